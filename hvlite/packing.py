"""A checkpoint becomes a packed store: where `weights.pack`, which knows no quantisation, meets `quant`.

Stores lie in HVLITE_HOME/packed, named after the model, its weights and the formats, so that one packing serves every
later run.
"""

from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch import Tensor, nn

from hvlite import paths
from hvlite.dims import ModelDims
from hvlite.errors import WeightsError
from hvlite.model.dit import Dit
from hvlite.model.text import build_llama
from hvlite.quant.swap import FORMATS, plan_swap
from hvlite.weights.layout import Formats
from hvlite.weights.pack import Progress, Recipe, pack
from hvlite.weights.sources import Sources, fingerprint
from hvlite.weights.store import Store

# int8-dynamic multiplies otherwise; what is stored is int8.
STORED_AS = {"int8-dynamic": "int8"}


def stored_formats(weights: str | None, text_weights: str | None) -> Formats:
    """The formats of a store for what is asked; None is the published precision."""
    plain = Formats()
    return Formats(
        weights=STORED_AS.get(weights or plain.weights, weights or plain.weights),
        text_weights=STORED_AS.get(text_weights or plain.text_weights, text_weights or plain.text_weights),
    )


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


def _quantiser(module: nn.Module, weights: str | None) -> Callable[[str, Tensor], dict[str, Tensor]] | None:
    """What turns a parameter of `module` into what its swapped twin holds; None where nothing is quantised."""
    if weights is None:
        return None
    assert weights in FORMATS, weights
    plan = plan_swap(module, weights)
    return lambda name, tensor: dict(plan.tensors(name, tensor))
