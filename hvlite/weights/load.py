"""Checkpoint -> our tensors, one at a time: the part of the loader that joins containers, names and numbers.

Each `*_tensors` holds the whole file against the tables first, from headers only: every key is known, every parameter
is there once and has its shape, or a WeightsError says which is not. Then the tensors come one by one, in the dtype of
the file; fp8 comes dequantised to bf16. What becomes of them is up to the transform that `fill` is given.

`wanted`, asked for the name of each of our tensors, spares reading the others; the whole file is checked all the same.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from hvlite.dims import ClipDims, DitDims, LlamaDims, VaeDims
from hvlite.errors import WeightsError
from hvlite.weights.checkpoint import FLOAT_DTYPES, FP8_DTYPES, PICKLE_SUFFIXES, Stored, quoted
from hvlite.weights.dit_layouts import DIT, dit_rules
from hvlite.weights.keymap import (
    CLIP,
    LLAMA,
    VAE,
    Change,
    Rule,
    clip_rules,
    llama_rules,
    unused_llama_names,
    vae_rules,
)
from hvlite.weights.parts import Opened, open_part

Tensors = Iterator[tuple[str, Tensor]]
Transform = Callable[[str, Tensor], Tensor]
Wanted = Callable[[str], bool]


def dit_tensors(source: Path, dims: DitDims, load_key: str = "module", wanted: Wanted | None = None) -> Tensors:
    """The transformer from any published layout (spec 2.1 to 2.5)."""
    opened = open_part(DIT, source, load_key)
    return _read(opened, list(dit_rules(dims, opened.layout)), wanted)


def vae_tensors(source: Path, dims: VaeDims, wanted: Wanted | None = None) -> Tensors:
    """The VAE from either layout (spec 3.4)."""
    opened = open_part(VAE, source)
    return _read(opened, list(vae_rules(dims, opened.layout)), wanted)


def llama_tensors(source: Path, dims: LlamaDims, wanted: Wanted | None = None) -> Tensors:
    """The embedding and the layers in use from any of the language model's layouts (spec 4.1)."""
    return _read(open_part(LLAMA, source), list(llama_rules(dims)), wanted, unused_llama_names(dims))


def clip_tensors(source: Path, dims: ClipDims, wanted: Wanted | None = None) -> Tensors:
    """The CLIP text tower, whether or not the file holds the image tower too (spec 4.2)."""
    return _read(open_part(CLIP, source), list(clip_rules(dims)), wanted)


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], transform: Transform | None = None) -> None:
    """Puts each tensor in its place in `module` (built on the meta device or not), through `transform`.

    Shapes are compared before the transform, which may change them. A parameter keeps the memory format of its
    place and comes out without gradients.
    """
    waiting = dict(module.state_dict(keep_vars=True))
    filled: set[str] = set()
    for name, tensor in tensors:
        if name not in waiting:
            fault = "was filled already" if name in filled else f"is not in {type(module).__name__}"
            raise WeightsError(f"tensor {quoted(name)} {fault}; checkpoint and model do not belong together")
        place = waiting.pop(name)
        if tensor.shape != place.shape:
            raise WeightsError(f"tensor {quoted(name)} has shape {list(tensor.shape)}; expected {list(place.shape)}")
        _put(module, name, place, tensor if transform is None else transform(name, tensor))
        filled.add(name)
        del tensor, place  # or two of them would be held while the next one is read
    if waiting:
        name, place = next(iter(waiting.items()))
        raise WeightsError(
            f"{len(waiting)} of {len(waiting) + len(filled)} parameters of {type(module).__name__} were not filled, "
            f"among them {quoted(name)} of shape {list(place.shape)}"
        )


def _put(module: nn.Module, name: str, place: Tensor, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if type(value) is Tensor and value.shape == place.shape and value.stride() != place.stride():
        ordered = torch.empty_strided(value.shape, place.stride(), dtype=value.dtype, device=value.device)
        value = ordered.copy_(value)
    if leaf in owner._buffers:
        owner.register_buffer(leaf, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _read(opened: Opened, rules: list[Rule], wanted: Wanted | None, unused: frozenset[str] = frozenset()) -> Tensors:
    _check(opened, rules, unused)
    return _follow_all(opened, rules, wanted)


def _check(opened: Opened, rules: list[Rule], unused: frozenset[str]) -> None:
    file, tensors = opened.file, opened.tensors
    expected = {name: shape for rule in rules for name, shape in rule.sources}
    missing = [name for name in expected if name not in tensors]
    unknown = [tensors[name].name for name in tensors if name not in expected and name not in unused]
    unknown += [scale.name for name, scale in opened.scales.items() if name not in tensors]
    if missing:
        raise WeightsError(
            f"{file}: tensor {quoted(missing[0])} of shape {list(expected[missing[0]])} is missing; {len(missing)} of "
            f"the {len(expected)} expected tensors are, and {len(unknown)} others are unknown"
            + (f", such as {quoted(unknown[0])}" if unknown else "")
        )
    if unknown:
        raise WeightsError(
            f"{file}: tensor {quoted(unknown[0])} is unknown, one of {len(unknown)} beside the {len(expected)} "
            "expected ones; the file belongs to another model or variant"
        )
    for name, shape in expected.items():
        _check_tensor(opened, tensors[name], shape, opened.scales.get(name))


def _check_tensor(opened: Opened, stored: Stored, shape: tuple[int, ...], scale: Stored | None) -> None:
    file, name = opened.file, quoted(stored.name)
    if stored.shape != shape:
        raise WeightsError(f"{file}: tensor {name} has shape {list(stored.shape)}; expected {list(shape)}")
    if stored.dtype not in FLOAT_DTYPES:
        raise WeightsError(f"{file}: tensor {name} is {stored.dtype}; expected floating point, 8 to 64 bits")
    if stored.dtype in FP8_DTYPES and scale is None:
        if opened.is_scaled:
            raise WeightsError(f"{file}: tensor {name} is fp8 and has no scale, though others have one")
        if file.suffix in PICKLE_SUFFIXES:
            raise WeightsError(
                f"{file}: tensor {name} is fp8 and its scale is missing; expected {file.stem}_map.pt beside the file, "
                "published with it"
            )
    if scale is not None and (stored.dtype not in FP8_DTYPES or scale.shape not in ((), (1,))):
        raise WeightsError(
            f"{file}: tensor {name} of {stored.dtype} has a scale {quoted(scale.name)} of shape {list(scale.shape)}; "
            "expected one number for an fp8 tensor"
        )


def _follow_all(opened: Opened, rules: list[Rule], wanted: Wanted | None) -> Tensors:
    for rule in rules:
        if wanted is None or any(wanted(name) for name, _ in rule.targets):
            yield from _follow(opened, rule)  # holds no tensor while the next one is read


def _follow(opened: Opened, rule: Rule) -> Tensors:
    parts = [opened.read(name) for name, _ in rule.sources]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    del parts
    if rule.change is Change.SWAP_HALVES:
        first, second = joined.chunk(2)
        joined = torch.cat([second, first])
    if rule.change is not Change.SPLIT_COLUMNS:
        (name, shape), *_ = rule.targets
        yield name, joined.reshape(shape)
        return
    start = 0
    for name, (_, width) in rule.targets:
        yield name, joined[:, start : start + width].contiguous()
        start += width
