"""Memory runs out where nobody planned it: the same clip is finished with less, or what was done is kept."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvlite import Outputs, Request, generate, metadata, open_model
from hvlite.dims import latent_shape
from hvlite.errors import DoesNotFit
from hvlite.events import Event, Finished, Note
from hvlite.memory.geometry import make_tiles, smaller
from hvlite.memory.tiles import tile_shapes
from hvlite.model.dit import Dit
from hvlite.model.vae import Vae
from hvlite.opened import Model
from hvlite.video.mp4 import read_frames, read_metadata

REQUEST = Request("a red circle", steps=2, seed=4)
TILED = Request("a red circle", steps=1, seed=4, size=(96, 128), frames=21)
TILES = make_tiles(16, 96, 96)


class Failing:
    """Calls through, but for the calls (from 0) in `fail`: those find no memory."""

    def __init__(self, real: Callable[..., Any], fail: set[int]) -> None:
        self.real = real
        self.fail = fail
        self.calls = 0

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return lambda *arguments, **named: self(instance, *arguments, **named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.real(*arguments, **named)


@pytest.fixture
def model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    # beside what libraries take, whatever this small model gives up is little
    monkeypatch.setattr("hvlite.memory.choice.LEAST_GAIN", 0.0)
    with open_model(tiny_model) as opened:
        yield opened


def clip_of(model: Model, folder: Path, request: Request = REQUEST) -> tuple[NDArray[np.uint8], list[str], Path]:
    """Frames, notes and the file of one clip."""
    events: list[Event] = list(generate(request, model, outputs=Outputs(folder=folder, decode_tile=TILES)))
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.path is not None
    notes = [event.text for event in events if isinstance(event, Note)]
    return np.stack(list(read_frames(last.path))), notes, last.path


@pytest.mark.parametrize(
    ("owner", "method", "where"),
    [(Model, "encode", "stage text"), (Dit, "prepare_schedule", "stage schedule"), (Dit, "run_block", "step 1")],
)
@pytest.mark.parametrize("call", [0, 3])
def test_a_stage_that_finds_no_memory_is_done_with_less(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, where: str, call: int
) -> None:
    whole, notes, _ = clip_of(model, tmp_path)
    assert not notes
    failing = Failing(getattr(owner, method), {call})
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, failing)
        again, notes, file = clip_of(model, tmp_path)
    assert np.array_equal(again, whole)
    if failing.calls <= call:
        return
    assert [note.partition(":")[0] for note in notes] == [f"out of memory in {where}"]
    memory = metadata.decode(read_metadata(file), file).memory
    assert memory is not None
    assert list(memory.descents) == notes


def test_every_tile_may_find_no_memory(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = clip_of(model, tmp_path, TILED)
    resolved = TILED.resolve(model.dims)
    tiles = tile_shapes(latent_shape(resolved.size, resolved.frames, model.dims.vae), TILES)
    assert len(tiles) > 2
    assert smaller(TILES, latent_shape(resolved.size, resolved.frames, model.dims.vae)) is not None
    for tile in range(len(tiles)):
        with monkeypatch.context() as patch:
            patch.setattr(Vae, "decode", Failing(Vae.decode, {tile}))
            again, notes, _ = clip_of(model, tmp_path, TILED)
        assert [note.partition(":")[0] for note in notes] == ["out of memory in decode"]
        assert again.shape == whole.shape
        error = np.abs(again.astype(int) - whole.astype(int)).mean()
        assert error < 40, f"tile {tile}: frames are {error:.1f} off on average"


def test_at_the_end_of_the_ladder_the_latents_are_kept(
    model: Model, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Vae, "decode", Failing(Vae.decode, set(range(100))))
        with pytest.raises(DoesNotFit, match=r"Tried to allocate 2\.00 GiB"):
            clip_of(model, tmp_path)
    (kept,) = (own_home / "latents").iterdir()
    assert not list(tmp_path.glob("*.mp4"))
    events = list(generate(REQUEST, model, outputs=Outputs(folder=tmp_path, decode_tile=TILES), resume=kept))
    assert isinstance(events[-1], Finished)


def test_another_error_is_no_reason_to_go_on(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of the driver")

    monkeypatch.setattr(Dit, "run_block", broken)
    with pytest.raises(RuntimeError, match="a fault of the driver"):
        clip_of(model, tmp_path)
