"""What a run holds on its device, counted while the run's own code passes by: the proof of the plan.

A `Trace` sees every operation on meta tensors, where nothing is computed and every allocation is made. It adds a
storage when an operation returns one that is new, takes it away when the last tensor on it has died, and notes the
most that was held, stage by stage, with the line of code that asked for the last of it. What an operation allocates
inside itself and frees again is not seen: that is what the plan's table of workspaces is for.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# CUDA's allocator gives memory in multiples of this.
ROUNDING = 512
PACKAGE = str(Path(__file__).resolve().parent.parent)

Step = TypeVar("Step")
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePeak:
    """The most bytes that were held at once during a stage, and the line and operation that came to them."""

    stage: str
    peak_bytes: int
    place: str


@contextmanager
def not_counted() -> Iterator[None]:
    """What is made in here takes no device memory in a real run: empty parameters of modules, what lies on the host."""
    with _hiding(True):
        yield


@contextmanager
def counted() -> Iterator[None]:
    """What is made in here does, also where it is part of work on the host."""
    with _hiding(False):
        yield


@contextmanager
def _hiding(value: bool) -> Iterator[None]:
    token = _hidden.set(value)
    try:
        yield
    finally:
        _hidden.reset(token)


def on_host(steps: Iterator[Step]) -> Iterator[Step]:
    """The same; what is done to make each of them is not counted, but for what is `counted` within."""
    while True:
        with not_counted():
            step = next(steps, None)
        if step is None:
            return
        yield step
        del step  # not to be held beside the next one


def to_host(tensor: Tensor) -> Tensor:
    """In the host's memory; on meta that takes nothing."""
    if tensor.device.type != "meta":
        return tensor.cpu()
    with not_counted():
        return torch.empty_like(tensor)


class Trace(TorchDispatchMode):
    """Counts the live storages of one kind of device while it is entered; those that were there before do not count."""

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is not annotated
        self.live_bytes = 0
        self._device_type = device_type
        self._known: set[int] = set()
        self._peaks: dict[str, StagePeak] = {}
        self._stage = ""
        self.begin("")

    @property
    def peaks(self) -> list[StagePeak]:
        """One for each stage, in the order in which they began; operations before the first are of stage ''."""
        return list(self._peaks.values())

    def peak(self, stage: str) -> StagePeak:
        """That of one stage."""
        return self._peaks[stage]

    def begin(self, stage: str) -> None:
        """What follows belongs to this stage, to which everything counts that is held now."""
        self._stage = stage
        self._note("held when it began")

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        new = {key: storage for key, storage in self._storages(result) if key not in self._known}
        if new and not _hidden.get():
            for key, _ in self._storages((args, kwargs)):
                new.pop(key, None)  # a view of something that does not count
            for key, storage in new.items():
                self._add(key, storage)
            if new and self.live_bytes > self._peaks[self._stage].peak_bytes:
                self._note(f"{_place(sys._getframe(1))}: {func}")
        return result

    def _storages(self, values: object) -> Iterator[tuple[int, torch.UntypedStorage]]:
        for value in tree_iter(values):
            if isinstance(value, Tensor) and value.device.type == self._device_type:
                storage = value.untyped_storage()
                yield storage._cdata, storage

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._known.add(key)
        self.live_bytes += size
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.live_bytes -= size

    def _note(self, place: str) -> None:
        held = self._peaks.get(self._stage)
        if held is None or self.live_bytes > held.peak_bytes:
            self._peaks[self._stage] = StagePeak(stage=self._stage, peak_bytes=self.live_bytes, place=place)


def _place(frame: FrameType | None) -> str:
    """The innermost line of hvlite, or of whoever called torch where none is."""
    inner = frame
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    shown = frame or inner
    assert shown is not None
    return f"{Path(shown.f_code.co_filename).name}:{shown.f_lineno} {shown.f_code.co_name}"
