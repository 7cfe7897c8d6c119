"""What each stage holds beside its weights, in bytes, written out term by term as the model's code makes it. No torch.

Every function here is the arithmetic of some function of `model`, named in its docstring: whoever changes the one
changes the other, and the tests hold both together by a trace. A product's temporaries are those of `quant`. Terms
below a megabyte (biases, single vectors) are left out.
"""

# S tokens (video first, text after)  L text tokens  D hidden  c tokens of a chunk  T steps
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from hvlite.dims import SINUSOID_WIDTH, ClipDims, DitDims, LatentShape, LlamaDims

FP32 = 4
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Longest prompt, and what each template puts before it (model.text).
TEXT_TOKENS = 256
TEMPLATE_TOKENS: Mapping[str, int] = {"video": 95, "image": 36}
# A chunk's tail of fewer tokens joins the chunk before it (model.ops.token_chunks).
SHORTEST_TAIL = 64
# Tokens that are multiplied at a time as integers, and the shortest tail of them (quant.int8).
INTEGER_TOKENS = 512
SHORTEST_INTEGERS = 32
NF4_GROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What of a request its memory depends on. `prompts`: one, or two with true guidance."""

    shape: LatentShape
    steps: int
    prompts: int = 1
    text_tokens: int = TEXT_TOKENS
    template_tokens: int = max(TEMPLATE_TOKENS.values())

    @property
    def tokens(self) -> int:
        """Of the joint sequence."""
        return self.shape.tokens + self.text_tokens

    @property
    def encoded_tokens(self) -> int:
        """Of a prompt in its template, as the language model reads it."""
        return self.template_tokens + self.text_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How the blocks are computed: tokens per chunk, groups of heads that attend one after the other."""

    token_chunk: int
    head_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """How matrices are held (`weights`, a format's name) and in which dtype they are multiplied."""

    weights: str
    dtype: str

    @property
    def item(self) -> int:
        """Bytes of a number that goes in or comes out."""
        return ITEM_BYTES[self.dtype]

    def takes_integers(self, tokens: int) -> bool:
        """Whether so many tokens are multiplied as integers."""
        return self.weights == "int8-dynamic" and tokens >= SHORTEST_INTEGERS

    def scratch(self, tokens: int, columns: int, rows: int) -> int:
        """The buffer that a weight of this size is written into before it is multiplied; shared by all weights."""
        return 0 if self.weights == self.dtype or self.takes_integers(tokens) else rows * columns * self.item

    def run(self, tokens: int, columns: int, rows: int) -> int:
        """The most that x [tokens,columns] W^T holds while it runs, beside x and scratch; its result is part of it."""
        result = tokens * rows * self.item
        if self.takes_integers(tokens):
            return result + _integers(tokens, columns, rows)
        return max(result, self._dequantising(rows, columns))

    def add(self, tokens: int, columns: int, rows: int) -> int:
        """The same where the product is added to a result that is there."""
        if self.takes_integers(tokens):
            return _integers(tokens, columns, rows)
        return self._dequantising(rows, columns)

    def _dequantising(self, rows: int, columns: int) -> int:
        if self.weights == "nf4-double":
            return ceil(rows * columns / NF4_GROUP) * FP32  # the groups' absmax
        if self.weights == "fp8" and self.dtype != "bf16":
            return rows * columns * ITEM_BYTES["bf16"]  # the rounding on the way
        return 0


def _integers(tokens: int, columns: int, rows: int) -> int:
    """quant.int8.DynamicInt8Linear: a slice of tokens at a time."""
    part = _longest(tokens, INTEGER_TOKENS, SHORTEST_INTEGERS)
    kept = part * rows * FP32 + part * columns if tokens > part else 0  # of the slice before: product and int8 tokens
    quantising = part * columns * (FP32 + 1)
    multiplying = part * columns + part * rows * (FP32 + FP32)  # int32, then scaled
    return kept + max(quantising, multiplying)


def longest_chunk(tokens: int, chunk: int) -> int:
    """The tokens of the longest of `model.ops.token_chunks`."""
    return _longest(tokens, chunk, SHORTEST_TAIL)


def _longest(tokens: int, chunk: int, shortest_tail: int) -> int:
    tail = tokens % chunk
    return min(tokens, chunk + tail if 0 < tail < shortest_tail else chunk)


# The transformer.


def conditioning_bytes(dims: DitDims, clip: Clip, item: int, steps: int) -> int:
    """model.dit.Conditioning: of every prompt, all vectors and the refined text of so many steps."""
    vectors = dims.double_blocks * 2 * 6 + dims.single_blocks * 3 + 2
    return clip.prompts * steps * (vectors + clip.text_tokens) * dims.hidden * item


def latent_bytes(dims: DitDims, clip: Clip, item: int = FP32) -> int:
    """One set of latents [1,C,T,H,W]."""
    return dims.latent_channels * clip.shape.frames * clip.shape.height * clip.shape.width * item


def modulate_bytes(tokens: int, dims: DitDims, item: int) -> int:
    """model.ops.modulate: x in fp32, if it is not that already, and its norm with a mean and a deviation per token."""
    wide = tokens * dims.hidden * FP32
    return wide + (wide if item < FP32 else 0) + 2 * tokens * FP32


def project_bytes(tokens: int, dims: DitDims, knobs: Knobs, product: Product) -> int:
    """model.dit.QkvPart._project_rows: z, and of one of q, k, v what its product, norm or rotation holds."""
    width = dims.hidden // knobs.head_groups
    z = tokens * dims.hidden * product.item
    part, wide = tokens * width * product.item, tokens * width * FP32
    own = wide if product.item < FP32 else 0  # x.float() makes no copy of fp32
    rotating = part + own + 3 * (wide // 2)  # two products of pairs and their sum; the norm before it holds less
    return max(
        modulate_bytes(tokens, dims, product.item),
        z + max(product.run(tokens, dims.hidden, width), rotating),
    )


def finish_bytes(tokens: int, dims: DitDims, product: Product) -> int:
    """What Stream._finish_rows and SingleBlock._finish_rows hold: the larger of the two, which differ by little."""
    hidden, inner = dims.hidden, dims.mlp_hidden
    z = tokens * hidden * product.item
    middle = tokens * inner * product.item
    projected = tokens * hidden * product.item
    return max(
        modulate_bytes(tokens, dims, product.item),
        z + product.run(tokens, hidden, inner),
        middle + product.run(tokens, hidden, hidden),
        middle + product.run(tokens, inner, hidden),  # double: fc2
        middle + projected + product.add(tokens, inner, hidden),  # single: linear2_mlp
    )


def block_scratch(dims: DitDims, clip: Clip, product: Product) -> int:
    """For the largest row slice that any block multiplies by: fc1, fc2, and the MLP's share of linear1."""
    return product.scratch(clip.text_tokens, dims.hidden, dims.mlp_hidden)


def denoise_activations(dims: DitDims, clip: Clip, knobs: Knobs, product: Product) -> int:
    """Of the line's steps: Dit.run_block, with the streams of all prompts side by side, and one step's conditioning.

    Where a stream is narrow, Dit.embed may hold more than a block, and Dit.head: the latents cut in patches, and again.
    """
    item = product.item
    stream = clip.tokens * dims.hidden * item
    group = stream // knobs.head_groups
    chunk = max(longest_chunk(tokens, knobs.token_chunk) for tokens in (clip.shape.tokens, clip.tokens))
    always = (
        conditioning_bytes(dims, clip, item, 1)
        + latent_bytes(dims, clip)
        + 3 * group  # q, k, v
        + 2 * clip.tokens * dims.head_dim // 2 * FP32  # cos, sin
        + block_scratch(dims, clip, product)
        + clip.prompts * stream  # x
    )
    projecting, finishing = project_bytes(chunk, dims, knobs, product), finish_bytes(chunk, dims, product)
    if knobs.head_groups == 1:
        block = max(projecting, group, group + finishing)
    else:
        attended = stream
        block = attended + max(projecting, group, finishing)
    narrow = latent_bytes(dims, clip, item)
    embedding = latent_bytes(dims, clip) + (narrow if item < FP32 else 0)
    return always + max(block, embedding, 2 * narrow)


def rest_bytes(dims: DitDims, item: int) -> int:
    """All of the transformer but its blocks and their modulation."""
    hidden, width = dims.hidden, SINUSOID_WIDTH
    matrices = [
        (dims.patch_features, hidden),  # img_in
        *_embedder(width, hidden),  # time_in
        *_embedder(dims.pooled_width, hidden),  # vector_in
        *(_embedder(width, hidden) if dims.has_guidance else []),  # guidance_in
        (dims.text_width, hidden),  # txt_in.input_embedder
        *_embedder(width, hidden),  # txt_in.t_embedder
        *_embedder(dims.text_width, hidden),  # txt_in.c_embedder
        *dims.refiner_blocks * _refiner_block(dims),
        (hidden, 2 * hidden),  # final_mod
        (hidden, dims.patch_features),  # final_linear
    ]
    return item * sum(columns * rows + rows for columns, rows in matrices)


def step_bytes(dims: DitDims, item: int) -> int:
    """Of these, img_in and final_linear: all that a step uses beside the blocks."""
    return item * (2 * dims.patch_features * dims.hidden + dims.hidden + dims.patch_features)


def _embedder(columns: int, hidden: int) -> list[tuple[int, int]]:
    """model.dit.EmbeddingMlp: its two matrices, each with a bias."""
    return [(columns, hidden), (hidden, hidden)]


def _refiner_block(dims: DitDims) -> list[tuple[int, int]]:
    """model.dit.RefinerBlock; its four norm vectors count as a matrix of three columns and a bias."""
    hidden, inner = dims.hidden, dims.mlp_hidden
    return [(3, hidden), (hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden), (hidden, 2 * hidden)]


def schedule_activations(dims: DitDims, clip: Clip, product: Product) -> int:
    """Of Dit.prepare_schedule: everything that it makes, and what modulation or the refiner needs while it is made.

    The texts come in; of every step silu(vec) [1,D] is kept until all modulation is done.
    """
    item, hidden = product.item, dims.hidden
    vectors = clip.prompts * clip.steps * hidden * item
    modulating = product.scratch(1, hidden, 6 * hidden) + product.run(1, hidden, 6 * hidden)
    made = conditioning_bytes(dims, clip, item, clip.steps)
    return made + texts_bytes(dims, clip, item) + vectors + max(modulating, refiner_bytes(dims, clip, item))


def texts_bytes(dims: DitDims, clip: Clip, item: int) -> int:
    """What the text encoder says of every prompt, [L,text_width]."""
    return clip.prompts * clip.text_tokens * dims.text_width * item


def refiner_bytes(dims: DitDims, clip: Clip, item: int) -> int:
    """model.dit.RefinerBlock at its widest: y before and after attention; q, k, v; the MLP's middle, and its SiLU."""
    return clip.text_tokens * (2 * dims.hidden + 3 * dims.hidden + 2 * dims.mlp_hidden) * item


# The text encoders.


def clip_bytes(dims: ClipDims, item: int) -> int:
    """All of CLIP's text tower."""
    hidden, inner = dims.hidden, dims.mlp_hidden
    embeddings = (dims.vocabulary + dims.positions) * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    return item * (embeddings + dims.layers * layer + 2 * hidden)


def text_activations(dims: LlamaDims, clip: Clip, product: Product) -> int:
    """Of model.text.encode_texts: the states of all prompts, and a layer at work on one of them.

    CLIP runs first, with less. A layer's attention is counted as torch computes it on meta, without a fused kernel: in
    fp32, with a mask and all scores and with keys and values repeated for every head; a card needs less.
    """
    item, tokens = product.item, clip.encoded_tokens
    stream = tokens * dims.hidden
    keys = stream // dims.heads * dims.kv_heads
    scores = tokens * tokens * dims.heads
    narrow = item if item < FP32 else 0  # what fp32 is made of, where it is not fp32 already
    mask = tokens * tokens * FP32
    attention = mask + 4 * stream * FP32 + 2 * keys * (FP32 + narrow) + stream * narrow
    attention += max(2 * scores * FP32, (scores + stream) * (FP32 + narrow))  # at the softmax; at the product after it
    middle = tokens * dims.mlp_hidden * item
    widest = max(
        product.run(tokens, *shape) for shape in ((dims.hidden, dims.mlp_hidden), (dims.mlp_hidden, dims.hidden))
    )
    mlp = stream * item + middle + max(2 * middle, widest)  # the sum with attention; gate, up and their product
    states = (clip.prompts + 1) * stream * item  # every prompt's, and the norm of the one at work
    rotary = clip.prompts * 2 * tokens * dims.hidden // dims.heads * item
    scratch = product.scratch(tokens, dims.hidden, dims.mlp_hidden)
    return states + rotary + scratch + max(attention, mlp)
