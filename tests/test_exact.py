"""The exact decode: the untiled one's numbers, in the memory that is predicted, wherever activations lie."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, LatentShape, VaeDims
from hvlite.errors import OutputError
from hvlite.memory.decode_ladder import Fell, decode_on_ladder, tile_rungs, untiled_rung
from hvlite.memory.device import is_out_of_memory
from hvlite.memory.exact_needs import exact_needs
from hvlite.memory.geometry import make_tiles, tiles_text
from hvlite.memory.spill import Shape, Spill, Spilled
from hvlite.memory.tiles import TileStep, decode_tiles
from hvlite.model import causal
from hvlite.model.exact import exact_decode
from hvlite.model.vae import Vae
from tests.live_bytes import peak_bytes

CPU = torch.device("cpu")
REAL = HUNYUANVIDEO.vae
ONE_LAYER = VaeDims(channels=(8, 16, 24, 24), layers_per_block=1, norm_groups=4, latent_channels=16, scaling_factor=1.0)
# Widens where the real one narrows.
UNEVEN = VaeDims(channels=(8, 8, 24, 16), layers_per_block=2, norm_groups=2, latent_channels=4, scaling_factor=1.0)
BOTH = pytest.mark.parametrize("dims", [ONE_LAYER, UNEVEN], ids=["one layer", "uneven"])
DTYPES = {2: torch.float16, 4: torch.float32}
SMALL = make_tiles(16, 32, 32)


@cache
def model(dims: VaeDims) -> Vae:
    torch.manual_seed(3)
    vae = Vae(dims, encodes=False)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return vae


@cache
def on_meta(dims: VaeDims, dtype_bytes: int) -> Vae:
    with torch.device("meta"):
        return Vae(dims, encodes=False).to(DTYPES[dtype_bytes])


def clip(dims: VaeDims, *shape: int) -> Tensor:
    return torch.randn(1, dims.latent_channels, *shape, generator=torch.Generator().manual_seed(4))


def decode(vae: Vae, latents: Tensor, spill: Spill) -> Tensor:
    return torch.cat([piece for piece in exact_decode(vae, latents, spill) if piece is not None], 1)


@BOTH
@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 3, 4), (5, 4, 3), (9, 5, 6)], ids=str)
@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "host"])
def test_it_is_the_untiled_decode(dims: VaeDims, shape: tuple[int, int, int], on_disk: bool, tmp_path: Path) -> None:
    latents = clip(dims, *shape)
    with Spill(torch.float32, CPU, tmp_path if on_disk else None) as spill:
        decoded = decode(model(dims), latents, spill)
    # nothing is summed in another order: equal bits
    assert torch.equal(decoded, model(dims).decode(latents)[0])
    assert list(tmp_path.iterdir()) == []


@BOTH
@pytest.mark.parametrize("elements", [1, 3000])
def test_in_small_pieces_too(dims: VaeDims, elements: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    latents = clip(dims, 6, 4, 3)
    expected = model(dims).decode(latents)[0]
    monkeypatch.setattr(causal, "CONV_ELEMENTS_CPU", elements)
    with Spill(torch.float32, CPU) as spill:
        pieces = list(exact_decode(model(dims), latents, spill))
    frames = [piece for piece in pieces if piece is not None]
    assert len(frames) > 1
    torch.testing.assert_close(torch.cat(frames, 1), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_a_long_clip_has_statistics_of_the_whole(tmp_path: Path) -> None:
    """One loud frame far away changes every other: what tiles cannot know."""
    quiet = clip(ONE_LAYER, 9, 3, 3)
    loud = quiet.clone()
    loud[:, :, 8] *= 20
    with Spill(torch.float32, CPU) as spill:
        first = decode(model(ONE_LAYER), quiet, spill)[:, 0]
        assert (decode(model(ONE_LAYER), loud, spill)[:, 0] - first).abs().max() > 0.01


@pytest.mark.parametrize("dims", [REAL, ONE_LAYER, UNEVEN], ids=["real", "one layer", "uneven"])
@pytest.mark.parametrize("dtype_bytes", DTYPES)
@pytest.mark.parametrize("shape", [(17, 16, 32), (1, 32, 32), (2, 90, 160), (5, 8, 8)], ids=str)
def test_the_device_holds_what_is_predicted(
    dims: VaeDims, dtype_bytes: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    vae, dtype = on_meta(dims, dtype_bytes), DTYPES[dtype_bytes]
    latents = torch.empty(1, dims.latent_channels, *shape, device="meta", dtype=dtype)
    spill = Spill(dtype, torch.device("meta"), tmp_path)
    pieces = 0

    def run() -> None:
        nonlocal pieces
        for _ in exact_decode(vae, latents, spill):
            pieces += 1

    traced = peak_bytes(run)
    needs = exact_needs(dims, LatentShape(*shape), dtype_bytes)
    assert needs.device_bytes == pytest.approx(traced, rel=0.02)
    assert needs.chunks == pieces


@dataclass
class Counting:
    """Spills to the host and counts."""

    spill: Spill
    stored: dict[int, int] = field(default_factory=dict)
    peak: int = 0
    read: int = 0
    written: int = 0

    def new(self, shape: Shape) -> "Counted":
        made = Counted(self.spill.new(shape), self)
        self.stored[id(made.inner.memory)] = 4 * prod(shape)
        self.peak = max(self.peak, sum(self.stored.values()))
        return made


@dataclass
class Counted:
    inner: Spilled
    counting: Counting

    @property
    def shape(self) -> Shape:
        return self.inner.shape

    def read(self, start: int, stop: int) -> Tensor:
        self.counting.read += (stop - start) * self.inner.frame_bytes
        return self.inner.read(start, stop)

    def write(self, first: int, frames_BTHWC: Tensor) -> None:
        self.counting.written += frames_BTHWC.numel() * 4
        self.inner.write(first, frames_BTHWC)

    def with_channels(self, channels: int) -> "Counted":
        return Counted(self.inner.with_channels(channels), self.counting)

    def close(self) -> None:
        del self.counting.stored[id(self.inner.memory)]
        self.inner.close()


@BOTH
def test_storage_and_traffic_are_what_is_predicted(dims: VaeDims, tmp_path: Path) -> None:
    latents = clip(dims, 5, 4, 6)
    with Spill(torch.float32, CPU) as spill:
        counting = Counting(spill)
        for _ in exact_decode(model(dims), latents, counting):
            pass
    needs = exact_needs(dims, LatentShape(5, 4, 6), 4, "cpu")
    assert (counting.peak, counting.read, counting.written) == (
        needs.stored_bytes,
        needs.read_bytes,
        needs.written_bytes,
    )
    assert counting.stored == {}


def test_the_real_one_is_affordable() -> None:
    needs = exact_needs(REAL, LatentShape(33, 90, 160), 2)
    assert needs.device_bytes < 2e9
    assert needs.stored_bytes == pytest.approx(91.3e9, rel=0.001)
    assert needs.flops == pytest.approx((2010 + 231) * 1e12, rel=0.01)
    assert needs.read_bytes + needs.written_bytes == pytest.approx(808e9, rel=0.02)


def test_a_full_disk_is_named_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    spill = Spill(torch.float32, CPU, tmp_path)
    with pytest.raises(OutputError, match=r"needs 2\.00 GiB more in .*GiB is free: No space left.*--decode-tile auto"):
        spill.new((1, 2, 64, 64, 65536))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/below"):
        Spill(torch.float32, CPU, tmp_path / "file" / "below").new((1, 1, 1, 1, 1))


def test_an_abandoned_decode_leaves_no_file_open(tmp_path: Path) -> None:
    with Spill(torch.float32, CPU, tmp_path) as spill:
        pieces = exact_decode(model(ONE_LAYER), clip(ONE_LAYER, 3, 4, 4), spill)
        for _ in range(5):
            next(iter(pieces))
        before = open_files(tmp_path)
        del pieces
    assert before > 0
    assert open_files(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def open_files(folder: Path) -> int:
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them
            found += os.readlink(f"/proc/self/fd/{number}").startswith(str(folder))
    return found


def test_no_grad_mode_is_left_behind(tmp_path: Path) -> None:
    with Spill(torch.float32, CPU) as spill:
        for piece in exact_decode(model(ONE_LAYER), clip(ONE_LAYER, 2, 2, 2), spill):
            assert torch.is_grad_enabled()
            assert piece is None or not piece.requires_grad


def test_without_memory_for_it_the_clip_is_begun_anew_in_tiles(tmp_path: Path) -> None:
    latents, vae = clip(ONE_LAYER, 9, 4, 4), model(ONE_LAYER)

    def pieces() -> Iterator[Tensor | None]:
        left = 0
        with Spill(torch.float32, CPU) as spill:
            for piece in exact_decode(vae, latents, spill):
                left += 0 if piece is None else piece.shape[1]
                yield piece
                if left > 3:
                    raise torch.OutOfMemoryError("no room")

    count = exact_needs(ONE_LAYER, LatentShape(9, 4, 4), 4, "cpu").chunks
    rungs = [untiled_rung("exact", pieces, count), *tile_rungs(latents, vae.decode, SMALL)]
    steps = list(decode_on_ladder(rungs, is_out_of_memory, lambda: None))
    (fell,) = [step for step in steps if isinstance(step, Fell)]
    assert (fell.name, fell.frame, fell.anew) == (tiles_text(SMALL), 0, True)
    frames = [
        step.frames for step in steps[steps.index(fell) + 1 :] if isinstance(step, TileStep) and step.frames is not None
    ]
    expected = [step.frames for step in decode_tiles(latents, vae.decode, SMALL) if step.frames is not None]
    assert torch.equal(torch.cat(frames, 1), torch.cat(expected, 1))


def test_as_a_rung_its_steps_are_counted_and_its_frames_are_fp32(tmp_path: Path) -> None:
    latents, vae = clip(ONE_LAYER, 3, 4, 4), model(ONE_LAYER)
    count = exact_needs(ONE_LAYER, LatentShape(3, 4, 4), 4, "cpu").chunks
    with Spill(torch.float32, CPU) as spill:
        rung = untiled_rung("exact", lambda: exact_decode(vae, latents, spill), count)
        steps = [step for step in decode_on_ladder([rung], is_out_of_memory, lambda: None)]
    assert [(step.tile, step.tiles) for step in steps if isinstance(step, TileStep)] == [
        (i, count) for i in range(count)
    ]
    frames = [step.frames for step in steps if isinstance(step, TileStep) and step.frames is not None]
    assert torch.equal(torch.cat(frames, 1), vae.decode(latents)[0])
