"""What each weight format costs and changes: bytes of the 13 B store, error of a wide block, clips of `shapes`.

    PYTHONPATH=tools/shapes python benchmarks/formats.py [--seeds 3]

Bytes follow exactly from the published dims. The wide block has random weights; its error and time are against the same
block in bf16 in the same run. A step is one pass of the transformer of `shapes` over noise, its error that of the
velocity. Clips are those of tools/shapes/evaluate.py. Prints a table and then a JSON line.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from data import split_scenes
from evaluate import FIRST_SEED, evaluate
from torch import Tensor, nn

from hvlite import Outputs, Request, generate, load_profile, open_model
from hvlite.dims import HUNYUANVIDEO, LatentShape
from hvlite.model.dit import Activations, Dit, SingleBlock
from hvlite.origin import Checkpoint, find_origin
from hvlite.packing import pack_model
from hvlite.planning import stored_formats
from hvlite.quant.swap import FORMATS, swap
from hvlite.sampler import make_noise
from hvlite.video.latents import load_latents
from hvlite.video.mp4 import read_frames
from hvlite.weights.layout import store_bytes

ROWS = ("bf16", "fp8", "int8", "int8-dynamic", "nf4")
SHAPE = LatentShape(3, 24, 42)
REPEATS = 5
# Every fifth held-out prompt is enough for the error of a step.
STEP_PROMPTS = 5
# How many points of accuracy a format may cost.
GOALS = {"int8": 1.0, "nf4": 5.0}


def wide_block(weights: str) -> SingleBlock:
    """A published-width single block with one seed's random weights, in this format."""
    dims = replace(HUNYUANVIDEO.dit, double_blocks=0, single_blocks=1)
    torch.manual_seed(0)
    block = SingleBlock(dims).bfloat16()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.02)
    if weights not in FORMATS:
        return block
    plain = dict(block.state_dict())
    plan = swap(block, weights)
    filled = {part: value for name, tensor in plain.items() for part, value in plan.tensors(name, tensor)}
    block.load_state_dict(filled, assign=True)
    return block


def block_run(block: SingleBlock) -> Callable[[], Tensor]:
    """A function that gives what the block adds to a fixed input, fp32."""
    dims = replace(HUNYUANVIDEO.dit, double_blocks=0, single_blocks=0, refiner_blocks=0)
    work = Dit(dims).bfloat16().make_workspace(SHAPE, 64, Activations(), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SHAPE.tokens + 64, dims.hidden, generator=generator).bfloat16()
    vectors = torch.randn(3, dims.hidden, generator=generator).bfloat16() * 0.5

    @torch.no_grad()
    def run() -> Tensor:
        x = start.clone()
        block(x, vectors, work)
        return (x - start).float()

    return run


def time_ratio(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
    """The median over pairs of runs, one after the other."""
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(REPEATS))


def seconds(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def packed_shapes(weights: str, folder: Path) -> Path:
    """The embedded model as a store: the transformer in `weights`, the text encoder as it is."""
    origin = find_origin("shapes", {})
    assert isinstance(origin, Checkpoint)
    list(pack_model(origin.sources, origin.dims, folder, stored_formats(weights, None)))
    return folder


def make_steps(store: Path, folder: Path, *, dynamic: bool) -> None:
    """One step from noise for some prompts; its latents stay in `folder`."""
    folder.mkdir()
    with open_model(store, load_profile("cpu", weights="int8-dynamic" if dynamic else None), "cpu") as model:
        for number, scene in enumerate(split_scenes()[1][::STEP_PROMPTS]):
            files = Outputs(file=folder / f"{number}.mp4", latents=folder / f"{number}.safetensors")
            list(generate(Request(scene.caption, steps=1, seed=FIRST_SEED), model, outputs=files))


def velocities_of(folder: Path) -> Tensor:
    """What the transformer answered in `make_steps`: noise - latents, since sigma went from 1 to 0."""
    latents = torch.cat([load_latents(file).latents for file in sorted(folder.glob("*.safetensors"))])
    return make_noise(LatentShape(*latents.shape[2:]), latents.shape[1], FIRST_SEED) - latents


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def mean_psnr(clips: Path, reference: Path) -> float:
    """PSNR in dB over all frames of all clips, from the mean error."""
    errors = []
    for clip in sorted(reference.glob("*.mp4")):
        pairs = zip(read_frames(clips / clip.name), read_frames(clip), strict=True)
        errors += [float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)) for a, b in pairs]
    return 10 * math.log10(255**2 / max(statistics.mean(errors), 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One format; errors, time and clips are against bf16."""

    weights: str
    store_gb: float
    step_error: float
    block_error: float
    block_time: float
    psnr_db: float
    all_four: float


def measure(weights: str, seeds: int, work: Path, plain: Callable[[], Tensor]) -> Row:
    ours = block_run(wide_block(weights))
    block_error = relative_error(ours(), plain())
    clips = work / f"clips-{weights}"
    clips.mkdir()
    store, dynamic = packed_shapes(weights, work / f"store-{weights}"), weights == "int8-dynamic"
    hits, count, _ = evaluate(store, range(FIRST_SEED, FIRST_SEED + seeds), clips, dynamic=dynamic)
    make_steps(store, work / f"steps-{weights}", dynamic=dynamic)
    return Row(
        weights=weights,
        store_gb=store_bytes(HUNYUANVIDEO, stored_formats(weights, None).weights, "fp16") / 1e9,
        step_error=relative_error(*(velocities_of(work / f"steps-{name}") for name in (weights, "bf16"))),
        block_error=block_error,
        block_time=time_ratio(ours, plain),
        psnr_db=mean_psnr(clips, work / "clips-bf16"),
        all_four=hits["all four"] / count,
    )


def print_row(row: Row, plain: Row) -> None:
    is_plain = row is plain
    goal = f" (goal: {-GOALS[row.weights]:.0f})" if row.weights in GOALS else ""
    points = "-" if is_plain else f"{100 * (row.all_four - plain.all_four):+.1f}{goal}"
    print(
        f"| {row.weights} | {row.store_gb:.2f} | {row.step_error:.1e} | {row.block_error:.1e} | {row.block_time:.2f} "
        f"| {'-' if is_plain else f'{row.psnr_db:.1f}'} | {row.all_four:.1%} | {points} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    plain = block_run(wide_block("bf16"))
    print(
        "| weights | 13 B store, GB | step error | block error | block time | clip PSNR, dB | all four right | points |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in ROWS:
            rows.append(measure(weights, arguments.seeds, Path(folder), plain))
            print_row(rows[-1], rows[0])
    print(json.dumps({"benchmark": "formats", "seeds": arguments.seeds, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
