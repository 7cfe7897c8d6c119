"""How long VAE decode takes on this CPU and how much memory, as ratios to diffusers' decode in the same run.

    python benchmarks/vae_decode.py [--runs 5] [--threads 2] [--only shapes] [--quick] [--fresh]

Random weights, fp32, equal tiles. Without `--fresh` both decode the same latents with equal weights in one process, in
alternating order, and their results are compared. With it each decode has a process of its own, whose VmHWM is all
that it ever held, Python and torch included, and whose seconds are those of the CPU, which other processes do not
change; a second table shows that a longer clip takes no more memory. Ratios are medians over runs of ours / diffusers:
below 1 is better. Prints tables in Markdown and, as the last line, JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, VaeDims, latent_shape
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, decode_tiles
from hvlite.model.vae import Vae
from hvlite.video.frames import frames_to_uint8

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
    from diffusers import AutoencoderKLHunyuanVideo  # not where hvlite's memory is measured

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


def timed(decode: Callable[[], object]) -> float:
    began = time.perf_counter()
    decode()
    return time.perf_counter() - began


def cpu_timed(decode: Callable[[], object]) -> float:
    began = time.process_time()
    decode()
    return time.process_time() - began


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


FRESH = (
    Case(name="shapes fresh", dims=SHAPES, frames=65, size=(256, 256)),
    Case(name="middle fresh", dims=MIDDLE, frames=65, size=(128, 128)),
    Case(name="published fresh", dims=HUNYUANVIDEO.vae, frames=17, size=(96, 96)),
)
QUICK_FRESH = (Case(name="shapes fresh quick", dims=SHAPES, frames=5, size=(64, 64)),)
LENGTHS = (
    Case(name="65 frames", dims=SHAPES, frames=65, size=(192, 192)),
    Case(name="257 frames", dims=SHAPES, frames=257, size=(192, 192)),
)
QUICK_LENGTHS = (
    Case(name="5 frames", dims=SHAPES, frames=5, size=(32, 32), tiles=SMALL_TILES),
    Case(name="17 frames", dims=SHAPES, frames=17, size=(32, 32), tiles=SMALL_TILES),
)
CHILD_CASES = {case.name: case for case in (*FRESH, *QUICK_FRESH, *LENGTHS, *QUICK_LENGTHS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One decode in a process of its own; seconds of all its threads."""

    seconds: float
    hwm_bytes: int


@torch.no_grad()
def decode_alone(who: str, case: Case) -> Run:
    """In the child: one decode, as each of the two gives its frames away."""
    shape = latent_shape(case.size, case.frames, case.dims)
    latents = torch.randn(1, case.dims.latent_channels, shape.frames, shape.height, shape.width)
    if who == "diffusers":
        reference = build_reference(case.dims, case.tiles)
        seconds = cpu_timed(lambda: reference.decode(latents).sample)
    else:
        torch.manual_seed(0)
        vae = Vae(case.dims, encodes=False)
        seconds = cpu_timed(lambda: stream(latents, vae, case.tiles))
    return Run(seconds=seconds, hwm_bytes=high_water_bytes())


def stream(latents: Tensor, vae: Vae, tiles: TileGeometry) -> None:
    for step in decode_tiles(latents, vae.decode, tiles):
        for index in range(0 if step.frames is None else step.frames.shape[1]):
            assert step.frames is not None
            frames_to_uint8(step.frames[:, index : index + 1])
        del step  # its frames are not to be held beside the next tile's decode


def high_water_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def run_alone(who: str, case: Case, threads: int) -> Run:
    command = [sys.executable, __file__, "--child", who, case.name, "--threads", str(threads)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Run(**json.loads(finished.stdout.splitlines()[-1]))


def compare_fresh(cases: tuple[Case, ...], runs: int, threads: int) -> list[dict[str, Any]]:
    """Time and VmHWM of both, each decode in a fresh process, in alternating order."""
    print(
        "| case | channels | frames x height x width | diffusers CPU s | hvlite CPU s | ratio "
        "| diffusers MiB | hvlite MiB | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for case in cases:
        pairs = []
        for run in range(runs):
            order = ("hvlite", "diffusers") if run % 2 else ("diffusers", "hvlite")
            found = {who: run_alone(who, case, threads) for who in order}
            pairs.append((found["diffusers"], found["hvlite"]))
        row = {
            "case": case.name,
            "channels": case.dims.channels,
            "clip": f"{case.frames}x{case.size[0]}x{case.size[1]}",
            "diffusers_s": statistics.median(theirs.seconds for theirs, _ in pairs),
            "hvlite_s": statistics.median(ours.seconds for _, ours in pairs),
            "time_ratio": statistics.median(ours.seconds / theirs.seconds for theirs, ours in pairs),
            "diffusers_mib": statistics.median(theirs.hwm_bytes for theirs, _ in pairs) / 2**20,
            "hvlite_mib": statistics.median(ours.hwm_bytes for _, ours in pairs) / 2**20,
            "memory_ratio": statistics.median(ours.hwm_bytes / theirs.hwm_bytes for theirs, ours in pairs),
        }
        rows.append(row)
        print(
            f"| {row['case']} | {row['channels']} | {row['clip']} | {row['diffusers_s']:.2f} | {row['hvlite_s']:.2f} "
            f"| {row['time_ratio']:.2f} | {row['diffusers_mib']:.0f} | {row['hvlite_mib']:.0f} "
            f"| {row['memory_ratio']:.2f} |",
            flush=True,
        )
    return rows


def compare_lengths(cases: tuple[Case, ...], threads: int) -> list[dict[str, Any]]:
    """VmHWM of hvlite for clips of the same size and other lengths."""
    print("\n| clip | hvlite MiB | to the first |")
    print("|---|---|---|")
    rows: list[dict[str, Any]] = []
    for case in cases:
        mib = run_alone("hvlite", case, threads).hwm_bytes / 2**20
        rows.append({"clip": f"{case.frames}x{case.size[0]}x{case.size[1]}", "hvlite_mib": mib})
        print(f"| {rows[-1]['clip']} | {mib:.0f} | {mib / rows[0]['hvlite_mib']:.3f} |", flush=True)
    return rows


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
    parser.add_argument("--fresh", action="store_true", help="each decode in a process of its own, and its VmHWM")
    parser.add_argument("--child", nargs=2, metavar=("WHO", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one tiny case, to see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        who, name = arguments.child
        print(json.dumps(asdict(decode_alone(who, CHILD_CASES[name]))))
        return
    about = {
        "benchmark": "vae_decode",
        "torch": torch.__version__,
        "threads": arguments.threads,
        "runs": arguments.runs,
    }
    if arguments.fresh:
        cases, lengths = (QUICK_FRESH, QUICK_LENGTHS) if arguments.quick else (FRESH, LENGTHS)
        chosen = tuple(case for case in cases if arguments.only in case.name)
        fresh = compare_fresh(chosen, arguments.runs, arguments.threads)
        print(json.dumps(about | {"fresh": fresh, "lengths": compare_lengths(lengths, arguments.threads)}))
        return
    print("| case | channels | frames x height x width | diffusers s | hvlite s | ratio | max difference |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for case in QUICK if arguments.quick else CASES:
        if arguments.only in case.name:
            results.append(measure(case, arguments.runs))
            print_row(results[-1])
    print(json.dumps(about | {"results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
