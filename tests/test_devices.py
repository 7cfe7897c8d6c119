"""Which device a worker serves, and the locks: held by both processes, freed by the kernel alone."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from uuid import UUID

import pytest

from hvlite import paths
from hvlite.errors import Busy, DeviceError
from hvlite.jobs import devices
from hvlite.jobs.devices import (
    CPU_LOCK,
    Place,
    any_worker,
    check_free,
    cuda_cards,
    is_free,
    places,
    take_lock,
    take_place,
)
from hvlite.telemetry import Card
from tests.nights import ROOT
from tests.refusal import refusal

UUIDS = ("GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002")


class Libcuda:
    """A driver with two cards; `broken` is the call that fails."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        calls: dict[str, Callable[..., object]] = {
            "cuInit": lambda _flags: None,
            "cuDeviceGetCount": lambda count: setattr(count._obj, "value", len(UUIDS)),
            "cuDeviceGet": lambda device, index: setattr(device._obj, "value", index),
            "cuDeviceGetUuid_v2": lambda found, device: ctypes.memmove(
                found._obj, UUID(UUIDS[device.value].removeprefix("GPU-")).bytes, 16
            ),
        }

        def answer(*arguments: Any) -> int:
            if name == self.broken:
                return 100
            calls[name](*arguments)
            return 0

        return answer


def card(uuid: str, free: int) -> Card:
    """Of which nothing else is known."""
    values: dict[str, Any] = dict.fromkeys(each.name for each in fields(Card))
    return Card(**{**values, "uuid": uuid, "free_bytes": free})


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = tuple(card(uuid, free) for uuid, free in zip(UUIDS, (1, 2), strict=True))
    monkeypatch.setattr(devices, "cards", lambda: cards)
    monkeypatch.setattr(devices, "cuda_cards", lambda: list(UUIDS))
    monkeypatch.setattr(devices, "torch_knows_cuda", lambda: True)


def test_cards_are_named_in_cudas_order() -> None:
    assert cuda_cards(lambda _name: Libcuda()) == list(UUIDS)


@pytest.mark.parametrize("broken", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid_v2"])
def test_a_driver_that_does_not_answer_has_no_cards(broken: str) -> None:
    assert cuda_cards(lambda _name: Libcuda(broken)) == []


def test_no_driver_has_no_cards() -> None:
    def load(_name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert cuda_cards(load) == []


def test_without_a_card_the_cpu_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_cards", list)
    assert places() == [Place(device="cpu", lock=CPU_LOCK)]
    assert places()[0].serves == {None, "cpu"}
    refusal(lambda: places("cuda"), "cuda is not there", "0 card", kind=DeviceError)


@pytest.mark.usefixtures("two_cards")
def test_a_torch_without_cuda_serves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_knows_cuda", lambda: False)
    assert [place.device for place in places()] == ["cpu"]


@pytest.mark.usefixtures("two_cards")
def test_the_freest_card_comes_first_and_any_may_be_named() -> None:
    assert [place.device for place in places()] == ["cuda:1", "cuda:0"]
    assert [place.device for place in places("cuda:0")] == ["cuda:0"]
    assert [place.device for place in places("cpu")] == ["cpu"]
    assert places("cuda:1")[0].serves == {None, "cuda", "cuda:1"}
    refusal(lambda: places("cuda:2"), "cuda:2", "2 card", kind=DeviceError)
    refusal(lambda: places("tpu"), "cpu, cuda or cuda:N", "tpu", kind=DeviceError)


@pytest.mark.usefixtures("two_cards")
def test_a_second_worker_takes_the_other_card_and_a_third_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOCK_SECONDS", 0.0)
    first, second = take_place(places(), list), take_place(places(), list)
    assert (first[0].device, second[0].device) == ("cuda:1", "cuda:0")
    refusal(lambda: take_place(places(), list), "cuda:0 is served", "cuda:1 is served", kind=Busy)
    second[1].close()
    again = take_place(places(), list)
    assert again[0] == second[0]
    for _, lock in (first, again):
        lock.close()


def test_a_lock_is_held_by_the_worker_too_and_freed_by_its_death() -> None:
    lock = take_lock("GPU-1")
    assert lock is not None
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.handle,), cwd=ROOT
    ) as worker:
        lock.close()
        assert (is_free("GPU-1"), any_worker()) == (False, True)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        assert (is_free("GPU-1"), any_worker()) == (True, False)


def test_those_who_only_look_are_not_in_each_others_way() -> None:
    looking = take_lock("GPU-1", fcntl.LOCK_SH)
    assert looking is not None
    assert is_free("GPU-1")
    looking.close()


def test_a_name_that_is_no_lock_is_free_and_makes_no_file() -> None:
    assert is_free("../../elsewhere")
    assert not paths.home().exists() or not any(paths.home().rglob("*elsewhere*"))


def test_a_card_that_a_worker_serves_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gen` asks before it loads anything; another card, and the same one later, are free."""
    found = [Place(device=f"cuda:{index}", lock=f"GPU-{index}") for index in range(2)]
    monkeypatch.setattr(devices, "places", lambda asked: found)
    lock = take_lock("GPU-1")
    assert lock is not None
    with pytest.raises(Busy, match=r"cuda:1 is served by a worker .*it makes no clip now.*hvlite queue add"):
        check_free("cuda:1", list)
    check_free("cuda:0", list)
    lock.close()
    check_free("cuda:1", list)
