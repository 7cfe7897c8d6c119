"""Where a model's weights come from: a published checkpoint, a packed store, or nowhere (dims only). One shape for all.

What comes out are tensors in our names, one at a time. `formats` tells in which form they are stored; those of a
checkpoint are cast while they are loaded, so it has none. `slabs` gives a block in one piece; a checkpoint has none, so
its parts are loaded whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hvlite import paths
from hvlite.dims import ModelDims
from hvlite.errors import WeightsError
from hvlite.memory.feed import Slabs
from hvlite.model.text import has_tokenizer
from hvlite.weights import load
from hvlite.weights.checkpoint import SAFETENSORS_DTYPES
from hvlite.weights.layout import Formats, Placement, plan_slabs, slab_placements
from hvlite.weights.slab import views
from hvlite.weights.sources import Sources, find_sources, fingerprint, read_dims, source_bytes
from hvlite.weights.store import Store, is_store, open_store

EMBEDDED = "shapes"
REAL = "hunyuanvideo"
LOOKED_UP = "text_embedding"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    sources: Sources
    dims: ModelDims
    formats: None = None
    slabs: None = None
    dynamic: bool = False

    @property
    def folder(self) -> Path:
        return self.sources.folder

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.sources)

    @cached_property
    def nbytes(self) -> int:
        return source_bytes(self.sources)

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """All of `part` (dit, text, clip, vae). Checked against the headers at once; read when they are asked for."""
        sources, dims = self.sources, self.dims
        match part:
            case "dit":
                return load.dit_tensors(sources.dit, dims.dit)
            case "text":
                return load.llama_tensors(sources.text_encoder, dims.llama)
            case "clip":
                return load.clip_tensors(sources.text_encoder_2, dims.clip)
            case _:
                return load.vae_tensors(sources.vae, dims.vae)

    def tokenizer(self, name: str) -> Path:
        folder: Path = getattr(self.sources, name)
        return folder


@dataclass(frozen=True)
class Packed:
    """A packed store."""

    store: Store
    dynamic: bool = False
    """Multiply int8 weights by int8 activations."""
    repacks: bool = False
    """Whether a checkpoint was named, which other flags would pack to another store."""

    @property
    def folder(self) -> Path:
        return self.store.path

    @property
    def dims(self) -> ModelDims:
        return self.store.dims

    @property
    def slabs(self) -> Slabs:
        return self.store

    @property
    def fingerprint(self) -> str:
        """The checkpoint's, and the formats: other formats give another clip."""
        index = self.store.index
        return f"{index.source}-{index.weights}-{index.text_weights}" + ("-dynamic" if self.dynamic else "")

    @property
    def formats(self) -> Formats:
        return self.store.index.formats

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """All of one slab that travels alone: dit_rest, text_embedding, clip or vae.

        The table of embeddings, 1 GB, stays on disk: of it a prompt's rows alone are ever touched.
        """
        return self.store.mapped_tensors(part) if part == LOOKED_UP else self.store.tensors(part)

    def tokenizer(self, name: str) -> Path:
        return self.store.tokenizer(name)


@dataclass(frozen=True)
class DimsOnly:
    """No weights at all: meta tensors of the sizes that a store in `formats` would have."""

    dims: ModelDims
    formats: Formats
    dynamic: bool = False
    folder: None = None
    fingerprint: str = "none"

    @property
    def slabs(self) -> Slabs:
        return self

    @cached_property
    def _placements(self) -> Mapping[str, Placement]:
        return slab_placements(self.dims, self.formats)

    @cached_property
    def _prefixes(self) -> Mapping[str, str]:
        return {plan.name: plan.prefix for plan in plan_slabs(self.dims)}

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """All of one slab that travels alone, as the host would hold them: shapes and dtypes, no memory."""
        for placed in self._placements[part].tensors:
            nothing = torch.empty((), dtype=SAFETENSORS_DTYPES[placed.dtype], device="meta")
            yield self._prefixes[part] + placed.name, nothing.expand(placed.shape)

    def slab_bytes(self, name: str) -> int:
        return self._placements[name].data_bytes

    def read_slab(self, name: str, buffer: Tensor) -> None:
        """Nothing is read."""

    def slab_views(self, name: str, data: Tensor) -> dict[str, Tensor]:
        return views(self._placements[name], data)


Origin = Checkpoint | Packed | DimsOnly


def find_origin(model: str | Path, files: Mapping[str, Path | None], *, dynamic: bool = False) -> Checkpoint | Packed:
    """The store, or the checkpoint, that a model's name or folder stands for; checked by headers alone."""
    given = {name: path for name, path in files.items() if path is not None}
    folder = model_folder(model)
    if is_store(folder):
        if given:
            raise WeightsError(
                f"{folder} is a packed store: its parts cannot be replaced (asked for {', '.join(given)})"
            )
        store = open_store(folder)
        check_slabs(store)
        return Packed(store, dynamic)
    return open_checkpoint(folder, given)


def check_slabs(store: Store) -> None:
    """WeightsError unless the store holds what its dims and formats ask for, slab by slab."""
    for name, placement in slab_placements(store.dims, store.index.formats).items():
        slab = store.slabs.get(name)
        if slab is None or slab.placement != placement:
            fault = "is missing" if slab is None else f"has {slab.data_bytes} bytes, not {placement.data_bytes}"
            raise WeightsError(
                f"{store.path}: slab {name} {fault}: the store is of another hvlite. Pack the model again."
            )


def open_checkpoint(folder: Path, given: dict[str, Path]) -> Checkpoint:
    """A checkpoint folder with single parts replaced; WeightsError says what does not belong together."""
    for name, path in given.items():
        if not path.exists():
            raise WeightsError(f"{path} (given for {name}) does not exist")
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        own = given.get(encoder)
        if own is not None and tokenizer not in given and has_tokenizer(own):
            given[tokenizer] = own
    sources = find_sources(folder, given)
    checkpoint = Checkpoint(sources, read_dims(sources))
    check_parts(sources, checkpoint.dims)
    for part in ("dit", "vae", "text", "clip"):
        checkpoint.tensors(part)  # held against the headers now: a damaged part must not end a run after hours
    return checkpoint


def check_parts(sources: Sources, dims: ModelDims) -> None:
    """Parts of different models are refused, with the two numbers that do not meet."""
    meetings = (
        ("text states", sources.dit, dims.dit.text_width, sources.text_encoder, dims.llama.hidden),
        ("the pooled text", sources.dit, dims.dit.pooled_width, sources.text_encoder_2, dims.clip.hidden),
        ("latents", sources.dit, dims.dit.latent_channels, sources.vae, dims.vae.latent_channels),
    )
    for what, dit, wanted, part, found in meetings:
        if wanted != found:
            raise WeightsError(
                f"{dit} takes {what} of width {wanted}, {part} gives {found}: they belong to different models"
            )


def model_folder(model: str | Path) -> Path:
    """The folder that a model's name stands for."""
    if model == EMBEDDED:
        return paths.SHAPES_MODEL
    if model == REAL:
        folder = paths.models_folder() / REAL
        if not folder.is_dir():
            raise WeightsError(
                f"{REAL} is not on this machine (looked in {folder}). Fetch it: hvlite models fetch {REAL}; or name "
                "its checkpoint folder: --model FOLDER. The embedded model needs nothing: --model shapes."
            )
        return folder
    return Path(model)
