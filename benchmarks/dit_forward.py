"""One forward pass of the transformer against diffusers' class: equal weights, one process, alternating runs.

    python benchmarks/dit_forward.py [--quick] [--dtype fp32|bf16] [--repeats 7]

Ours includes its share of `prepare_schedule` (modulation and refined text of that step). Prints a table and then a JSON
line. The figure to read is the ratio: the median over pairs of runs.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from hvlite.dims import LatentShape
from hvlite.model.dit import Activations, Dit
from hvlite.weights.configs import read_dit_dims
from hvlite.weights.load import dit_tensors, fill

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model size and a clip; `grid` in latents."""

    name: str
    heads: int
    head_dim: int
    axes: tuple[int, int, int]
    double: int
    single: int
    grid: tuple[int, int, int]
    text: int = 64


CASES = (
    Case(name="shapes, 17x64x64", heads=4, head_dim=32, axes=(8, 12, 12), double=2, single=4, grid=(5, 8, 8), text=12),
    Case(name="shapes, 33x192x192", heads=4, head_dim=32, axes=(8, 12, 12), double=2, single=4, grid=(9, 24, 24)),
    Case(name="D=1024, 17x192x336", heads=8, head_dim=128, axes=(16, 56, 56), double=1, single=2, grid=(5, 24, 42)),
    Case(name="D=3072, 9x192x336", heads=24, head_dim=128, axes=(16, 56, 56), double=1, single=1, grid=(3, 24, 42)),
)


def make_reference(case: Case, dtype: torch.dtype) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return (
        HunyuanVideoTransformer3DModel(
            num_attention_heads=case.heads,
            attention_head_dim=case.head_dim,
            num_layers=case.double,
            num_single_layers=case.single,
            text_embed_dim=256,
            pooled_projection_dim=128,
            rope_axes_dim=case.axes,
        )
        .to(dtype)
        .eval()
    )


def make_ours(reference: HunyuanVideoTransformer3DModel, dtype: torch.dtype) -> Dit:
    """The same weights through a file."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        dims = read_dit_dims(Path(folder), "module")
        dit = Dit(dims).to(dtype)
        fill(dit, dit_tensors(Path(folder), dims))
    return dit


def runs_of(case: Case, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Two functions without arguments: our pass and theirs, on the same inputs."""
    reference = make_reference(case, dtype)
    dit = make_ours(reference, dtype)
    latents = torch.randn(1, 16, *case.grid, dtype=dtype)
    text, pooled = torch.randn(case.text, 256, dtype=dtype), torch.randn(128, dtype=dtype)
    timestep = torch.tensor([500.0])
    shape, knobs = LatentShape(*case.grid), Activations()
    work = dit.make_workspace(shape, case.text, knobs, dtype)

    def ours() -> Tensor:
        (conditioning,) = dit.prepare_schedule(timestep, 6.0, [(text, pooled)])
        x = dit.embed(latents, conditioning.text[0])
        for index in range(dit.dims.blocks):
            dit.run_block(index, x, conditioning.of_block(index)[0], work)
        return dit.head(x, conditioning.final[0], shape, knobs.token_chunk)

    guidance = torch.tensor([6.0], dtype=dtype) * 1000
    mask = torch.ones(1, case.text, dtype=torch.long)

    @torch.no_grad()
    def theirs() -> Tensor:
        out: Tensor = reference(
            latents, timestep, text[None], mask, pooled[None], guidance=guidance, return_dict=False
        )[0]
        return out

    return ours, theirs


def seconds(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(case: Case, dtype: torch.dtype, repeats: int) -> dict[str, float | str]:
    """Median seconds of each and the median ratio of pairs, after one warm-up that also compares the numbers."""
    ours, theirs = runs_of(case, dtype)
    error = (ours().float() - theirs().float()).abs().max().item()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return {
        "case": case.name,
        "ours_s": statistics.median(pair[0] for pair in pairs),
        "diffusers_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
        "max_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest case alone")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}\n")
    print("| case | hvlite s | diffusers s | ratio | max error |\n|---|---|---|---|---|")
    rows = []
    for case in CASES[:1] if arguments.quick else CASES:
        row = measure(case, DTYPES[arguments.dtype], arguments.repeats)
        rows.append(row)
        print(
            f"| {row['case']} | {row['ours_s']:.4f} | {row['diffusers_s']:.4f} | {row['ratio']:.2f} "
            f"| {row['max_error']:.1e} |",
            flush=True,
        )
    print(json.dumps({"benchmark": "dit_forward", "dtype": arguments.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
