"""Where a model's weights come from: a published checkpoint, or a packed store. One shape for both.

What comes out are tensors in our names, one at a time; in which form the matrices are is told by `weights` and
`text_weights`, names of `quant.swap.FORMATS`, or None for plain ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hvlite.dims import ModelDims
from hvlite.quant.swap import FORMATS
from hvlite.weights import load
from hvlite.weights.sources import Sources, fingerprint, source_bytes
from hvlite.weights.store import Store


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint; every matrix is plain."""

    sources: Sources
    dims: ModelDims
    weights: str | None = None
    text_weights: str | None = None

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
        """Checked against the headers at once; the tensors come when they are asked for."""
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
    """A packed store. Its slabs are mapped, so that on a CPU a tensor is the file's own bytes."""

    store: Store
    dynamic: bool = False
    """Multiply int8 weights by int8 activations."""

    @property
    def folder(self) -> Path:
        return self.store.path

    @property
    def dims(self) -> ModelDims:
        return self.store.dims

    @property
    def fingerprint(self) -> str:
        """The checkpoint's, and the formats: other formats give another clip."""
        index = self.store.index
        return f"{index.source}-{index.weights}-{index.text_weights}"

    @property
    def nbytes(self) -> int:
        return self.store.index.store_bytes

    @property
    def weights(self) -> str | None:
        stored = self.store.index.weights
        if stored not in FORMATS:
            return None
        return "int8-dynamic" if self.dynamic and stored == "int8" else stored

    @property
    def text_weights(self) -> str | None:
        stored = self.store.index.text_weights
        return stored if stored in FORMATS else None

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        return self.store.tensors(part)

    def tokenizer(self, name: str) -> Path:
        return self.store.tokenizer(name)


Origin = Checkpoint | Packed
