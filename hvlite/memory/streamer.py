"""Walks modules whose weights are not all on the device: prefetch the next, wait for this one, release the one before.

    slot 0     | block 0        | block 2 arrives | block 2         | block 4 arrives |
    slot 1     | block 1 arrives| block 1         | block 3 arrives | block 3         |
    compute    | block 0        | block 1         | block 2         | block 3         |
    host       up to two blocks ahead of the above

A visited module's parameters are views of its slab's data, wherever that lies: in a slot of the ring, or in a buffer of
its own if it is resident. Before and after they are the placeholders that the module was built with, and the module
does not know. The ring goes on from the last block of a round to the first of the next. Frozen weights never travel
back, so a slot is free as soon as computing has left it. On the meta device nothing arrives, and all else is the same.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from hvlite.memory.device import Lanes, Mark
from hvlite.memory.feed import Feed, Load
from hvlite.memory.pool import Pool
from hvlite.memory.tiers import RING, slot_sizes, stays_in_slot

RUN_AHEAD = 2
"""Blocks that the host may have asked for and the device has not finished: a cancel waits for no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visited:
    """A block is finished, in this round (both count from 0); computing waited so long for its weights."""

    round: int
    index: int
    waited_s: float


@contextmanager
def open_streamer(pool: Pool, blocks: Sequence[tuple[str, nn.Module]], *, rounds: int) -> Iterator["Streamer"]:
    """A walk over (slab's name, module on the meta device), all of them `rounds` times in this order.

    Slots are allocated here and given back at the end, also after an exception: then no module is bound, no thread
    runs, nothing is being copied.
    """
    lanes, slabs = pool.lanes, pool.slabs
    streamed = [name for name, _ in blocks if pool.resident(name) is None]
    with ExitStack() as stack:
        slots: list[Tensor] = []
        stack.callback(slots.clear)  # a caller may hold the streamer for longer
        for nbytes in slot_sizes([slabs.slab_bytes(name) for name in streamed]):
            slots.append(lanes.allocate(nbytes))
            stack.callback(lanes.free, slots[-1])
        loads = _loads(streamed, rounds) if lanes.has_bytes else []
        feed = stack.enter_context(pool.feed(loads, slots))
        yield Streamer(pool, [Binding(name, module) for name, module in blocks], rounds, slots, feed)


def _loads(streamed: Sequence[str], rounds: int) -> list[Load]:
    if stays_in_slot(len(streamed)):
        return [Load(name, slot) for slot, name in enumerate(streamed)]
    return [Load(name, turn % RING) for turn, name in enumerate(name for _ in range(rounds) for name in streamed)]


class Binding:
    """Where a slab's tensors go in a module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._placeholders: dict[str, nn.Parameter] = {}
        for path, parameter in module.named_parameters():
            owner, _, leaf = path.rpartition(".")
            self._places[path] = module.get_submodule(owner), leaf
            self._placeholders[path] = parameter

    def bind(self, views: Mapping[str, Tensor]) -> None:
        """Let the module's parameters be these."""
        assert views.keys() == self._places.keys(), f"{self.name}: {set(views) ^ set(self._places)} belong to one only"
        for path, view in views.items():
            wanted = self._placeholders[path].shape
            assert view.shape == wanted, f"{self.name}: {path} is {list(view.shape)}, its place {list(wanted)}"
            owner, leaf = self._places[path]
            owner._parameters[leaf] = nn.Parameter(view, requires_grad=False)

    def unbind(self) -> None:
        """Let them be the placeholders again."""
        for path, (owner, leaf) in self._places.items():
            owner._parameters[leaf] = self._placeholders[path]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A visit whose work has been asked of the device: when waiting began and ended (None: resident), and its end."""

    round: int
    index: int
    waiting: tuple[Mark, Mark] | None
    done: Mark


class Walk:
    """Visits to blocks, all of them `rounds` times in their order; here to blocks whose weights are in place."""

    def __init__(self, lanes: Lanes, blocks: int, rounds: int) -> None:
        self._lanes = lanes
        self._visits = iter([(turn, index) for turn in range(rounds) for index in range(blocks)])
        self._asked: deque[_Asked] = deque()
        self._finished: list[Visited] = []

    @contextmanager
    def visit(self, index: int) -> Iterator[None]:
        """Block `index` is ready to run inside; whatever runs it (every branch, every prompt) does so on one visit.

        Raises what went wrong with the block's slab. After an exception there is no further visit.
        """
        turn, expected = next(self._visits, (0, None))
        assert index == expected, f"block {index} is visited where {expected} is next"
        while len(self._asked) >= RUN_AHEAD:
            self._retire()
        try:
            with self._weights(turn, index) as waiting:
                yield
        except BaseException:
            self._visits = iter([])
            raise
        done = self._lanes.mark()
        self._asked.append(_Asked(round=turn, index=index, waiting=waiting, done=done))
        self._leave(turn, index, done)

    def finished(self) -> list[Visited]:
        """The blocks that are now known to be finished and were not reported before, in order."""
        while self._asked and self._lanes.is_done(self._asked[0].done):
            self._retire()
        finished, self._finished = self._finished, []
        return finished

    def drain(self) -> list[Visited]:
        """Wait until every visited block is finished; those that were not reported before."""
        while self._asked:
            self._retire()
        return self.finished()

    @contextmanager
    def _weights(self, turn: int, index: int) -> Iterator[tuple[Mark, Mark] | None]:
        """The block's weights are in place inside; the marks around computing's wait for them, if it waits."""
        yield None

    def _leave(self, turn: int, index: int, done: Mark) -> None:
        """The block's weights are not needed beyond `done`."""

    def _retire(self) -> None:
        """Wait for the oldest unfinished block."""
        oldest = self._asked.popleft()
        self._lanes.finish(oldest.done)
        waited = self._lanes.seconds(*oldest.waiting) if oldest.waiting else 0.0
        self._finished.append(Visited(round=oldest.round, index=oldest.index, waited_s=waited))


class Streamer(Walk):
    """A walk that brings the weights. Made by `open_streamer`."""

    def __init__(
        self, pool: Pool, bindings: Sequence[Binding], rounds: int, slots: Sequence[Tensor], feed: Feed
    ) -> None:
        super().__init__(pool.lanes, len(bindings), rounds)
        self._pool = pool
        self._bindings = bindings
        self._slots = slots
        self._feed = feed
        streamed = [index for index, binding in enumerate(bindings) if pool.resident(binding.name) is None]
        self._rank = {index: rank for rank, index in enumerate(streamed)}

    @contextmanager
    def _weights(self, turn: int, index: int) -> Iterator[tuple[Mark, Mark] | None]:
        binding = self._bindings[index]
        try:
            slot = self._slot(turn, index)
            waiting = self._wait(turn, slot)
            # no variable here holds device memory: a traceback would keep it
            binding.bind(self._pool.slabs.slab_views(binding.name, self._data(index, slot)))
            yield waiting
        finally:
            binding.unbind()

    def _leave(self, turn: int, index: int, done: Mark) -> None:
        slot = self._slot(turn, index)
        if slot is not None and not self._stays:
            self._feed.release(slot, done)

    @property
    def _stays(self) -> bool:
        return stays_in_slot(len(self._rank))

    def _slot(self, turn: int, index: int) -> int | None:
        """Where the block is in this round; None if it is resident."""
        if index not in self._rank:
            return None
        return self._rank[index] if self._stays else (turn * len(self._rank) + self._rank[index]) % RING

    def _wait(self, turn: int, slot: int | None) -> tuple[Mark, Mark] | None:
        """Make computing wait until what belongs in the slot is there; the marks around that."""
        is_there = slot is None or (self._stays and turn > 0)
        if is_there or not self._lanes.has_bytes:
            return None
        began = self._lanes.mark()
        self._lanes.wait(self._feed.next())
        return began, self._lanes.mark()

    def _data(self, index: int, slot: int | None) -> Tensor:
        if slot is not None:
            return self._slots[slot]
        resident = self._pool.resident(self._bindings[index].name)
        assert resident is not None
        return resident
