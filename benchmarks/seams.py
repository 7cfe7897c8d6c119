"""How far each way to cut a clip is from decoding it whole: GroupNorm makes every tile depend on its own statistics.

    python benchmarks/seams.py [--model shapes|random|both] [--large] [--quick]

`shapes`: latents of a moving picture, made by the embedded model's own encoder. `random`: a decoder of the published
widths with random weights, and random latents. Tiles are those of the published proportions, as much smaller
as the clip is smaller than a real one; `--large` takes a clip of 65 frames and the published tiles themselves.

For each way to cut: PSNR of the clip and of its worst frame against the untiled decode (peak: the range of that), and
the mean step of the error across seams, in thousandths of the range, beside its mean step everywhere. Then the exact
decode. Prints Markdown tables and, as the last line, JSON.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, LatentShape
from hvlite.memory.exact_needs import exact_needs
from hvlite.memory.geometry import decoded_volume, parse_tiles, tiles_text
from hvlite.memory.spill import Spill
from hvlite.memory.tiles import TIME, TileGeometry, decode_tiles, encode_tiles
from hvlite.model.exact import exact_decode
from hvlite.model.vae import Vae, posterior_mode
from hvlite.opened import open_model

SEAM_AXES = ("frames", "height", "width")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What is decoded, and the tiles that are tried on it."""

    name: str
    vae: Vae
    latents: Tensor
    tiles: tuple[str, ...]

    @property
    def shape(self) -> LatentShape:
        return LatentShape(*self.latents.shape[2:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """dB, thousandths of the range, and seconds; steps are of the error, None where there is no such seam."""

    tiles: str
    volume: float
    psnr: float
    worst_frame: float
    time_step: float | None
    space_step: float | None
    usual_time_step: float
    usual_space_step: float
    seconds: float


# The published tiles and those after them on the ladder, in proportion; whole frames; short ones.
SMALL_TILES = ("17x64x64", "17x48x48", "17x32x32", "9x64x64", "5x64x64", "17x128x192+4x0x0", "9x128x192+4x0x0")
LARGE_TILES = ("65x256x256", "65x192x192", "65x128x128", "65x64x64", "33x256x256", "17x256x256", "17x384x384+4x0x0")
RANDOM_TILES = ("9x32x32", "9x24x24", "5x32x32", "9x64x96+4x0x0", "5x64x96+0x0x0")
QUICK_TILES = ("5x32x32", "5x48x64+0x0x0")


def moving_picture(frames: int, height: int, width: int) -> Tensor:
    """[1,3,F,H,W] in [-1,1]: discs of several colours that drift over a shaded background."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij")
    clip = torch.empty(3, frames, height, width)
    clip[:] = torch.stack((0.5 * x - 0.4, 0.3 - 0.6 * y, 0.4 * y - 0.2))[:, None]
    generator = torch.Generator().manual_seed(7)
    for _ in range(8):
        place, speed = torch.rand(2, generator=generator), 0.6 * torch.rand(2, generator=generator) - 0.3
        colour, radius = 2 * torch.rand(3, generator=generator) - 1, 0.06 + 0.1 * torch.rand(1, generator=generator)
        for frame in range(frames):
            now = place + speed * frame / 24
            inside = (y - now[0]) ** 2 + (x - now[1] * width / height) ** 2 < radius**2
            clip[:, frame, inside] = colour[:, None]
    return clip[None]


def shapes_clip(frames: int, height: int, width: int, tiles: tuple[str, ...]) -> Iterator[Clip]:
    with open_model("shapes") as model, torch.no_grad():
        vae = Vae(model.dims.vae)
        vae.load_state_dict(dict(model.origin.tensors("vae")))
        latents = posterior_mode(encode_tiles(moving_picture(frames, height, width), vae.encode))
        yield Clip(name=f"shapes, {frames}x{height}x{width}", vae=vae, latents=latents, tiles=tiles)


def random_clip(shape: tuple[int, int, int], tiles: tuple[str, ...]) -> Iterator[Clip]:
    torch.manual_seed(0)
    vae = Vae(HUNYUANVIDEO.vae, encodes=False)
    frames, height, width = 4 * shape[0] - 3, 8 * shape[1], 8 * shape[2]
    yield Clip(name=f"random, {frames}x{height}x{width}", vae=vae, latents=torch.randn(1, 16, *shape), tiles=tiles)


def timed(decode: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    return decode(), time.perf_counter() - began


def in_tiles(clip: Clip, geometry: TileGeometry) -> Tensor:
    steps = decode_tiles(clip.latents, clip.vae.decode, geometry)
    return torch.cat([step.frames for step in steps if step.frames is not None], TIME)


def exactly(clip: Clip, folder: Path | None) -> Tensor:
    with Spill(torch.float32, torch.device("cpu"), folder) as spill:
        pieces = exact_decode(clip.vae, clip.latents, spill)
        return torch.cat([piece for piece in pieces if piece is not None], TIME)


def psnr(found: Tensor, expected: Tensor, peak: float) -> float:
    error = (found.double() - expected.double()).square().mean().item()
    return 10 * math.log10(peak * peak / error) if error else math.inf


def steps(error: Tensor, axis: int, places: list[int]) -> float | None:
    """Mean step of the error from the line before each place to the place."""
    if not places:
        return None
    after = error.index_select(axis, torch.tensor(places))
    before = error.index_select(axis, torch.tensor(places) - 1)
    return (after - before).abs().mean().item()


def seams(length: int, tile: int, stride: int, first: int = 0) -> list[int]:
    """Where tiles take over."""
    return [] if length <= tile + first else list(range(stride + first, length, stride))


def compare(clip: Clip, tiles: str, expected: Tensor) -> Result:
    geometry = parse_tiles(tiles)
    assert isinstance(geometry, TileGeometry)
    found, seconds = timed(lambda: in_tiles(clip, geometry))
    peak = (expected.max() - expected.min()).item()
    error = (found - expected) * (1000 / peak)
    time_cut, height_cut, width_cut = geometry.pixels
    rows, columns = (
        seams(length, cut.tile, cut.stride)
        for length, cut in zip(expected.shape[2:], (height_cut, width_cut), strict=True)
    )
    in_space = [step for step in (steps(error, 2, rows), steps(error, 3, columns)) if step is not None]
    return Result(
        tiles=tiles_text(geometry),
        volume=decoded_volume(clip.shape, geometry),
        psnr=psnr(found, expected, peak),
        worst_frame=min(psnr(found[:, frame], expected[:, frame], peak) for frame in range(found.shape[1])),
        time_step=steps(error, 1, seams(expected.shape[1], time_cut.tile, time_cut.stride, first=1)),
        space_step=sum(in_space) / len(in_space) if in_space else None,
        usual_time_step=steps(error, 1, list(range(1, error.shape[1]))) or 0.0,
        usual_space_step=(steps(error, 2, list(range(1, error.shape[2]))) or 0.0),
        seconds=seconds,
    )


def report(clip: Clip) -> dict[str, object]:
    expected, seconds = timed(lambda: clip.vae.decode(clip.latents)[0])
    print(f"\n{clip.name}, untiled {seconds:.1f} s\n")
    print(
        "| tiles | decoded volume | PSNR dB | worst frame dB | error step across seams in time (usual) "
        "| in space (usual) | s |"
    )
    print("|---|---|---|---|---|---|---|")
    results = []
    for tiles in clip.tiles:
        results.append(compare(clip, tiles, expected))
        print_row(results[-1])
    with tempfile.TemporaryDirectory() as folder:
        found, exact_s = timed(lambda: exactly(clip, Path(folder)))
    difference = (found - expected).abs().max().item()
    needs = exact_needs(clip.vae.dims, clip.shape, 4, "cpu")
    print(f"| exact, from disk | 1.00 | largest difference {difference:.1e} | | | | {exact_s:.1f} |", flush=True)
    print(
        f"\nexact: {needs.stored_bytes / 1e6:.0f} MB stored, {needs.read_bytes / 1e6:.0f} MB read, "
        f"{needs.written_bytes / 1e6:.0f} MB written, {needs.flops / 1e12:.2f} TFLOP"
    )
    return {
        "clip": clip.name,
        "untiled_s": seconds,
        "tiles": [asdict(result) for result in results],
        "exact": {"largest_difference": difference, "seconds": exact_s, "needs": asdict(needs)},
    }


def print_row(result: Result) -> None:
    in_time = "" if result.time_step is None else f"{result.time_step:.2f} ({result.usual_time_step:.2f})"
    in_space = "" if result.space_step is None else f"{result.space_step:.2f} ({result.usual_space_step:.2f})"
    print(
        f"| {result.tiles} | {result.volume:.2f} | {result.psnr:.1f} | {result.worst_frame:.1f} | {in_time} "
        f"| {in_space} | {result.seconds:.1f} |",
        flush=True,
    )


def clips(model: str, *, large: bool, quick: bool) -> Iterator[Clip]:
    if quick:
        yield from shapes_clip(9, 48, 64, QUICK_TILES)
        return
    if model in ("shapes", "both"):
        yield from shapes_clip(65, 384, 384, LARGE_TILES) if large else shapes_clip(33, 128, 192, SMALL_TILES)
    if model in ("random", "both"):
        yield from random_clip((5, 8, 12), RANDOM_TILES)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("shapes", "random", "both"), default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--large", action="store_true", help="the published tiles themselves, on shapes: an hour")
    parser.add_argument("--quick", action="store_true", help="one tiny clip, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = [report(clip) for clip in clips(arguments.model, large=arguments.large, quick=arguments.quick)]
    about = {"benchmark": "seams", "torch": torch.__version__, "threads": arguments.threads}
    print(json.dumps(about | {"clips": found}))


if __name__ == "__main__":
    main()
