"""One slab file: written once, then read in one piece into memory that is already there, tensor by tensor, or mapped.

Its tensors are views of one run of bytes, so that a block travels in one copy (`views` works on any device). Whoever
reads a slab first in a process holds its SHA-256 against the index; a file that has changed since counts as unread.
"""

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from hvlite.atomic import explained, replaced_file
from hvlite.errors import WeightsError
from hvlite.weights.checkpoint import SAFETENSORS_DTYPES, opened_file
from hvlite.weights.layout import DTYPE_BYTES, Form, Placed, Placement, slab_header

# A tensor that is worth a request to the disk, and pages in memory, of its own.
LARGE_BYTES = 1 << 20
DTYPE_WORDS = {SAFETENSORS_DTYPES[word]: word for word in DTYPE_BYTES}

# (device, inode, size, modification time, expected hash) of the files that were found whole in this process.
_checked: set[tuple[int, int, int, int, str]] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """What the index knows of a slab. `prefix` before a tensor's name here gives its name in the model."""

    name: str
    part: str
    prefix: str
    file: str
    file_bytes: int
    data_offset: int
    sha256: str
    tensors: tuple[Placed, ...]

    @property
    def data_bytes(self) -> int:
        """How much memory it needs: whole pages."""
        return self.file_bytes - self.data_offset

    @property
    def placement(self) -> Placement:
        return Placement(self.tensors, self.data_bytes)


def write_slab(
    folder: Path,
    name: str,
    placement: Placement,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    part: str = "",
    prefix: str = "",
) -> Slab:
    """Write NAME.safetensors, whole or not at all. `tensors` come as placed, one at a time, and none is kept."""
    header = slab_header(placement)
    file = folder / f"{name}.safetensors"
    digest = hashlib.sha256()
    with replaced_file(file) as temporary, explained(file), temporary.open("wb") as stream:
        for piece in _pieces(header, placement, iter(tensors)):
            digest.update(piece)
            stream.write(piece)
            if len(piece) >= LARGE_BYTES:
                _begin_writing(stream)
            del piece
    return Slab(
        name=name,
        part=part,
        prefix=prefix,
        file=file.name,
        file_bytes=len(header) + placement.data_bytes,
        data_offset=len(header),
        sha256=digest.hexdigest(),
        tensors=placement.tensors,
    )


def _begin_writing(stream: BufferedWriter) -> None:
    """Let the disk work while the next tensor is made, so that the fsync at the end waits for little."""
    stream.flush()
    with suppress(OSError):  # only a hint
        # whoever says that he needs no page again makes Linux begin to write those that are not on the disk yet
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pieces(header: bytes, placement: Placement, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[memoryview | bytes]:
    yield header
    position = 0
    for placed in placement.tensors:
        name, tensor = next(tensors)
        found = Form(name, DTYPE_WORDS[tensor.dtype], tuple(tensor.shape))
        assert found == Form(placed.name, placed.dtype, placed.shape), f"{found} where {placed} was planned"
        yield bytes(placed.offset - position)
        yield _bytes_of(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        position = placed.offset + placed.nbytes
        del tensor  # or it would be held while the next one is made
    assert next(tensors, None) is None
    yield bytes(placement.data_bytes - position)


def _bytes_of(data: Tensor) -> memoryview:
    """The memory of uint8 [n] on the CPU."""
    return data.numpy().data


def views(placement: Placement, data: Tensor) -> dict[str, Tensor]:
    """The tensors of a slab by their names in it, where its data lies: uint8 [at least data_bytes], on any device."""
    _check_buffer(placement, data)
    return {
        placed.name: data[placed.offset : placed.offset + placed.nbytes]
        .view(SAFETENSORS_DTYPES[placed.dtype])
        .view(placed.shape)
        for placed in placement.tensors
    }


def _check_buffer(placement: Placement, buffer: Tensor) -> None:
    assert buffer.dtype == torch.uint8
    assert buffer.dim() == 1
    assert buffer.is_contiguous()
    assert len(buffer) >= placement.data_bytes, f"a slab needs {placement.data_bytes} bytes, got {len(buffer)}"


def check_header(folder: Path, slab: Slab) -> None:
    """Size and header are what the index says; no weight is touched."""
    file = folder / slab.file
    with opened_file(file) as stream:
        _check_size(file, stream.fileno(), slab)
        if stream.read(slab.data_offset) != slab_header(slab.placement):
            raise WeightsError(f"{file}: its header is not the one in the index: it is damaged. {_advice(folder)}")


def map_slab(folder: Path, slab: Slab) -> dict[str, Tensor]:
    """Its tensors as views of the mapped file; pages come when they are touched. Writing to them changes no file."""
    file = folder / slab.file
    with opened_file(file) as stream:
        status = _check_size(file, stream.fileno(), slab)
        if _key(status, slab) not in _checked:
            # read, not mapped: mapped pages that were touched count as memory of this process
            _check_hash(file, status, slab, hashlib.file_digest(stream, hashlib.sha256).hexdigest())
        mapped = mmap.mmap(stream.fileno(), slab.file_bytes, access=mmap.ACCESS_COPY)
    return views(slab.placement, torch.frombuffer(mapped, dtype=torch.uint8)[slab.data_offset :])


def read_tensors(folder: Path, slab: Slab) -> Iterator[tuple[str, Tensor]]:
    """Its tensors one at a time, each in memory of its own; what is damaged is told after the last of them."""
    file = folder / slab.file
    with opened_file(file) as stream:
        handle = stream.fileno()
        status = _check_size(file, handle, slab)
        digest = None if _key(status, slab) in _checked else hashlib.sha256()
        position = 0
        for placed in slab.tensors:
            begin = slab.data_offset + placed.offset
            data = _own_memory(placed.nbytes)
            _read_at(file, handle, _bytes_of(data), begin)
            if digest is not None:
                digest.update(os.pread(handle, begin - position, position))
                digest.update(_bytes_of(data))
            position = begin + placed.nbytes
            yield placed.name, data.view(SAFETENSORS_DTYPES[placed.dtype]).view(placed.shape)
            del data  # or it would be held while the next one is read
        if digest is not None:
            digest.update(os.pread(handle, slab.file_bytes - position, position))
            _check_hash(file, status, slab, digest.hexdigest())


def _own_memory(nbytes: int) -> Tensor:
    """uint8 [n]. Pages of its own where it is large: malloc would keep them when it is dropped, between what stays."""
    with torch.inference_mode(False):  # else it could not be written to outside of that mode
        if nbytes < LARGE_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)


def read_slab_into(folder: Path, slab: Slab, buffer: Tensor) -> None:
    """Its data straight into the beginning of `buffer` (uint8 [n] on the CPU, pinned or not)."""
    _check_buffer(slab.placement, buffer)
    assert buffer.device.type == "cpu"
    data = buffer[: slab.data_bytes]
    file = folder / slab.file
    with opened_file(file) as stream:
        status = _check_size(file, stream.fileno(), slab)
        header = os.pread(stream.fileno(), slab.data_offset, 0)
        _read_at(file, stream.fileno(), _bytes_of(data), slab.data_offset)
    if _key(status, slab) not in _checked:
        digest = hashlib.sha256(header)
        digest.update(_bytes_of(data))
        _check_hash(file, status, slab, digest.hexdigest())


def _read_at(file: Path, handle: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        found = os.preadv(handle, [target[done:]], offset + done)
        if found == 0:
            raise WeightsError(f"{file}: ended {len(target) - done} bytes too early; it was cut while hvlite read it")
        done += found


def check_slab(folder: Path, slab: Slab) -> None:
    """Read all of the file and hold it against the index, whether or not it was read before."""
    file = folder / slab.file
    with opened_file(file) as stream:
        _check_size(file, stream.fileno(), slab)
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != slab.sha256:
        raise _damaged(file, found, slab.sha256)


def _check_size(file: Path, handle: int, slab: Slab) -> os.stat_result:
    status = os.fstat(handle)
    if status.st_size != slab.file_bytes:
        raise WeightsError(
            f"{file}: has {status.st_size} bytes, the index says {slab.file_bytes}: it is cut off or another file. "
            f"{_advice(file.parent)}"
        )
    return status


def _key(status: os.stat_result, slab: Slab) -> tuple[int, int, int, int, str]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, slab.sha256


def _check_hash(file: Path, status: os.stat_result, slab: Slab, found: str) -> None:
    """Once for each file in a process; two threads at once both do it, and find the same."""
    if found != slab.sha256:
        raise _damaged(file, found, slab.sha256)
    _checked.add(_key(status, slab))


def _damaged(file: Path, found: str, expected: str) -> WeightsError:
    return WeightsError(
        f"{file}: its SHA-256 is {found}, the index says {expected}: the file is damaged. {_advice(file.parent)}"
    )


def _advice(store: Path) -> str:
    return f"Remove the store {store} and pack the model again (`hvlite models verify` looks for more damage)"
