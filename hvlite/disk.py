"""How fast a disk gives a file back: read once, in order, with the page cache emptied before, and proved by counters.

No torch.
"""

import mmap
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from hvlite.atomic import explained
from hvlite.errors import OutputError
from hvlite.telemetry import disk_state, nearest_existing

OWN_IO = Path("/proc/self/io")
CHUNK_BYTES = 16 << 20
# A file shorter than this tells little.
LEAST_BYTES = 64 << 20
# The rest of a disk that a temporary file is not written into.
SPARED_BYTES = 1 << 30
# Of what was read, the share that must have come from the device.
COLD_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """One reading. `device_bytes` is what the kernel fetched from the device for it; None where it does not tell."""

    what: str
    read_bytes: int
    seconds: float
    cpu_seconds: float
    device_bytes: int | None

    @property
    def bytes_per_second(self) -> float:
        return self.read_bytes / self.seconds

    @property
    def is_cold(self) -> bool:
        """Whether it was the disk that was measured, not a cache in this machine's memory."""
        return self.device_bytes is not None and self.device_bytes >= COLD_SHARE * self.read_bytes


def measure_disk(path: Path, nbytes: int = 256 << 20, own_io: Path = OWN_IO) -> DiskRate:
    """Read up to `nbytes` of `path`, or of the largest weights below that folder.

    Where there are none, of a temporary file in the nearest folder that exists. OutputError if that cannot be written.
    """
    file = path if path.is_file() else _largest_weights(path)
    if file is not None:
        with _explained_reading(file), file.open("rb", buffering=0) as stream:
            return _read(stream, nbytes, "the models that are there", own_io)
    folder = nearest_existing(path)
    with _temporary(folder, nbytes) as stream, _explained_reading(folder):
        return _read(stream, nbytes, "a temporary file", own_io)


def _largest_weights(folder: Path) -> Path | None:
    sizes = [(file.stat().st_size, file) for file in folder.rglob("*.safetensors") if file.is_file()]
    size, file = max(sizes, default=(0, folder))
    return file if size >= LEAST_BYTES else None


@contextmanager
def _temporary(folder: Path, nbytes: int) -> Iterator[FileIO]:
    """Random bytes, which no file system can store in less, in a file without a name: even a kill removes it."""
    free = disk_state(folder).free_bytes
    if free < nbytes + SPARED_BYTES:
        raise OutputError(
            f"{folder} has {free / 1e9:.1f} GB free: too little to write {nbytes / 1e9:.1f} GB and read them back"
        )
    file = folder / f".hvlite-{secrets.token_hex(6)}.part"
    with explained(file):
        stream = FileIO(file, "x+")
    with stream:
        with explained(file):
            file.unlink()
            for begin in range(0, nbytes, CHUNK_BYTES):
                stream.write(os.urandom(min(CHUNK_BYTES, nbytes - begin)))
            os.fsync(stream.fileno())  # what is not written yet cannot be dropped from the cache
            stream.seek(0)
        yield stream


def _read(stream: FileIO, nbytes: int, what: str, own_io: Path) -> DiskRate:
    nbytes = min(nbytes, os.fstat(stream.fileno()).st_size)
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    device_before, cpu_before, began = _device_bytes(own_io), time.process_time(), time.perf_counter()
    done = 0
    with mmap.mmap(-1, CHUNK_BYTES) as buffer:
        while done < nbytes and (got := stream.readinto(memoryview(buffer)[: nbytes - done])):
            done += got
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_before
    device_after = _device_bytes(own_io)
    fetched = None if device_before is None or device_after is None else device_after - device_before
    return DiskRate(what=what, read_bytes=done, seconds=seconds, cpu_seconds=cpu_seconds, device_bytes=fetched)


@contextmanager
def _explained_reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error


def _device_bytes(own_io: Path) -> int | None:
    """What the kernel has fetched from block devices for this process so far."""
    try:
        found = re.search(r"^read_bytes: (\d+)$", own_io.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
