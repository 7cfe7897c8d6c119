"""Checkpoint files as containers: which tensors lie where, from headers only, and one tensor at a time.

A single safetensors file, a folder of shards with its index, or a torch pickle. No file is trusted: every size is
held against the file's own before a byte is allocated, and a pickle is read with `weights_only` onto the meta device,
which runs no code of its and loads no tensor. Whatever is wrong with a file ends in one WeightsError.
"""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from hvlite.errors import WeightsError

FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}) | FP8_DTYPES

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"

# The real headers, indexes and configs are below 1 MiB.
MOST_JSON_BYTES = 32 * 2**20
MOST_AXES = 16
MOST_ELEMENTS_PER_AXIS = 2**48

FOLDER_PATTERNS = (f"*{INDEX_SUFFIX}", "*.safetensors", "*.pt", "*.pth", "*.bin")
# Preferred where a folder holds variants too, such as `model.fp16.safetensors`.
PLAIN_NAMES = frozenset(
    f"{stem}{suffix}"
    for stem in (
        "diffusion_pytorch_model",
        "model",
        "mp_rank_00_model_states",
        "pytorch_model",
        "pytorch_model_module",
    )
    for suffix in (INDEX_SUFFIX, ".safetensors", ".pt", ".bin")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor that lies `offset` bytes into `file`; `stride` is None where its elements are in order."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """What lies in the file from its first element to its last."""
        return _span(self.shape, self.stride) * self.dtype.itemsize

    def announce(self) -> None:
        """Tell the system that it is read next, so that the disk works while something else is computed."""
        with opened_file(self.file) as file, suppress(OSError):  # only a hint
            os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        buffer = np.empty(self.nbytes, np.uint8)
        with opened_file(self.file) as file:
            file.seek(self.offset)
            found = file.readinto(buffer.data)
        if found != len(buffer):
            raise WeightsError(
                f"{self.file}: ends {len(buffer) - found} bytes inside tensor {quoted(self.name)}; "
                "the file was cut while hvlite read it"
            )
        flat = torch.from_numpy(buffer).view(self.dtype)
        if self.stride is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()


Catalog = dict[str, Stored]


def open_checkpoint(path: Path, load_key: str = "module") -> Catalog:
    """What the file, or the one checkpoint in the folder, holds. `load_key` is the entry of a DeepSpeed pickle."""
    file = find_checkpoint(path)
    if file.name.endswith(INDEX_SUFFIX):
        return _read_shards(file)
    return _read_file(file, load_key)


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a file; else the one checkpoint in that folder, an index before its shards."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or folder; check the path")
    for pattern in FOLDER_PATTERNS:
        found = sorted(file for file in path.glob(pattern) if not file.stem.endswith("_map"))
        plain = [file for file in found if file.name in PLAIN_NAMES] or found
        if len(plain) == 1:
            return plain[0]
        if plain:
            if "-of-" in plain[0].stem:
                raise WeightsError(f"{path}: holds shards such as {plain[0].name} without *{INDEX_SUFFIX}; get it too")
            names = ", ".join(file.name for file in plain[:4])
            raise WeightsError(f"{path}: holds {len(plain)} checkpoints ({names}); name the file that is meant")
    raise WeightsError(f"{path}: holds no checkpoint; looked for {', '.join(FOLDER_PATTERNS)}")


def checkpoint_files(path: Path) -> list[Path]:
    """The files that `open_checkpoint` reads: one, or an index and its shards."""
    file = find_checkpoint(path)
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    return [file, *(file.parent / name for name in sorted(set(_read_index(file).values())))]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file."""
    with opened_file(path) as file:
        raw = file.read(MOST_JSON_BYTES + 1)
    if len(raw) > MOST_JSON_BYTES:
        raise WeightsError(f"{path}: is larger than {MOST_JSON_BYTES} bytes; that is no file of a model's settings")
    return _parse_json(raw, path)


@contextmanager
def opened_file(path: Path) -> Iterator[BufferedReader]:
    """The file, open for reading; what the system says against it becomes a WeightsError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or type(error).__name__}") from error


def quoted(name: str) -> str:
    """A name from a file, fit for one line of a message."""
    return repr(name if len(name) <= 200 else name[:200] + "...")


def _read_file(file: Path, load_key: str) -> Catalog:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in PICKLE_SUFFIXES:
        return _read_pickle(file, load_key)
    known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
    raise WeightsError(f"{file}: unknown kind of checkpoint {quoted(file.suffix)}; expected {known}")


def _parse_json(raw: bytes, path: Path) -> dict[str, object]:
    try:
        value = json.loads(raw, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its JSON is damaged: {error}; get the file again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: its JSON is a {type(value).__name__}; expected an object")
    return value


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{quoted(key)} stands in it twice")
        result[key] = value
    return result


# Safetensors: 8 bytes of length, a JSON header of that length, then the tensors, in order and without gaps.


def _read_safetensors(path: Path) -> Catalog:
    with opened_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_JSON_BYTES):
            raise WeightsError(
                f"{path}: its header should take {length} bytes, but the file has {size}; "
                "it is cut off or no safetensors file: get it again"
            )
        header = _parse_json(file.read(length), path)
    start = 8 + length
    header.pop("__metadata__", None)
    catalog = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    _check_extents(path, catalog, start, size)
    return catalog


def _stored(path: Path, name: str, entry: object, start: int) -> Stored:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    dtype = SAFETENSORS_DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise WeightsError(
            f"{path}: tensor {quoted(name)} has dtype {quoted(str(code))}; hvlite reads {', '.join(SAFETENSORS_DTYPES)}"
        )
    if not _are_counts(shape, MOST_AXES) or not _are_counts(offsets, 2) or len(offsets) != 2:
        raise WeightsError(
            f"{path}: tensor {quoted(name)} has shape {quoted(str(shape))} and offsets {quoted(str(offsets))}; "
            "the header is damaged: get the file again"
        )
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise WeightsError(
            f"{path}: tensor {quoted(name)} of shape {shape} and dtype {code} takes {expected} bytes, "
            f"but its offsets say {offsets[1] - offsets[0]}; the header is damaged: get the file again"
        )
    return Stored(file=path, name=name, dtype=dtype, shape=tuple(shape), offset=start + offsets[0])


def _are_counts(value: object, most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(number) is int and 0 <= number <= MOST_ELEMENTS_PER_AXIS for number in value)
    )


def _check_extents(path: Path, catalog: Catalog, start: int, size: int) -> None:
    position, before = start, "the header"
    for stored in sorted(catalog.values(), key=lambda stored: (stored.offset, math.prod(stored.shape))):
        if stored.offset != position:
            fault = "overlaps" if stored.offset < position else "leaves a gap after"
            raise WeightsError(
                f"{path}: tensor {quoted(stored.name)} begins at byte {stored.offset}, expected {position}: "
                f"it {fault} {before}; the header is damaged: get the file again"
            )
        position += math.prod(stored.shape) * stored.dtype.itemsize
        before = quoted(stored.name)
    if position != size:
        fault = "it is cut off" if size < position else "it has bytes too many"
        raise WeightsError(
            f"{path}: its header describes {position} bytes, up to the end of {before}, but the file has {size}; "
            f"{fault}: get it again"
        )


# Shards: an index maps each tensor to a file in the same folder.


def _read_shards(index: Path) -> Catalog:
    table = _read_index(index)
    catalog: Catalog = {}
    for shard in sorted(set(table.values())):
        for name, stored in _read_file(index.parent / shard, "").items():
            if name in catalog:
                raise WeightsError(
                    f"{index.parent}: tensor {quoted(name)} is in two shards, {catalog[name].file.name} and {shard}"
                )
            if table.get(name) != shard:
                expected = quoted(table[name]) if name in table else "in no shard"
                raise WeightsError(f"{index}: tensor {quoted(name)} is in {shard}; the index has it {expected}")
            catalog[name] = stored
    for name, shard in table.items():
        if name not in catalog:
            raise WeightsError(f"{index}: tensor {quoted(name)} should be in {shard}, which does not hold it")
    return catalog


def _read_index(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise WeightsError(f"{index}: has no `weight_map` of tensors to files; get it again")
    for name, shard in table.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise WeightsError(
                f"{index}: puts tensor {quoted(name)} into {quoted(str(shard))}; expected a file name in its own folder"
            )
        if not (index.parent / shard).is_file():
            raise WeightsError(f"{index}: names the shard {quoted(shard)}, which is not there; get it too")
    return cast(dict[str, str], table)


def _is_plain_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", "..") and name.isprintable() and len(name) <= 255


# Pickles, in torch's zip format: the tensors lie uncompressed in the archive.


def _read_pickle(path: Path, load_key: str) -> Catalog:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than tensors ({_refused(path)}), which could run code, so it was not read; "
            "get the safetensors version"
        ) from error
    except Exception as error:  # a damaged pickle drives torch's unpickler into any of a dozen exceptions
        reason = str(error).strip().partition("\n")[0][:200]
        raise WeightsError(f"{path}: is damaged: {type(error).__name__}: {reason}; get it again") from error
    size = path.stat().st_size
    state = _state_dict(path, content, load_key)
    return {name: _stored_in_pickle(path, name, tensor, size) for name, tensor in state.items()}


def _check_archive(path: Path) -> None:
    with opened_file(path) as file:
        if file.read(4) != b"PK\x03\x04":
            raise WeightsError(
                f"{path}: is no torch checkpoint in the zip format, the only one that hvlite reads; if it is old, "
                "load it with torch.load(..., weights_only=True) and save it again with torch.save"
            )
        try:
            records = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile's own list for damaged archives is open-ended
            raise WeightsError(
                f"{path}: its zip archive is cut off or damaged: {quoted(str(error))}; get it again"
            ) from error
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise WeightsError(f"{path}: its record {quoted(packed[0])} is compressed; torch.save writes none such")


def _refused(path: Path) -> str:
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # only wanted for the message: the pickle may be damaged as well
        names = []
    return ", ".join(quoted(name) for name in names[:3]) or "an unusual operation"


def _state_dict(path: Path, content: object, load_key: str) -> dict[str, Tensor]:
    """The entry `load_key` of a DeepSpeed dict, `state_dict` of a wrapped one, or the dict itself (spec 2.1, 3.4)."""
    state = content
    if isinstance(content, dict):
        wrapped = [content[key] for key in (load_key, "state_dict") if isinstance(content.get(key), dict)]
        state = wrapped[0] if wrapped else content
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds a {type(state).__name__} without entries; expected a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            entries = ", ".join(quoted(str(key)) for key in list(state)[:6])
            raise WeightsError(
                f"{path}: entry {quoted(str(name))} is a {type(tensor).__name__}, expected a tensor, and there is no "
                f"{quoted(load_key)} entry; it holds {entries}: choose one by load_key"
            )
    return state


def _stored_in_pickle(path: Path, name: str, tensor: Tensor, size: int) -> Stored:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsError(f"{path}: tensor {quoted(name)} is sparse or quantised; expected plain numbers")
    storage = tensor.untyped_storage()
    # torch.load notes it when it loads onto the meta device (torch's serialization notes).
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        raise WeightsError(f"{path}: tensor {quoted(name)} has a shape but no numbers in the file; get it again")
    shape = tuple(tensor.shape)
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    first, last = tensor.storage_offset() * tensor.itemsize, _span(shape, stride) * tensor.itemsize
    if first + last > storage.nbytes() or start + first + last > size or tensor.numel() * tensor.itemsize > last:
        raise WeightsError(
            f"{path}: tensor {quoted(name)} of shape {list(shape)} takes {tensor.numel() * tensor.itemsize} bytes, but "
            f"its record has {storage.nbytes()} and the file {size}; the file is damaged: get it again"
        )
    return Stored(file=path, name=name, dtype=tensor.dtype, shape=shape, offset=start + first, stride=stride)


def _span(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> int:
    """Elements from the first to the last of a tensor, both included."""
    if stride is None or 0 in shape:
        return math.prod(shape)
    return 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
