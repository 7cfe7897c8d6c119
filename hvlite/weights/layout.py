"""What the slabs of a store hold, in which form and where: names and arithmetic, no torch, no file.

A slab is a safetensors file whose every tensor begins at a multiple of 256 bytes, in the file and in its data: since
the format allows no gaps, those are tensors themselves, named `__pad.N`. Header and data both end with a page, so that
a slab is mapped or read as it lies. A model is cut into what travels together: one slab for each block, one for
each block's modulation, which is used before the blocks and never again, and one for each layer of the text encoder.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from re import match

from hvlite.dims import ModelDims
from hvlite.errors import WeightsError
from hvlite.weights.dit_layouts import dit_rules
from hvlite.weights.keymap import Named, Rule, Shape, clip_rules, llama_rules, vae_rules

ALIGNMENT = 256
PAGE = 4096
PAD = "__pad."
METADATA = "__metadata__"

# By safetensors' words.
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor as it is stored."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Placed(Form):
    """A tensor that lies `offset` bytes into the data of its slab."""

    offset: int


@dataclass(frozen=True, slots=True)
class Placement:
    """All tensors of a slab, in order, and the size of its data, in whole pages."""

    tensors: tuple[Placed, ...]
    data_bytes: int

    @property
    def slab_bytes(self) -> int:
        """The size of the file."""
        return len(slab_header(self)) + self.data_bytes


def place(forms: Iterable[Form]) -> Placement:
    """Each tensor at the first multiple of ALIGNMENT behind the one before it."""
    placed: list[Placed] = []
    position = 0
    for form in forms:
        placed.append(Placed(form.name, form.dtype, form.shape, _round_up(position, ALIGNMENT)))
        position = placed[-1].offset + form.nbytes
    return Placement(tuple(placed), _round_up(position, PAGE))


def slab_header(placement: Placement) -> bytes:
    """What stands in the file before the data: the length of the JSON, the JSON, spaces up to a page."""
    entries: dict[str, object] = {METADATA: {"format": "pt"}}
    position = pads = 0

    def pad_to(offset: int) -> None:
        nonlocal pads
        if offset > position:
            entries[f"{PAD}{pads}"] = _entry("U8", (offset - position,), position, offset)
            pads += 1

    for tensor in placement.tensors:
        pad_to(tensor.offset)
        position = tensor.offset + tensor.nbytes
        entries[tensor.name] = _entry(tensor.dtype, tensor.shape, tensor.offset, position)
    pad_to(placement.data_bytes)
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    length = _round_up(8 + len(text), PAGE) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _entry(dtype: str, shape: Shape, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


# Which slabs there are.


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabPlan:
    """The parameters that one slab stands for, in the order in which every loader gives them.

    `part`: dit, text, clip or vae. `prefix`: what a parameter's name in the model has before its name in the slab.
    """

    name: str
    part: str
    prefix: str
    parameters: tuple[Named, ...]


def plan_slabs(dims: ModelDims) -> tuple[SlabPlan, ...]:
    """Every slab of the model, in the order in which they are packed."""
    parts: Mapping[str, Iterable[Rule]] = {
        "dit": dit_rules(dims.dit, "A"),
        "text": llama_rules(dims.llama),
        "clip": clip_rules(dims.clip),
        "vae": vae_rules(dims.vae, "diffusers"),
    }
    plans = [plan for part, rules in parts.items() for plan in _plan_part(part, rules)]
    assert len({plan.name for plan in plans}) == len(plans)
    return tuple(plans)


def _plan_part(part: str, rules: Iterable[Rule]) -> Iterator[SlabPlan]:
    named = (target for rule in rules for target in rule.targets)
    for (name, prefix), parameters in groupby(named, lambda named: _slab_of(part, named[0])):
        yield SlabPlan(name=name, part=part, prefix=prefix, parameters=tuple(parameters))


def _slab_of(part: str, parameter: str) -> tuple[str, str]:
    """The slab that a parameter lies in, and the prefix that its name loses there."""
    if part == "dit":
        block = match(r"(?:double|single)_(?:blocks|mods)\.\d+(?=\.)", parameter)
        return (block[0], f"{block[0]}.") if block else ("dit_rest", "")
    if part == "text":
        layer = match(r"layers\.\d+(?=\.)", parameter)
        return (f"text_{layer[0]}", f"{layer[0]}.") if layer else ("text_embedding", "embed_tokens.")
    return part, ""


# In which form.


PLAIN = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
# CLIP and VAE are small: in fp32, every published dtype is had from them without loss.
SMALL_PARTS = "fp32"
# What is quantised are the matrices of these slabs (`quant.swap` says why not the others').
QUANTISED_SLABS = ("double_blocks.", "single_blocks.", "double_mods.", "single_mods.", "text_layers.")
NF4_GROUP = 64
NF4_RUN = 256
NF4_CODES = 256


def _int8(out: int, width: int) -> Iterator[Form]:
    yield Form("qweight", "I8", (out, width))
    yield Form("scales", "F32", (out,))


def _fp8(out: int, width: int) -> Iterator[Form]:
    yield Form("qweight", "F8_E4M3", (out, width))
    yield Form("scale", "F32", (1,))


def _nf4(out: int, width: int) -> Iterator[Form]:
    yield Form("qweight", "U8", (out, width // 2))
    yield Form("absmax", "F32", (out, width // NF4_GROUP))


def _nf4_double(out: int, width: int) -> Iterator[Form]:
    groups = width // NF4_GROUP
    yield Form("qweight", "U8", (out, width // 2))
    yield Form("absmax", "U8", (out, groups))
    yield Form("absmax_scales", "F32", (-(-out * groups // NF4_RUN),))
    yield Form("absmax_offset", "F32", (1,))
    yield Form("absmax_code", "F32", (NF4_CODES,))


# The tensors that a matrix becomes in the quantised formats of `quant`, which a test holds to these.
QUANTISED = {"int8": _int8, "fp8": _fp8, "nf4": _nf4, "nf4-double": _nf4_double}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """How the transformer and the text encoder are stored: names of PLAIN or QUANTISED."""

    weights: str = "bf16"
    text_weights: str = "fp16"

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("text weights", self.text_weights)):
            if value not in PLAIN and value not in QUANTISED:
                raise WeightsError(f"{name} cannot be stored as {value!r}; known: {', '.join((*PLAIN, *QUANTISED))}")

    @property
    def dtype(self) -> str:
        """Of the transformer's tensors that are not quantised."""
        return self.weights if self.weights in PLAIN else "bf16"

    @property
    def text_dtype(self) -> str:
        """Of the text encoder's tensors that are not quantised: fp16, as it was published."""
        return self.text_weights if self.text_weights in PLAIN else "fp16"

    def plain_dtype(self, part: str) -> str:
        """Of the tensors of `part` that are not quantised."""
        return {"dit": self.dtype, "text": self.text_dtype}.get(part, SMALL_PARTS)

    def quantised(self, part: str) -> str | None:
        """The format that the matrices of `part` are quantised to, if they are."""
        asked = {"dit": self.weights, "text": self.text_weights}.get(part)
        return asked if asked in QUANTISED else None


def stored_forms(plan: SlabPlan, formats: Formats) -> Iterator[Form]:
    """The tensors of a slab, by their names in it."""
    plain, kind = PLAIN[formats.plain_dtype(plan.part)], formats.quantised(plan.part)
    for parameter, shape in plan.parameters:
        name = parameter.removeprefix(plan.prefix)
        if kind is None or not _is_quantised(plan, kind, shape):
            yield Form(name, plain, shape)
            continue
        stem = name.removesuffix("weight")
        for form in QUANTISED[kind](*shape):
            yield Form(stem + form.name, form.dtype, form.shape)


def _is_quantised(plan: SlabPlan, kind: str, shape: Shape) -> bool:
    group = NF4_GROUP if kind.startswith("nf4") else 1
    return plan.name.startswith(QUANTISED_SLABS) and len(shape) == 2 and shape[1] % group == 0


def slab_placements(dims: ModelDims, formats: Formats) -> dict[str, Placement]:
    """Every slab's tensors and sizes, from dims alone: what a plan of memory and disk is made with."""
    return {plan.name: place(stored_forms(plan, formats)) for plan in plan_slabs(dims)}


def store_bytes(dims: ModelDims, weights: str, text_weights: str) -> int:
    """The size of all slabs of a store; index and tokenizers come on top (some MiB)."""
    formats = Formats(weights=weights, text_weights=text_weights)
    return sum(placement.slab_bytes for placement in slab_placements(dims, formats).values())
