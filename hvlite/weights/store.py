"""A packed store: a folder of slabs, the tokenizers, and an index that knows the hash of each and its own.

Opening reads the index, and of each slab the size and the header; no weight is touched. Whoever reads a slab first
checks it (`slab`), `verify` checks everything. Nothing in an index is believed before its hash, and no name in it
leads out of the folder.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from torch import Tensor

from hvlite.atomic import explained, locked, replaced_file, sync_folder
from hvlite.dims import ModelDims
from hvlite.errors import OutputError, WeightsError
from hvlite.weights import slab as slabs
from hvlite.weights.checkpoint import MOST_JSON_BYTES, opened_file, quoted
from hvlite.weights.layout import DTYPE_BYTES, Formats, place
from hvlite.weights.mounts import unfit_file_system
from hvlite.weights.slab import Slab

FORMAT = 1
INDEX = "index.json"
# What a store that is being packed has instead: the slabs that are there.
JOURNAL = "journal.json"
PARTIAL = ".partial"
TOKENIZERS = ("tokenizer", "tokenizer_2")
REMOVED = ".hvlite-removed-"
TEMPORARY = re.compile(r"\.hvlite-[0-9a-f]+\.part")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

# The hash stands first in the file and is taken over all of it, with these digits in its own place.
NO_HASH = b"0" * 64
OPENING = b'{"sha256":"'
MARK = b'","kind":"hvlite store"'


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedFile:
    """A file of a tokenizer, in its folder of the store."""

    folder: str
    name: str
    file_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a store is. `source` is the fingerprint of the checkpoint, `writer` the hvlite that packed it.

    `load_key` was the entry of the transformer's pickle, where it is one of DeepSpeed's.
    `dtype` and `text_dtype` are those of the tensors that are not quantised; CLIP and VAE are in fp32.
    """

    kind: Literal["hvlite store"] = "hvlite store"
    format: int = FORMAT
    writer: str
    dims: ModelDims
    weights: str
    text_weights: str
    dtype: str
    text_dtype: str
    source: str
    load_key: str = "module"
    files: tuple[CopiedFile, ...] = ()
    slabs: tuple[Slab, ...] = ()

    @property
    def formats(self) -> Formats:
        return Formats(weights=self.weights, text_weights=self.text_weights)

    @property
    def store_bytes(self) -> int:
        """The size of all slabs."""
        return sum(slab.file_bytes for slab in self.slabs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """How far `verify` is: bytes of the whole store."""

    file: str
    done_bytes: int
    total_bytes: int


class Store:
    """An opened store. Made by `open_store`; holds no file open and no weights."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index
        self.slabs = {slab.name: slab for slab in index.slabs}

    @property
    def dims(self) -> ModelDims:
        return self.index.dims

    def map_slab(self, name: str) -> dict[str, Tensor]:
        """The slab's tensors as views of the mapped file; writing to them changes no file."""
        return slabs.map_slab(self.path, self.slabs[name])

    def slab_bytes(self, name: str) -> int:
        """The memory that the slab's data needs: whole pages."""
        return self.slabs[name].data_bytes

    def read_slab(self, name: str, buffer: Tensor) -> None:
        """The slab's data straight into the beginning of `buffer`, uint8 [at least slab_bytes] on the CPU."""
        slabs.read_slab_into(self.path, self.slabs[name], buffer)

    def slab_views(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """The slab's tensors by their names in it, as views of its data: uint8 [at least slab_bytes], anywhere."""
        return slabs.views(self.slabs[name].placement, data)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The slab's tensors, one at a time, under the names that they have in the module of its part."""
        slab = self.slabs[name]
        for tensor_name, tensor in slabs.read_tensors(self.path, slab):
            yield slab.prefix + tensor_name, tensor
            del tensor  # or it would be held while the next one is read

    def mapped_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The same, mapped: for what is looked up here and there."""
        prefix = self.slabs[name].prefix
        for tensor_name, tensor in self.map_slab(name).items():
            yield prefix + tensor_name, tensor

    def tokenizer(self, folder: str) -> Path:
        """The folder of `tokenizer` or `tokenizer_2`, its files checked."""
        for copied in self.index.files:
            if copied.folder == folder:
                _check_copied(self.path, copied)
        return self.path / folder

    def verify(self) -> Iterator[Verified]:
        """Read and check every file; yields after each. At the end a WeightsError, if any was damaged, names them."""
        total = self.index.store_bytes + sum(copied.file_bytes for copied in self.index.files)
        files: list[Slab | CopiedFile] = [*self.index.slabs, *self.index.files]
        faults: list[tuple[str, WeightsError]] = []
        done = 0
        for file in files:
            try:
                if isinstance(file, Slab):
                    slabs.check_slab(self.path, file)
                else:
                    _check_copied(self.path, file)
            except WeightsError as fault:
                faults.append((_file_name(file), fault))
            done += file.file_bytes
            yield Verified(file=_file_name(file), done_bytes=done, total_bytes=total)
        if len(faults) == 1:
            raise faults[0][1]
        if faults:
            names = ", ".join(name for name, _ in faults[:5]) + ("" if len(faults) <= 5 else " ...")
            raise WeightsError(f"{len(faults)} of the store's files are damaged ({names}). {faults[0][1]}")


def _file_name(file: Slab | CopiedFile) -> str:
    return file.file if isinstance(file, Slab) else f"{file.folder}/{file.name}"


def _check_copied(store: Path, copied: CopiedFile) -> None:
    file = store / copied.folder / copied.name
    with opened_file(file) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != copied.sha256:
        raise WeightsError(
            f"{file}: its SHA-256 is {found}, the index says {copied.sha256}: the file is damaged or was edited. "
            "Put the model's own file in its place, or pack the model again"
        )


def open_store(path: Path) -> Store:
    """Check index, sizes and headers. WeightsError says which file is wrong, and why."""
    refuse_unfit(path)
    if not (path / INDEX).is_file():
        if (path / JOURNAL).is_file():
            raise WeightsError(f"{path}: is not packed to its end; run the same `hvlite models pack` again to go on")
        raise WeightsError(f"{path}: is no store: there is no {INDEX} in it")
    index = read_index(path / INDEX)
    for slab in index.slabs:
        slabs.check_header(path, slab)
    return Store(path, index)


def is_store(path: Path) -> bool:
    """Whether the folder holds an index of ours, be it damaged."""
    with suppress(OSError), (path / INDEX).open("rb") as stream:
        return stream.read(len(OPENING) + len(NO_HASH) + len(MARK)).endswith(MARK)
    return False


def refuse_unfit(path: Path) -> None:
    """WeightsError where the file system cannot hold a store."""
    reason = unfit_file_system(path)
    if reason is not None:
        raise WeightsError(
            f"{reason}: a store needs ordered writes and reliable mapping. Choose a folder on a local disk"
        )


# The index.


def write_index(file: Path, index: Index) -> None:
    """The index and its own hash, in place of what was there."""
    blank = OPENING + NO_HASH + b'",' + msgspec.json.encode(index)[1:] + b"\n"
    digest = hashlib.sha256(blank).hexdigest().encode("ascii")
    with replaced_file(file) as temporary, explained(file):
        temporary.write_bytes(OPENING + digest + blank[len(OPENING) + len(digest) :])


def read_index(file: Path) -> Index:
    """What `write_index` wrote; WeightsError if a byte of it is another."""
    with opened_file(file) as stream:
        raw = stream.read(MOST_JSON_BYTES + 1)
    start, end = len(OPENING), len(OPENING) + len(NO_HASH)
    found = hashlib.sha256(OPENING + NO_HASH + raw[end:]).hexdigest()
    stated = raw[start:end].decode("ascii", "replace")
    if not raw.startswith(OPENING) or stated != found:
        raise WeightsError(
            f"{file}: its SHA-256 is {found}, it says {quoted(stated)}: the index is damaged. Pack the model again"
        )
    try:
        form = msgspec.json.decode(raw, type=_Header).format
        if form != FORMAT:
            raise WeightsError(
                f"{file}: is of store format {form}, this hvlite reads {FORMAT}. Update hvlite, or pack the model again"
            )
        index = msgspec.json.decode(raw, type=Index)
    except msgspec.DecodeError as error:
        raise WeightsError(f"{file}: is no index that hvlite wrote: {error}. Pack the model again") from error
    fault = _fault(index)
    if fault:
        raise WeightsError(f"{file}: is no index that hvlite wrote: {fault}. Pack the model again")
    return index


class _Header(msgspec.Struct):
    kind: Literal["hvlite store"]
    format: int


def _fault(index: Index) -> str | None:
    """What hvlite would never have written, so that no reader has to ask again."""
    for slab in index.slabs:
        if not PLAIN_NAME.fullmatch(slab.file) or not slab.file.endswith(".safetensors"):
            return f"slab file {quoted(slab.file)}"
        if any(tensor.dtype not in DTYPE_BYTES or min(tensor.shape, default=0) < 0 for tensor in slab.tensors):
            return f"tensors of slab {quoted(slab.name)}"
        placement = place(slab.tensors)
        if slab.placement != placement or slab.file_bytes != placement.slab_bytes:
            return f"sizes and offsets of slab {quoted(slab.name)}"
    for copied in index.files:
        if copied.folder not in TOKENIZERS or not PLAIN_NAME.fullmatch(copied.name):
            return f"file {quoted(copied.folder)}/{quoted(copied.name)}"
    names = [slab.name for slab in index.slabs]
    return "two slabs of one name" if len(set(names)) < len(names) else None


# Stores as folders.


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedStore:
    """A store in a folder of stores; `fault` says why it cannot be used, `index` is None where it cannot be read."""

    path: Path
    disk_bytes: int
    index: Index | None
    fault: str | None


def list_stores(folder: Path) -> list[ListedStore]:
    """Every store in `folder`, by name: whole, damaged and unfinished ones."""
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(REMOVED))
    return [_listed(path) for path in found if is_store(path) or (path / JOURNAL).is_file()]


def _listed(path: Path) -> ListedStore:
    index, fault = None, None
    try:
        index = open_store(path).index
    except WeightsError as error:
        fault = str(error)
    sizes = (file.stat().st_size for file in path.rglob("*") if file.is_file())
    return ListedStore(path=path, disk_bytes=sum(sizes), index=index, fault=fault)


def foreign_entry(folder: Path) -> str | None:
    """A name in a store, or in a partial one, that hvlite did not put there."""
    for entry in sorted(folder.rglob("*")):
        name = str(entry.relative_to(folder))
        is_ours = name in (INDEX, JOURNAL) or TEMPORARY.fullmatch(entry.name) or entry.suffix == ".safetensors"
        in_tokenizer = name.split("/")[0] in TOKENIZERS
        if entry.is_symlink() or not (is_ours or in_tokenizer):
            return name
    return None


def remove_store(path: Path) -> None:
    """Delete a store, also an unfinished one: gone under its name at once, whatever happens while it is deleted."""
    if path.is_symlink() or not (is_store(path) or (path / JOURNAL).is_file()):
        raise WeightsError(f"{path}: is no store, so it is not removed; `hvlite models ls` shows what there is")
    foreign = foreign_entry(path)
    if foreign is not None:
        raise WeightsError(f"{path}: holds {quoted(foreign)}, which is no part of a store; move it away first")
    with locked(path):
        _remove(path)


def _remove(path: Path) -> None:
    try:
        for left_over in path.parent.glob(f"{REMOVED}*"):  # of a removal that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        doomed = path.parent / f"{REMOVED}{secrets.token_hex(6)}"
        os.rename(path, doomed)
        sync_folder(path.parent)
        shutil.rmtree(doomed)
    except OSError as error:
        raise OutputError(f"{error.filename or path} cannot be removed: {error.strerror}. Remove it by hand") from error
