"""No race: a thousand random walks on a device that delays, hurries and poisons, and not one wrong bit.

And the device itself: with a wait left out of the lanes it must find wrong bits, or it would prove nothing.
"""

import threading
from collections.abc import Callable, Sequence
from random import Random

import pytest
from torch import Tensor, nn

from hvlite.errors import WeightsError
from hvlite.memory.device import Mark
from hvlite.memory.pool import Pool
from hvlite.memory.streamer import RUN_AHEAD, Streamer, Visited, open_streamer
from tests.delaying import DelayingLanes, Habits, Tick
from tests.slabs import MemorySlabs, is_unbound, parameters

SCHEDULES = 1000

Blocks = Sequence[tuple[str, nn.Module]]


class BrokenLayer(Exception):
    """What a layer may raise."""


class Walker:
    """Random walks over one pool on one device; `faults` is what was wrong."""

    def __init__(self, seed: int, device: Callable[[Habits], DelayingLanes]) -> None:
        self.random = Random(seed)
        self.slabs = MemorySlabs([self.random.randint(1, 90) for _ in range(self.random.randint(1, 8))], seed)
        self.lanes = device(
            Habits(
                when=self.random.choice(["last", "first", "random"]),
                direct=self.random.random() < 0.3,
                refusals=self.random.choice([0.0, 0.0, 0.5]),
                seed=seed,
            )
        )
        self.pool = Pool(self.slabs, self.lanes, pin_bytes=self.random.choice([None, None, 0, 3000]))
        self.faults = self.lanes.found.faults
        self.unfinished = 0

    def run(self) -> list[str]:
        for _ in range(self.random.randint(1, 3)):
            self.keep()
            self.walk()
        self.pool.close()
        self.lanes.finish(self.lanes.mark())
        if self.lanes.found.allocated or self.lanes.found.pinned:
            self.faults.append("memory was not given back")
        if any(thread.name.startswith("hvlite") for thread in threading.enumerate()):
            self.faults.append("threads are left")
        return self.faults

    def keep(self) -> None:
        """Some residents and some pinned slabs; now and then the caller leaves while they come."""
        resident, pinned = (
            self.random.sample(self.slabs.names, self.random.randint(0, len(self.slabs.names))) for _ in range(2)
        )
        loading = self.pool.keep(resident=resident, pinned=pinned)
        for _ in loading:
            if self.random.random() < 0.05:
                break
        loading.close()

    def walk(self) -> None:
        """To its end, or into a layer that breaks, a slab that cannot be read, or until the caller leaves."""
        blocks, rounds = self.slabs.walk(), self.random.randint(1, 4)
        ending = self.random.choice(["end", "end", "end", "layer", "slab", "left"])
        self.slabs.failing = self.random.choice(self.slabs.names) if ending == "slab" else None
        visits = rounds * len(blocks)
        stop = self.random.randrange(visits) if ending in ("layer", "left") else visits
        finished: list[Visited] = []
        try:
            with open_streamer(self.pool, blocks, rounds=rounds) as streamer:
                for visit in range(stop):
                    self.visit(streamer, blocks, visit % len(blocks))
                    finished += streamer.finished() if self.random.random() < 0.7 else []
                if ending == "layer":
                    with streamer.visit(stop % len(blocks)):
                        raise BrokenLayer
                finished += streamer.drain()
        except (BrokenLayer, WeightsError) as error:
            if ending != {BrokenLayer: "layer", WeightsError: "slab"}[type(error)]:
                raise
        else:
            order = [(turn, index) for turn in range(rounds) for index in range(len(blocks))]
            if [(visited.round, visited.index) for visited in finished] != order[:stop]:
                self.faults.append(f"reported as finished: {finished}")
        self.slabs.failing = None
        self.lanes.finish(self.lanes.mark())
        if not all(is_unbound(module) for _, module in blocks):
            self.faults.append("a module is still bound")

    def visit(self, streamer: Streamer, blocks: Blocks, index: int) -> None:
        """Look at every bit twice, as a layer that takes its time does."""
        name, module = blocks[index]
        with streamer.visit(index):
            views = parameters(module)
            self.unfinished += 1
            for _ in range(2):
                self.lanes.compute(lambda: self.look(name, views))
            self.lanes.compute(self.count_down)
        if self.unfinished > RUN_AHEAD:
            self.faults.append(f"the host is {self.unfinished} blocks ahead")

    def look(self, name: str, views: dict[str, Tensor]) -> None:
        self.faults.extend(f"{name}: wrong bits in {path}" for path in self.slabs.wrong(name, views))

    def count_down(self) -> None:
        self.unfinished -= 1


@pytest.mark.parametrize("part", range(10))
def test_no_schedule_gives_a_wrong_bit(part: int) -> None:
    for seed in range(part, SCHEDULES, 10):
        assert Walker(seed, DelayingLanes).run() == [], f"schedule {seed}"


class NoWait(DelayingLanes):
    """Computing does not wait for the slab to arrive."""

    def wait(self, mark: Mark) -> None:
        pass


class NoRelease(DelayingLanes):
    """Copies do not wait for the slot to be released."""

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        return super().copy(target, source, Tick(self._copies, done=True))


class NoStagingWait(DelayingLanes):
    """The host does not wait for copies: staging is refilled, and memory given back, while they are under way."""

    def finish(self, mark: Mark) -> None:
        assert isinstance(mark, Tick)
        if mark.lane is not self._copies:
            super().finish(mark)


class NoHostWait(DelayingLanes):
    """The host does not wait for computing: it reads straight into slots that are in use."""

    def finish(self, mark: Mark) -> None:
        assert isinstance(mark, Tick)
        if mark.lane is self._copies or not threading.current_thread().name.startswith("hvlite"):
            super().finish(mark)


@pytest.mark.parametrize("broken", [NoWait, NoRelease, NoStagingWait, NoHostWait])
def test_the_device_finds_a_wait_that_is_missing(broken: type[DelayingLanes]) -> None:
    assert any("wrong bits" in fault for seed in range(SCHEDULES) for fault in Walker(seed, broken).run())
