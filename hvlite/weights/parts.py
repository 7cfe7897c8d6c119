"""A checkpoint of one model part by the names of our tables, whichever layout it is in, and what fp8 in it means.

Between the containers (`checkpoint`), which know no names, and the tables (`keymap`, `dit_layouts`), which know no
files.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvlite.errors import WeightsError
from hvlite.weights.checkpoint import (
    FP8_DTYPES,
    PICKLE_SUFFIXES,
    Catalog,
    Stored,
    find_checkpoint,
    open_checkpoint,
    quoted,
)
from hvlite.weights.keymap import Part

# Scaled fp8 (spec 2.4, 2.5): `X.scale_weight` stands beside `X.weight`, the marker once in the file.
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
SCALED_MARKER = "scaled_fp8"
# How ComfyUI quantises activations: of no use once the weights are dequantised.
HINT_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """An fp8 tensor as it lies in a file, and its scale, fp32 [1]; 1 where the file has none."""

    weight: Tensor
    scale: Tensor

    def dequantised(self) -> Tensor:
        """bf16(weight) x bf16(scale), rounded to bf16 (spec 2.4)."""
        return self.weight.to(torch.bfloat16).mul_(self.scale.to(torch.bfloat16))


Loaded = Tensor | Fp8Weight


def plain(loaded: Loaded) -> Tensor:
    """The tensor itself; fp8 becomes bf16."""
    return loaded.dequantised() if isinstance(loaded, Fp8Weight) else loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint of one part by the names of our tables; `scales` belong to the fp8 weights of the same name."""

    file: Path
    layout: str
    tensors: Catalog
    scales: Catalog
    is_scaled: bool

    def read(self, name: str) -> Loaded:
        """One published tensor; fp8 comes with its scale."""
        tensor = self.tensors[name].read()
        if tensor.dtype not in FP8_DTYPES:
            return tensor
        scale = self.scales[name].read().float().reshape(1) if name in self.scales else torch.ones(1)
        return Fp8Weight(tensor, scale)


def open_part(part: Part, source: Path, load_key: str = "module") -> Opened:
    """The checkpoint by the names of our tables: prefix stripped, known extras dropped, fp8 scales set apart."""
    file = find_checkpoint(source)
    catalog = open_checkpoint(file, load_key)
    found = part.detect(catalog)
    if found is None:
        some = ", ".join(quoted(key) for key in list(catalog)[:3])
        marks = " or ".join(quoted(mark) for mark in part.marks.values())
        raise WeightsError(
            f"{file}: no {part.title} in a known layout: expected a tensor {marks}; found {len(catalog)}: {some}"
        )
    tensors: Catalog = {}
    scales: Catalog = {}
    hints: list[tuple[str, str]] = []
    is_scaled = False
    for key, stored in catalog.items():
        weight, kind = _weight_of(key)
        if part.drops(weight, found.prefix):
            continue
        if key.removeprefix(found.prefix) == SCALED_MARKER:
            is_scaled = True
        elif not key.startswith(found.prefix):
            raise WeightsError(f"{file}: tensor {quoted(key)} is unknown; expected the prefix {found.prefix!r}")
        elif kind == "hint":
            hints.append((part.table_name(weight, found), key))
        else:
            _add(scales if kind == "scale" else tensors, part.table_name(weight, found), stored, file)
    for weight, key in hints:
        if weight not in tensors:
            raise WeightsError(f"{file}: tensor {quoted(key)} is unknown: there is no {quoted(weight)}")
    map_file = scale_map(file)
    for key, stored in (open_checkpoint(map_file) if map_file else {}).items():
        _add(scales, f"{key.removeprefix(found.prefix)}.weight", stored, file)
    return Opened(file=file, layout=found.layout, tensors=tensors, scales=scales, is_scaled=is_scaled or bool(scales))


def _weight_of(key: str) -> tuple[str, str]:
    """The weight that `key` is about, and whether it is that weight, its scale, or a hint."""
    for kind, suffixes in (("scale", SCALE_SUFFIXES), ("hint", HINT_SUFFIXES)):
        for suffix in suffixes:
            if key.endswith(suffix):
                return key.removesuffix(suffix) + ".weight", kind
    return key, "weight"


def _add(catalog: Catalog, name: str, stored: Stored, file: Path) -> None:
    if name in catalog:
        raise WeightsError(
            f"{file}: tensors {quoted(catalog[name].name)} and {quoted(stored.name)} are both {quoted(name)}; "
            "expected one of them"
        )
    catalog[name] = stored


def scale_map(file: Path) -> Path | None:
    """The official fp8 release keeps its scales in `X_map.pt` beside `X.pt`; some ship that as safetensors."""
    suffixes = (*PICKLE_SUFFIXES, ".safetensors") if file.suffix in PICKLE_SUFFIXES else (".safetensors",)
    candidates = (file.with_name(f"{file.stem}_map{suffix}") for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)
