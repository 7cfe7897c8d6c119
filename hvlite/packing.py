"""A checkpoint becomes a packed store: where `weights.pack`, which knows no quantisation, meets `quant`.

Stores lie in HVLITE_HOME/packed, named after the model, its weights and the formats, so that one packing serves every
later run.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvlite import paths
from hvlite.dims import ModelDims
from hvlite.errors import WeightsError
from hvlite.events import Note
from hvlite.model.dit import Dit
from hvlite.model.text import build_llama
from hvlite.origin import Checkpoint, Packed, find_origin
from hvlite.planning import formats_for, stored_formats
from hvlite.profile import Profile
from hvlite.quant.swap import FORMATS, plan_swap
from hvlite.weights.layout import Formats, store_bytes
from hvlite.weights.pack import Progress, Recipe, pack
from hvlite.weights.parts import Fp8Weight, Loaded, plain
from hvlite.weights.sources import Sources, fingerprint
from hvlite.weights.store import Store, is_store


class Asked(NamedTuple):
    """The formats that a user named, over the profile's own."""

    weights: str | None = None
    text_weights: str | None = None


NOTHING_ASKED = Asked()


def check_formats(store: Store, weights: str | None, text_weights: str | None) -> None:
    """WeightsError if a store holds other formats than are asked for."""
    asked, index = stored_formats(weights, text_weights), store.index
    meetings = (
        ("--weights", weights, asked.weights, index.weights),
        ("--text-weights", text_weights, asked.text_weights, index.text_weights),
    )
    for flag, given, wanted, held in meetings:
        if given is not None and wanted != held:
            raise WeightsError(
                f"{store.path} holds {held}, {flag} asks for {given}: leave the flag away, or pack the checkpoint anew"
            )


def store_path(sources: Sources, dims: ModelDims, formats: Formats) -> Path:
    """Where a packed model lies: its name says model, weights and formats."""
    name = f"{dims.name}-{fingerprint(sources)[:12]}-{formats.weights}-text-{formats.text_weights}"
    return paths.packed_folder() / name


def pack_model(sources: Sources, dims: ModelDims, out: Path, formats: Formats) -> Generator[Progress, None, None]:
    """Pack all parts of a checkpoint to `out`; see `weights.pack.pack` for what it raises and keeps."""
    with torch.device("meta"):
        dit = Dit(dims.dit)
    recipe = Recipe(
        formats=formats,
        dit=_quantiser(dit, formats.quantised("dit")),
        text=_quantiser(build_llama(dims.llama), formats.quantised("text")),
    )
    yield from pack(sources, dims, out, recipe)


def _quantiser(module: nn.Module, weights: str | None) -> Callable[[str, Loaded], dict[str, Tensor]] | None:
    """What turns a parameter of `module` into what its swapped twin holds; None where nothing is quantised."""
    if weights is None:
        return None
    assert weights in FORMATS, weights
    plan = plan_swap(module, weights)

    def quantise(name: str, loaded: Loaded) -> dict[str, Tensor]:
        if isinstance(loaded, Fp8Weight) and plan.adopts(name, loaded.weight):
            return dict(plan.adopted(name, loaded.weight, loaded.scale))
        return dict(plan.tensors(name, plain(loaded)))

    return quantise


def provide(
    model: str | Path, profile: Profile, files: Mapping[str, Path | None], asked: Asked = NOTHING_ASKED
) -> Generator[Progress | Note, None, Checkpoint | Packed]:
    """What is rendered from: a store itself, a small checkpoint as it is, or the store that a checkpoint is packed to.

    Packing happens once, to the formats of the profile. WeightsError where a store holds others than were asked for.
    """
    dynamic = profile.weights == "int8-dynamic"
    origin = find_origin(model, files, dynamic=dynamic)
    if isinstance(origin, Packed):
        check_formats(origin.store, asked.weights, asked.text_weights)
        return origin
    formats = formats_for(origin.dims, profile, asked=asked != NOTHING_ASKED)
    if formats is None:
        return origin
    out = store_path(origin.sources, origin.dims, formats)
    if not is_store(out):
        size = store_bytes(origin.dims, formats.weights, formats.text_weights)
        yield Note(
            f"packing {origin.folder} once: {size / 1e9:.2f} GB of {formats.weights} weights and "
            f"{formats.text_weights} text weights, to {out}"
        )
        yield from pack_model(origin.sources, origin.dims, out, formats)
    packed = find_origin(out, {}, dynamic=dynamic)
    assert isinstance(packed, Packed)
    return replace(packed, repacks=True)
