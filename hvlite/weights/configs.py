"""The dimensions of each model part: from its config.json, and without one from the shapes in its checkpoint's header.

Every field is held to its type and range here; whether it is true shows when the loaders compare the tensors. A model
folder may hold an `hvlite.json` with the model's name and what a Request's None means for it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from hvlite.dims import (
    HEAD_DIM_ROPE_AXES,
    HUNYUANVIDEO,
    ClipDims,
    DitDims,
    LlamaDims,
    RequestDefaults,
    VaeDims,
)
from hvlite.errors import WeightsError
from hvlite.weights.checkpoint import read_json
from hvlite.weights.dit_layouts import DIT, published_name
from hvlite.weights.keymap import CLIP, LLAMA, VAE, Part, Rule, clip_rules, llama_rules, vae_rules
from hvlite.weights.parts import Opened, open_part

Size = Annotated[int, Meta(ge=1, le=2**24)]
Count = Annotated[int, Meta(ge=1, le=1000)]
Positive = Annotated[float, Meta(gt=0, le=1e9)]

SETTINGS_FILE = "hvlite.json"

# Only the fields that decide the numbers, each with its range. Literals refuse relatives of the model.


class _DitConfig(msgspec.Struct):
    num_layers: Count
    num_single_layers: Count
    num_attention_heads: Size
    attention_head_dim: Size
    in_channels: Size
    text_embed_dim: Size
    pooled_projection_dim: Size
    rope_axes_dim: tuple[Size, Size, Size]
    out_channels: Size | None = None
    num_refiner_layers: Count = 2
    mlp_ratio: Positive = 4.0
    patch_size: Size = 2
    patch_size_t: Literal[1] = 1
    rope_theta: Positive = 256.0
    guidance_embeds: bool = True
    qk_norm: Literal["rms_norm"] = "rms_norm"
    image_condition_type: None = None


class _VaeConfig(msgspec.Struct):
    block_out_channels: Annotated[list[Size], Meta(min_length=1, max_length=16)]
    latent_channels: Size
    scaling_factor: Positive
    layers_per_block: Count = 2
    norm_num_groups: Size = 32
    spatial_compression_ratio: Size = 8
    temporal_compression_ratio: Size = 4
    act_fn: Literal["silu"] = "silu"
    mid_block_add_attention: Literal[True] = True


class _Rope(msgspec.Struct):
    rope_theta: Positive = 10000.0
    rope_type: Literal["default"] = "default"


class _LlamaConfig(msgspec.Struct):
    """transformers leaves out what equals its own defaults, which are these."""

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Annotated[int, Meta(ge=3, le=1000)] = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    max_position_embeddings: Size = 2048
    hidden_act: Literal["silu"] = "silu"


class _ClipConfig(msgspec.Struct):
    """As above."""

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    num_hidden_layers: Count = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Size = 77
    eos_token_id: Annotated[int, Meta(ge=0, le=2**24)] = 49407
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Positive = 1e-5


class _Defaults(msgspec.Struct, forbid_unknown_fields=True):
    size: tuple[Size, Size]
    frames: Size
    steps: Count
    guidance: Annotated[float, Meta(ge=0, le=100)]
    flow_shift: Annotated[float, Meta(gt=0, le=100)]


class _FolderSettings(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    defaults: _Defaults


Settings = TypeVar("Settings", bound=msgspec.Struct)


def _convert(file: Path, values: object, kind: type[Settings]) -> Settings:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise WeightsError(f"{file}: {error}; hvlite cannot run a model of this kind") from error


def _config(source: Path, mark: str) -> tuple[Path, dict[str, object]] | None:
    """The config.json beside a part's weights, if it speaks of such a part: one that has the field `mark`."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        return None
    values = read_json(file)
    nested = values.get("text_config")  # the language model in LLaVA's, the text tower in CLIP's
    if isinstance(nested, dict) and mark == "vocab_size":
        return file, nested
    return (file, values) if mark in values else None


def _expect(holds: bool, file: Path, fault: str) -> None:
    if not holds:
        raise WeightsError(f"{file}: {fault}")


def read_dit_dims(source: Path, load_key: str = "module") -> DitDims:
    """Of a folder or single file; `load_key` as for `open_checkpoint`."""
    found = _config(source, "num_single_layers")
    if found is None:
        return _dit_dims_from_shapes(open_part(DIT, source, load_key))
    file, config = found[0], _convert(*found, _DitConfig)
    axes, head_dim = config.rope_axes_dim, config.attention_head_dim
    _expect(
        sum(axes) == head_dim and all(axis % 2 == 0 for axis in axes),
        file,
        f"rope_axes_dim {list(axes)} should be even and add up to attention_head_dim {head_dim}",
    )
    _expect(config.mlp_ratio.is_integer(), file, f"mlp_ratio is {config.mlp_ratio}; expected a whole number")
    out_channels = config.out_channels or config.in_channels
    _check_channels(file, config.in_channels, out_channels)
    return DitDims(
        hidden=config.num_attention_heads * head_dim,
        heads=config.num_attention_heads,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        refiner_blocks=config.num_refiner_layers,
        mlp_ratio=int(config.mlp_ratio),
        latent_channels=config.in_channels,
        text_width=config.text_embed_dim,
        pooled_width=config.pooled_projection_dim,
        rope_axes=axes,
        rope_theta=config.rope_theta,
        has_guidance=config.guidance_embeds,
        patch=config.patch_size,
    )


def _check_channels(file: Path, read: int, written: int) -> None:
    _expect(
        read == written,
        file,
        f"the transformer reads {read} channels and writes {written}; hvlite renders text to video, where both are "
        "equal (33 or 32 against 16: an image-to-video variant)",
    )


def _dit_dims_from_shapes(opened: Opened) -> DitDims:
    """Everything but the RoPE axes, which only the published head size implies, and its theta."""
    hidden, channels, _, patch, _ = _shape(opened, "img_in.weight", 5)
    (head_dim,) = _shape(opened, "double_blocks.0.img.q_norm.weight", 1)
    mlp, _ = _shape(opened, "double_blocks.0.img.fc1.weight", 2)
    patch_features, _ = _shape(opened, "final_linear.weight", 2)
    _check_channels(opened.file, channels, patch_features // patch**2)
    axes = HEAD_DIM_ROPE_AXES.get(head_dim)
    if axes is None:
        known = ", ".join(map(str, HEAD_DIM_ROPE_AXES))
        raise WeightsError(
            f"{opened.file}: heads of {head_dim} features (known: {known}) have RoPE axes that no tensor tells; put "
            "the transformer's config.json beside the file"
        )
    for size, name in ((head_dim, "its heads'"), (mlp, "its MLP's")):
        _expect(max(size, hidden) % min(size, hidden) == 0, opened.file, f"width {hidden} and {name} {size} do not fit")
    return DitDims(
        hidden=hidden,
        heads=hidden // head_dim,
        double_blocks=_count(opened, r"(double_blocks|transformer_blocks)\.(\d+)\..+"),
        single_blocks=_count(opened, r"(single_blocks|single_transformer_blocks)\.(\d+)\..+"),
        refiner_blocks=_count(opened, r".+(individual_token_refiner\.blocks|refiner_blocks)\.(\d+)\..+"),
        mlp_ratio=mlp // hidden,
        latent_channels=channels,
        text_width=_shape(opened, "txt_in.input_embedder.weight", 2)[1],
        pooled_width=_shape(opened, "vector_in.linear_1.weight", 2)[1],
        rope_axes=axes,
        rope_theta=HUNYUANVIDEO.dit.rope_theta,
        has_guidance=published_name("guidance_in.linear_1.weight", opened.layout) in opened.tensors,
        patch=patch,
    )


def _shape(opened: Opened, ours: str, axes: int) -> tuple[int, ...]:
    name = published_name(ours, opened.layout)
    stored = opened.tensors.get(name)
    shape = stored.shape if stored else ()
    if len(shape) != axes or 0 in shape:
        raise WeightsError(f"{opened.file}: tensor {name!r} has shape {list(shape)}; expected {axes} sizes above 0")
    return shape


def _count(opened: Opened, pattern: str) -> int:
    """How many different blocks there are: a stray number makes no room for a million of them."""
    matches = (re.fullmatch(pattern, name) for name in opened.tensors)
    return len({match[2] for match in matches if match})


def read_vae_dims(source: Path) -> VaeDims:
    found = _config(source, "block_out_channels")
    if found is None:
        opened = open_part(VAE, source)
        _expect_published(opened, VAE, vae_rules(HUNYUANVIDEO.vae, opened.layout))
        return HUNYUANVIDEO.vae
    file, values = found
    if "time_compression_ratio" in values:  # the original release's word (spec 3.4)
        values = {"temporal_compression_ratio": values["time_compression_ratio"], **values}
    config = _convert(file, values, _VaeConfig)
    channels, groups = tuple(config.block_out_channels), config.norm_num_groups
    ratios = (config.spatial_compression_ratio, config.temporal_compression_ratio)
    _expect(
        all(ratio & (ratio - 1) == 0 and ratio.bit_length() <= len(channels) for ratio in ratios),
        file,
        f"compression ratios {ratios} should be powers of two that {len(channels)} levels can reach",
    )
    _expect(
        all(width % groups == 0 for width in channels),
        file,
        f"block_out_channels {list(channels)} should be multiples of norm_num_groups {groups}",
    )
    return VaeDims(
        channels=channels,
        layers_per_block=config.layers_per_block,
        norm_groups=groups,
        latent_channels=config.latent_channels,
        scaling_factor=config.scaling_factor,
        spatial_ratio=ratios[0],
        temporal_ratio=ratios[1],
    )


def read_llama_dims(source: Path) -> LlamaDims:
    found = _config(source, "vocab_size")
    if found is None:
        _expect_published(open_part(LLAMA, source), LLAMA, llama_rules(HUNYUANVIDEO.llama))
        return HUNYUANVIDEO.llama
    file, config = found[0], _convert(*found, _LlamaConfig)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    rope = config.rope_parameters or _Rope()
    _expect(
        config.hidden_size % heads == 0
        and heads % kv_heads == 0
        and config.head_dim in (None, config.hidden_size // heads),
        file,
        f"hidden_size {config.hidden_size}, {heads} heads and {kv_heads} key-value heads do not divide",
    )
    return LlamaDims(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        mlp_hidden=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        rms_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta or rope.rope_theta,
        max_positions=config.max_position_embeddings,
    )


def read_clip_dims(source: Path) -> ClipDims:
    found = _config(source, "vocab_size")
    if found is None:
        _expect_published(open_part(CLIP, source), CLIP, clip_rules(HUNYUANVIDEO.clip))
        return HUNYUANVIDEO.clip
    file, config = found[0], _convert(*found, _ClipConfig)
    heads = config.num_attention_heads
    _expect(config.hidden_size % heads == 0, file, f"hidden_size {config.hidden_size} and {heads} heads do not divide")
    return ClipDims(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        mlp_hidden=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        positions=config.max_position_embeddings,
        # The published config says 2, which transformers takes for: the highest token there is.
        eos_token=config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
    )


def _expect_published(opened: Opened, part: Part, rules: Iterator[Rule]) -> None:
    """Without a config, only the published sizes are known well enough: heads, groups and factors are no shapes."""
    for rule in rules:
        for name, shape in rule.sources:
            stored = opened.tensors.get(name)
            if stored is not None and stored.shape != shape:
                raise WeightsError(
                    f"{opened.file}: tensor {stored.name!r} has shape {list(stored.shape)}, published {list(shape)}; "
                    f"for a {part.title} of another size, put its config.json beside it"
                )


def read_folder_settings(folder: Path) -> tuple[str, RequestDefaults] | None:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return None
    settings = _convert(file, read_json(file), _FolderSettings)
    given = settings.defaults
    _expect(all(side % 16 == 0 for side in given.size), file, f"size {given.size} should be multiples of 16")
    _expect(given.frames % 4 == 1, file, f"frames is {given.frames}; expected 4k+1")
    return settings.name, RequestDefaults(
        size=given.size,
        frames=given.frames,
        steps=given.steps,
        guidance=given.guidance,
        flow_shift=given.flow_shift,
    )
