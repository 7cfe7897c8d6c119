"""What the pool keeps, what it gives back, and what it says when pinning has an end."""

import gc
import weakref

import pytest
import torch

from hvlite.errors import WeightsError
from hvlite.memory.device import CpuLanes, HostMemory, MetaLanes
from hvlite.memory.pool import Pool
from hvlite.memory.streamer import open_streamer
from tests.delaying import DelayingLanes, Habits
from tests.slabs import MemorySlabs


def make_pool(
    count: int = 4, *, refusals: float = 0.0, pin_bytes: int | None = None
) -> tuple[Pool, DelayingLanes, MemorySlabs]:
    """Slabs of one size, a device that delays."""
    slabs = MemorySlabs([20] * count)
    lanes = DelayingLanes(Habits(refusals=refusals))
    return Pool(slabs, lanes, pin_bytes=pin_bytes), lanes, slabs


def test_missing_slabs_come_and_unwanted_ones_go() -> None:
    pool, lanes, slabs = make_pool()
    list(pool.keep(resident=["blocks.0", "blocks.1"], pinned=["blocks.2"]))
    kept = pool.resident("blocks.1")
    assert slabs.reads == ["blocks.2", "blocks.0", "blocks.1"]

    list(pool.keep(resident=["blocks.1", "blocks.2"]))
    assert pool.resident("blocks.1") is kept
    assert pool.resident("blocks.0") is None
    assert pool.in_host("blocks.2") is None
    assert slabs.reads[3:] == ["blocks.2"]
    assert pool.resident_bytes == 2 * slabs.slab_bytes("blocks.0")
    assert pool.host_bytes == 0
    for name in ("blocks.1", "blocks.2"):
        data = pool.resident(name)
        assert data is not None
        assert slabs.wrong(name, slabs.slab_views(name, data)) == []

    pool.close()
    assert not lanes.found.allocated
    assert not lanes.found.pinned


def test_a_slab_in_host_memory_is_not_read_again() -> None:
    """A stage gives its residents up and has them back without touching the disk."""
    pool, _, slabs = make_pool()
    list(pool.keep(pinned=slabs.names))
    list(pool.keep(resident=slabs.names[:2], pinned=slabs.names))
    assert slabs.reads == slabs.names
    assert pool.pinned_bytes == pool.host_bytes == 4 * slabs.slab_bytes("blocks.0")
    pool.close()


def test_progress_counts_the_bytes_that_are_missing() -> None:
    pool, _, slabs = make_pool()
    size = slabs.slab_bytes("blocks.0")
    list(pool.keep(resident=["blocks.3"]))
    steps = list(pool.keep(resident=["blocks.3", "blocks.0"], pinned=["blocks.1"]))
    assert [(kept.name, kept.done_bytes, kept.total_bytes) for kept in steps] == [
        ("blocks.1", size, 2 * size),
        ("blocks.0", 2 * size, 2 * size),
    ]
    assert list(pool.keep(resident=["blocks.3", "blocks.0"], pinned=["blocks.1"])) == []
    pool.close()


def test_what_may_not_be_pinned_is_pageable_and_said_once() -> None:
    pool, _, slabs = make_pool(pin_bytes=1)
    list(pool.keep(pinned=slabs.names))
    assert pool.pinned_bytes == 0
    assert pool.host_bytes == 4 * slabs.slab_bytes("blocks.0")
    (note,) = pool.notes
    assert "0.00 GiB of host memory is pinned, and no more can be (0.00 GiB may be pinned)" in note
    pool.close()


def test_the_budget_is_used_up_before_anything_is_pageable() -> None:
    slabs = MemorySlabs([20] * 4)
    size = slabs.slab_bytes("blocks.0")
    pool = Pool(slabs, DelayingLanes(Habits()), pin_bytes=3 * size + 1)
    list(pool.keep(pinned=slabs.names))
    assert pool.pinned_bytes == 3 * size
    assert len(pool.notes) == 1
    pool.close()


def test_a_refusal_of_the_driver_is_a_note() -> None:
    pool, lanes, slabs = make_pool(refusals=1.0)
    list(pool.keep(pinned=slabs.names))
    assert pool.host_bytes == 4 * slabs.slab_bytes("blocks.0")
    assert not lanes.found.pinned
    (note,) = pool.notes
    assert "the test refuses" in note
    pool.close()


def test_a_damaged_slab_leaves_what_was_there_before() -> None:
    pool, lanes, slabs = make_pool()
    slabs.failing = "blocks.2"
    for kind in ("resident", "pinned"):
        with pytest.raises(WeightsError, match=r"blocks\.2 is damaged"):
            list(pool.keep(**{kind: slabs.names}))
        assert pool.host_bytes + pool.resident_bytes == 2 * slabs.slab_bytes("blocks.0")
    pool.close()
    assert not lanes.found.allocated
    assert not lanes.found.pinned
    assert not lanes.found.faults


def test_an_allocation_that_fails_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, lanes, slabs = make_pool()
    allocate = lanes.allocate

    def allocate_two(nbytes: int) -> torch.Tensor:
        if len(lanes.found.allocated) == 2:
            raise torch.OutOfMemoryError("no more")
        return allocate(nbytes)

    monkeypatch.setattr(lanes, "allocate", allocate_two)
    with pytest.raises(torch.OutOfMemoryError):
        list(pool.keep(resident=slabs.names))
    assert not lanes.found.allocated
    assert slabs.reads == []


def test_residents_do_not_change_under_a_walk() -> None:
    pool, _, slabs = make_pool()
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=1):
        with pytest.raises(AssertionError, match="a walk is open"):
            list(pool.keep())
        with pytest.raises(AssertionError, match="a walk is open"), open_streamer(pool, blocks, rounds=1):
            pass
        with pytest.raises(AssertionError, match="a walk is still open"):
            pool.close()
    pool.close()
    with pytest.raises(AssertionError):
        list(pool.keep(resident=slabs.names))


def test_nothing_is_read_or_held_on_meta() -> None:
    slabs = MemorySlabs([20] * 4)
    pool = Pool(slabs, MetaLanes(torch.device("meta")))
    list(pool.keep(resident=slabs.names[:2], pinned=slabs.names))
    data = pool.resident("blocks.0")
    assert data is not None
    assert data.is_meta
    assert pool.resident_bytes == 2 * slabs.slab_bytes("blocks.0")
    assert pool.host_bytes == 0
    assert slabs.reads == []
    pool.close()


def test_memory_goes_when_the_pool_is_closed() -> None:
    slabs = MemorySlabs([20] * 4)
    pool = Pool(slabs, CpuLanes(torch.device("cpu")))
    list(pool.keep(resident=slabs.names, pinned=slabs.names))
    held = [weakref.ref(tensor) for name in slabs.names for tensor in (pool.resident(name), pool.in_host(name))]
    assert all(reference() is not None for reference in held)
    pool.close()
    gc.collect()
    assert [reference() for reference in held] == [None] * 8


def test_host_memory_has_exactly_the_size_asked_for() -> None:
    """And begins with a page: whole pages can be registered, and nothing is rounded up."""
    memory = HostMemory(3 * 4096 + 1)
    assert memory.data.nbytes == memory.nbytes == 3 * 4096 + 1
    assert memory.data.data_ptr() % 4096 == 0
    assert not memory.is_pinned
    memory.data.fill_(1)
    memory.close()
    assert memory.data.nbytes == 0
