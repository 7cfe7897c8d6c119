"""On a card: streaming changes no bit, copies hide behind computing, memory is pinned as asked, the cap holds."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hvlite.memory import device
from hvlite.memory.device import cap, make_lanes
from hvlite.memory.pool import Pool
from hvlite.memory.streamer import Visited, open_streamer
from tests.slabs import MemorySlabs, parameters

WIDTH = 4096
COUNT = 8
ROUNDS = 3
MIB = 1 << 20


class SquareSlabs:
    """Slabs of one bf16 matrix each, 32 MiB, as a store would read them."""

    def __init__(self, count: int = COUNT) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = {
            f"blocks.{number}": torch.randn(WIDTH, WIDTH, generator=generator).mul_(WIDTH**-0.5).bfloat16()
            for number in range(count)
        }

    def slab_bytes(self, name: str) -> int:
        return self.weights[name].nbytes

    def read_slab(self, name: str, buffer: Tensor) -> None:
        buffer[: self.slab_bytes(name)] = self.weights[name].view(-1).view(torch.uint8)

    def slab_views(self, name: str, data: Tensor) -> dict[str, Tensor]:
        return {"weight": data[: self.slab_bytes(name)].view(torch.bfloat16).view(WIDTH, WIDTH)}

    def walk(self) -> list[tuple[str, nn.Module]]:
        return [(name, nn.Linear(WIDTH, WIDTH, bias=False, device="meta")) for name in self.weights]


@pytest.fixture
def no_cap(card: torch.device) -> Iterator[None]:
    yield
    cap(card, None)


def run(pool: Pool, x: Tensor, repeats: int = 1) -> tuple[Tensor, list[Visited]]:
    """All rounds of a walk over x, with `repeats` products a visit; the result, and what was reported."""
    slabs = pool.slabs
    assert isinstance(slabs, SquareSlabs)
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=ROUNDS) as streamer, torch.no_grad():
        for _ in range(ROUNDS):
            for index, (_, block) in enumerate(blocks):
                with streamer.visit(index):
                    for _ in range(repeats):
                        x = torch.tanh(block(x))
        return x, streamer.drain()


def hvlite_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hvlite")]


def test_streaming_is_residency_bit_for_bit(card: torch.device) -> None:
    """From disk through staging, from pinned memory, with some and with all resident."""
    slabs = SquareSlabs()
    names = list(slabs.weights)
    pool = Pool(slabs, make_lanes(card))
    torch.manual_seed(2)
    start = torch.randn(512, WIDTH, device=card, dtype=torch.bfloat16)
    list(pool.keep(resident=names))
    expected, _ = run(pool, start)
    assert torch.isfinite(expected).all()
    for resident, pinned in (([], []), ([], names), ([], names[::2]), (names[::3], names[1::3]), (names[:6], [])):
        list(pool.keep(resident=resident, pinned=pinned))
        for _ in range(3):
            found, visited = run(pool, start)
            assert torch.equal(found, expected)
            assert [(one.round, one.index) for one in visited] == [(r, i) for r in range(ROUNDS) for i in range(COUNT)]
    pool.close()
    assert hvlite_threads() == []


def test_every_bit_of_every_dtype_arrives(card: torch.device) -> None:
    slabs = MemorySlabs([1000 + number for number in range(9)])
    pool = Pool(slabs, make_lanes(card))
    list(pool.keep(resident=slabs.names[:2], pinned=slabs.names[2:5]))
    blocks = slabs.walk()
    with open_streamer(pool, blocks, rounds=4) as streamer:
        for _ in range(4):
            for index, (name, module) in enumerate(blocks):
                with streamer.visit(index):
                    on_host = {path: tensor.cpu() for path, tensor in parameters(module).items()}
                assert slabs.wrong(name, on_host) == []
    pool.close()


def test_copies_hide_behind_computing(card: torch.device, record_property: Callable[[str, object], None]) -> None:
    """With computing that takes far longer than copying, a step of pinned blocks waits for next to nothing."""
    slabs = SquareSlabs()
    pool = Pool(slabs, make_lanes(card))
    x = torch.randn(8192, WIDTH, device=card, dtype=torch.bfloat16)
    list(pool.keep(resident=list(slabs.weights)))
    resident_s = timed(pool, x)
    list(pool.keep(pinned=list(slabs.weights)))
    streamed_s = timed(pool, x)
    _, visited = run(pool, x, repeats=16)
    waited_s = sum(one.waited_s for one in visited[1:])
    for name, value in (("resident_s", resident_s), ("streamed_s", streamed_s), ("waited_s", waited_s)):
        record_property(name, value)
    print(f"resident {resident_s:.3f} s, streamed {streamed_s:.3f} s, waited {waited_s:.3f} s")  # noqa: T201
    assert streamed_s < 1.25 * resident_s
    assert waited_s < 0.25 * streamed_s
    pool.close()


def timed(pool: Pool, x: Tensor) -> float:
    """Seconds of a walk, the second one."""
    run(pool, x, repeats=16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # noqa: TID251  # to look at lanes from outside
    begin.record()
    run(pool, x, repeats=16)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def test_a_walk_takes_two_slots_and_gives_them_back(card: torch.device) -> None:
    slabs = SquareSlabs()
    pool = Pool(slabs, make_lanes(card))
    gc.collect()
    before = torch.cuda.memory_allocated(card)
    with open_streamer(pool, slabs.walk(), rounds=1) as streamer, streamer.visit(0):
        assert torch.cuda.memory_allocated(card) - before == 2 * slabs.slab_bytes("blocks.0")
    assert torch.cuda.memory_allocated(card) == before
    pool.close()


def test_an_exception_leaves_nothing_on_the_card(card: torch.device) -> None:
    slabs = SquareSlabs()
    pool = Pool(slabs, make_lanes(card))
    gc.collect()
    before = torch.cuda.memory_allocated(card)
    with pytest.raises(RuntimeError, match="broken"):
        break_in_the_second_block(pool)
    gc.collect()
    assert torch.cuda.memory_allocated(card) == before
    assert hvlite_threads() == []
    pool.close()


def break_in_the_second_block(pool: Pool) -> None:
    slabs = pool.slabs
    assert isinstance(slabs, SquareSlabs)
    with open_streamer(pool, slabs.walk(), rounds=9) as streamer:
        with streamer.visit(0):
            pass
        with streamer.visit(1):
            raise RuntimeError("broken layer")


def test_pinning_takes_exact_sizes_and_is_undone(card: torch.device) -> None:
    """Twice at the same addresses: an unregistered range can be registered again."""
    lanes = make_lanes(card)
    for _ in range(2):
        memory = lanes.host_memory(37 * MIB, pin=True)
        assert memory.refusal is None
        assert memory.data.is_pinned()
        memory.close()
        assert not memory.is_pinned


def test_a_refused_pinning_does_not_break_the_next_launch(card: torch.device) -> None:
    """What is registered already is refused; the error that this leaves must not be found by somebody else."""
    once = make_lanes(card).host_memory(MIB, pin=True)
    reason = device._pin(once.data)
    assert reason is not None
    assert "cudaHostRegister" in reason
    assert torch.ones(4, device=card).sum().item() == 4
    once.close()


def test_the_cap_holds(card: torch.device, no_cap: None) -> None:
    cap(card, 256 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(300 * MIB, dtype=torch.uint8, device=card)
    torch.empty(100 * MIB, dtype=torch.uint8, device=card)
    cap(card, None)
    torch.empty(300 * MIB, dtype=torch.uint8, device=card)
