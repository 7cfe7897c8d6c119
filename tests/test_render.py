"""What a worker does with its orders: the real engine on a tiny model, and a wire that is only a list."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvlite import paths
from hvlite.errors import DoesNotFit
from hvlite.events import BlockDone, Note, Parked, Stage, StepDone, TileDone
from hvlite.jobs import render as rendering
from hvlite.jobs.job import How
from hvlite.jobs.port import Port, Terminated
from hvlite.jobs.render import Renderer
from hvlite.jobs.wire import Ended, FromWorker, Go, Kept, Planned, Render, Spoke
from hvlite.line import encode_prompts
from hvlite.opened import Model
from hvlite.request import Request
from hvlite.telemetry import host_state
from hvlite.unfinished import load_unfinished
from hvlite.video.latents import load_latents
from hvlite.video.mp4 import read_frames

PROMPT = "a red circle"


class Wire(Port):
    """Answers every Planned with `output`, and asks for a stop at the first event that `stops` knows."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.said: list[FromWorker] = []
        self.stops: Callable[[object], bool] = lambda _event: False
        self.stop_asked = False

    def say(self, message: FromWorker) -> None:
        self.said.append(message)
        if isinstance(message, Spoke) and self.stops(message.event):
            self.stop_asked = True

    def answer(self, job: int) -> Go | None:
        return None if self.stop_asked else Go(job, self.output)

    def events(self, kind: type) -> list[Any]:
        return [each.event for each in self.said if isinstance(each, Spoke) and isinstance(each.event, kind)]

    @property
    def notes(self) -> list[str]:
        return [note.text for note in self.events(Note)]

    @property
    def kept(self) -> list[int]:
        return [each.step for each in self.said if isinstance(each, Kept)]


@pytest.fixture
def wire(tmp_path: Path) -> Wire:
    return Wire(tmp_path / "out" / "clip.mp4")


@pytest.fixture
def renderer(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renderer]:
    """Tells every block, and leaves this process's own stderr where it is."""
    monkeypatch.setattr(rendering, "TOLD_SECONDS", 0.0)
    made = Renderer("cpu", wire)
    yield made
    made.close()


def order(model: Path, **fields: Any) -> Render:
    """The first attempt at the first job: three steps, saved at each."""
    request = Request(PROMPT, size=(32, 32), frames=5, steps=3, seed=4)
    given: dict[str, Any] = {
        "job": 1,
        "request": request,
        "how": How(model=str(model)),
        "attempt": 1,
        "has_checkpoint": False,
        "latents": None,
        "stop_after": None,
        "save_seconds": 0.0,
    }
    return Render(**{**given, **fields})


def again(first: Render, **fields: Any) -> Render:
    """The second attempt, from the checkpoint."""
    values = {name: getattr(first, name) for name in first.__struct_fields__}
    return Render(**{**values, "attempt": 2, "has_checkpoint": True, **fields})


def frames(path: Path) -> Tensor:
    return torch.stack([torch.from_numpy(frame) for frame in read_frames(path)])


def test_a_clip_is_made_told_and_logged(renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "latents.safetensors"
    ended = renderer.render(order(tiny_model, latents=kept))
    assert (ended.kind, ended.is_last) == ("done", False)
    planned = wire.said[0]
    assert isinstance(planned, Planned)
    assert (planned.suffix, planned.resumes, planned.resolved.steps) == (".mp4", False, 3)
    assert planned.predicted_bytes > 0
    assert len(list(read_frames(wire.output))) == 5
    assert [stage.name for stage in wire.events(Stage)] == ["text", "schedule", "denoise", "decode"]
    assert wire.kept == [1, 2, 3]
    assert list(ended.timings) == ["text", "schedule", "denoise", "decode"]
    assert ended.seconds_per_step is not None
    assert ended.peak_bytes is not None
    assert ended.peak_bytes < host_state().process_rss  # of this clip, not of Python and its libraries
    assert not paths.checkpoint_file(1).exists()
    assert load_latents(kept).latents.shape == (1, 16, 2, 4, 4)
    assert paths.preview_file(1).exists()
    assert "step 3 of 3" in paths.job_log(1).read_text(encoding="utf-8")


def test_a_model_stays_open_and_prompts_are_read_together(
    renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[str]] = []

    def reading(texts: Sequence[str], model: Model, template: str) -> Any:
        read.append(list(texts))
        return encode_prompts(texts, model, template)

    monkeypatch.setattr(rendering, "encode_prompts", reading)
    first = order(tiny_model)
    others = [replace(first.request, prompt=prompt) for prompt in ("a blue square", "a green circle", "a picture")]
    others[2] = replace(others[2], frames=1)
    renderer.render(order(tiny_model, ahead=others))
    model = renderer.opened
    for number, request in enumerate(others[:2], 2):
        wire.output = tmp_path / f"{number}.mp4"
        following = order(tiny_model, job=number, request=request, ahead=others[number - 1 :])
        assert renderer.render(following).kind == "done"
    assert renderer.opened is model
    assert read == [[PROMPT, "a blue square", "a green circle"]]  # a picture's template is another one

    wire.output = tmp_path / "alone.mp4"
    alone = Renderer("cpu", wire)
    alone.render(order(tiny_model, job=9, request=others[1]))
    alone.close()
    assert torch.equal(frames(tmp_path / "alone.mp4"), frames(tmp_path / "3.mp4"))


def test_too_many_prompts_for_one_pass_are_read_alone(
    renderer: Renderer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(texts: Sequence[str], model: Model, template: str) -> Any:
        if len(texts) > 1:
            raise DoesNotFit("too many")
        return encode_prompts(texts, model, template)

    monkeypatch.setattr(rendering, "encode_prompts", reading)
    first = order(tiny_model)
    ended = renderer.render(order(tiny_model, ahead=[replace(first.request, prompt="a blue square")]))
    assert ended.kind == "done"


@pytest.mark.parametrize("left_by", ["stop", "signal"])
def test_a_clip_that_is_left_goes_on_bit_by_bit(
    renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path, left_by: str
) -> None:
    renderer.render(order(tiny_model, job=2, latents=tmp_path / "whole"))
    whole, wire.output = wire.output, tmp_path / "left.mp4"

    def is_second_block_of_step_2(event: object) -> bool:
        found = isinstance(event, BlockDone) and (event.step, event.block) == (1, 1)
        if found and left_by == "signal":
            raise Terminated
        return found

    wire.stops = is_second_block_of_step_2
    first = order(tiny_model, latents=tmp_path / "left", save_seconds=999.0)
    ended = renderer.render(first)
    assert (ended.kind, ended.is_last) == ("stopped", left_by == "signal")
    assert wire.kept[-1] == 1
    assert not wire.output.exists()

    wire.stops, wire.stop_asked, wire.said = lambda _event: False, False, []
    assert renderer.render(again(first)).kind == "done"
    assert [stage.name for stage in wire.events(Stage)] == ["denoise", "decode"]  # no encoder
    assert [event.step for event in wire.events(StepDone)] == [1, 2]
    assert (tmp_path / "left").read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(frames(wire.output), frames(whole))


@pytest.mark.parametrize("stage", ["text", "schedule", "decode"])
def test_a_clip_is_left_between_two_layers_and_the_model_stays(
    renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path, stage: str
) -> None:
    wire.stops = lambda event: isinstance(event, Stage) and event.name == stage
    first = order(tiny_model)
    ended = renderer.render(first)
    assert (ended.kind, ended.is_last) == ("stopped", False)
    model, events = renderer.opened, len(wire.events(TileDone))
    assert (events, wire.output.exists()) == (0, False)
    wire.stops, wire.stop_asked = lambda _event: False, False
    assert renderer.render(again(first, has_checkpoint=stage == "decode")).kind == "done"
    assert renderer.opened is model
    whole = frames(wire.output)
    wire.output = tmp_path / "whole.mp4"
    assert renderer.render(order(tiny_model, job=2)).kind == "done"
    assert torch.equal(frames(wire.output), whole)


def test_a_clip_that_was_left_in_decode_is_only_decoded(renderer: Renderer, wire: Wire, tiny_model: Path) -> None:
    wire.stops = lambda event: isinstance(event, Stage) and event.name == "decode"
    first = order(tiny_model)
    assert renderer.render(first).kind == "stopped"
    assert wire.kept[-1] == 3
    wire.stops, wire.stop_asked, wire.said = lambda _event: False, False, []
    assert renderer.render(again(first)).kind == "done"
    assert wire.events(StepDone) == []
    assert wire.events(Stage)[-1].name == "decode"


def test_a_draft_is_parked_with_a_picture_and_finished_later(renderer: Renderer, wire: Wire, tiny_model: Path) -> None:
    draft = order(tiny_model, stop_after=2, save_seconds=999.0)
    assert renderer.render(draft).kind == "parked"
    assert [event.done for event in wire.events(Parked)] == [2]
    assert wire.kept == [2]
    assert paths.preview_file(1).exists()
    assert renderer.render(again(draft, stop_after=None)).kind == "done"


def test_a_draft_that_would_be_the_whole_clip_says_so(renderer: Renderer, wire: Wire, tiny_model: Path) -> None:
    assert renderer.render(order(tiny_model, stop_after=3)).kind == "done"
    assert "no draft: it has 3 steps, and was to stop after 3" in wire.notes


def test_what_an_earlier_attempt_has_written_is_not_made_again(
    renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path
) -> None:
    first = order(tiny_model, latents=tmp_path / "latents")
    renderer.render(first)
    written = wire.output.read_bytes()
    wire.said = []
    assert renderer.render(again(first, has_checkpoint=False)).kind == "done"
    assert wire.events(Stage) == []
    assert wire.output.read_bytes() == written


def test_nothing_of_others_is_overwritten(renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path) -> None:
    wire.output.parent.mkdir()
    wire.output.write_text("mine", encoding="utf-8")
    first = order(tiny_model)
    for attempt in (first, again(first, has_checkpoint=False)):
        ended = renderer.render(attempt)
        assert (ended.kind, ended.reason) == ("failed", "output")
        assert "nothing is ever overwritten" in str(ended.error)
    assert wire.output.read_text(encoding="utf-8") == "mine"
    wire.output = tmp_path / "free.mp4"
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    assert renderer.render(order(tiny_model, latents=tmp_path / "taken")).kind == "failed"
    assert not wire.output.exists()


@pytest.mark.parametrize("damage", ["other request", "not whole", "missing", "not known"])
def test_a_checkpoint_that_does_not_fit_is_begun_anew(
    renderer: Renderer, wire: Wire, tiny_model: Path, damage: str
) -> None:
    wire.stops = lambda event: isinstance(event, StepDone)
    first = order(tiny_model)
    renderer.render(first)
    wire.stops, wire.stop_asked, wire.said = lambda _event: False, False, []
    second = again(first)
    match damage:
        case "other request":
            second = again(first, request=replace(first.request, seed=5))
        case "not whole":
            os.truncate(paths.checkpoint_file(1), 1000)
        case "missing":
            paths.checkpoint_file(1).unlink()
        case "not known":
            second = again(first, has_checkpoint=False)
    assert renderer.render(second).kind == "done"
    planned = wire.said[0 if damage == "not known" else 1]
    assert isinstance(planned, Planned)
    assert not planned.resumes
    assert wire.events(Stage)[0].name == "schedule"  # its prompt has been read before
    assert any("It begins anew" in note for note in wire.notes) == (damage != "not known")


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_keywords: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "kind", "reason", "is_last"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory", "out of memory in schedule", True),
        (MemoryError(), "memory", "out of memory in schedule", True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "device", "device", True),
        (DoesNotFit("needs 9 GiB, there are 8"), "failed", "does not fit", False),
        (ZeroDivisionError("oops"), "failed", "ZeroDivisionError", True),
    ],
    ids=["cuda-memory", "memory", "lost", "plan", "bug"],
)
def test_a_failure_is_what_it_is(
    renderer: Renderer,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: str,
    reason: str,
    is_last: bool,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hvlite.line.sampler.make_noise", raising(error))
        ended = renderer.render(order(tiny_model))
    assert (ended.kind, ended.reason, ended.is_last) == (kind, reason, is_last)
    assert "Traceback" in paths.job_log(1).read_text(encoding="utf-8")


def test_weights_that_cannot_be_read_fail_the_job_and_no_other(
    renderer: Renderer, wire: Wire, tiny_model: Path, tmp_path: Path
) -> None:
    ended = renderer.render(order(tmp_path / "nowhere"))
    assert (ended.kind, ended.reason, ended.is_last) == ("failed", "weights", False)
    assert renderer.render(order(tiny_model)).kind == "done"


def test_a_full_disk_keeps_what_was_saved_before(
    renderer: Renderer, wire: Wire, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 2
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal left
        if ".hvlite-" in os.readlink(f"/proc/self/fd/{handle}") and "checkpoints" in os.readlink(
            f"/proc/self/fd/{handle}"
        ):
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        first = order(tiny_model)
        ended = renderer.render(first)
    assert (ended.kind, ended.reason) == ("failed", "disk full")
    assert wire.kept == [1, 2]
    saved = load_unfinished(paths.checkpoint_file(1)).progress
    assert saved is not None
    assert saved.done == 2
    assert renderer.render(again(first)).kind == "done"


def test_a_preview_that_fails_is_a_note_and_no_more(
    renderer: Renderer, wire: Wire, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "write_strip", raising(ValueError("no picture")))
    assert renderer.render(order(tiny_model)).kind == "done"
    assert wire.notes == ["no previews of this clip: no picture"]


def test_what_the_killed_left_behind_is_removed(renderer: Renderer, wire: Wire, tiny_model: Path) -> None:
    wire.output.parent.mkdir()
    old, new = wire.output.parent / ".hvlite-1.part", wire.output.parent / ".hvlite-2.part"
    for file in (old, new):
        file.write_bytes(b"half of a clip")
    os.utime(old, (0, 0))
    assert renderer.render(order(tiny_model)).kind == "done"
    assert (old.exists(), new.exists()) == (False, True)


def test_a_stop_before_the_work_begins(renderer: Renderer, wire: Wire, tiny_model: Path) -> None:
    wire.stop_asked = True
    assert renderer.render(order(tiny_model)) == Ended(kind="stopped")
