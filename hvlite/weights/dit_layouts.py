"""The transformer's three published layouts side by side: original (A), ComfyUI (B), diffusers (C); and our names.

Spec 2.2, 2.3 and 2.5 as one table, `DIT_GROUPS`. Our differences from A: the patch embedding is a Linear,
modulation stands apart from the blocks, and the columns of `linear2` are two tensors (design.md 4).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hvlite.dims import SINUSOID_WIDTH, DitDims
from hvlite.weights.keymap import Change, Part, Rule

DIT = Part(
    title="transformer",
    marks={
        "A": "double_blocks.0.img_attn_qkv.weight",
        "B": "double_blocks.0.img_attn.qkv.weight",
        "C": "transformer_blocks.0.attn.to_q.weight",
    },
    prefixes=(
        "",
        "module.",
        "model.diffusion_model.",
        "model.model.",
        "diffusion_model.",
        "net.",
        "transformer.",
    ),
    aliases={"B": ("_norm.scale", "_norm.weight")},  # newer files of layout B already say `.weight`
)


class Row(NamedTuple):
    """One line of a group. `b` empty: as `a`. Several names in `c`: the rows of `a` are split over them.

    `shape` is that of our weight, in the letters of `_sizes`; `d` is a norm of heads, which has no bias. Two names
    in `ours`: they share the columns of `a`, and the first one has the bias.
    """

    ours: str
    a: str
    b: str
    c: str
    shape: str


class Group(NamedTuple):
    """Rows below one module; `repeats` is the field of DitDims that says how often (empty: once)."""

    ours: str
    ab: str
    c: str
    repeats: str
    rows: tuple[Row, ...]


# fmt: off
_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
DIT_GROUPS = (
    Group("", "", "", "", (
        Row("img_in",     "img_in.proj",                    "", "x_embedder.proj", "D P"),
        Row("final_mod",  "final_layer.adaLN_modulation.1", "", "norm_out.linear", "2D D"),
        Row("final_linear", "final_layer.linear",           "", "proj_out",        "P D"),
    )),
    Group("time_in", "time_in", "time_text_embed.timestep_embedder", "", (
        Row("linear_1", "mlp.0", "in_layer",  "linear_1", "D S"),
        Row("linear_2", "mlp.2", "out_layer", "linear_2", "D D"),
    )),
    Group("guidance_in", "guidance_in", "time_text_embed.guidance_embedder", "has_guidance", (
        Row("linear_1", "mlp.0", "in_layer",  "linear_1", "D S"),
        Row("linear_2", "mlp.2", "out_layer", "linear_2", "D D"),
    )),
    Group("vector_in", "vector_in", "time_text_embed.text_embedder", "", (
        Row("linear_1", "in_layer",  "", "linear_1", "D V"),
        Row("linear_2", "out_layer", "", "linear_2", "D D"),
    )),
    Group("txt_in", "txt_in", "context_embedder", "", (
        Row("input_embedder",      "input_embedder",      "",                     "proj_in", "D T"),
        Row("t_embedder.linear_1", "t_embedder.mlp.0",    "t_embedder.in_layer",
            "time_text_embed.timestep_embedder.linear_1", "D S"),
        Row("t_embedder.linear_2", "t_embedder.mlp.2",    "t_embedder.out_layer",
            "time_text_embed.timestep_embedder.linear_2", "D D"),
        Row("c_embedder.linear_1", "c_embedder.linear_1", "c_embedder.in_layer",
            "time_text_embed.text_embedder.linear_1",     "D T"),
        Row("c_embedder.linear_2", "c_embedder.linear_2", "c_embedder.out_layer",
            "time_text_embed.text_embedder.linear_2",     "D D"),
    )),
    Group("txt_in.blocks.{}", "txt_in.individual_token_refiner.blocks.{}",
          "context_embedder.token_refiner.refiner_blocks.{}", "refiner_blocks", (
        Row("norm1",     "norm1",              "",               "norm1",           "D"),
        Row("norm2",     "norm2",              "",               "norm2",           "D"),
        Row("attn_qkv",  "self_attn_qkv",      "self_attn.qkv",  _QKV,              "3D D"),
        Row("attn_proj", "self_attn_proj",     "self_attn.proj", "attn.to_out.0",   "D D"),
        Row("fc1",       "mlp.fc1",            "mlp.0",          "ff.net.0.proj",   "M D"),
        Row("fc2",       "mlp.fc2",            "mlp.2",          "ff.net.2",        "D M"),
        Row("mod",       "adaLN_modulation.1", "",               "norm_out.linear", "2D D"),
    )),
    Group("double_mods.{}", "double_blocks.{}", "transformer_blocks.{}", "double_blocks", (
        Row("img", "img_mod.linear", "img_mod.lin", "norm1.linear",         "6D D"),
        Row("txt", "txt_mod.linear", "txt_mod.lin", "norm1_context.linear", "6D D"),
    )),
    Group("double_blocks.{}", "double_blocks.{}", "transformer_blocks.{}", "double_blocks", (
        Row("img.attn_qkv",    "img_attn_qkv",    "img_attn.qkv",             _QKV,                "3D D"),
        Row("img.q_norm",      "img_attn_q_norm", "img_attn.norm.query_norm", "attn.norm_q",       "d"),
        Row("img.k_norm",      "img_attn_k_norm", "img_attn.norm.key_norm",   "attn.norm_k",       "d"),
        Row("img.attn_proj",   "img_attn_proj",   "img_attn.proj",            "attn.to_out.0",     "D D"),
        Row("img.fc1",         "img_mlp.fc1",     "img_mlp.0",                "ff.net.0.proj",     "M D"),
        Row("img.fc2",         "img_mlp.fc2",     "img_mlp.2",                "ff.net.2",          "D M"),
        Row("txt.attn_qkv",    "txt_attn_qkv",    "txt_attn.qkv",             _ADDED_QKV,          "3D D"),
        Row("txt.q_norm",      "txt_attn_q_norm", "txt_attn.norm.query_norm", "attn.norm_added_q", "d"),
        Row("txt.k_norm",      "txt_attn_k_norm", "txt_attn.norm.key_norm",   "attn.norm_added_k", "d"),
        Row("txt.attn_proj",   "txt_attn_proj",   "txt_attn.proj",            "attn.to_add_out",   "D D"),
        Row("txt.fc1",         "txt_mlp.fc1",     "txt_mlp.0",            "ff_context.net.0.proj", "M D"),
        Row("txt.fc2",         "txt_mlp.fc2",     "txt_mlp.2",            "ff_context.net.2",      "D M"),
    )),
    Group("single_mods.{}", "single_blocks.{}", "single_transformer_blocks.{}", "single_blocks", (
        Row("", "modulation.linear", "modulation.lin", "norm.linear", "3D D"),
    )),
    Group("single_blocks.{}", "single_blocks.{}", "single_transformer_blocks.{}", "single_blocks", (
        Row("linear1", "linear1", "",                "attn.to_q attn.to_k attn.to_v proj_mlp", "3D+M D"),
        Row("linear2_attn linear2_mlp", "linear2", "", "proj_out",                             "D D+M"),
        Row("q_norm",  "q_norm",  "norm.query_norm", "attn.norm_q",                            "d"),
        Row("k_norm",  "k_norm",  "norm.key_norm",   "attn.norm_k",                            "d"),
    )),
)
# fmt: on


def dit_rules(dims: DitDims, layout: str) -> Iterator[Rule]:
    """The transformer from layout A, B or C, group by group, block by block."""
    for group in DIT_GROUPS:
        for index in range(int(getattr(dims, group.repeats)) if group.repeats else 1):
            for row in group.rows:
                yield from _row_rules(row, _module_names(group, row, layout, index), dims)


def published_name(ours: str, layout: str) -> str:
    """What `layout` calls a parameter of ours (of a block 0) that is one whole tensor there."""
    module, _, leaf = ours.rpartition(".")
    for group in DIT_GROUPS:
        for row in group.rows:
            names = _module_names(group, row, layout, 0)
            if names.ours == [module] and len(names.published) == 1:
                return f"{names.published[0]}.{leaf}"
    raise AssertionError(ours)


class _Modules(NamedTuple):
    published: list[str]
    ours: list[str]
    has_swapped_halves: bool


def _module_names(group: Group, row: Row, layout: str, index: int) -> _Modules:
    parent = (group.c if layout == "C" else group.ab).format(index)
    published = {"A": row.a, "B": row.b or row.a, "C": row.c}[layout].split()
    ours = row.ours.split() or [""]
    return _Modules(
        [_dotted(parent, name) for name in published],
        [_dotted(group.ours.format(index), name) for name in ours],
        layout == "C" and ours == ["final_mod"],
    )


def _row_rules(row: Row, names: _Modules, dims: DitDims) -> Iterator[Rule]:
    sizes = _sizes(dims)
    shape = tuple(sizes[letters] for letters in row.shape.split())
    rows = _source_rows(len(names.published), shape[0], sizes)
    # The patch embedding is published as the kernel of a Conv3d (spec 1.5).
    columns = (dims.latent_channels, 1, dims.patch, dims.patch) if row.ours == "img_in" else shape[1:]
    weights = tuple((f"{n}.weight", (count, *columns)) for n, count in zip(names.published, rows, strict=True))
    biases = tuple((f"{n}.bias", (count,)) for n, count in zip(names.published, rows, strict=True))
    change = Change.SWAP_HALVES if names.has_swapped_halves else Change.RESHAPE
    if len(names.ours) == 2:
        halves = zip(names.ours, (sizes["D"], sizes["M"]), strict=True)
        columns_of = tuple((f"{n}.weight", (shape[0], width)) for n, width in halves)
        yield Rule(weights, columns_of, Change.SPLIT_COLUMNS)
    else:
        yield Rule(weights, ((f"{names.ours[0]}.weight", shape),), change)
    if row.shape != "d":
        yield Rule(biases, ((f"{names.ours[0]}.bias", shape[:1]),), change)


def _source_rows(count: int, rows: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """How many of our `rows` each of `count` published tensors holds: all, or q, k, v and perhaps the MLP."""
    return (rows,) if count == 1 else (sizes["D"], sizes["D"], sizes["D"], sizes["M"])[:count]


def _dotted(*names: str) -> str:
    return ".".join(name for name in names if name)


def _sizes(dims: DitDims) -> dict[str, int]:
    """The table's letters: D hidden, M MLP, d head, P patch features, S sinusoid, T text, V pooled width."""
    hidden, mlp = dims.hidden, dims.mlp_hidden
    return {
        **{"D": hidden, "2D": 2 * hidden, "3D": 3 * hidden, "6D": 6 * hidden},
        **{"M": mlp, "D+M": hidden + mlp, "3D+M": 3 * hidden + mlp},
        **{"d": dims.head_dim, "P": dims.patch_features, "S": SINUSOID_WIDTH},
        **{"T": dims.text_width, "V": dims.pooled_width},
    }
