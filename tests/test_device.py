"""What a device is asked for where there is none: a stand-in for CUDA's runtime sees that pinning is asked for rightly.

What needs a card is in tests/gpu.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hvlite.memory import device
from hvlite.memory.device import CpuLanes, HostMemory, MetaLanes, Pinning, cap, make_lanes

CPU, META = torch.device("cpu"), torch.device("meta")
RUFF = Path(sys.executable).with_name("ruff")


@dataclass
class FakeRuntime:
    """Registers what it is given, unless `code` says that it fails."""

    code: int = 0
    registered: dict[int, tuple[int, int]] = field(default_factory=dict)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.code == 0:
            self.registered[address] = (nbytes, flags)
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


def test_each_device_has_its_lanes() -> None:
    assert type(make_lanes(CPU)) is CpuLanes
    assert type(make_lanes(META)) is MetaLanes


def test_only_a_card_is_capped() -> None:
    for place in (CPU, META):
        cap(place, 1)


def test_memory_of_a_device_is_bytes_that_any_grad_mode_may_write() -> None:
    for place in (CPU, META):
        with torch.inference_mode():
            buffer = make_lanes(place).allocate(1000)
        assert buffer.device == place
        assert buffer.dtype == torch.uint8
        assert buffer.shape == (1000,)
        assert not buffer.is_inference()
        buffer.zero_()


def test_exactly_the_pages_are_registered_and_let_go(runtime: FakeRuntime) -> None:
    memory = HostMemory(5 * 4096, Pinning(pin=device._pin, unpin=device._unpin))
    assert memory.is_pinned
    assert memory.refusal is None
    assert runtime.registered == {memory.data.data_ptr(): (5 * 4096, 1)}
    memory.close()
    assert runtime.registered == {}
    assert not memory.is_pinned
    memory.close()


def test_pinned_memory_that_is_forgotten_is_let_go(runtime: FakeRuntime) -> None:
    """Else its address would stay registered, and the next mapping there could not be."""
    memory = HostMemory(4096, Pinning(pin=device._pin, unpin=device._unpin))
    assert len(runtime.registered) == 1
    del memory
    assert runtime.registered == {}


def test_a_refusal_is_a_reason_and_its_error_is_cleared(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """cudaHostRegister leaves its error for the next launch, whoever makes that."""
    launched: list[object] = []

    def fail(*size: int, device: str) -> torch.Tensor:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", fail)
    runtime.code = 2
    memory = HostMemory(4096, Pinning(pin=device._pin, unpin=device._unpin))
    assert memory.refusal == "cudaHostRegister gave error 2"
    assert not memory.is_pinned
    assert launched == ["cuda"]
    memory.data.fill_(1)
    memory.close()


def test_cuda_streams_and_events_are_for_this_module_alone() -> None:
    """The lint rule that CI runs says so of every other one."""
    source = (
        "import torch\n\nSTREAM = torch.cuda.Stream()\nEVENT = torch.cuda.Event()\nSIDE = torch.cuda.stream(STREAM)\n"
    )
    for name, count in (("hvlite/memory/pool.py", 3), ("hvlite/memory/device.py", 0)):
        done = subprocess.run(
            [RUFF, "check", "--select", "TID251", "--output-format", "concise", "--stdin-filename", name, "-"],
            input=source,
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
        )
        assert done.stdout.count("TID251") == count, done.stdout
