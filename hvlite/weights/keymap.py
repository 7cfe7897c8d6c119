"""What published checkpoints call things: how a layout is known, and the VAE and the text encoders in our names.

No tensors and no files, only names and shapes. A `Rule` says which published tensors, joined along their rows,
become which of ours; a `Part` says by which key a layout is known and what a file may hold that we do not need.
Anything else in a file is an error. The transformer's tables are in `dit_layouts`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from hvlite.dims import ClipDims, LlamaDims, VaeDims

Shape = tuple[int, ...]
Named = tuple[str, Shape]


class Change(Enum):
    """What happens to a rule's joined sources."""

    RESHAPE = "take the target's shape"
    SPLIT_COLUMNS = "each target takes its columns, in order"
    SWAP_HALVES = "second half of the rows first"


@dataclass(frozen=True, slots=True)
class Rule:
    """`sources` (published), joined along their rows, become `targets` (ours)."""

    sources: tuple[Named, ...]
    targets: tuple[Named, ...]
    change: Change = Change.RESHAPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How one model part is recognised.

    `marks`: layout -> a key that no other layout has. `prefixes`: what may stand before every key of a file.
    `aliases`: layout -> (ending in the file, ending in our tables). `dropped`: patterns of whole keys, with or
    without the prefix, that published files hold and hvlite does not need.
    """

    title: str
    marks: Mapping[str, str]
    prefixes: tuple[str, ...]
    aliases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def detect(self, keys: Collection[str]) -> "Found | None":
        """The first layout and prefix whose mark is among `keys`."""
        for prefix in self.prefixes:
            for layout, mark in self.marks.items():
                if prefix + mark in keys:
                    return Found(layout, prefix)
        return None

    def drops(self, key: str, prefix: str) -> bool:
        """Whether `key` is known and not needed."""
        names = (key, key.removeprefix(prefix))
        return any(re.fullmatch(pattern, name) for pattern in self.dropped for name in names)

    def table_name(self, key: str, found: "Found") -> str:
        """`key` without the prefix, and with the ending that our tables use."""
        name = key.removeprefix(found.prefix)
        ending, ours = self.aliases.get(found.layout, ("", ""))
        return name.removesuffix(ending) + ours if ending and name.endswith(ending) else name


@dataclass(frozen=True, slots=True)
class Found:
    """The layout of a file and the prefix that all its keys carry."""

    layout: str
    prefix: str


VAE = Part(
    title="VAE",
    marks={"diffusers": "decoder.conv_norm_out.weight", "ldm": "decoder.norm_out.weight"},
    prefixes=("", "vae."),
)
LLAMA = Part(
    title="text encoder",
    marks={"llama": "embed_tokens.weight"},
    prefixes=("", "model.", "language_model.model.", "model.language_model."),
    dropped=(
        r"norm\.weight",  # hvlite takes the states before the final norm
        r"((language_)?model\.)?lm_head\.weight",
        r"(model\.)?vision_tower\..+",
        r"(model\.)?multi_modal_projector\..+",
        r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"tokenizer",
    ),
)
CLIP = Part(
    title="second text encoder",
    marks={"clip": "embeddings.token_embedding.weight"},
    prefixes=("", "text_model."),
    dropped=(
        r"vision_model\..+",
        r"text_projection\.weight",
        r"visual_projection\.weight",
        r"logit_scale",
        r"embeddings\.position_ids",
    ),
)


def vae_rules(dims: VaeDims, layout: str) -> Iterator[Rule]:
    """The VAE from its `diffusers` names, which are ours, or from the `ldm` ones (spec 3.4)."""
    for ours, shape in vae_shapes(dims):
        if layout == "ldm":
            is_attention_weight = ".attentions.0." in ours and len(shape) == 2
            yield Rule(((_ldm_name(ours, dims), shape + (1, 1, 1) * is_attention_weight),), ((ours, shape),))
        else:
            yield Rule(((ours, shape),), ((ours, shape),))


LDM_NAMES = (
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
    (".mid_block.attentions.0.to_q.", ".mid.attn_1.q."),
    (".mid_block.attentions.0.to_k.", ".mid.attn_1.k."),
    (".mid_block.attentions.0.to_v.", ".mid.attn_1.v."),
    (".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out."),
    (".down_blocks.", ".down."),
    (".up_blocks.", ".up."),
    (".resnets.", ".block."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)


def _ldm_name(ours: str, dims: VaeDims) -> str:
    last = len(dims.channels) - 1
    name = re.sub(r"(?<=\.up_blocks\.)\d+", lambda level: str(last - int(level[0])), ours)
    for plain, ldm in LDM_NAMES:
        name = name.replace(plain, ldm)
    return name


def vae_shapes(dims: VaeDims) -> Iterator[Named]:
    """Every parameter of the VAE in our (and diffusers') names, encoder first."""
    first, last, latent = dims.channels[0], dims.channels[-1], dims.latent_channels
    widths = list(zip((first, *dims.channels[:-1]), dims.channels, strict=True))
    yield from _conv("encoder.conv_in.conv", 3, first)
    for level, (before, width) in enumerate(widths):
        block = f"encoder.down_blocks.{level}"
        yield from _resnets(block, before, width, dims.layers_per_block)
        if dims.level_ratios[level] != (1, 1):
            yield from _conv(f"{block}.downsamplers.0.conv.conv", width, width)
    yield from _ends("encoder", last, last, 2 * latent)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)

    yield from _conv("decoder.conv_in.conv", latent, last)
    climb = tuple(reversed(dims.channels))
    for level, (before, width) in enumerate(zip((last, *climb[:-1]), climb, strict=True)):
        block = f"decoder.up_blocks.{level}"
        yield from _resnets(block, before, width, dims.layers_per_block + 1)
        if dims.level_ratios[level] != (1, 1):
            yield from _conv(f"{block}.upsamplers.0.conv.conv", width, width)
    yield from _ends("decoder", last, first, 3)


def _ends(half: str, middle: int, width: int, out: int) -> Iterator[Named]:
    """The middle block, and the norm and convolution that close this half of the VAE."""
    yield from _resnets(f"{half}.mid_block", middle, middle, 2)
    yield from _norm(f"{half}.mid_block.attentions.0.group_norm", middle)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{half}.mid_block.attentions.0.{name}.weight", (middle, middle)
        yield f"{half}.mid_block.attentions.0.{name}.bias", (middle,)
    yield from _norm(f"{half}.conv_norm_out", width)
    yield from _conv(f"{half}.conv_out.conv", width, out)


def _resnets(block: str, before: int, width: int, count: int) -> Iterator[Named]:
    for index in range(count):
        name, entering = f"{block}.resnets.{index}", before if index == 0 else width
        yield from _norm(f"{name}.norm1", entering)
        yield from _conv(f"{name}.conv1.conv", entering, width)
        yield from _norm(f"{name}.norm2", width)
        yield from _conv(f"{name}.conv2.conv", width, width)
        if entering != width:
            yield from _conv(f"{name}.conv_shortcut.conv", entering, width, 1)


def _conv(name: str, width_in: int, width_out: int, kernel: int = 3) -> Iterator[Named]:
    yield f"{name}.weight", (width_out, width_in, kernel, kernel, kernel)
    yield f"{name}.bias", (width_out,)


def _norm(name: str, width: int) -> Iterator[Named]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def llama_rules(dims: LlamaDims) -> Iterator[Rule]:
    """The embedding and the layers that are run; the names are transformers' (spec 4.1)."""
    names: list[Named] = [("embed_tokens.weight", (dims.vocabulary, dims.hidden))]
    for layer in range(dims.used_layers):
        names += _llama_layer(dims, layer)
    return (Rule((named,), (named,)) for named in names)


def unused_llama_names(dims: LlamaDims) -> frozenset[str]:
    """The layers after those whose states are the text states (spec 4.1, step 4)."""
    return frozenset(name for k in range(dims.used_layers, dims.layers) for name, _ in _llama_layer(dims, k))


def _llama_layer(dims: LlamaDims, layer: int) -> list[Named]:
    hidden, mlp = dims.hidden, dims.mlp_hidden
    keys = hidden // dims.heads * dims.kv_heads
    shapes: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return [(f"layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]


def clip_rules(dims: ClipDims) -> Iterator[Rule]:
    """The CLIP text tower; the names are transformers', without `text_model.` (spec 4.2)."""
    hidden, mlp = dims.hidden, dims.mlp_hidden
    names: list[Named] = [
        ("embeddings.token_embedding.weight", (dims.vocabulary, hidden)),
        ("embeddings.position_embedding.weight", (dims.positions, hidden)),
    ]
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkv"}
    linears |= {"self_attn.out_proj": (hidden, hidden), "mlp.fc1": (mlp, hidden), "mlp.fc2": (hidden, mlp)}
    for layer in range(dims.layers):
        block = f"encoder.layers.{layer}"
        names += [*_norm(f"{block}.layer_norm1", hidden), *_norm(f"{block}.layer_norm2", hidden)]
        for name, shape in linears.items():
            names += [(f"{block}.{name}.weight", shape), (f"{block}.{name}.bias", shape[:1])]
    names += _norm("final_layer_norm", hidden)
    return (Rule((named,), (named,)) for named in names)
