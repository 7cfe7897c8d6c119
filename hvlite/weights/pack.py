"""Checkpoint -> store in one pass, with the memory of one tensor and what is made of it.

The store grows in OUT.partial: a slab gets its name when it is whole and on disk, and only then stands in the journal,
so that a kill at any point costs the slab in hand. The next run of the same packing keeps what is there, once its
hashes are found right, and reads nothing that it does not need; another packing begins anew. The last step gives
the folder its name. What quantisation is, only the transform knows.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from hvlite.atomic import explained, locked, replaced_file, sync_folder
from hvlite.dims import ModelDims
from hvlite.errors import OutputError, WeightsError
from hvlite.events import Note
from hvlite.weights.checkpoint import SAFETENSORS_DTYPES, checkpoint_files, opened_file, quoted
from hvlite.weights.layout import PLAIN, Formats, SlabPlan, place, plan_slabs, store_bytes, stored_forms
from hvlite.weights.load import Published, Tensors, clip_tensors, published_dit, published_llama, vae_tensors
from hvlite.weights.parts import Loaded, plain, scale_map
from hvlite.weights.slab import Slab, check_slab, write_slab
from hvlite.weights.sources import Sources, fingerprint
from hvlite.weights.store import (
    INDEX,
    JOURNAL,
    PARTIAL,
    TOKENIZERS,
    CopiedFile,
    Index,
    Store,
    Verified,
    foreign_entry,
    read_index,
    refuse_unfit,
    write_index,
)

# A parameter by its name in the model, fp8 as it was published -> what is stored for it: itself, or tensors by their
# names in the model. What has the parameter's own name is cast to the part's dtype; the rest is stored as it is, in
# the order of `layout`.
Transform = Callable[[str, Loaded], Tensor | Mapping[str, Tensor]]

# All that transformers reads of a tokenizer; the folder may hold a model beside it.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
CAST_ELEMENTS = 1 << 22
# For the index, the journal and what a file system needs itself.
SPARE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a store is made of. `dit` and `text` quantise, where the formats are quantised ones."""

    formats: Formats = field(default_factory=Formats)
    dit: Transform | None = None
    text: Transform | None = None

    def __post_init__(self) -> None:
        for part, transform in (("dit", self.dit), ("text", self.text)):
            assert (transform is None) == (self.formats.quantised(part) is None), f"{self.formats}: {part} transform"

    def transform(self, part: str) -> Transform | None:
        """What makes the stored tensors of `part`."""
        return {"dit": self.dit, "text": self.text}.get(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A slab is on disk. `kept_bytes` of `done_bytes` were there before this run."""

    slab: str
    done_bytes: int
    total_bytes: int
    kept_bytes: int


Progress = Packed | Note
# Each with its folder in the store.
TokenizerFiles = list[tuple[Path, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One packing. `empty` is the index of the store to be, before it has anything."""

    out: Path
    partial: Path
    recipe: Recipe
    plans: tuple[SlabPlan, ...]
    total_bytes: int
    empty: Index

    def journal(self, slabs: Mapping[str, Slab]) -> Index:
        """Slabs in the order of the plans, whatever order they were made in."""
        return replace(self.empty, slabs=tuple(slabs[plan.name] for plan in self.plans if plan.name in slabs))


def pack(
    sources: Sources, dims: ModelDims, out: Path, recipe: Recipe | None = None, load_key: str = "module"
) -> Generator[Progress, None, None]:
    """Write the model as a store at `out`, which must not be there yet; yields after each slab.

    `load_key` is the entry of a DeepSpeed pickle. Busy if another process packs to `out`; OutputError if `out` is
    taken or the disk too small, WeightsError if checkpoint or place are unfit, before any slab is written.
    """
    job = _make_job(sources, dims, Path(os.path.abspath(out)), recipe or Recipe(), load_key)
    tokenizers = _tokenizer_files(sources)
    unread: set[str] = set()  # parameters; filled when it is known which slabs are kept, before any is read
    parts = _open_parts(sources, dims, load_key, unread)
    with _begun(job):
        slabs, note = _continued(job)
        if note:
            yield note
        _check_space(job, _file_bytes(slabs), tokenizers)
        yield from _drop_damaged(job, slabs)
        write_index(job.partial / JOURNAL, job.journal(slabs))
        kept_bytes = _file_bytes(slabs)
        missing = [plan for plan in job.plans if plan.name not in slabs]
        unread.update(name for plan in missing for name, _ in plan.parameters)
        for plan in missing:
            slabs[plan.name] = _pack_slab(job, plan, parts[plan.part])
            write_index(job.partial / JOURNAL, job.journal(slabs))
            yield _packed(job, plan.name, slabs, kept_bytes)
        _finish(job, slabs, tokenizers)


def _make_job(sources: Sources, dims: ModelDims, out: Path, recipe: Recipe, load_key: str) -> _Job:
    refuse_unfit(out)
    _refuse_taken(out)
    formats = recipe.formats
    return _Job(
        out=out,
        partial=out.with_name(out.name + PARTIAL),
        recipe=recipe,
        plans=plan_slabs(dims),
        total_bytes=store_bytes(dims, formats.weights, formats.text_weights),
        empty=Index(
            writer=f"hvlite {version('hvlite')}",
            dims=dims,
            weights=formats.weights,
            text_weights=formats.text_weights,
            dtype=formats.dtype,
            text_dtype=formats.text_dtype,
            source=fingerprint(sources),
            load_key=load_key,
        ),
    )


def _refuse_taken(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(
            f"{out} exists, and nothing is ever overwritten. Remove it (`hvlite models rm`), or choose another folder."
        )


def _open_parts(sources: Sources, dims: ModelDims, load_key: str, unread: Container[str]) -> dict[str, Published]:
    """The checkpoint's parts, held against `dims` by their headers; of their tensors only those in `unread` come."""
    wanted = unread.__contains__
    return {
        "dit": published_dit(sources.dit, dims.dit, load_key, wanted),
        "text": published_llama(sources.text_encoder, dims.llama, wanted),
        "clip": clip_tensors(sources.text_encoder_2, dims.clip, wanted),
        "vae": vae_tensors(sources.vae, dims.vae, wanted),
    }


@contextmanager
def _begun(job: _Job) -> Iterator[None]:
    """OUT.partial is there, and this process alone works in it; if nothing is in it at the end, it goes."""
    with explained(job.partial):
        job.partial.mkdir(parents=True, exist_ok=True)
    with locked(job.partial):
        try:
            _refuse_taken(job.out)  # whoever had the lock before may have just given the folder its name
            yield
        finally:
            with suppress(OSError):
                job.partial.rmdir()


def _continued(job: _Job) -> tuple[dict[str, Slab], Note | None]:
    """What an earlier run left for this packing; everything else in the folder is deleted."""
    foreign = foreign_entry(job.partial)
    if foreign is not None:
        raise OutputError(f"{job.partial} holds {quoted(foreign)}, which hvlite did not put there. Move it away first.")
    left = [entry for entry in job.partial.rglob("*") if entry.is_file()]
    if not left:
        return {}, None
    old = _old_journal(job.partial)
    is_same = old is not None and replace(old, slabs=(), files=()) == job.empty
    slabs: dict[str, Slab] = {}
    if old is not None and is_same:
        slabs = {slab.name: slab for slab in old.slabs if _has_size(job.partial / slab.file, slab.file_bytes)}
    write_index(job.partial / JOURNAL, job.journal(slabs))
    kept = {JOURNAL, *(slab.file for slab in slabs.values())}
    with explained(job.partial):
        for file in left:
            if str(file.relative_to(job.partial)) not in kept:
                file.unlink()
    if is_same:
        done = f"{len(slabs)} of {len(job.plans)} slabs ({_size(_file_bytes(slabs))})"
        return slabs, Note(f"{job.partial} holds {done} of this packing: it goes on from there")
    return slabs, Note(f"{job.partial} was begun from another checkpoint or for another format: it begins anew")


def _old_journal(partial: Path) -> Index | None:
    """The journal, or the index where the run was killed after it had become one; None if neither is whole."""
    for name in (JOURNAL, INDEX):
        if (partial / name).is_file():
            with suppress(WeightsError):
                return read_index(partial / name)
    return None


def _has_size(file: Path, size: int) -> bool:
    with suppress(OSError):
        return file.stat().st_size == size
    return False


def _check_space(job: _Job, kept_bytes: int, tokenizers: TokenizerFiles) -> None:
    copied = sum(file.stat().st_size for file, _ in tokenizers)
    needed = job.total_bytes - kept_bytes + copied + SPARE_BYTES
    free = shutil.disk_usage(job.partial).free
    if needed > free:
        formats = job.recipe.formats
        raise OutputError(
            f"{job.empty.dims.name} in {formats.weights}, its text encoder in {formats.text_weights}, takes "
            f"{_size(needed)} more in {job.out.parent}; {_size(free)} is free. Make room, choose another folder (-o), "
            "or a smaller format."
        )


def _drop_damaged(job: _Job, slabs: dict[str, Slab]) -> Iterator[Progress]:
    """Hold the slabs of an earlier run against the journal; those that are not what it says are made again."""
    checked: dict[str, Slab] = {}
    for slab in list(slabs.values()):
        try:
            check_slab(job.partial, slab)
        except WeightsError:
            del slabs[slab.name]
            yield Note(f"{job.partial / slab.file} was damaged since it was written: it is made again")
            continue
        checked[slab.name] = slab
        yield _packed(job, slab.name, checked, _file_bytes(checked))


def _packed(job: _Job, name: str, slabs: Mapping[str, Slab], kept_bytes: int) -> Packed:
    return Packed(slab=name, done_bytes=_file_bytes(slabs), total_bytes=job.total_bytes, kept_bytes=kept_bytes)


def _file_bytes(slabs: Mapping[str, Slab]) -> int:
    return sum(slab.file_bytes for slab in slabs.values())


def _pack_slab(job: _Job, plan: SlabPlan, tensors: Published) -> Slab:
    placement = place(stored_forms(plan, job.recipe.formats))
    return write_slab(
        job.partial, plan.name, placement, _stored(job.recipe, plan, tensors), part=plan.part, prefix=plan.prefix
    )


def _stored(recipe: Recipe, plan: SlabPlan, tensors: Published) -> Tensors:
    """The tensors of a slab by their names in it, made from the loader's as they are asked for."""
    for parameter, _ in plan.parameters:
        yield from _made(recipe, plan, parameter, tensors)  # holds nothing while the next one is read


def _made(recipe: Recipe, plan: SlabPlan, parameter: str, tensors: Published) -> Tensors:
    name, loaded = next(tensors)
    assert name == parameter, f"the loader gives {name} where the plan has {parameter}"
    dtype = SAFETENSORS_DTYPES[PLAIN[recipe.formats.plain_dtype(plan.part)]]
    transform = recipe.transform(plan.part)
    made = plain(loaded) if transform is None else transform(name, loaded)
    del loaded
    for key, value in ({name: made} if isinstance(made, Tensor) else made).items():
        yield key.removeprefix(plan.prefix), cast_in_place(value, dtype) if key == name else value


def cast_in_place(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, in its own memory where the sizes allow: the text encoder's embedding is 1 GB."""
    if tensor.dtype == dtype or tensor.dtype.itemsize != dtype.itemsize:
        return tensor.to(dtype)
    old = tensor.reshape(-1)
    new = old.view(dtype)
    for begin in range(0, len(old), CAST_ELEMENTS):
        new[begin : begin + CAST_ELEMENTS] = old[begin : begin + CAST_ELEMENTS].to(dtype)
    return new.view(tensor.shape)


def _finish(job: _Job, slabs: Mapping[str, Slab], tokenizers: TokenizerFiles) -> None:
    files = tuple(_copy(file, job.partial / folder) for file, folder in tokenizers)
    write_index(job.partial / INDEX, replace(job.journal(slabs), files=files))
    with explained(job.out):
        (job.partial / JOURNAL).unlink()
        sync_folder(job.partial)
        os.rename(job.partial, job.out)
        sync_folder(job.out.parent)


def _tokenizer_files(sources: Sources) -> TokenizerFiles:
    files: TokenizerFiles = []
    for folder in TOKENIZERS:
        source: Path = getattr(sources, folder)
        found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        names = {file.name for file in found}
        if "tokenizer.json" not in names and not names >= {"vocab.json", "merges.txt"}:
            raise WeightsError(
                f"{source} holds no tokenizer: found neither tokenizer.json nor vocab.json with merges.txt. "
                "Copy the tokenizer's files there from the model's repository."
            )
        files += [(file, folder) for file in found]
    return files


def _copy(source: Path, folder: Path) -> CopiedFile:
    with opened_file(source) as stream:
        content = stream.read()
    with explained(folder):
        folder.mkdir(exist_ok=True)
    with replaced_file(folder / source.name) as temporary, explained(folder / source.name):
        temporary.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return CopiedFile(folder=folder.name, name=source.name, file_bytes=len(content), sha256=digest)


def delete_source(sources: Sources, store: Store) -> Generator[Verified | Note, None, None]:
    """Delete the weight files that `store` was packed from, once every byte of the store is found right.

    Configs and tokenizers stay. Of a link only the link goes, not what it points to.
    """
    found = fingerprint(sources)
    if found != store.index.source:
        raise WeightsError(
            f"{sources.folder} is not what {store.path} was packed from (its files give {found[:16]}, the store says "
            f"{store.index.source[:16]}), so nothing is deleted"
        )
    yield from store.verify()
    files = _weight_files(sources)
    freed = sum(file.lstat().st_size for file in files)
    for file in files:
        try:
            file.unlink()
        except OSError as error:
            raise OutputError(f"{file} cannot be deleted: {error.strerror}. Delete it by hand") from error
    yield Note(f"deleted {len(files)} files of {sources.folder} ({_size(freed)})")


def _weight_files(sources: Sources) -> list[Path]:
    files: dict[Path, None] = {}
    for source in (sources.dit, sources.text_encoder, sources.text_encoder_2, sources.vae):
        found = checkpoint_files(source)
        scales = scale_map(found[0])
        files |= dict.fromkeys(found if scales is None else [*found, scales])
    return list(files)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
