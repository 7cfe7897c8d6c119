"""How long VAE decode takes on this CPU, as a ratio to diffusers' decode of the same latents in the same run.

    python benchmarks/vae_decode.py [--runs 5] [--threads 2] [--only shapes] [--quick]

Equal random weights, fp32, equal tiles. Each run times one after the other, in alternating order; the ratio is the
median over runs of ours / diffusers, so below 1 is faster. Prints a table in Markdown and, as the last line, JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, VaeDims, latent_shape
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, decode_tiles
from hvlite.model.vae import Vae

SHAPES = VaeDims(channels=(16, 24, 48, 64), layers_per_block=1, norm_groups=2, latent_channels=16, scaling_factor=1.0)
MIDDLE = VaeDims(channels=(32, 64, 128, 128), layers_per_block=2, norm_groups=8, latent_channels=16, scaling_factor=1.0)
SMALL_TILES = TileGeometry(frames=16, frames_stride=12, height=64, height_stride=48, width=64, width_stride=48)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table; `size` is (height, width)."""

    name: str
    dims: VaeDims
    frames: int
    size: tuple[int, int]
    tiles: TileGeometry = PUBLISHED_TILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Median seconds, median ratio of paired runs, and how far apart the two outputs are."""

    case: str
    channels: tuple[int, ...]
    clip: str
    diffusers_s: float
    hvlite_s: float
    ratio: float
    max_difference: float


QUICK = (Case(name="shapes quick", dims=SHAPES, frames=5, size=(32, 32)),)
CASES = (
    Case(name="shapes", dims=SHAPES, frames=17, size=(64, 64)),
    Case(name="shapes image", dims=SHAPES, frames=1, size=(64, 64)),
    Case(name="shapes large", dims=SHAPES, frames=33, size=(192, 256)),
    Case(name="middle", dims=MIDDLE, frames=17, size=(64, 64)),
    Case(name="middle tiled", dims=MIDDLE, frames=25, size=(96, 80), tiles=SMALL_TILES),
    Case(name="published", dims=HUNYUANVIDEO.vae, frames=5, size=(64, 64)),
    Case(name="published image", dims=HUNYUANVIDEO.vae, frames=1, size=(128, 128)),
)


def build_reference(dims: VaeDims, tiles: TileGeometry) -> Any:
    torch.manual_seed(0)
    reference: Any = AutoencoderKLHunyuanVideo(
        block_out_channels=dims.channels,
        layers_per_block=dims.layers_per_block,
        norm_num_groups=dims.norm_groups,
        latent_channels=dims.latent_channels,
    )
    reference.enable_tiling(
        tile_sample_min_height=tiles.height,
        tile_sample_min_width=tiles.width,
        tile_sample_min_num_frames=tiles.frames,
        tile_sample_stride_height=tiles.height_stride,
        tile_sample_stride_width=tiles.width_stride,
        tile_sample_stride_num_frames=tiles.frames_stride,
    )
    return reference.eval()


def timed(decode: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    decode()
    return time.perf_counter() - began


@torch.no_grad()
def measure(case: Case, runs: int) -> Result:
    """Both decoders once to warm up, then `runs` pairs in alternating order."""
    reference = build_reference(case.dims, case.tiles)
    vae = Vae(case.dims)
    vae.load_state_dict(reference.state_dict())
    shape = latent_shape(case.size, case.frames, case.dims)
    latents = torch.randn(1, case.dims.latent_channels, shape.frames, shape.height, shape.width)

    def theirs() -> Tensor:
        decoded: Tensor = reference.decode(latents).sample[0]
        return decoded

    def ours() -> Tensor:
        steps = decode_tiles(latents, vae.decode, case.tiles)
        return torch.cat([step.frames for step in steps if step.frames is not None], 1)

    difference = (theirs() - ours()).abs().max().item()
    pairs = []
    for run in range(runs):
        if run % 2:
            our_s, their_s = timed(ours), timed(theirs)
        else:
            their_s, our_s = timed(theirs), timed(ours)
        pairs.append((their_s, our_s))
    return Result(
        case=case.name,
        channels=case.dims.channels,
        clip=f"{case.frames}x{case.size[0]}x{case.size[1]}",
        diffusers_s=statistics.median(theirs for theirs, _ in pairs),
        hvlite_s=statistics.median(ours for _, ours in pairs),
        ratio=statistics.median(ours / theirs for theirs, ours in pairs),
        max_difference=difference,
    )


def print_row(result: Result) -> None:
    print(
        f"| {result.case} | {result.channels} | {result.clip} | {result.diffusers_s:.3f} | "
        f"{result.hvlite_s:.3f} | {result.ratio:.2f} | {result.max_difference:.1e} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one tiny case, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| case | channels | frames x height x width | diffusers s | hvlite s | ratio | max difference |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for case in QUICK if arguments.quick else CASES:
        if arguments.only in case.name:
            results.append(measure(case, arguments.runs))
            print_row(results[-1])
    print(
        json.dumps(
            {
                "benchmark": "vae_decode",
                "torch": torch.__version__,
                "threads": arguments.threads,
                "runs": arguments.runs,
                "results": [asdict(result) for result in results],
            }
        )
    )


if __name__ == "__main__":
    main()
