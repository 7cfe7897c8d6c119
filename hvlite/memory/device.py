"""Which device a run uses, what it must be able to do, and in which order. The only module that asks CUDA anything.

`cpu`, `cuda`, `cuda:N` and `meta` (real shapes, no bytes) are all there are. Each has its `Lanes`: memory, copies into
it, and the marks that order copies and computing. Only here are there CUDA streams and events.
"""

import ctypes
import errno
import mmap
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvlite.errors import DeviceError
from hvlite.telemetry import cards, host_state

MIN_CAPABILITY = (8, 0)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# cudaHostRegisterPortable: pinned for every CUDA context of the process.
PORTABLE = 1


def choose_device(asked: str | None = None) -> torch.device:
    """The asked device, checked; with none asked the CUDA device with most free memory, else the CPU."""
    if asked is None:
        return _freest_cuda() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DeviceError(f"unknown device {asked!r}; use cpu, cuda, cuda:N or meta") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise DeviceError(f"device {asked!r} is not supported; use cpu, cuda, cuda:N or meta")
    if device.type == "cuda":
        return _checked_cuda(device)
    return device


def check_dtype(device: torch.device, dtype: str) -> None:
    """bf16 needs compute capability 8.0: DeviceError names the card below it."""
    if device.type != "cuda" or dtype == "fp32":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise DeviceError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; {dtype} needs "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}. Use --dtype fp32 (slow), or another card."
        )


def device_name(device: torch.device) -> str:
    """The card's name, or the device's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def wait_for(device: torch.device) -> None:
    """Return when the device has finished all that it was asked: what is then reported is done, not queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """Return memory that no tensor holds to the driver, or to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cpu":
        with suppress(OSError, AttributeError):  # only glibc keeps what was freed, and has this to change that
            ctypes.CDLL(None).malloc_trim(0)


# What CUDA, its libraries and torch's CPU allocator say in errors that have no class of their own.
NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(words in str(error) for words in NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether CUDA itself failed (a hung or fallen card, a fault in a kernel): this process can use it no more."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def unused_card_note() -> str | None:
    """A sentence if an NVIDIA driver is loaded that this torch cannot use; None otherwise."""
    if torch.cuda.is_available() or not NVIDIA_DRIVER.exists():
        return None
    driver = NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
    return (
        f"an NVIDIA driver is loaded ({driver}) but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot "
        "use it. Update the driver, or install a torch build for it (see README, Install)."
    )


def _freest_cuda() -> torch.device:
    """By the driver's figures where it has them: to ask CUDA takes a part of every card for a context."""
    known = {card.uuid: card.free_bytes for card in cards()}

    def free(index: int) -> int:
        found = known.get(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return torch.cuda.mem_get_info(index)[0] if found is None else found

    indexes = range(torch.cuda.device_count())
    return torch.device("cuda", max(indexes, key=free) if len(indexes) > 1 else 0)


def _checked_cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        why = unused_card_note() or f"torch {torch.__version__} sees no CUDA device."
        raise DeviceError(f"device {device} is not available: {why} Use --device cpu to render without it.")
    count = torch.cuda.device_count()
    if device.index is None:
        return _freest_cuda()
    if device.index >= count:
        raise DeviceError(f"device {device} does not exist: this machine has {count} (cuda:0 to cuda:{count - 1})")
    return device


# How much memory there is, and how much may be used.


def cap(device: torch.device, budget_bytes: int | None) -> None:
    """Let torch's allocator take no more than this of the card, cached memory included; None lifts it."""
    if device.type != "cuda":
        return
    _use_expandable_segments()
    total = torch.cuda.mem_get_info(device)[1]
    share = 1.0 if budget_bytes is None else min(1.0, budget_bytes / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def used_peak(device: torch.device) -> int | None:
    """The most that torch's allocator has taken of the card since `forget_peak`; None where there is no card."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    """Count the peak from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(device: torch.device) -> int:
    """What torch's allocator holds of the card now; on the CPU, what this process has in RAM."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else host_state().process_rss


def tensor_bytes(device: torch.device) -> int | None:
    """What tensors take of the card now; None where there is no card."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _use_expandable_segments() -> None:
    """Segments that grow, so that what is freed in pieces is had again in one; a user's own settings stand."""
    if any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    # unsupported where the driver has no virtual memory management; torch then warns and goes on without
    with suppress(RuntimeError, AttributeError):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


# Memory of the host that copies start from.


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinning:
    """How pages are pinned: `pin` gives the reason if it refuses; `unpin` takes their address."""

    pin: Callable[[Tensor], str | None]
    unpin: Callable[[int], None]


class HostMemory:
    """uint8 [n] of pages of its own, in exactly the size asked for. `refusal`: why they are not pinned, if asked."""

    def __init__(self, nbytes: int, pinning: Pinning | None = None) -> None:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            self.data = torch.frombuffer(pages, dtype=torch.uint8)
        self.nbytes = nbytes
        self.refusal = None if pinning is None else pinning.pin(self.data)
        self._unpin = None
        if pinning is not None and self.refusal is None:
            self._unpin = weakref.finalize(self, pinning.unpin, self.data.data_ptr())
            self._unpin.atexit = False  # the driver has let go of it by then

    @property
    def is_pinned(self) -> bool:
        return self._unpin is not None and self._unpin.alive

    def close(self) -> None:
        """Unpin; the pages go with the last view of them. Every copy from here must be finished."""
        if self._unpin is not None:
            self._unpin()
        self.data = torch.empty(0, dtype=torch.uint8)


def _pin(data: Tensor) -> str | None:
    """Register the pages with CUDA; its reason if it refuses."""
    code = int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, PORTABLE))
    if code == 0:
        return None
    _discard_error()
    return f"cudaHostRegister gave error {code}"


def _unpin(address: int) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
        _discard_error()


def _discard_error() -> None:
    """A failed call leaves its error to be found by this thread's next launch, which has nothing to do with it."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


# Lanes.


Mark = object
"""A point in a lane's work; only the lanes that made it can read it."""


class Lanes(ABC):
    """Two lanes of work on a device: copies to it, and computing, which is whatever torch is asked for by the caller.

    Each goes in order, neither waits for the other but where a mark says so, and the host waits for none but in
    `finish`. `copy` and `finish` may be called from any thread, everything else from the one that computes.
    """

    has_bytes = True
    """Whether memory holds anything: on meta there is nothing to read or to copy."""
    reads_directly = False
    """Whether device memory is the host's, so that a file is read straight into it."""
    can_pin = False
    """Whether copies from pinned host memory are faster than from pageable."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 [n] on the device, of any content; a copy into it must wait for a mark made afterwards."""
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free(self, buffer: Tensor) -> None:  # noqa: B027  # the last reference does it; a device of the tests does more
        """The caller lets go of `buffer`: every copy into it is finished, no more computing with it will be asked."""

    def host_memory(self, nbytes: int, *, pin: bool) -> HostMemory:
        """Memory to copy from, pinned if asked for and if the device can."""
        return HostMemory(nbytes)

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """The copy lane: wait for `after`, then copy host memory to the device. The mark says that it has arrived."""

    @abstractmethod
    def mark(self) -> Mark:
        """How far the compute lane will be when it has done all that it was asked for until now."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """The compute lane does nothing more before `mark`."""

    @abstractmethod
    def finish(self, mark: Mark) -> None:
        """The host waits for `mark`."""

    @abstractmethod
    def is_done(self, mark: Mark) -> bool:
        """Whether the device has passed `mark`."""

    @abstractmethod
    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time from one mark of the compute lane to a later one; both are done."""


class CpuLanes(Lanes):
    """Work is done when torch returns, so a mark is a time."""

    reads_directly = True

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        target.copy_(source)
        return self.mark()

    def mark(self) -> Mark:
        return time.perf_counter()

    def wait(self, mark: Mark) -> None:
        pass

    def finish(self, mark: Mark) -> None:
        pass

    def is_done(self, mark: Mark) -> bool:
        return True

    def seconds(self, begin: Mark, end: Mark) -> float:
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin


class MetaLanes(CpuLanes):
    """Device memory is allocated, without bytes; nothing is ever read or copied."""

    has_bytes = False
    reads_directly = False

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        raise AssertionError("nothing is copied to the meta device")


class CudaLanes(Lanes):
    """A stream for the copies; the compute lane is the current stream of the thread that computes."""

    can_pin = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)

    def host_memory(self, nbytes: int, *, pin: bool) -> HostMemory:
        with torch.cuda.device(self.device):
            return HostMemory(nbytes, Pinning(pin=_pin, unpin=_unpin) if pin else None)

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(_event(after))
            target.copy_(source, non_blocking=True)
            return self._record(self._copies)

    def mark(self) -> Mark:
        return self._record(torch.cuda.current_stream(self.device))

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(_event(mark))

    def finish(self, mark: Mark) -> None:
        _event(mark).synchronize()

    def is_done(self, mark: Mark) -> bool:
        return bool(_event(mark).query())

    def seconds(self, begin: Mark, end: Mark) -> float:
        return float(_event(begin).elapsed_time(_event(end))) / 1000

    @staticmethod
    def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # a waiting thread sleeps: the others need the core
        event.record(stream)
        return event


def _event(mark: Mark) -> torch.cuda.Event:
    assert isinstance(mark, torch.cuda.Event)
    return mark


def make_lanes(device: torch.device) -> Lanes:
    """Those of the device."""
    kinds: dict[str, type[Lanes]] = {"cpu": CpuLanes, "meta": MetaLanes, "cuda": CudaLanes}
    return kinds[device.type](device)
