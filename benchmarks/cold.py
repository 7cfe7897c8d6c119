"""Reading that comes from the disk, and proves it; the memory that a process took; a folder for large files.

The page cache of a file is dropped by `posix_fadvise`, which needs no rights; what the kernel then fetches from the
device for this process, or for one thread of it, stands in /proc.
"""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Left free on the disk, whatever is written.
SPARED_BYTES = 4 << 30


def drop_from_cache(files: Iterable[Path]) -> None:
    """Forget the pages of these files; they must be on disk (`os.fsync`), and mapped by nobody."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def fetched_bytes(who: str = "self") -> int:
    """What the kernel has fetched from devices for this process so far; `thread-self`: for this thread."""
    return _number(f"/proc/{who}/io", "read_bytes")


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that a process has had at once, files that it maps included: VmHWM."""
    return _number(f"/proc/{process}/status", "VmHWM") << 10


def _number(file: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+)", Path(file).read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"{file} does not tell {key}"
    return int(found[1])


def in_fresh_process(act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `act` returns, called in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(act, *args, **kwargs).result()


def free_bytes(folder: Path) -> int:
    """What may be written there."""
    return max(0, shutil.disk_usage(folder).free - SPARED_BYTES)


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone on leaving, also by Ctrl+C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with tempfile.TemporaryDirectory(prefix="hvlite-benchmark-", dir=parent) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)
