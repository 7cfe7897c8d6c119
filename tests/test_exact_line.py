"""`--decode-tile exact` through the line: planned, told, the untiled numbers, and a clip also where it fails."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvlite import Outputs, Request, generate, load_profile, metadata, open_model, paths
from hvlite.clip import decode, decode_file, scaled
from hvlite.errors import DoesNotFit, OutputError
from hvlite.events import Event, Finished, Note, TileDone
from hvlite.memory.geometry import EXACT, parse_tiles
from hvlite.memory.spill import Spill
from hvlite.memory.tiles import TileStep
from hvlite.metadata import Metadata, ModelMade
from hvlite.model.exact import exact_decode
from hvlite.model.vae import Vae
from hvlite.opened import Model
from hvlite.planning import Wishes
from hvlite.profile import GIB
from hvlite.run import Run
from hvlite.video.latents import SavedLatents, save_latents
from hvlite.video.mp4 import read_frames, read_metadata

REQUEST = Request("a red circle", size=(64, 96), frames=13, steps=1)
ONLY_DECODE = Wishes(tiles=EXACT, stages=("decode",))


@dataclass(frozen=True)
class Made:
    """Latents of a clip, and where they lie."""

    latents: Tensor
    file: Path


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path) -> Made:
    latents = torch.randn(1, 16, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with open_model(tiny_model) as model:
        text = metadata.encode(
            Metadata(
                request=REQUEST.resolve(model.dims),
                model=ModelMade(name=model.dims.name, fingerprint=model.origin.fingerprint),
            )
        )
    save_latents(tmp_path / "latents", SavedLatents(latents=latents, request=text))
    return Made(latents, tmp_path / "latents")


@pytest.fixture(params=["host", "disk"])
def model(tiny_model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """With room for the layers of a clip, or for all but them."""
    monkeypatch.setattr("hvlite.memory.choice.LEAST_GAIN", 0.0)
    with open_model(tiny_model) as roomy:
        plan = roomy.plan(REQUEST.resolve(roomy.dims), ONLY_DECODE)
        if request.param == "host":
            yield roomy
            return
    assert plan.spilled is not None
    budget = plan.stage("decode").peak_bytes - plan.spilled.nbytes // 2
    profile = load_profile("cpu", memory_gib=budget / GIB, reserve_gib=0)
    with open_model(tiny_model, profile) as tight:
        yield tight


def of_files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def test_its_clip_is_the_untiled_one(model: Model, made: Made, request: pytest.FixtureRequest) -> None:
    resolved = REQUEST.resolve(model.dims)
    plan = model.plan(resolved, ONLY_DECODE)
    assert plan.spilled is not None
    assert plan.spilled.place in request.node.name
    assert plan.decoded_volume == 1.0
    steps = [step for step in decode(Run(model, resolved, Outputs(), plan), made.latents) if isinstance(step, TileStep)]
    frames = torch.cat([step.frames for step in steps if step.frames is not None], 1)
    untiled = model.vae().decode(scaled(model, made.latents))[0]
    torch.testing.assert_close(frames, untiled, atol=1e-5, rtol=0)
    assert len(steps) == plan.spilled.chunks
    assert of_files(paths.scratch_folder()) == []


def test_it_is_told_and_written_down(model: Model, made: Made, tmp_path: Path) -> None:
    events = list(decode_file(made.file, model, Outputs(file=tmp_path / "clip.mp4", decode_tile=EXACT)))
    written = metadata.decode(read_metadata(tmp_path / "clip.mp4"), "clip")
    assert (written.decode_tile, written.decoded_volume) == ("exact", 1.0)
    assert len(list(read_frames(tmp_path / "clip.mp4"))) == 13
    told = [event for event in events if isinstance(event, TileDone)]
    assert [event.tile for event in told] == list(range(told[0].tiles))
    assert made.file.exists()


def test_tiles_are_written_down_too(tiny_model: Path, made: Made, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        for _ in decode_file(made.file, model, Outputs(file=tmp_path / "clip.mp4", decode_tile=parse_tiles("9x32"))):
            pass
    written = metadata.decode(read_metadata(tmp_path / "clip.mp4"), "clip")
    assert written.decode_tile == "9x32x32+4x8x8"
    # latents of all tiles on each axis, of those of the clip
    in_time, in_rows, in_columns = (3 + 3 + 2) / 4, (4 + 4 + 2) / 8, (4 + 4 + 4 + 3) / 12
    assert written.decoded_volume == pytest.approx(in_time * in_rows * in_columns, abs=1e-3)


@pytest.mark.parametrize("model", ["disk"], indirect=True)
def test_too_little_disk_is_refused_before_any_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvlite.machine.scratch_bytes", lambda: GIB // 1000)
    with pytest.raises(
        DoesNotFit, match=r"64x96x13 .* keeps \d\.\d MiB in .*scratch, where 1\.0 MiB may be used\. Try --decode"
    ):
        next(generate(REQUEST, model, outputs=Outputs(decode_tile=EXACT)))


@pytest.mark.parametrize("model", ["disk"], indirect=True)
def test_a_disk_that_is_full_by_then_keeps_the_latents(
    model: Model, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    outputs = Outputs(file=tmp_path / "clip.mp4", decode_tile=EXACT)
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(OutputError, match=r"more in .*scratch.*No space left on device"):
            list(decode_file(made.file, model, outputs))
    assert sorted(tmp_path.iterdir()) == [made.file]
    assert isinstance(list(decode_file(made.file, model, outputs))[-1], Finished)


def test_wherever_memory_runs_out_the_clip_is_made_in_tiles(
    model: Model, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where frames have left already: the file begins anew."""
    falls = 0

    def failing(vae: Vae, latents: Tensor, storage: Spill) -> Iterator[Tensor | None]:
        for number, piece in enumerate(exact_decode(vae, latents, storage)):
            if number == chunk:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield piece

    plan = model.plan(REQUEST.resolve(model.dims), ONLY_DECODE)
    assert plan.spilled is not None
    in_tiles = clip_of(made, model, tmp_path / "tiles.mp4", "auto")[0]
    monkeypatch.setattr("hvlite.clip.exact_decode", failing)
    for chunk in range(plan.spilled.chunks):
        frames, events = clip_of(made, model, tmp_path / f"{chunk}.mp4", EXACT)
        assert np.array_equal(frames, in_tiles)
        written = metadata.decode(read_metadata(tmp_path / f"{chunk}.mp4"), "clip")
        assert written.decode_tile == "65x256x256+16x64x64"
        notes = [event.text for event in events if isinstance(event, Note)]
        assert notes[-1] == "out of memory in decode: going on with 65x256x256+16x64x64 from frame 0"
        falls += len(notes)
    assert falls >= plan.spilled.chunks
    assert of_files(paths.scratch_folder()) == []


def clip_of(made: Made, model: Model, file: Path, tiles: str) -> tuple[NDArray[np.uint8], list[Event]]:
    events = list(decode_file(made.file, model, Outputs(file=file, decode_tile=tiles)))
    return np.stack(list(read_frames(file))), events


@pytest.mark.parametrize("model", ["disk"], indirect=True)
def test_a_decode_that_is_cancelled_leaves_nothing(model: Model, made: Made, tmp_path: Path) -> None:
    events = decode_file(made.file, model, Outputs(file=tmp_path / "clip.mp4", decode_tile=EXACT))
    for event in events:
        if isinstance(event, TileDone) and event.tile == 7:
            break
    events.close()
    assert of_files(paths.scratch_folder()) == []
    assert list(tmp_path.iterdir()) == [made.file]
