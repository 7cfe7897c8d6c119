"""A device that is as unfriendly as the contract of `Lanes` allows: nothing happens before it must, or all at once.

Both lanes are lists of things to do. Whoever waits makes them go as far as it needs, and no further (`when="last"`), or
they go as far as they may at every call ("first"), or anywhere between ("random"). 0xFF (NaN in every float) lies in
what holds nothing: new memory, a slot from its release until the next slab is whole, memory given back or unpinned.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

from hvlite.memory.device import HostMemory, Lanes, Mark, Pinning

POISON = 0xFF


@dataclass(eq=False)
class Tick:
    """A mark: the lane that it is in, and whether that has come so far."""

    lane: "deque[Task]"
    done: bool = False

    def reach(self) -> None:
        self.done = True


class Task(NamedTuple):
    """Something to do in a lane, once `needs` is reached; `memory` is what a copy works on."""

    act: Callable[[], object]
    needs: Tick | None = None
    memory: tuple[int, ...] = ()


@dataclass
class Habits:
    """When things happen, whether files are read straight into device memory, how often pinning is refused."""

    when: str = "last"
    direct: bool = False
    refusals: float = 0.0
    seed: int = 0


@dataclass
class Findings:
    """What the device saw: memory that is out, and what was done that may not be."""

    allocated: dict[int, Tensor] = field(default_factory=dict)
    pinned: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class DelayingLanes(Lanes):
    """See the module's text."""

    can_pin = True

    def __init__(self, habits: Habits) -> None:
        super().__init__(torch.device("cpu"))
        self.habits = habits
        self.reads_directly = habits.direct
        self.found = Findings()
        self._random = Random(habits.seed)
        self._lock = RLock()
        self._copies: deque[Task] = deque()
        self._computing: deque[Task] = deque()

    def allocate(self, nbytes: int) -> Tensor:
        buffer = super().allocate(nbytes).fill_(POISON)
        self.found.allocated[buffer.data_ptr()] = buffer
        return buffer

    def free(self, buffer: Tensor) -> None:
        self._check_unused(buffer.data_ptr(), "device memory was given back")
        del self.found.allocated[buffer.data_ptr()]
        self._add(self._computing, Task(lambda: buffer.fill_(POISON)))

    def host_memory(self, nbytes: int, *, pin: bool) -> HostMemory:
        return HostMemory(nbytes, Pinning(pin=self._pin, unpin=self._unpin) if pin else None)

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        arrived = Tick(self._copies)
        memory = target.data_ptr(), source.data_ptr()
        self._add(
            self._copies,
            Task(lambda: target.fill_(POISON), needs=_tick(after), memory=memory),
            Task(lambda: target.copy_(source), memory=memory),
            Task(arrived.reach),
        )
        return arrived

    def compute(self, act: Callable[[], object]) -> None:
        """Ask the compute lane for this."""
        self._add(self._computing, Task(act))

    def mark(self) -> Mark:
        tick = Tick(self._computing)
        self._add(self._computing, Task(tick.reach))
        return tick

    def wait(self, mark: Mark) -> None:
        self._add(self._computing, Task(lambda: None, needs=_tick(mark)))

    def finish(self, mark: Mark) -> None:
        with self._lock:
            self._reach(_tick(mark))

    def is_done(self, mark: Mark) -> bool:
        return _tick(mark).done

    def seconds(self, begin: Mark, end: Mark) -> float:
        assert _tick(begin).done
        assert _tick(end).done
        return 0.25

    def _add(self, lane: deque[Task], *tasks: Task) -> None:
        with self._lock:
            lane.extend(tasks)
            going = {"last": 0, "first": 1_000_000, "random": self._random.randrange(6)}[self.habits.when]
            while going and (ready := [lane for lane in (self._copies, self._computing) if _is_ready(lane)]):
                self._step(self._random.choice(ready))
                going -= 1

    def _step(self, lane: deque[Task]) -> None:
        needs = lane[0].needs
        if needs is not None:
            self._reach(needs)
        lane.popleft().act()

    def _reach(self, tick: Tick) -> None:
        while not tick.done:
            self._step(tick.lane)

    def _pin(self, data: Tensor) -> str | None:
        if self._random.random() < self.habits.refusals:
            return "the test refuses"
        self.found.pinned[data.data_ptr()] = data.nbytes
        return None

    def _unpin(self, address: int) -> None:
        self._check_unused(address, "memory was unpinned")
        ctypes.memset(address, POISON, self.found.pinned.pop(address))

    def _check_unused(self, address: int, what: str) -> None:
        with self._lock:
            if any(address in task.memory for task in self._copies):
                self.found.faults.append(f"{what} while a copy was under way")


def _is_ready(lane: deque[Task]) -> bool:
    return bool(lane) and (lane[0].needs is None or lane[0].needs.done)


def _tick(mark: Mark) -> Tick:
    assert isinstance(mark, Tick)
    return mark
