"""Who owns which bytes: slabs that stay on the device, slabs that stay in pinned host memory; all others are on disk.

Owned across calls. What is not wanted any more goes, what is missing comes; a walk (`streamer`) moves nothing in here.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from torch import Tensor

from hvlite.memory.device import HostMemory, Lanes
from hvlite.memory.feed import Feed, Load, Slabs, Source
from hvlite.memory.tiers import STAGING


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How far `keep` is: a slab has come, and how much of all that is missing is there."""

    name: str
    done_bytes: int
    total_bytes: int


class Pool:
    """Slabs that are at hand. `notes` are sentences that a user should read."""

    def __init__(self, slabs: Slabs, lanes: Lanes, *, pin_bytes: int | None = None) -> None:
        """pin_bytes: how much host memory may be pinned, staging included. None: what the driver gives."""
        self.slabs = slabs
        self.lanes = lanes
        self.notes: list[str] = []
        self._pin_bytes = pin_bytes
        self._resident: dict[str, Tensor] = {}
        self._host: dict[str, HostMemory] = {}
        self._staging: list[HostMemory] = []
        self._may_pin = True
        self._is_open = True
        self._is_walked = False

    def resident(self, name: str) -> Tensor | None:
        """The slab's data on the device, if it stays there."""
        return self._resident.get(name)

    def in_host(self, name: str) -> Tensor | None:
        """The slab's data in host memory, if it is kept there."""
        memory = self._host.get(name)
        return None if memory is None else memory.data

    @property
    def resident_bytes(self) -> int:
        """What the residents take of the device."""
        return sum(data.nbytes for data in self._resident.values())

    @property
    def host_bytes(self) -> int:
        """What slabs and staging take of the host now, pinned or not."""
        return sum(memory.nbytes for memory in (*self._host.values(), *self._staging))

    @property
    def pinned_bytes(self) -> int:
        """How much of `host_bytes` is pinned."""
        return sum(memory.nbytes for memory in (*self._host.values(), *self._staging) if memory.is_pinned)

    def keep(self, *, resident: Iterable[str] = (), pinned: Iterable[str] = ()) -> Generator[Kept, None, None]:
        """Give up all slabs but these, then load the missing ones; yields after each. Nothing happens unless iterated.

        Where no more can be pinned the slab lies in pageable memory, and a note says so.
        """
        assert self._is_open
        assert not self._is_walked, "a walk is open: its residents cannot change"
        on_device, on_host = list(dict.fromkeys(resident)), list(dict.fromkeys(pinned))
        self._drop(on_device, on_host)
        missing = [name for name in on_device if name not in self._resident]
        absent = [name for name in on_host if name not in self._host] if self.lanes.has_bytes else []
        total = sum(self.slabs.slab_bytes(name) for name in (*missing, *absent))
        done = 0
        for names, load in ((absent, self._load_host), (missing, self._load_resident)):
            with closing(load(names)) as loading:
                for name in loading:
                    done += self.slabs.slab_bytes(name)
                    yield Kept(name=name, done_bytes=done, total_bytes=total)

    def close(self) -> None:
        """Give everything back. Walks have ended before."""
        assert not self._is_walked, "a walk is still open"
        self._drop([], [])
        self._is_open = False

    @contextmanager
    def feed(self, loads: Sequence[Load], slots: Sequence[Tensor]) -> Iterator[Feed]:
        """Bring `loads` to `slots`, with staging buffers of its own where a slab comes from disk through the host.

        While it is open, what is kept stays as it is, and there is no other feed.
        """
        assert self._is_open
        assert not self._is_walked, "a walk is open already"
        sizes = [self.slabs.slab_bytes(load.name) for load in loads if load.name not in self._host]
        with ExitStack() as stack:
            self._is_walked = True
            stack.callback(self._end_walk)
            if sizes and not self.lanes.reads_directly:
                for _ in range(min(STAGING, len(sizes))):
                    self._staging.append(stack.enter_context(closing(self._take_host(max(sizes)))))
            source = Source(self.slabs, self.in_host, list(self._staging))
            yield stack.enter_context(closing(Feed(source, self.lanes, loads, slots)))

    def _end_walk(self) -> None:
        self._is_walked = False
        self._staging.clear()

    def _drop(self, resident: Sequence[str], pinned: Sequence[str]) -> None:
        for name in [name for name in self._resident if name not in resident]:
            self.lanes.free(self._resident.pop(name))
        for name in [name for name in self._host if name not in pinned]:
            self._host.pop(name).close()
            self._may_pin = True  # what was refused may be granted now

    def _load_host(self, names: Sequence[str]) -> Generator[str, None, None]:
        for name in names:
            memory = self._take_host(self.slabs.slab_bytes(name))
            try:
                self.slabs.read_slab(name, memory.data)
            except BaseException:
                memory.close()
                raise
            self._host[name] = memory
            yield name

    def _load_resident(self, names: Sequence[str]) -> Generator[str, None, None]:
        if not self.lanes.has_bytes:
            for name in names:
                self._resident[name] = self.lanes.allocate(self.slabs.slab_bytes(name))
                yield name
            return
        coming: dict[str, Tensor] = {}
        try:
            for name in names:
                coming[name] = self.lanes.allocate(self.slabs.slab_bytes(name))
            with self.feed([Load(name, slot) for slot, name in enumerate(names)], list(coming.values())) as feed:
                for name in names:
                    self.lanes.finish(feed.next())
                    self._resident[name] = coming.pop(name)
                    yield name
        finally:
            for buffer in coming.values():
                self.lanes.free(buffer)

    def _take_host(self, nbytes: int) -> HostMemory:
        """Pinned while that is allowed and granted; after a refusal nothing more is asked for until some is freed."""
        fits = self._pin_bytes is None or self.pinned_bytes + nbytes <= self._pin_bytes
        memory = self.lanes.host_memory(nbytes, pin=fits and self._may_pin)
        if self.lanes.can_pin and self._may_pin and not memory.is_pinned:
            self._may_pin = False
            why = memory.refusal or f"{gib(self._pin_bytes or 0)} may be pinned"
            self.notes.append(
                f"{gib(self.pinned_bytes)} of host memory is pinned, and no more can be ({why}): the rest is pageable, "
                "and copies from it are slower"
            )
        return memory


def gib(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 2**30:.2f} GiB"
