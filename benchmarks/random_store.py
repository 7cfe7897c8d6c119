"""Packed stores of random weights, written directly: for benchmarks of a size that no checkpoint at hand has.

Names, sizes, alignment and hashes are those that `hvlite models pack` writes, so that a store opens like any other. The
values alone are cheap: one run of random numbers, repeated, and every block has those of the first one of its kind.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, ClipDims, LlamaDims, ModelDims, VaeDims
from hvlite.model.dit import Dit
from hvlite.model.text import build_llama
from hvlite.quant.swap import SwapPlan, plan_swap
from hvlite.weights.checkpoint import SAFETENSORS_DTYPES
from hvlite.weights.keymap import Shape
from hvlite.weights.layout import PLAIN, Formats, SlabPlan, place, plan_slabs, stored_forms
from hvlite.weights.slab import Slab, write_slab
from hvlite.weights.store import INDEX, TOKENIZERS, CopiedFile, Index, write_index

SPREAD = 0.02
# Prime, so that the rows of a matrix differ.
RUN_LENGTH = 1_048_583

Named = list[tuple[str, Tensor]]

# The smallest that there can be, beside a transformer of the published width.
SMALL_VAE = VaeDims(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=2, latent_channels=16, scaling_factor=1.0)
SMALL_CLIP = ClipDims(vocabulary=64, hidden=768, mlp_hidden=64, layers=1, heads=12, positions=77, eos_token=63)
SMALL_LLAMA = LlamaDims(
    vocabulary=64,
    hidden=4096,
    mlp_hidden=64,
    layers=3,
    heads=32,
    kv_heads=8,
    rms_eps=1e-5,
    rope_theta=5e5,
    max_positions=512,
)


def small_model(double: int, single: int) -> ModelDims:
    """The published widths with so many blocks, and next to nothing beside them."""
    dit = replace(HUNYUANVIDEO.dit, double_blocks=double, single_blocks=single)
    return replace(HUNYUANVIDEO, name="wide", dit=dit, vae=SMALL_VAE, clip=SMALL_CLIP, llama=SMALL_LLAMA)


def write_random_store(folder: Path, dims: ModelDims, formats: Formats) -> Path:
    """The store at `folder`, which may hold the tokenizers already, in the folders that a store has for them."""
    folder.mkdir(parents=True, exist_ok=True)
    swaps = _swap_plans(dims, formats)
    slabs: list[Slab] = []
    made: dict[tuple[tuple[str, Shape], ...], Named] = {}
    for plan in plan_slabs(dims):
        kind = tuple((name.removeprefix(plan.prefix), shape) for name, shape in plan.parameters)
        if kind not in made:
            made.clear()  # or two kinds of block would be held at once
            made[kind] = list(_slab_tensors(plan, formats, swaps.get(plan.part)))
        placement = place(stored_forms(plan, formats))
        slabs.append(write_slab(folder, plan.name, placement, made[kind], part=plan.part, prefix=plan.prefix))
    index = Index(
        writer=f"hvlite {version('hvlite')}",
        dims=dims,
        weights=formats.weights,
        text_weights=formats.text_weights,
        dtype=formats.dtype,
        text_dtype=formats.text_dtype,
        source=hashlib.sha256(b"random weights").hexdigest(),
        files=tuple(_copied(file) for each in TOKENIZERS for file in sorted((folder / each).glob("*"))),
        slabs=tuple(slabs),
    )
    write_index(folder / INDEX, index)
    return folder


def random_parameter(name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Matrices and kernels of a small spread; norms that scale by 1; biases of 0."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
    run = torch.randn(RUN_LENGTH, generator=torch.Generator().manual_seed(len(name))).mul_(SPREAD).to(dtype)
    count = prod(shape)
    return run.repeat(-(-count // RUN_LENGTH))[:count].view(shape)


def _swap_plans(dims: ModelDims, formats: Formats) -> dict[str, SwapPlan]:
    """What quantises the parts that are quantised."""
    with torch.device("meta"):
        modules = {"dit": Dit(dims.dit), "text": build_llama(dims.llama)}
    kinds = {part: formats.quantised(part) for part in modules}
    return {part: plan_swap(modules[part], kind) for part, kind in kinds.items() if kind is not None}


def _slab_tensors(plan: SlabPlan, formats: Formats, swap: SwapPlan | None) -> Iterator[tuple[str, Tensor]]:
    """By their names in the slab, as they are stored."""
    dtype = SAFETENSORS_DTYPES[PLAIN[formats.plain_dtype(plan.part)]]
    for parameter, shape in plan.parameters:
        value = random_parameter(parameter, shape, dtype)
        stored = [(parameter, value)] if swap is None else swap.tensors(parameter, value)
        for name, tensor in stored:
            yield name.removeprefix(plan.prefix), tensor


def _copied(file: Path) -> CopiedFile:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return CopiedFile(folder=file.parent.name, name=file.name, file_bytes=len(content), sha256=digest)
