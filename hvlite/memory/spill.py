"""Clips outside of the device, for the exact decode: in host memory as long as it lasts, then in temporary files.

Files have no name in the folder (or lose it at once), so that nothing is left behind whatever happens; their space is
taken when they are made, so that a full disk is an OutputError then and not a crash in the middle. On meta tensors
nothing is stored at all.
"""

import os
import shutil
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Protocol, Self

import torch
from torch import Tensor

from hvlite.errors import OutputError

GIB = 2**30
Shape = tuple[int, int, int, int, int]


class Memory(Protocol):
    """Bytes that are not on the device."""

    def read(self, offset: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the host; not to be changed."""

    def write(self, offset: int, data: Tensor) -> None:
        """`data`, uint8 [n] on the host."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Spilled:
    """A clip [1,T,H,W,C] in some memory, frame after frame."""

    memory: Memory | None
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def frame_bytes(self) -> int:
        return prod(self.shape[2:]) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Frames [1,t,H,W,C] on the device; not to be changed."""
        shape = (1, stop - start, *self.shape[2:])
        if self.memory is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        data = self.memory.read(start * self.frame_bytes, (stop - start) * self.frame_bytes)
        return data.view(self.dtype).view(shape).to(self.device)

    def write(self, first: int, frames_BTHWC: Tensor) -> None:
        """Frames from number `first` on."""
        assert frames_BTHWC.shape[2:] == self.shape[2:], (frames_BTHWC.shape, self.shape)
        if self.memory is not None:
            data = frames_BTHWC.to("cpu").contiguous().view(-1).view(torch.uint8)
            self.memory.write(first * self.frame_bytes, data)

    def with_channels(self, channels: int) -> "Spilled":
        """The same memory for frames of fewer channels: none of them lies later than it did."""
        assert channels <= self.shape[4], (channels, self.shape)
        return replace(self, shape=(*self.shape[:4], channels))

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()


class Spill:
    """Gives memory for clips: `host_bytes` of the host's, then files in `folder`; OutputError where that is full.

    A context manager: what has not been closed by then is closed at its end.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, host_bytes: int, folder: Path) -> None:
        self.dtype = dtype
        self.device = device
        self.folder = folder
        self.free_bytes = host_bytes
        self._files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def new(self, shape: Shape) -> Spilled:
        """Memory for a clip; what is in it is undefined."""
        return Spilled(self._take(prod(shape) * self.dtype.itemsize), shape, self.dtype, self.device)

    def _take(self, nbytes: int) -> Memory | None:
        if self.device.type == "meta":
            return None
        if nbytes <= self.free_bytes:
            self.free_bytes -= nbytes
            return _Host(nbytes, self)
        return self._files.enter_context(closing(_File(nbytes, self.folder)))


class _Host:
    def __init__(self, nbytes: int, spill: Spill) -> None:
        self.data = torch.empty(nbytes, dtype=torch.uint8)
        self.spill = spill

    def read(self, offset: int, nbytes: int) -> Tensor:
        return self.data[offset : offset + nbytes]

    def write(self, offset: int, data: Tensor) -> None:
        self.data[offset : offset + len(data)] = data

    def close(self) -> None:
        self.spill.free_bytes += len(self.data)
        self.data = self.data.new_empty(0)


class _File:
    def __init__(self, nbytes: int, folder: Path) -> None:
        try:
            self.file = _reserve(nbytes, folder)
        except OSError as error:
            free = shutil.disk_usage(folder).free if folder.is_dir() else 0
            raise OutputError(
                f"the exact decode needs {nbytes / GIB:.2f} GiB more in {folder}, where {free / GIB:.2f} GiB is free: "
                f"{error.strerror}. Make room there, or use --decode-tile auto."
            ) from error

    def read(self, offset: int, nbytes: int) -> Tensor:
        data = torch.empty(nbytes, dtype=torch.uint8)
        rest: memoryview = data.numpy().data
        while rest:
            count = os.preadv(self.file.fileno(), [rest], offset + nbytes - len(rest))
            if count == 0:
                raise OutputError(f"a temporary file of the exact decode ends before {offset + nbytes} bytes")
            rest = rest[count:]
        return data

    def write(self, offset: int, data: Tensor) -> None:
        rest: memoryview = data.numpy().data
        while rest:
            count = os.pwrite(self.file.fileno(), rest, offset)
            rest, offset = rest[count:], offset + count

    def close(self) -> None:
        self.file.close()


def _reserve(nbytes: int, folder: Path) -> IO[bytes]:
    """A file without a name whose space is taken."""
    file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError:
        file.close()
        raise
    return file
