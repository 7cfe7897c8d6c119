"""A clip that ends in the middle goes on where it was, and comes out as if it never had ended."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvlite import Outputs, Request, generate, metadata, open_model
from hvlite.clip import decode_file
from hvlite.errors import DoesNotFit, RequestError
from hvlite.events import BlockDone, Event, Finished, Note, Parked, Preview, Saved, Stage, StepDone, TileDone
from hvlite.memory.geometry import make_tiles, tiles_text
from hvlite.model.dit import Dit
from hvlite.opened import Model
from hvlite.origin import Checkpoint, find_origin
from hvlite.packing import pack_model
from hvlite.planning import stored_formats
from hvlite.unfinished import Unfinished, load_unfinished, save_unfinished
from hvlite.video.mp4 import read_frames, read_metadata

REQUEST = Request("a red circle", steps=4, seed=2)
GUIDED = replace(REQUEST, negative_prompt="a blue square", cfg_scale=2.5)


@pytest.fixture
def model(tiny_model: Path) -> Iterator[Model]:
    with open_model(tiny_model) as opened:
        yield opened


def frames_of(events: list[Event]) -> NDArray[np.uint8]:
    """The pixels of the clip that these events end with."""
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.path is not None
    return np.stack(list(read_frames(last.path)))


def end_after(model: Model, outputs: Outputs, last: Callable[[Event], bool], request: Request = REQUEST) -> list[Event]:
    """The events of a run whose caller goes away after the first one of which `last` is true."""
    seen: list[Event] = []
    with closing(generate(request, model, outputs=outputs)) as stream:
        for event in stream:
            seen.append(event)
            if last(event):
                return seen
    raise AssertionError("the run came to its end")


def kept(own_home: Path) -> Path:
    """The one file of latents that is left."""
    (file,) = (own_home / "latents").iterdir()
    return file


@pytest.mark.parametrize("request_", [REQUEST, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("ended_at", [(0, 1), (1, 0), (2, 1)])
def test_resumed_is_uninterrupted(
    model: Model, tmp_path: Path, own_home: Path, request_: Request, ended_at: tuple[int, int]
) -> None:
    whole = frames_of(list(generate(request_, model, outputs=Outputs(folder=tmp_path))))

    def is_there(event: Event) -> bool:
        return isinstance(event, BlockDone) and (event.step, event.block) == ended_at

    end_after(model, Outputs(folder=tmp_path), is_there, request_)
    if ended_at[0] == 0:
        assert not list((own_home / "latents").iterdir())
        return
    file = kept(own_home)
    progress = load_unfinished(file).progress
    assert progress is not None
    assert progress.done == ended_at[0]
    events = list(generate(request_, model, outputs=Outputs(folder=tmp_path), resume=file))
    assert [event.name for event in events if isinstance(event, Stage)] == ["denoise", "decode"]
    assert not [event for event in events if isinstance(event, Note)]
    assert np.array_equal(frames_of(events), whole)
    assert not file.exists()


def test_every_step_is_saved_when_asked_for(model: Model, tmp_path: Path) -> None:
    outputs = Outputs(folder=tmp_path, save_seconds=0.0)
    events = list(generate(REQUEST, model, outputs=outputs))
    assert [event.kind for event in events if isinstance(event, Saved)] == ["unfinished"] * 3 + ["latents", "video"]


def test_finished_latents_only_need_decoding(model: Model, tmp_path: Path, own_home: Path) -> None:
    whole = frames_of(list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path))))
    end_after(model, Outputs(folder=tmp_path), lambda event: isinstance(event, Saved))
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=kept(own_home)))
    assert not [event for event in events if isinstance(event, StepDone)]
    assert np.array_equal(frames_of(events), whole)


def test_latents_that_a_user_named_stay_there(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    end_after(model, Outputs(folder=tmp_path, latents=file), lambda event: isinstance(event, StepDone))
    list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=file))
    assert load_unfinished(file).progress is None


def test_tiles_that_were_asked_for_are_kept_with_the_latents(model: Model, tmp_path: Path) -> None:
    """By whoever finishes the clip, elsewhere and without the flag; other tiles may still be asked for."""
    asked, latents = make_tiles(16, 72, 72), tmp_path / "kept.safetensors"
    list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path, latents=latents, decode_tile=asked)))

    def decoded(outputs: Outputs) -> str:
        last = list(decode_file(latents, model, outputs))[-1]
        assert isinstance(last, Finished)
        assert last.path is not None
        return metadata.decode(read_metadata(last.path), "clip").decode_tile

    assert decoded(Outputs(folder=tmp_path)) == tiles_text(asked)
    assert decoded(Outputs(folder=tmp_path, decode_tile="exact")) == "exact"


def test_no_clip_is_decoded_on_meta(model: Model, tmp_path: Path, tiny_model: Path) -> None:
    latents = tmp_path / "kept.safetensors"
    list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path, latents=latents)))
    with open_model(tiny_model, device="meta") as nothing, pytest.raises(RequestError, match="meta computes nothing"):
        list(decode_file(latents, nothing, Outputs(folder=tmp_path)))


def test_what_belongs_to_another_clip_is_refused(model: Model, tmp_path: Path, own_home: Path) -> None:
    end_after(model, Outputs(folder=tmp_path), lambda event: isinstance(event, StepDone))
    file = kept(own_home)
    for other, named in ((replace(REQUEST, seed=3), "seed 2, now 3"), (replace(REQUEST, steps=5), "steps 4, now 5")):
        with pytest.raises(RequestError, match=named):
            list(generate(other, model, outputs=Outputs(folder=tmp_path), resume=file))
    with open_model("shapes") as another, pytest.raises(RequestError, match="made with other weights"):
        list(generate(REQUEST, another, outputs=Outputs(folder=tmp_path), resume=file))
    with pytest.raises(RequestError, match=r"not all steps are done.*--resume"):
        list(decode_file(file, model))


def test_other_knobs_are_told(model: Model, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_after(model, Outputs(folder=tmp_path), lambda event: isinstance(event, StepDone))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=kept(own_home)))
    assert any(isinstance(event, Note) and f"threads {threads} -> {threads + 1}" in event.text for event in events)
    assert isinstance(events[-1], Finished)
    assert events[-1].path is not None
    assert not metadata.decode(read_metadata(events[-1].path), "clip").bit_exact


def test_the_steps_before_a_failure_are_kept(
    model: Model, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_block, runs = Dit.run_block, iter(range(1000))

    def failing(self: Dit, *arguments: object) -> None:
        if next(runs) >= 2 * self.dims.blocks + 1:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        run_block(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Dit, "run_block", failing)
        with pytest.raises(DoesNotFit):
            list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path)))
    progress = load_unfinished(kept(own_home)).progress
    assert progress is not None
    assert progress.done == 2


def test_a_run_that_was_left_is_ended_by_the_next(model: Model, tmp_path: Path, own_home: Path) -> None:
    left = generate(REQUEST, model, outputs=Outputs(folder=tmp_path))
    next(event for event in left if isinstance(event, StepDone))
    whole = frames_of(list(generate(replace(REQUEST, seed=9), model, outputs=Outputs(folder=tmp_path))))
    file = kept(own_home)
    with pytest.raises(RequestError, match="left before its end"):
        next(left)
    assert load_unfinished(file).progress is not None
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=file))
    assert not np.array_equal(frames_of(events), whole)


def test_a_model_closes_over_a_run_that_was_left(tiny_model: Path, tmp_path: Path, own_home: Path) -> None:
    store = tmp_path / "store"
    origin = find_origin(tiny_model, {})
    assert isinstance(origin, Checkpoint)
    list(pack_model(origin.sources, origin.dims, store, stored_formats("fp32", "fp32")))
    with open_model(store) as model:
        left = generate(REQUEST, model, outputs=Outputs(folder=tmp_path))
        next(event for event in left if isinstance(event, StepDone))
    assert not model.loaded
    progress = load_unfinished(kept(own_home)).progress
    assert progress is not None
    assert progress.done == 1
    left.close()


def test_conditionings_do_not_stay_beside_the_decode(
    model: Model, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_after(model, Outputs(folder=tmp_path), lambda event: isinstance(event, StepDone))
    made = weakref.WeakSet[torch.Tensor]()

    def loaded(path: Path) -> Unfinished:
        found = load_unfinished(path)
        made.update(each.double for each in found.conditionings)
        return found

    monkeypatch.setattr("hvlite.line.load_unfinished", loaded)
    stream = generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=kept(own_home))
    next(event for event in stream if isinstance(event, StepDone))
    assert len(made) == 1
    next(event for event in stream if isinstance(event, TileDone))
    assert not made
    stream.close()


def test_a_resumed_clip_goes_down_the_rungs_of_its_knobs(
    model: Model, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvlite.memory.choice.LEAST_GAIN", 0.0)
    end_after(model, Outputs(folder=tmp_path), lambda event: isinstance(event, StepDone))
    run_block, runs = Dit.run_block, iter(range(1000))

    def failing(self: Dit, *arguments: object) -> None:
        if next(runs) < 2:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        run_block(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Dit, "run_block", failing)
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=kept(own_home)))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert "2 groups of heads" in notes[-1]
    assert isinstance(events[-1], Finished)


def test_a_draft_is_parked_and_finished_later(model: Model, tmp_path: Path) -> None:
    whole = frames_of(list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path))))
    *_, last = generate(REQUEST, model, outputs=Outputs(folder=tmp_path, stop_after=2))
    assert isinstance(last, Parked)
    assert (last.done, last.steps) == (2, 4)
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=last.latents))
    assert np.array_equal(frames_of(events), whole)


def test_previews_come_when_asked_for_and_change_nothing(model: Model, tmp_path: Path) -> None:
    plain = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path)))
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path, preview_steps=1)))
    previews = [event for event in events if isinstance(event, Preview)]
    assert [event.step for event in previews] == [0, 1, 2]
    assert not [event for event in plain if isinstance(event, Preview)]
    assert np.array_equal(frames_of(events), frames_of(plain))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"latents": torch.zeros(1, 16, 1, 4, 4)}, r"latents is \(1, 16, 1, 4, 4\), this request makes"),
        ({"done": -5}, "-5 of 4 steps are done"),
        ({"done": 4}, "4 of 4 steps are done"),
        ({"branches": 0}, "prompts is 0, this request makes 1"),
        ({"dtype": "bf16"}, "begun in bf16, now fp32 is asked for: go on with --dtype bf16"),
    ],
)
def test_a_file_that_cannot_be_of_this_clip_is_refused(
    model: Model, tmp_path: Path, own_home: Path, changes: dict[str, Any], told: str
) -> None:
    end_after(model, Outputs(folder=tmp_path), lambda event: isinstance(event, StepDone))
    clip = load_unfinished(kept(own_home))
    assert clip.progress is not None
    progress = msgspec.structs.replace(clip.progress, done=changes.get("done", 1))
    if "branches" in changes:
        clip, progress = replace(clip, conditionings=()), msgspec.structs.replace(progress, branches=0)
    if "dtype" in changes:
        progress = msgspec.structs.replace(progress, knobs=msgspec.structs.replace(progress.knobs, dtype="bf16"))
    damaged = replace(clip, progress=progress, latents=changes.get("latents", clip.latents))
    save_unfinished(tmp_path / "damaged", damaged)
    with pytest.raises(RequestError, match=told):
        list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path), resume=tmp_path / "damaged"))
