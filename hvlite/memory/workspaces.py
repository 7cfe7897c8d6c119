"""What the libraries below torch take for themselves while they work: memory that no trace of tensors sees. No torch.

Every entry says where its number is from. Where a number depends on the card, it is the largest that any card asks for.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from hvlite.dims import DitDims
from hvlite.memory.needs import FP32, SHORTEST_INTEGERS, Clip, Knobs, Product

Kind = Literal["cuda", "cpu"]
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One of them. `source`: a document, a library's code, or a measurement."""

    what: str
    nbytes: int
    source: str


def products(kind: Kind) -> Entry:
    """Of matrix products, in every stage."""
    if kind == "cuda":
        return Entry(
            what="cuBLAS and cuBLASLt, one buffer each for the computing stream",
            nbytes=2 * 32 * MIB,
            source="ATen, CublasHandlePool.cpp and CUDABlas.cpp: 32 MiB from compute capability 9.0 on, else 8.1 and 4",
        )
    return Entry(
        what="packed slices of oneDNN's and MKL's products",
        nbytes=32 * MIB,
        source="growth of the resident set in [2048,3072] x [3072,12288]: 10 MiB in fp32, 1 in bf16, with 2 threads",
    )


def attention(kind: Kind, backend: str, dims: DitDims, clip: Clip, knobs: Knobs) -> Entry:
    """Of one attention of one group of heads, beside its output, which is counted as a tensor."""
    heads = dims.heads // knobs.head_groups
    elements = clip.tokens * heads * dims.head_dim
    if kind == "cpu":
        return Entry(
            what="blocks of scores, by thread",
            nbytes=16 * MIB,
            source="growth of the resident set in attention over 8,000 tokens and 24 heads: 5 MiB with 2 threads",
        )
    if backend == "sage":
        # v in fp16, k less its mean, q and k in one byte
        return Entry(
            what="quantised q and k, smoothed k, v in fp16",
            nbytes=elements * (2 + 2 + 1 + 1),
            source="sageattention, core.py and quant_per_block.py",
        )
    return Entry(
        what="the logarithms of the sums of every row, padded to 128 rows",
        nbytes=heads * ceil(clip.tokens / 128) * 128 * FP32,
        source="flash_attn, flash_api.cpp (mha_fwd); torch's flash, cuDNN and efficient kernels hold the same or less",
    )


def short_prompts(dims: DitDims, clip: Clip, product: Product) -> Entry:
    """int8-dynamic multiplies a few tokens as int8 does: a prompt that short is known only when it is encoded."""
    return Entry(
        what=f"a dequantised weight, for prompts of fewer than {SHORTEST_INTEGERS} tokens",
        nbytes=product.scratch(1, dims.hidden, dims.mlp_hidden) if product.takes_integers(clip.text_tokens) else 0,
        source="quant.int8.DynamicInt8Linear",
    )


def convolutions(kind: Kind) -> Entry:
    """Of the VAE's convolutions, which read and write channels-last tensors as they lie."""
    if kind == "cuda":
        return Entry(
            what="cuDNN's choice of algorithm",
            nbytes=256 * MIB,
            source="an allowance: cuDNN's heuristics state no limit for implicit products on channels-last tensors",
        )
    return Entry(
        what="reordered weights and slices of oneDNN",
        nbytes=64 * MIB,
        source="growth of the resident set in a decode with 2 threads",
    )
