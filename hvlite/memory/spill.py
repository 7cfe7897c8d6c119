"""Clips outside of the device, for the exact decode: in host memory, or in temporary files.

Files have no name in the folder (or lose it at once), so that nothing is left behind whatever happens, a kill included;
their space is taken when they are made, so that a full disk is an OutputError then and not a crash in the middle. On
meta tensors nothing is stored at all.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Protocol, Self

import torch
from torch import Tensor

from hvlite.errors import OutputError
from hvlite.telemetry import disk_state

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
    """Gives memory for clips: files in `folder`, which is made, or the host's where that is None.

    A context manager: what has not been closed by then is closed at its end. OutputError where the disk fails.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, folder: Path | None = None) -> None:
        self.dtype = dtype
        self.device = device
        self.folder = folder
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def new(self, shape: Shape) -> Spilled:
        """Memory for a clip; what is in it is undefined."""
        memory = None if self.device.type == "meta" else self._take(prod(shape) * self.dtype.itemsize)
        return Spilled(memory, shape, self.dtype, self.device)

    def _take(self, nbytes: int) -> Memory:
        memory = _Host(nbytes) if self.folder is None else _File(nbytes, self.folder)
        return self._open.enter_context(closing(memory))


class _Host:
    def __init__(self, nbytes: int) -> None:
        self.data = torch.empty(nbytes, dtype=torch.uint8)

    def read(self, offset: int, nbytes: int) -> Tensor:
        return self.data[offset : offset + nbytes]

    def write(self, offset: int, data: Tensor) -> None:
        self.data[offset : offset + len(data)] = data

    def close(self) -> None:
        self.data = self.data.new_empty(0)


class _File:
    def __init__(self, nbytes: int, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = _reserve(nbytes, folder)
        except OSError as error:
            raise OutputError(
                f"the exact decode needs {nbytes / GIB:.2f} GiB more in {folder}, where "
                f"{disk_state(folder).free_bytes / GIB:.2f} GiB is free: {error.strerror}. Make room there, or use "
                "--decode-tile auto."
            ) from error

    def read(self, offset: int, nbytes: int) -> Tensor:
        data = torch.empty(nbytes, dtype=torch.uint8)
        rest: memoryview = data.numpy().data
        while rest:
            with _explained(self.folder):
                count = os.preadv(self.file.fileno(), [rest], offset + nbytes - len(rest))
            if count == 0:
                raise OutputError(f"a temporary file in {self.folder} ends before {offset + nbytes} bytes")
            rest = rest[count:]
        return data

    def write(self, offset: int, data: Tensor) -> None:
        rest: memoryview = data.numpy().data
        while rest:
            with _explained(self.folder):
                count = os.pwrite(self.file.fileno(), rest, offset)
            rest, offset = rest[count:], offset + count

    def close(self) -> None:
        self.file.close()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the exact decode cannot use its files in {folder}: {error.strerror}. Look at the system's log, or use "
            "--decode-tile auto."
        ) from error


def _reserve(nbytes: int, folder: Path) -> IO[bytes]:
    """A file without a name whose space is taken."""
    # where a file system cannot do without one, a kill may leave it: its name is one that leftovers have
    file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0, prefix=".hvlite-", suffix=".part")  # noqa: SIM115
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError:
        file.close()
        raise
    return file
