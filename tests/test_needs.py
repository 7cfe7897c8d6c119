"""The arithmetic of what a stage holds equals a trace of the model's own code, at the real dims."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from hvlite.dims import HUNYUANVIDEO, LatentShape, latent_shape
from hvlite.memory import needs
from hvlite.memory.needs import (
    ITEM_BYTES,
    Clip,
    Knobs,
    Product,
    clip_bytes,
    conditioning_bytes,
    denoise_activations,
    longest_chunk,
    rest_bytes,
    step_bytes,
)
from hvlite.memory.trace import Trace
from hvlite.model.dit import Activations, Conditioning, Dit
from hvlite.model.ops import token_chunks
from hvlite.model.text import TEMPLATES, TEXT_TOKENS, build_clip
from hvlite.opened import USED_BY_STEPS
from hvlite.part import DTYPES
from hvlite.quant.swap import swap

GIB = 1 << 30
DIMS = HUNYUANVIDEO.dit
HD, SMALL, IMAGE, THUMB = ((720, 1280), 129), ((544, 960), 129), ((720, 1280), 1), ((256, 256), 1)


def clip_of(size: tuple[int, int], frames: int, steps: int = 1, prompts: int = 1) -> Clip:
    return Clip(shape=latent_shape(size, frames, HUNYUANVIDEO.vae), steps=steps, prompts=prompts)


@cache
def one_of_each(weights: str, dtype: str) -> Dit:
    """The published model with one block of each kind."""
    with torch.device("meta"):
        dit = Dit(replace(DIMS, double_blocks=1, single_blocks=1)).to(DTYPES[dtype])
    if weights != dtype:
        swap(dit, weights)
    return dit


def empty_conditioning(clip: Clip, dtype: torch.dtype) -> Conditioning:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(clip.steps, *shape, DIMS.hidden, dtype=dtype, device="meta")

    return Conditioning(
        empty(DIMS.double_blocks, 2, 6), empty(DIMS.single_blocks, 3), empty(2), empty(clip.text_tokens)
    )


def trace_step(dit: Dit, clip: Clip, knobs: Knobs, dtype: str) -> int:
    """The most that a step holds beside weights: every prompt's stream through a double and a single block."""
    for module in dit.modules():
        getattr(getattr(module, "scratch", None), "release", int)()  # what an earlier trace left there
    shape, knobs_of_model = clip.shape, Activations(token_chunk=knobs.token_chunk, head_groups=knobs.head_groups)
    with Trace() as trace:
        every = [empty_conditioning(replace(clip, steps=1), DTYPES[dtype]) for _ in range(clip.prompts)]
        latents = torch.empty(1, DIMS.latent_channels, shape.frames, shape.height, shape.width, device="meta")
        work = dit.make_workspace(shape, clip.text_tokens, knobs_of_model, DTYPES[dtype])
        streams = [dit.embed(latents, each.text[0]) for each in every]
        for x, each in zip(streams, every, strict=True):
            dit.run_block(0, x, each.double[0, 0], work)
            dit.run_block(1, x, each.single[0, 0], work)
        del x
        for each in every:
            dit.head(streams.pop(0), each.final[0], shape, knobs.token_chunk)
    return trace.peak("").peak_bytes


def check(clip: Clip, knobs: Knobs, product: Product) -> None:
    traced = trace_step(one_of_each(product.weights, product.dtype), clip, knobs, product.dtype)
    assert denoise_activations(DIMS, clip, knobs, product) == pytest.approx(traced, rel=0.01)


KNOBS = [Knobs(token_chunk=chunk, head_groups=groups) for chunk, groups in ((2048, 1), (1024, 4), (512, 24))]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("size", [HD, SMALL, IMAGE, THUMB])
@pytest.mark.parametrize("prompts", [1, 2])
def test_a_step_in_bf16(size: tuple[tuple[int, int], int], knobs: Knobs, prompts: int) -> None:
    check(clip_of(*size, prompts=prompts), knobs, Product(weights="bf16", dtype="bf16"))


FORMATS = [("bf16", weights) for weights in ("int8", "int8-dynamic", "nf4", "nf4-double", "fp8")]
FORMATS += [("fp32", weights) for weights in ("fp32", "int8", "nf4", "fp8")]


@pytest.mark.parametrize(("dtype", "weights"), FORMATS)
@pytest.mark.parametrize("knobs", [KNOBS[0], KNOBS[2]])
@pytest.mark.parametrize("size", [HD, IMAGE])
def test_a_step_in_other_formats(size: tuple[tuple[int, int], int], knobs: Knobs, dtype: str, weights: str) -> None:
    check(clip_of(*size), knobs, Product(weights=weights, dtype=dtype))


@pytest.mark.parametrize(("size", "goals"), [(HD, (3.8, 2.2, 1.8)), (SMALL, (2.3, 1.4, 1.2))])
def test_activations_stay_below_the_goals(size: tuple[tuple[int, int], int], goals: tuple[float, ...]) -> None:
    clip, bf16 = clip_of(*size, steps=50), Product(weights="bf16", dtype="bf16")
    for goal, groups in zip(goals, (1, 4, 24), strict=True):
        knobs = Knobs(token_chunk=2048, head_groups=groups)
        assert denoise_activations(DIMS, clip, knobs, bf16) <= goal * GIB


def test_the_longest_chunk_is_the_models() -> None:
    for tokens, chunk in product((1, 63, 64, 256, 257, 700, 2048, 2049, 2111, 2112), (64, 512, 2048)):
        lengths = [part.stop - part.start for part in token_chunks(tokens, chunk)]
        assert longest_chunk(tokens, chunk) == max(lengths)


def test_conditioning_is_what_the_model_makes() -> None:
    clip = Clip(shape=LatentShape(1, 2, 2), steps=50, prompts=2)
    made = empty_conditioning(clip, torch.bfloat16)
    nbytes = sum(tensor.nbytes for tensor in (made.double, made.single, made.final, made.text))
    assert conditioning_bytes(DIMS, clip, ITEM_BYTES["bf16"], clip.steps) == 2 * nbytes
    assert nbytes == pytest.approx((106 + 75) * 2**20, rel=0.01)


def test_small_parts_are_counted_to_the_byte() -> None:
    with torch.device("meta"):
        dit = Dit(DIMS).bfloat16()
    rest = {name: each.nbytes for name, each in dit.named_parameters() if not name.startswith(("double_", "single_"))}
    assert rest_bytes(DIMS, 2) == sum(rest.values())
    assert step_bytes(DIMS, 2) == sum(size for name, size in rest.items() if name.startswith(USED_BY_STEPS))
    clip = build_clip(HUNYUANVIDEO.clip, torch.float16)
    assert clip_bytes(HUNYUANVIDEO.clip, 2) == sum(each.nbytes for each in clip.parameters())


def test_the_longest_prompt_is_the_models() -> None:
    assert needs.TEXT_TOKENS == TEXT_TOKENS
    assert {name: template.published_crop for name, template in TEMPLATES.items()} == needs.TEMPLATE_TOKENS
