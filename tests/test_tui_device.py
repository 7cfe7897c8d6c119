"""The two lines on the device: its memory in four parts, the plan's mark, the last minute; a machine without a card."""

from dataclasses import replace

import pytest

from hvlite.dims import HUNYUANVIDEO
from hvlite.jobs.job import Progress
from hvlite.jobs.store import open_store
from hvlite.telemetry import Card, Driver, Holder
from hvlite.tui.device_strip import Machine, Part, card_of, card_parts, host_parts, memory_bar, minute_bars, probe
from tests.tui_hands import GIB, NO_CARD, Hands, jobs, opened, queue, run_next

CARD = Card(
    index=0,
    uuid="GPU-1",
    name="NVIDIA GeForce RTX 4070",
    total_bytes=12 * GIB,
    free_bytes=2 * GIB,
    holders=(Holder(pid=4711, name="hvlite", held_bytes=9 * GIB), Holder(pid=1, name="Xorg", held_bytes=GIB)),
    utilisation=98,
    temperature_c=71,
    power_w=196.0,
    driver="580.65",
    capability=(8, 9),
    pcie_gen=4,
    pcie_width=16,
)
MACHINE = Machine(driver=Driver(cards=(CARD,)), host=NO_CARD.host, ours=frozenset({4711}))
COUNTED = Progress(stage="denoise", step=4, steps=16, tensor_bytes=8 * GIB, torch_bytes=round(8.5 * GIB))


async def shown(hands: Hands) -> list[str]:
    """The strip's lines, once it has been drawn."""
    await hands.until_shown("free ")
    return hands.screen_text().splitlines()[-3:-1]


def sizes(parts: list[Part]) -> dict[str, float]:
    return {part.words: part.nbytes / GIB for part in parts}


@pytest.mark.asyncio
async def test_memory_is_told_in_four_parts_beside_the_plan() -> None:
    queue("apple")
    job = run_next(COUNTED, lock="GPU-1")
    with open_store() as store:
        assert job.request is not None
        claims = store.claims("somebody's worker", "GPU-1", {None, "cpu"})
        claims.record_plan(job.id, job.request.resolve(HUNYUANVIDEO), 10 * GIB)
    for size in ((140, 45), (80, 24)):
        async with opened(size, probe=lambda ours: MACHINE) as hands:
            first, second = await shown(hands)
            assert "GeForce RTX 4070  util 98 %  71 \u00b0C  196 W" in first
            for words in ("tensors 8.0", "cache 0.5", "others 1.5", "free 2.0/12.0", "plan 10.0"):
                assert words in second


@pytest.mark.asyncio
async def test_without_a_driver_it_says_so_and_tells_of_ram() -> None:
    async with opened() as hands:
        first, second = await shown(hands)
        assert "no NVIDIA driver found: this machine's RAM  this window 64 MiB" in first
        assert "others 6.0" in second
        assert "free 18.0/24.0 GiB" in second


def test_the_four_parts_are_the_whole_card_whatever_a_worker_says() -> None:
    queue("apple")
    (job,) = jobs()
    for progress in (
        None,
        COUNTED,
        replace(COUNTED, torch_bytes=50 * GIB),
        replace(COUNTED, tensor_bytes=40 * GIB, torch_bytes=GIB),
    ):
        parts = card_parts(CARD, MACHINE, replace(job, progress=progress))
        assert sum(part.nbytes for part in parts) == CARD.total_bytes
        assert all(part.nbytes >= 0 for part in parts)
    assert sizes(card_parts(CARD, MACHINE, None))["worker"] == 9
    assert card_parts(replace(CARD, free_bytes=None), MACHINE, None) == []
    assert sum(part.nbytes for part in host_parts(replace(NO_CARD, ours_rss=99 * GIB))) == NO_CARD.host.total_bytes


def test_the_bar_has_its_width_and_the_plan_its_mark() -> None:
    parts = [Part("#", "tensors", "", 3), Part(".", "free", "", 5)]
    assert "".join(sign for sign, _ in memory_bar(parts, None, 8)) == "###....."
    assert "".join(sign for sign, _ in memory_bar(parts, 6, 8)) == "###...\u2502."
    assert "".join(sign for sign, _ in memory_bar(parts, 8, 8))[-1] == "\u2502"
    assert memory_bar(parts, 9, 0) == []
    assert memory_bar([], None, 8) == []


def test_the_last_minute_shows_the_most_of_each_two_seconds() -> None:
    assert minute_bars([0.0, 1.0, 0.0, 0.0], 30) == "\u2588\u2581"
    assert minute_bars([0.5], 60) == "\u2585"
    assert len(minute_bars([0.1] * 60, 20)) == 20


def test_the_card_at_work_is_the_one_that_is_shown() -> None:
    two = Machine(driver=Driver(cards=(CARD, replace(CARD, uuid="GPU-2", index=1))), host=NO_CARD.host)
    queue("apple")
    assert card_of(two, []) == CARD
    found = card_of(two, [run_next(lock="GPU-2")])
    assert found is not None
    assert found.uuid == "GPU-2"
    assert card_of(NO_CARD, []) is None


def test_this_machine_can_be_asked() -> None:
    assert probe(frozenset({2**22 + 1})).ours_rss == 0
