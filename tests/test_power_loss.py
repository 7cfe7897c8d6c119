"""A power loss at any point of a clip: what was told is there, and nothing torn is taken for whole."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvlite import paths
from hvlite.events import Event, Finished
from hvlite.jobs import render as rendering
from hvlite.jobs.job import How
from hvlite.jobs.render import Renderer
from hvlite.jobs.wire import FromWorker, Kept, Render
from hvlite.request import Request
from hvlite.unfinished import load_unfinished
from tests.power import Recorder, recorded
from tests.test_render import Wire

STEPS = 3
FAILED, DONE = -1, STEPS + 1


class Promising(Wire):
    """What the worker tells its supervisor is a promise: the queue may be told of it at once."""

    recorder: Recorder

    def say(self, message: FromWorker) -> None:
        super().say(message)
        if isinstance(message, Kept):
            self.recorder.promised = message.step


@dataclass
class Night:
    """A clip that is made while the disk is watched, and made again from what a power loss has left."""

    root: Path
    wire: Promising
    renderer: Renderer
    order: Render

    @property
    def own(self) -> Path:
        """Final latents that a user wants kept."""
        assert self.order.latents is not None
        return self.order.latents

    def record(self, *, syncs: bool = True) -> Recorder:
        with recorded(self.root, syncs=syncs) as recorder:
            self.wire.recorder = recorder
            assert self.renderer.render(self.order).kind == "done"
            recorder.promised = DONE
            recorder.after("told", None)
        return recorder

    def recover(self, promised: int) -> int:
        """How far the next attempt gets without rendering anything: a step, DONE or FAILED."""
        begun: list[int] = []

        def generate(*_: Any, resume: Path | None, **__: Any) -> Generator[Event, None, None]:
            saved = None if resume is None else load_unfinished(resume)
            begun.append(0 if saved is None else STEPS if saved.progress is None else saved.progress.done)
            yield Finished(None, {})

        again = {name: getattr(self.order, name) for name in self.order.__struct_fields__}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rendering, "generate", generate)
            ended = self.renderer.render(Render(**{**again, "attempt": 2, "has_checkpoint": promised != 0}))
        if ended.kind != "done":
            return FAILED
        return begun[0] if begun else DONE


@pytest.fixture
def night(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    root = tmp_path / "disk"
    root.mkdir()
    monkeypatch.setenv("HVLITE_HOME", str(root / "home"))
    wire = Promising(root / "clips" / "clip.mp4")
    renderer = Renderer("cpu", wire)
    order = Render(
        job=1,
        request=Request("a red circle", size=(16, 16), frames=5, steps=STEPS, seed=4),
        how=How(model=str(tiny_model)),
        attempt=1,
        has_checkpoint=False,
        latents=root / "kept" / "latents.safetensors",
        stop_after=None,
        save_seconds=0.0,
    )
    return Night(root, wire, renderer, order)


def faults(night: Night, recorder: Recorder) -> Iterator[str]:
    """Every state, the last ones first, from which the next attempt would not go on as it should."""
    final = recorder.last
    clip, own = (str(path.relative_to(night.root)) for path in (night.wire.output, night.own))
    for promised, tree in reversed(recorder.states()):
        recorder.restore(tree)
        recovered = night.recover(promised)
        if recovered < promised:
            yield f"{promised} was told, {recovered} is there"
        if recovered == DONE and (tree.get(clip), tree.get(own)) != (final[clip], final[own]):
            yield "a torn clip is taken for whole"
        if recovered < DONE and clip in tree:
            yield "a torn clip lies in the way"


def test_a_power_loss_at_any_point_leaves_what_was_told_and_nothing_torn(night: Night) -> None:
    recorder = night.record()
    assert str(paths.checkpoint_file(1).relative_to(night.root)) not in recorder.last
    assert {call.call for call in recorder.moments} >= {"fsync", "link", "replace", "unlink", "mkdir"}
    assert len(recorder.states()) > 50
    assert list(faults(night, recorder)) == []


def test_without_syncs_this_would_be_seen(night: Night) -> None:
    recorder = night.record(syncs=False)
    missing = {"a torn clip lies in the way", f"{DONE} was told, 0 is there"}
    for fault in faults(night, recorder):
        missing.discard(fault)
        if not missing:
            return
    raise AssertionError(f"not seen: {missing}")
