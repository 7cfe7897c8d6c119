"""Checkpoint -> our tensors, one at a time: the part of the loader that joins containers, names and numbers.

Each `*_tensors` holds the whole file against the tables first, from headers only: every key is known, every parameter
is there once and has its shape, or a WeightsError says which is not. Then the tensors come one by one, in the dtype of
the file; fp8 comes dequantised to bf16. What becomes of them is up to the transform that `fill` is given. From
`published_*` fp8 comes with its scale, as it lies in the file, for whoever stores it that way.

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
from hvlite.weights.parts import Fp8Weight, Loaded, Opened, open_part, plain

Tensors = Iterator[tuple[str, Tensor]]
Published = Iterator[tuple[str, Loaded]]
Transform = Callable[[str, Tensor], Tensor]
Wanted = Callable[[str], bool]


def dit_tensors(source: Path, dims: DitDims, load_key: str = "module", wanted: Wanted | None = None) -> Tensors:
    """The transformer from any published layout (spec 2.1 to 2.5)."""
    return _plain(published_dit(source, dims, load_key, wanted))


def published_dit(source: Path, dims: DitDims, load_key: str = "module", wanted: Wanted | None = None) -> Published:
    """As `dit_tensors`, with fp8 as it lies in the file."""
    opened = open_part(DIT, source, load_key)
    return _read(opened, list(dit_rules(dims, opened.layout)), wanted)


def llama_tensors(source: Path, dims: LlamaDims, wanted: Wanted | None = None) -> Tensors:
    """The embedding and the layers in use from any of the language model's layouts (spec 4.1)."""
    return _plain(published_llama(source, dims, wanted))


def published_llama(source: Path, dims: LlamaDims, wanted: Wanted | None = None) -> Published:
    """As `llama_tensors`, with fp8 as it lies in the file."""
    return _read(open_part(LLAMA, source), list(llama_rules(dims)), wanted, unused_llama_names(dims))


def vae_tensors(source: Path, dims: VaeDims, wanted: Wanted | None = None) -> Tensors:
    """The VAE from either layout (spec 3.4)."""
    opened = open_part(VAE, source)
    return _plain(_read(opened, list(vae_rules(dims, opened.layout)), wanted))


def clip_tensors(source: Path, dims: ClipDims, wanted: Wanted | None = None) -> Tensors:
    """The CLIP text tower, whether or not the file holds the image tower too (spec 4.2)."""
    return _plain(_read(open_part(CLIP, source), list(clip_rules(dims)), wanted))


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], transform: Transform | None = None) -> None:
    """Puts each tensor in its place in `module` (built on the meta device or not), through `transform`.

    Shapes are compared before the transform, which may change them. A parameter keeps the memory format of its
    place and comes out without gradients.
    """
    waiting = fill_some(module, tensors, transform)
    if waiting:
        name, place = next(iter(waiting.items()))
        every = len(module.state_dict())
        raise WeightsError(
            f"{len(waiting)} of {every} parameters of {type(module).__name__} were not filled, "
            f"among them {quoted(name)} of shape {list(place.shape)}"
        )


def fill_some(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor]], transform: Transform | None = None
) -> dict[str, Tensor]:
    """As `fill`, for a part of the module; returns the places that were not filled."""
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
    return waiting


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


def _read(opened: Opened, rules: list[Rule], wanted: Wanted | None, unused: frozenset[str] = frozenset()) -> Published:
    _check(opened, rules, unused)
    return _follow_all(opened, rules, wanted)


def _plain(published: Published) -> Tensors:
    return map(_plain_pair, published)  # a generator would hold one tensor while the next one is read


def _plain_pair(pair: tuple[str, Loaded]) -> tuple[str, Tensor]:
    name, loaded = pair
    return name, plain(loaded)


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


def _follow_all(opened: Opened, rules: list[Rule], wanted: Wanted | None) -> Published:
    chosen = [rule for rule in rules if wanted is None or any(wanted(name) for name, _ in rule.targets)]
    for rule, following in zip(chosen, [*chosen[1:], None], strict=True):
        for name, _ in following.sources if following else ():
            opened.tensors[name].announce()
        yield from _follow(opened, rule)  # holds no tensor while the next one is read


def _follow(opened: Opened, rule: Rule) -> Published:
    joined, scale = _joined([opened.read(name) for name, _ in rule.sources])
    if rule.change is Change.SWAP_HALVES:
        first, second = joined.chunk(2)
        joined = torch.cat([second, first])
    if rule.change is not Change.SPLIT_COLUMNS:
        (name, shape), *_ = rule.targets
        yield name, _with_scale(joined.reshape(shape), scale)
        return
    start = 0
    for name, (_, width) in rule.targets:
        yield name, _with_scale(joined[:, start : start + width].contiguous(), scale)
        start += width


def _joined(parts: list[Loaded]) -> tuple[Tensor, Tensor | None]:
    """The rows of all parts, and the scale if they are fp8 still.

    A matrix of ours has one scale. So fp8 parts stay as they are where they share one, as all casts do; where q, k, v
    (and the MLP half of a linear1) are published apart with a scale each, as in scaled files of layout C, they are
    dequantised, and whoever wants fp8 must quantise the whole anew.
    """
    first = parts[0]
    if isinstance(first, Fp8Weight):
        same = [
            part.weight
            for part in parts
            if isinstance(part, Fp8Weight)
            and part.weight.dtype == first.weight.dtype
            and torch.equal(part.scale, first.scale)
        ]
        if len(same) == len(parts):
            return _concatenated(same), first.scale
    return _concatenated([plain(part) for part in parts]), None


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _with_scale(tensor: Tensor, scale: Tensor | None) -> Loaded:
    return tensor if scale is None else Fp8Weight(tensor, scale)
