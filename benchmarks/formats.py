"""What each weight format costs and changes: bytes of the 13 B store, error of a wide block, clips of `shapes`.

    PYTHONPATH=tools/shapes python benchmarks/formats.py [--seeds 1]

Bytes follow exactly from the published dims. The wide block has random weights; its error and time are against the same
block in bf16 in the same run. Clips are those of tools/shapes/evaluate.py. Prints a table and then a JSON line.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from evaluate import FIRST_SEED, evaluate
from torch import Tensor, nn

from hvlite.dims import HUNYUANVIDEO, LatentShape
from hvlite.model.dit import Activations, Dit, SingleBlock
from hvlite.opened import find_origin
from hvlite.origin import Checkpoint
from hvlite.packing import pack_model, stored_formats
from hvlite.quant.swap import FORMATS, swap
from hvlite.video.mp4 import read_frames
from hvlite.weights.layout import store_bytes

ROWS = ("bf16", "fp8", "int8", "int8-dynamic", "nf4")
SHAPE = LatentShape(3, 24, 42)
REPEATS = 5


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


@torch.no_grad()
def block_output(block: SingleBlock) -> tuple[Tensor, float]:
    """What the block adds to a fixed input, fp32, and its median seconds."""
    dims = replace(HUNYUANVIDEO.dit, double_blocks=0, single_blocks=0, refiner_blocks=0)
    work = Dit(dims).bfloat16().make_workspace(SHAPE, 64, Activations(), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SHAPE.tokens + 64, dims.hidden, generator=generator).bfloat16()
    vectors = torch.randn(3, dims.hidden, generator=generator).bfloat16() * 0.5
    seconds = []
    x = start
    for _ in range(REPEATS + 1):
        x = start.clone()
        began = time.perf_counter()
        block(x, vectors, work)
        seconds.append(time.perf_counter() - began)
    return (x - start).float(), statistics.median(seconds[1:])


def packed_shapes(weights: str, folder: Path) -> Path:
    """The embedded model as a store: the transformer in `weights`, the text encoder as it is."""
    origin = find_origin("shapes", {})
    assert isinstance(origin, Checkpoint)
    list(pack_model(origin.sources, origin.dims, folder, stored_formats(weights, None)))
    return folder


def mean_psnr(clips: Path, reference: Path) -> float:
    """PSNR in dB over all frames of all clips, from the mean error."""
    errors = []
    for clip in sorted(reference.glob("*.mp4")):
        pairs = zip(read_frames(clips / clip.name), read_frames(clip), strict=True)
        errors += [float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)) for a, b in pairs]
    return 10 * math.log10(255**2 / max(statistics.mean(errors), 1e-9))


def measure(weights: str, seeds: int, work: Path, plain: tuple[Tensor, float]) -> dict[str, float | str]:
    output, seconds = block_output(wide_block(weights))
    clips = work / f"clips-{weights}"
    clips.mkdir()
    store = packed_shapes(weights, work / f"store-{weights}")
    hits, count, _ = evaluate(store, range(FIRST_SEED, FIRST_SEED + seeds), clips, dynamic=weights == "int8-dynamic")
    stored = stored_formats(weights, None).weights
    return {
        "weights": weights,
        "store_gb": store_bytes(HUNYUANVIDEO, stored, "fp16") / 1e9,
        "block_error": ((output - plain[0]).norm() / plain[0].norm()).item(),
        "block_time": seconds / plain[1],
        "psnr_db": mean_psnr(clips, work / "clips-bf16"),
        "all_four": hits["all four"] / count,
        "shape": hits["shape"] / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    plain = block_output(wide_block("bf16"))
    print("| weights | 13 B store, GB | block error | block time | clip PSNR, dB | all four right |")
    print("|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in ROWS:
            row = measure(weights, arguments.seeds, Path(folder), plain)
            rows.append(row)
            psnr = "-" if weights == "bf16" else f"{row['psnr_db']:.1f}"
            print(
                f"| {weights} | {row['store_gb']:.2f} | {row['block_error']:.1e} | {row['block_time']:.2f} "
                f"| {psnr} | {row['all_four']:.1%} |",
                flush=True,
            )
    print(json.dumps({"benchmark": "formats", "seeds": arguments.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
