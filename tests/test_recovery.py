"""Memory runs out where nobody planned it: the same clip is finished with less, or what was done is kept."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvlite import Outputs, Request, generate, metadata, open_model
from hvlite.clip import decode_file
from hvlite.dims import latent_shape
from hvlite.errors import DoesNotFit
from hvlite.events import Event, Finished, Note
from hvlite.memory.device import CpuLanes
from hvlite.memory.geometry import make_tiles, parse_tiles, smaller, tiles_text
from hvlite.memory.tiles import tile_shapes
from hvlite.model.dit import Dit
from hvlite.model.vae import Vae
from hvlite.opened import Model
from hvlite.origin import Checkpoint, find_origin
from hvlite.packing import pack_model
from hvlite.planning import stored_formats
from hvlite.video.mp4 import read_frames, read_metadata

REQUEST = Request("a red circle", steps=2, seed=4)
TILED = Request("a red circle", steps=1, seed=4, size=(80, 80), frames=17)
TILES = make_tiles(16, 72, 72)


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


@pytest.fixture(scope="module")
def store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "store"
    origin = find_origin(tiny_model, {})
    assert isinstance(origin, Checkpoint)
    list(pack_model(origin.sources, origin.dims, folder, stored_formats("fp32", "fp32")))
    return folder


@pytest.fixture
def streamed(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """Its blocks travel by themselves; all of them fit, and a plan may take any number of them away."""
    monkeypatch.setattr("hvlite.memory.choice.LEAST_GAIN", 0.0)
    with open_model(store) as opened:
        yield opened


def clip_of(model: Model, folder: Path, request: Request = REQUEST) -> tuple[NDArray[np.uint8], list[str], Path]:
    """Frames, notes and the file of one clip."""
    events: list[Event] = list(generate(request, model, outputs=Outputs(folder=folder, decode_tile=TILES)))
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.path is not None
    notes = [event.text for event in events if isinstance(event, Note)]
    return np.stack(list(read_frames(last.path))), notes, last.path


STAGES = [
    (Model, "encode", 0, "stage text"),
    (Dit, "prepare_schedule", 0, "stage schedule"),
    (Dit, "run_block", 0, "step 1"),
    (Dit, "run_block", 5, "step 2"),
]


@pytest.mark.parametrize(("owner", "method", "call", "where"), STAGES)
def test_a_stage_that_finds_no_memory_is_done_with_less(
    streamed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int, where: str
) -> None:
    whole, notes, _ = clip_of(streamed, tmp_path)
    assert not notes
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, Failing(getattr(owner, method), {call}))
        again, notes, file = clip_of(streamed, tmp_path)
    assert np.array_equal(again, whole)
    assert [note.partition(":")[0] for note in notes] == [f"out of memory in {where}"]
    made = metadata.decode(read_metadata(file), file)
    assert made.memory is not None
    assert list(made.memory.descents) == notes
    assert made.bit_exact  # what was kept for the next clip went, no knob was turned


def test_a_step_goes_down_every_rung_and_then_gives_up(
    streamed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More groups of heads, shorter chunks, fewer blocks on the device: the same clip but for its last bits."""
    whole, _, _ = clip_of(streamed, tmp_path)
    seen, ways = set[str](), set[bool]()

    def clip_after(failures: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Dit, "run_block", Failing(Dit.run_block, set(range(failures))))
            again, notes, file = clip_of(streamed, tmp_path)
        assert len(notes) == failures
        assert np.abs(again.astype(int) - whole.astype(int)).max() <= 1
        seen.add(notes[-1])
        ways.add(metadata.decode(read_metadata(file), file).bit_exact)

    def descend() -> None:
        for failures in range(1, 40):
            clip_after(failures)

    with pytest.raises(DoesNotFit, match=r"with a budget of .* GiB: .*Tried to allocate 2\.00 GiB"):
        descend()
    assert ways == {True, False}
    for words in ("2 groups of heads", "512 tokens a chunk", " 0 of 4 blocks resident"):
        assert any(words in note for note in seen), words


def test_every_allocation_for_weights_may_fail(
    streamed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots of the ring and blocks that stay, in each stage that has them."""
    whole, _, _ = clip_of(streamed, tmp_path)
    streamed.release()
    counting = Failing(CpuLanes.allocate, set())
    with monkeypatch.context() as patch:
        patch.setattr(CpuLanes, "allocate", counting)
        clip_of(streamed, tmp_path)
    assert counting.calls > 6
    for call in range(counting.calls):
        streamed.release()
        with monkeypatch.context() as patch:
            patch.setattr(CpuLanes, "allocate", Failing(CpuLanes.allocate, {call}))
            again, notes, _ = clip_of(streamed, tmp_path)
        assert len(notes) == 1, call
        assert np.array_equal(again, whole), call


def test_every_tile_may_find_no_memory(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first what other parts keep is given back and the tile is tried again, which changes no bit."""
    shape, latents = latent_shape((80, 80), 17, model.dims.vae), tmp_path / "latents"
    list(generate(TILED, model, outputs=Outputs(file=tmp_path / "whole.mp4", latents=latents, decode_tile=TILES)))
    whole = np.stack(list(read_frames(tmp_path / "whole.mp4")))
    count = len(tile_shapes(shape, TILES))
    assert count > 2
    assert smaller(TILES, shape) is not None

    @cache
    def decoded_in(tiles: str) -> NDArray[np.uint8]:
        """The clip in other tiles, with nothing in their way."""
        events = list(decode_file(latents, model, Outputs(folder=tmp_path, decode_tile=parse_tiles(tiles))))
        assert isinstance(events[-1], Finished)
        assert events[-1].path is not None
        return np.stack(list(read_frames(events[-1].path)))

    for tile, last in [(5, 5), *((first, first + 1) for first in range(count))]:
        fails = {tile, last}
        file = tmp_path / f"{tile}-{len(fails)}.mp4"
        with monkeypatch.context() as patch:
            patch.setattr(Vae, "decode", Failing(Vae.decode, fails))
            model.preload(model.plan(TILED.resolve(model.dims)))
            events = list(decode_file(latents, model, Outputs(file=file, decode_tile=TILES)))
        notes = [event.text for event in events if isinstance(event, Note)]
        assert [note.partition(":")[0] for note in notes] == ["out of memory in decode"] * len(fails)
        made = metadata.decode(read_metadata(file), file)
        assert made.memory is not None
        assert list(made.memory.descents) == notes
        assert made.decode_tile in notes[-1]
        frames, kept = np.stack(list(read_frames(file))), int(notes[-1].rpartition(" ")[2])
        expected = whole if len(fails) == 1 else decoded_in(made.decode_tile)
        if kept == 0 or len(fails) == 1:
            assert np.array_equal(frames, expected), f"tile {tile}"
        else:  # those that had left are of the first tiles, but for what the encoder makes of the later ones
            assert frames.shape == whole.shape
            assert np.abs(frames[:kept].astype(int) - whole[:kept].astype(int)).mean() < 1, f"tile {tile}"


def test_after_a_card_the_cpu_decodes(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own decoder finds no memory whatever the tiles; another one, on the CPU, makes the same frames."""
    whole, _, _ = clip_of(model, tmp_path, TILED)
    ours = model.vae()

    def decode(vae: Vae, *arguments: Any) -> Any:
        if vae is ours:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(vae, *arguments)

    real = Vae.decode
    with monkeypatch.context() as patch:
        patch.setattr("hvlite.clip.has_another_memory", lambda device: True)
        patch.setattr(Vae, "decode", decode)
        again, notes, file = clip_of(model, tmp_path, TILED)
    assert np.array_equal(again, whole)
    assert notes[-1].endswith("on the CPU from frame 0")
    made = metadata.decode(read_metadata(file), file)
    assert made.decode_tile == f"{tiles_text(TILES)} on the CPU"
    assert made.bit_exact is False


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
