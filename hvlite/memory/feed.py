"""Brings slabs to buffers on the device, one after the other in an order known beforehand, ahead of their use.

    reader   disk -> staging A | B      (not where files are read straight into device memory)
    feeder   slab in host memory, or staging -> its slot, once the slot is released
    caller   next(): the next slab is on its way, and here is the mark of its arrival; release(): a slot is free again

Queues join the three, so nobody looks at what another one is doing. The reader runs ahead of the slots by its two
staging buffers and refills one only when the copy from it is finished. A failure travels down the same queues and is
raised, as itself, where the slab it concerns is asked for.
"""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol

from torch import Tensor

from hvlite.memory.device import HostMemory, Lanes, Mark


class Slabs(Protocol):
    """What is known of a store: its slabs by name."""

    def slab_bytes(self, name: str) -> int:
        """The size of its data: whole pages."""

    def read_slab(self, name: str, buffer: Tensor) -> None:
        """Its data into the beginning of uint8 [n] in host memory; an HvliteError if it is damaged or gone."""

    def slab_views(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """Its tensors by name, as views of its data (uint8, on any device)."""


class Load(NamedTuple):
    """One slab that goes to one slot."""

    name: str
    slot: int


class Source(NamedTuple):
    """Where slabs come from: those in host memory from there, the others from disk, through `staging`."""

    slabs: Slabs
    host: Callable[[str], Tensor | None]
    staging: Sequence[HostMemory]


class _Staged(NamedTuple):
    """A staging buffer, and when the last copy from it is done."""

    memory: HostMemory
    copied: Mark | None


class Feed:
    """The two threads of the module's text. `close` leaves neither a thread nor a copy behind."""

    def __init__(self, source: Source, lanes: Lanes, loads: Sequence[Load], slots: Sequence[Tensor]) -> None:
        self._source = source
        self._lanes = lanes
        self._loads = loads
        self._slots = slots
        self._is_closed = False
        self._last_copy: Mark | None = None
        self._released: list[SimpleQueue[Mark | None]] = [SimpleQueue() for _ in slots]
        self._empty: SimpleQueue[_Staged | None] = SimpleQueue()
        self._full: SimpleQueue[HostMemory | BaseException | None] = SimpleQueue()
        self._arriving: SimpleQueue[Mark | BaseException] = SimpleQueue()
        allocated = lanes.mark()  # a buffer's former owner may still be computing with it
        for queue in self._released:
            queue.put(allocated)
        for memory in source.staging:
            self._empty.put(_Staged(memory, None))
        # daemons: an interpreter that ends with a walk still open must not wait for them
        self._threads = [Thread(target=self._feed, name="hvlite feeder", daemon=True)] if loads else []
        if source.staging:
            self._threads.append(Thread(target=self._read, name="hvlite reader", daemon=True))
        for thread in self._threads:
            thread.start()

    def next(self) -> Mark:
        """Wait until the next load is under way; the mark of its arrival. What went wrong with it is raised."""
        arriving = self._arriving.get()
        if isinstance(arriving, BaseException):
            self._arriving.put(arriving)  # whoever asks once more is told again
            raise arriving
        return arriving

    def release(self, slot: int, mark: Mark) -> None:
        """Computing does not use what is in this slot beyond `mark`."""
        self._released[slot].put(mark)

    def close(self) -> None:
        """Stop after what is being read now; return when no thread runs and no copy is under way."""
        self._is_closed = True
        self._empty.put(None)
        for queue in self._released:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        if self._last_copy is not None:
            self._lanes.finish(self._last_copy)

    def _feed(self) -> None:
        try:
            for load in self._loads:
                released = self._released[load.slot].get()
                if self._is_closed or released is None:
                    return
                arriving = self._bring(load, released)
                if arriving is None:
                    return
                self._arriving.put(arriving)
        except BaseException as error:
            self._arriving.put(error)

    def _bring(self, load: Load, released: Mark) -> Mark | None:
        """Start the load; the mark of its arrival, None if the feed is being closed."""
        lanes, slabs = self._lanes, self._source.slabs
        slot = self._slots[load.slot][: slabs.slab_bytes(load.name)]
        host = self._source.host(load.name)
        if host is not None:
            self._last_copy = lanes.copy(slot, host, released)
        elif lanes.reads_directly:
            lanes.finish(released)
            slabs.read_slab(load.name, slot)
            return released
        else:
            full = self._full.get()
            if isinstance(full, BaseException):
                raise full
            if full is None:
                return None
            self._last_copy = lanes.copy(slot, full.data[: len(slot)], released)
            self._empty.put(_Staged(full, self._last_copy))
        return self._last_copy

    def _read(self) -> None:
        try:
            for load in self._loads:
                if self._source.host(load.name) is not None:
                    continue
                staged = self._empty.get()
                if self._is_closed or staged is None:
                    break
                if staged.copied is not None:
                    self._lanes.finish(staged.copied)
                self._source.slabs.read_slab(load.name, staged.memory.data)
                self._full.put(staged.memory)
        except BaseException as error:
            self._full.put(error)
        self._full.put(None)
