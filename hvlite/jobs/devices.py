"""Which device a worker serves, and the lock that makes it the only one there. No torch, no CUDA context.

A card's lock bears its UUID: an index means another card as soon as CUDA_VISIBLE_DEVICES or a slot changes. The kernel
frees a lock when the last process that holds it is gone, however it went; the worker inherits its supervisor's.
"""

import ctypes
import fcntl
import importlib.util
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from hvlite import paths
from hvlite.atomic import explained
from hvlite.errors import Busy, DeviceError
from hvlite.jobs.job import Job
from hvlite.telemetry import cards

# How long a second start waits: whoever was killed just now is gone by then.
LOCK_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device that a worker may serve: `device` is what `--device` calls it, `lock` the name of its lock."""

    device: str
    lock: str

    @property
    def serves(self) -> frozenset[str | None]:
        """The values of a job's `--device` that mean this place, or any."""
        return frozenset({None, self.device, self.device.partition(":")[0]})


CPU_LOCK = "cpu-" + socket.gethostname()


def places(asked: str | None = None) -> list[Place]:
    """Where `--device` may be served, best first; without it the cards, the freest first, or the CPU.

    DeviceError if there is no such device.
    """
    if asked == "cpu":
        return [Place(device="cpu", lock=CPU_LOCK)]
    if asked is not None and asked.partition(":")[0] != "cuda":
        raise DeviceError(f"a worker serves cpu, cuda or cuda:N; got {asked!r}")
    found = [Place(device=f"cuda:{index}", lock=uuid) for index, uuid in enumerate(cuda_cards())]
    if asked is None and (not found or not torch_knows_cuda()):
        return [Place(device="cpu", lock=CPU_LOCK)]
    chosen = [place for place in found if asked in place.serves]
    if not chosen:
        raise DeviceError(f"device {asked} is not there: CUDA shows {len(found)} card(s) (see hvlite doctor)")
    free = {card.uuid: card.free_bytes or 0 for card in cards()}
    return sorted(chosen, key=lambda place: -free.get(place.lock, 0))


def cuda_cards(load: Callable[[str], Any] = ctypes.CDLL) -> list[str]:
    """The UUIDs of the cards that CUDA shows to this process, by its own index; [] without a driver."""
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return []
    count, device, uuid = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetUuid_v2(ctypes.byref(uuid), device):
            return []
        found.append(f"GPU-{UUID(bytes=bytes(uuid))}")
    return found


def torch_knows_cuda() -> bool:
    """Whether the installed torch was built with CUDA; looked up, not imported."""
    found = importlib.util.find_spec("torch")
    return found is not None and (Path(found.origin or "").parent / "lib" / "libtorch_cuda.so").exists()


@dataclass(slots=True)
class DeviceLock:
    """A lock that is held as long as `handle` is open, here or in a child."""

    name: str
    handle: int

    def close(self) -> None:
        os.close(self.handle)


def take_lock(name: str, kind: int = fcntl.LOCK_EX) -> DeviceLock | None:
    """The lock of that name; None if another process has it."""
    file = paths.lock_file(name)
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return DeviceLock(name, handle)


def sign(lock: DeviceLock) -> None:
    """Write who holds it, for those who are refused."""
    os.ftruncate(lock.handle, 0)
    os.pwrite(lock.handle, json.dumps({"pid": os.getpid()}).encode(), 0)


def is_free(name: str) -> bool:
    """Whether nobody serves the device of that lock now. What is no file's name was never locked."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return True
    lock = take_lock(name, fcntl.LOCK_SH)  # two that only look are not in each other's way
    if lock is None:
        return False
    lock.close()
    return True


def any_worker() -> bool:
    """Whether a worker runs on any device."""
    return any(not is_free(file.stem) for file in paths.lock_file("any").parent.glob("*.lock"))


def take_place(candidates: Sequence[Place], running: Callable[[], Sequence[Job]]) -> tuple[Place, DeviceLock]:
    """The first of these places that nobody serves, and its lock; Busy says what `running` there."""
    ends = time.monotonic() + LOCK_SECONDS
    while True:
        for place in candidates:
            lock = take_lock(place.lock)
            if lock is not None:
                sign(lock)
                return place, lock
        if time.monotonic() >= ends:
            raise Busy("; ".join(_occupied(place, running()) for place in candidates))
        time.sleep(0.05)


def check_free(device: str, running: Callable[[], Sequence[Job]]) -> None:
    """Busy if a worker serves that card: two runs would plan for the same memory. What waits can be queued."""
    for place in places(device):
        if place.device == device and not is_free(place.lock):
            raise Busy(_occupied(place, running()))


def _occupied(place: Place, running: Sequence[Job]) -> str:
    at_work = next((job for job in running if job.lock == place.lock), None)
    doing = (
        "it makes no clip now (hvlite queue ls says what waits)"
        if at_work is None
        else f"it makes job {at_work.id}{_course(at_work)}"
    )
    return (
        f"{place.device} is served by a worker (process {_holder(place.lock) or 'unknown'}): {doing}. "
        "Queue what you want made: hvlite queue add"
    )


def _course(job: Job) -> str:
    progress = job.progress
    if progress is None:
        return ""
    step = f" step {progress.step}/{progress.steps}" if progress.steps else ""
    eta = "" if progress.eta is None else f", until about {time.strftime('%H:%M', time.localtime(progress.eta))}"
    return f" ({progress.stage}{step}{eta})"


def _holder(name: str) -> int | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(paths.lock_file(name).read_text(encoding="ascii"))["pid"])
    return None
