"""Streaming changes no bit and leaves nothing behind; what is read, and when, is what was said.

`test_schedules.py` has the races.
"""

import gc
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvlite.dims import HUNYUANVIDEO_DEFAULTS, LatentShape, ModelDims
from hvlite.errors import WeightsError
from hvlite.memory.device import CpuLanes, MetaLanes, make_lanes
from hvlite.memory.pool import Pool
from hvlite.memory.streamer import Streamer, Visited, open_streamer
from hvlite.model.dit import Activations, Conditioning, Dit
from hvlite.weights.layout import Form, place
from hvlite.weights.slab import write_slab
from hvlite.weights.store import INDEX, Index, Store, open_store, write_index
from tests.delaying import DelayingLanes, Habits
from tests.layouts import TINY_CLIP, TINY_DIT, TINY_LLAMA, TINY_VAE
from tests.slabs import MemorySlabs, is_unbound, parameters

CPU = torch.device("cpu")
SHAPE = LatentShape(2, 4, 4)
TEXT_TOKENS = 5
STEPS = 3


def cpu_pool(count: int = 5) -> tuple[Pool, MemorySlabs]:
    slabs = MemorySlabs([20 + number for number in range(count)])
    return Pool(slabs, CpuLanes(CPU)), slabs


def visit_all(streamer: Streamer, blocks: list[tuple[str, nn.Module]], rounds: int) -> Iterator[tuple[str, nn.Module]]:
    """Every visit of the walk, with the module bound."""
    for _ in range(rounds):
        for index, block in enumerate(blocks):
            with streamer.visit(index):
                yield block


def streamer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hvlite")]


# The same bits.


def random_dit() -> Dit:
    """Three steps' worth of vectors make values large enough to notice a wrong weight anywhere."""
    torch.manual_seed(3)
    dit = Dit(TINY_DIT)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    return dit


def write_blocks(dit: Dit, folder: Path) -> Store:
    """A store with a slab for each block."""
    written = []
    for name, block in named_blocks(dit):
        state = block.state_dict()
        placement = place(Form(key, "F32", tuple(tensor.shape)) for key, tensor in state.items())
        written.append(write_slab(folder, name, placement, state.items(), part="dit", prefix=f"{name}."))
    dims = ModelDims(
        name="tiny", dit=TINY_DIT, vae=TINY_VAE, llama=TINY_LLAMA, clip=TINY_CLIP, defaults=HUNYUANVIDEO_DEFAULTS
    )
    index = Index(
        writer="hvlite test",
        dims=dims,
        weights="fp32",
        text_weights="fp16",
        dtype="fp32",
        text_dtype="fp16",
        source="0" * 64,
        slabs=tuple(written),
    )
    write_index(folder / INDEX, index)
    return open_store(folder)


def named_blocks(dit: Dit) -> list[tuple[str, nn.Module]]:
    double = [(f"double_blocks.{number}", block) for number, block in enumerate(dit.double_blocks)]
    return double + [(f"single_blocks.{number}", block) for number, block in enumerate(dit.single_blocks)]


def inputs(dit: Dit) -> tuple[Tensor, Conditioning]:
    torch.manual_seed(4)
    x = torch.randn(SHAPE.tokens + TEXT_TOKENS, TINY_DIT.hidden)
    text, pooled = torch.randn(TEXT_TOKENS, TINY_DIT.text_width), torch.randn(TINY_DIT.pooled_width)
    return x, dit.prepare_schedule(torch.tensor([900.0, 500.0, 100.0]), 6.0, [(text, pooled)])[0]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dit, Store]:
    dit = random_dit()
    return dit, write_blocks(dit, tmp_path_factory.mktemp("blocks"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For operations so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("residents", range(TINY_DIT.blocks + 1))
def test_streamed_is_resident_bit_for_bit(stored: tuple[Dit, Store], residents: int) -> None:
    """Every choice of so many residents, from a store on disk, over three steps."""
    dit, store = stored
    start, conditioning = inputs(dit)
    work = dit.make_workspace(SHAPE, TEXT_TOKENS, Activations(token_chunk=64), torch.float32)
    expected = start.clone()
    for step in range(STEPS):
        for index in range(TINY_DIT.blocks):
            dit.run_block(index, expected, conditioning.of_block(index)[step], work)

    with torch.device("meta"):
        blocks = named_blocks(Dit(TINY_DIT))
    pool = Pool(store, make_lanes(CPU))
    for chosen in combinations([name for name, _ in blocks], residents):
        list(pool.keep(resident=chosen))
        x = start.clone()
        with open_streamer(pool, blocks, rounds=STEPS) as streamer, torch.no_grad():
            for step in range(STEPS):
                for index, (_, block) in enumerate(blocks):
                    with streamer.visit(index):
                        block(x, conditioning.of_block(index)[step], work)
        assert torch.equal(x, expected), f"residents {chosen}"
    pool.close()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_grad_mode_will_do(mode: type[AbstractContextManager[None]]) -> None:
    """Also one that changes between the walks, and between opening and visiting."""
    pool, slabs = cpu_pool()
    blocks = slabs.walk()
    list(pool.keep(resident=slabs.names[:1], pinned=slabs.names[1:2]))
    for _ in range(2):
        with open_streamer(pool, blocks, rounds=2) as streamer:
            for name, module in visit_all(streamer, blocks, 1):
                assert slabs.wrong(name, parameters(module)) == []
            with mode():
                for name, module in visit_all(streamer, blocks, 1):
                    assert slabs.wrong(name, parameters(module)) == []
    with mode(), open_streamer(pool, blocks, rounds=1) as streamer:
        for name, module in visit_all(streamer, blocks, 1):
            assert slabs.wrong(name, parameters(module)) == []
    pool.close()


def test_a_module_is_as_it_was() -> None:
    """Frozen parameters by the same names while it is visited; its own placeholders before and after."""
    pool, slabs = cpu_pool()
    blocks = slabs.walk()
    before = [dict(module.named_parameters()) for _, module in blocks]
    with open_streamer(pool, blocks, rounds=2) as streamer:
        for _, module in visit_all(streamer, blocks, 2):
            assert list(module.state_dict()) == list(before[0])
            assert not any(parameter.is_meta or parameter.requires_grad for parameter in module.parameters())
            bound = [other for _, other in blocks if not is_unbound(other)]
            assert bound == [module]
    for (_, module), placeholders in zip(blocks, before, strict=True):
        assert all(parameter is placeholders[path] for path, parameter in module.named_parameters())
    pool.close()


def test_a_slab_that_does_not_belong_is_refused() -> None:
    pool, slabs = cpu_pool(3)
    blocks = slabs.walk()
    for wrong in (nn.Linear(3, 3, device="meta"), blocks[0][1]):
        with (
            pytest.raises(AssertionError, match=r"blocks\.1"),
            open_streamer(pool, [blocks[0], (slabs.names[1], wrong), blocks[2]], rounds=1) as streamer,
        ):
            list(visit_all(streamer, blocks, 1))
    assert is_unbound(blocks[0][1])
    pool.close()


# What is read, and when.


def test_every_streamed_slab_is_read_once_a_round_and_none_ahead_of_the_end() -> None:
    pool, slabs = cpu_pool()
    list(pool.keep(resident=["blocks.1"]))
    slabs.reads.clear()
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=3) as streamer:
        for number, _ in enumerate(visit_all(streamer, blocks, 3)):
            assert len(slabs.reads) <= number + 2, "a ring of two has no room for more"
    assert slabs.reads == ["blocks.0", "blocks.2", "blocks.3", "blocks.4"] * 3
    pool.close()


@pytest.mark.parametrize("streamed", [1, 2])
def test_one_or_two_slabs_keep_their_slots(streamed: int) -> None:
    lanes = DelayingLanes(Habits())
    slabs = MemorySlabs([10, 20, 30])
    pool = Pool(slabs, lanes)
    list(pool.keep(resident=slabs.names[streamed:]))
    slabs.reads.clear()
    resident = set(lanes.found.allocated)
    blocks = slabs.walk()

    def look(name: str, views: dict[str, Tensor]) -> None:
        lanes.found.faults.extend(slabs.wrong(name, views))

    with open_streamer(pool, blocks, rounds=4) as streamer:
        slots = [buffer.nbytes for address, buffer in lanes.found.allocated.items() if address not in resident]
        for name, module in visit_all(streamer, blocks, 4):
            lanes.compute(partial(look, name, parameters(module)))
        streamer.drain()
    assert slots == [slabs.slab_bytes(name) for name in slabs.names[:streamed]]
    assert slabs.reads == slabs.names[:streamed]
    assert lanes.found.faults == []
    pool.close()


def test_the_ring_is_two_slots_of_the_largest_streamed_slab() -> None:
    lanes = DelayingLanes(Habits())
    slabs = MemorySlabs([10, 90, 20, 30])
    pool = Pool(slabs, lanes)
    list(pool.keep(resident=["blocks.1"]))
    with open_streamer(pool, slabs.walk(), rounds=1):
        sizes = sorted(buffer.nbytes for buffer in lanes.found.allocated.values())
    assert sizes == sorted([slabs.slab_bytes("blocks.1"), *[slabs.slab_bytes("blocks.3")] * 2])
    pool.close()


def test_staging_is_given_back_with_the_walk() -> None:
    """Two buffers, of the largest slab that comes from disk, and none where all come from host memory."""
    slabs = MemorySlabs([10, 90, 20, 30])
    pool = Pool(slabs, DelayingLanes(Habits()))
    for pinned, staging in (([], "blocks.1"), (["blocks.1"], "blocks.3"), (slabs.names, None)):
        list(pool.keep(pinned=pinned))
        kept = pool.host_bytes
        with open_streamer(pool, slabs.walk(), rounds=1):
            assert pool.host_bytes - kept == (2 * slabs.slab_bytes(staging) if staging else 0)
        assert pool.host_bytes == kept
    pool.close()


def test_waiting_is_reported_for_streamed_blocks_alone() -> None:
    slabs = MemorySlabs([10] * 4)
    pool = Pool(slabs, DelayingLanes(Habits()))
    list(pool.keep(resident=["blocks.1"]))
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=2) as streamer:
        list(visit_all(streamer, blocks, 2))
        finished = streamer.drain()
        assert streamer.drain() == streamer.finished() == []
    assert finished == [
        Visited(round=turn, index=index, waited_s=0.0 if index == 1 else 0.25)
        for turn in range(2)
        for index in range(4)
    ]
    pool.close()


def test_a_finished_block_is_reported_at_once_on_a_cpu() -> None:
    pool, slabs = cpu_pool()
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=1) as streamer:
        for index in range(len(blocks)):
            with streamer.visit(index):
                assert streamer.finished() == []
            (visited,) = streamer.finished()
            assert visited.index == index
            assert visited.waited_s >= 0
    pool.close()


def test_blocks_are_visited_in_order() -> None:
    pool, slabs = cpu_pool(3)
    blocks = slabs.walk()
    with (
        open_streamer(pool, blocks, rounds=1) as streamer,
        pytest.raises(AssertionError, match="block 1 is visited where 0 is next"),
        streamer.visit(1),
    ):
        pass
    with open_streamer(pool, blocks, rounds=1) as streamer:
        assert len(list(visit_all(streamer, blocks, 1))) == 3
        with pytest.raises(AssertionError, match="block 0 is visited where None is next"), streamer.visit(0):
            pass
    pool.close()


def test_a_streamer_that_is_left_holds_no_memory() -> None:
    """Though the variable is still there, and so is the exception that ended it, with all its frames."""
    pool, slabs = cpu_pool()
    blocks = slabs.walk()
    held: list[weakref.ref[torch.UntypedStorage]] = []
    kept: Exception | None = None
    try:
        with open_streamer(pool, blocks, rounds=2) as streamer, streamer.visit(0):
            held += (weakref.ref(parameter.untyped_storage()) for parameter in blocks[0][1].parameters())
            gc.collect()
            assert all(reference() is not None for reference in held)
            raise RuntimeError("broken layer")
    except RuntimeError as error:
        kept = error
    gc.collect()
    assert kept is not None
    assert streamer.finished() == []
    assert [reference() for reference in held] == [None] * 3
    pool.close()


# Meta.


def test_on_meta_all_is_the_same_and_nothing_is_there() -> None:
    slabs = MemorySlabs([20] * 4)
    pool = Pool(slabs, MetaLanes(torch.device("meta")))
    list(pool.keep(resident=["blocks.2"], pinned=slabs.names))
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=2) as streamer:
        assert streamer_threads() == []
        places = []
        for _, module in visit_all(streamer, blocks, 2):
            (storage,) = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
            places.append(storage)
        assert len(streamer.drain()) == 8
    first, second, resident = places[0], places[1], places[2]
    assert places == [first, second, resident, first, second, first, resident, second]
    assert len({first, second, resident}) == 3
    assert slabs.reads == []
    pool.close()


# When it goes wrong.


@pytest.mark.parametrize("direct", [True, False])
def test_a_damaged_slab_is_told_where_it_is_needed(direct: bool) -> None:
    slabs = MemorySlabs([10] * 5)
    lanes = DelayingLanes(Habits(direct=direct))
    pool = Pool(slabs, lanes)
    blocks, slabs.failing = slabs.walk(), "blocks.3"
    with open_streamer(pool, blocks, rounds=2) as streamer:
        visits = visit_all(streamer, blocks, 2)
        assert [next(visits)[0] for _ in range(3)] == slabs.names[:3]
        with pytest.raises(WeightsError) as caught:
            next(visits)
    assert str(caught.value) == "slab blocks.3 is damaged"
    assert all(is_unbound(module) for _, module in blocks)
    assert streamer_threads() == []
    assert not lanes.found.allocated
    slabs.failing = None
    with open_streamer(pool, blocks, rounds=1) as streamer:
        assert len(list(visit_all(streamer, blocks, 1))) == 5
    pool.close()


def test_after_an_exception_in_a_layer_there_is_no_further_visit() -> None:
    """Its slot was not released, so going on would wait for ever."""
    pool, slabs = cpu_pool()
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=1) as streamer:
        with pytest.raises(RuntimeError, match="broken"), streamer.visit(0):
            raise RuntimeError("broken layer")
        assert is_unbound(blocks[0][1])
        with pytest.raises(AssertionError), streamer.visit(1):
            pass
    pool.close()


def test_a_slot_that_cannot_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = MemorySlabs([10] * 5)
    lanes = DelayingLanes(Habits())
    pool, allocate = Pool(slabs, lanes), lanes.allocate

    def allocate_one(nbytes: int) -> Tensor:
        if lanes.found.allocated:
            raise torch.OutOfMemoryError("no more")
        return allocate(nbytes)

    monkeypatch.setattr(lanes, "allocate", allocate_one)
    with pytest.raises(torch.OutOfMemoryError), open_streamer(pool, slabs.walk(), rounds=1):
        pass
    assert not lanes.found.allocated
    assert streamer_threads() == []
    pool.close()


def test_an_abandoned_generator_leaves_nothing() -> None:
    """Neither a thread nor a bound module nor the memory of a slot."""
    pool, slabs = cpu_pool()
    blocks = slabs.walk()
    held: list[weakref.ref[torch.UntypedStorage]] = []

    def render() -> Generator[int, None, None]:
        with open_streamer(pool, blocks, rounds=50) as streamer:
            for number, (_, module) in enumerate(visit_all(streamer, blocks, 50)):
                held.extend(weakref.ref(parameter.untyped_storage()) for parameter in module.parameters())
                yield number

    rendering = render()
    assert [next(rendering) for _ in range(7)] == list(range(7))
    assert streamer_threads() == ["hvlite feeder"]
    gc.collect()
    assert all(reference() is not None for reference in held), "the two slots are there"
    rendering.close()
    gc.collect()
    assert streamer_threads() == []
    assert all(is_unbound(module) for _, module in blocks)
    assert [reference() for reference in held] == [None] * len(held)
    pool.close()
