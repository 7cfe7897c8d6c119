"""Predicted seconds follow from the lanes: computing hides copying and reading exactly as far as it can."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvlite.memory.choice import Asked
from hvlite.memory.geometry import EXACT
from hvlite.memory.plan import make_plan
from hvlite.memory.predict import Source, Ways, Work, predict, walk
from hvlite.memory.rates import Compute, Curve, Rates, card_rates, find_card
from tests.plans import HD, SMALL, clip_of, inputs_of, profile_inputs, stored

CARD = card_rates(find_card("RTX 4090"), disk_read=3.5e9)
FAST = Ways(disk=100.0, copy=100.0)


def block(seconds: float, nbytes: int, source: Source = "host") -> Work:
    return Work(seconds=seconds, nbytes=nbytes, source=source)


def test_a_copy_that_is_shorter_than_computing_hides_behind_it() -> None:
    rounds = walk([block(1.0, 50)] * 6, 3, FAST)
    assert rounds[0].copy_wait_s == pytest.approx(0.5)  # nothing hides the very first
    assert [each.copy_wait_s for each in rounds[1:]] == [0, 0]
    assert rounds[1].seconds == rounds[1].compute_s == pytest.approx(6.0)


def test_a_copy_that_is_longer_sets_the_pace() -> None:
    step = walk([block(1.0, 150)] * 6, 3, FAST)[-1]
    assert step.seconds == pytest.approx(6 * 1.5)
    assert step.copy_wait_s == pytest.approx(6 * 0.5)
    assert step.disk_wait_s == 0


def test_reading_that_is_longest_of_all_sets_the_pace_and_is_named() -> None:
    step = walk([block(1.0, 150, "disk")] * 6, 3, Ways(disk=75.0, copy=300.0))[-1]
    assert step.seconds == pytest.approx(6 * 2.0)
    assert step.disk_wait_s == pytest.approx(6 * 1.0)
    assert step.copy_wait_s == 0


def test_a_host_that_computes_itself_reads_into_the_slots() -> None:
    direct = walk([block(1.0, 150, "disk")] * 6, 3, Ways(disk=100.0, copy=None))[-1]
    assert direct.seconds == pytest.approx(6 * 1.5)
    assert direct.disk_wait_s == pytest.approx(3.0)


def test_residents_between_streamed_blocks_give_them_time() -> None:
    alternating = [block(1.0, 0, "device"), block(1.0, 150)] * 5
    assert walk(alternating, 3, FAST)[-1].seconds == pytest.approx(10.0)


def test_two_streamed_blocks_are_loaded_once() -> None:
    blocks = [block(1.0, 0, "device")] * 3 + [block(1.0, 500)] * 2
    first, second = walk(blocks, 2, FAST)
    assert first.copy_wait_s > 0
    assert second.seconds == pytest.approx(5.0)


Blocks = st.lists(
    st.builds(
        block,
        st.floats(0.01, 5),
        st.integers(1, 500),
        st.sampled_from(("device", "host", "disk")),
    ),
    min_size=1,
    max_size=12,
)


@given(blocks=Blocks, rounds=st.integers(1, 4), disk=st.floats(10, 500), copy=st.floats(10, 500))
def test_no_lane_is_beaten_and_no_more_than_all_of_them_is_spent(
    blocks: list[Work], rounds: int, disk: float, copy: float
) -> None:
    total = sum(each.seconds for each in walk(blocks, rounds, Ways(disk=disk, copy=copy)))
    streamed = [each for each in blocks if each.source != "device"]
    loads = (rounds if len(streamed) > 2 else 1) * streamed
    computing = rounds * sum(each.seconds for each in blocks)
    copying = sum(each.nbytes for each in loads) / copy
    reading = sum(each.nbytes for each in loads if each.source == "disk") / disk
    assert total >= max(computing, copying, reading) * (1 - 1e-9)
    assert total <= (computing + copying + reading) * (1 + 1e-9)


def test_streaming_costs_nothing_where_blocks_take_long_and_shows_where_they_do_not() -> None:
    long = predict(make_plan(inputs_of(clip_of(*HD), 5.2, 32, stored("bf16", "nf4"))), CARD)
    assert long.step.copy_wait_s == long.step.disk_wait_s == 0
    assert 60 < long.step.seconds < 120  # what is reported of this card at this size
    image = inputs_of(clip_of((256, 256), 1), 2.6, 32, stored("bf16", "nf4"))
    from_host, from_disk = (
        predict(make_plan(replace(image, budget=replace(image.budget, host_bytes=nbytes))), CARD)
        for nbytes in (32 << 30, 4 << 30)
    )
    assert from_host.step.copy_wait_s > from_host.step.compute_s
    assert from_host.step.disk_wait_s == 0
    assert from_disk.step.disk_wait_s > from_host.step.copy_wait_s
    assert from_disk.clip_s > 2 * from_host.clip_s


def test_two_prompts_take_twice_as_long_and_a_short_clip_is_mostly_encoding() -> None:
    one, two = (predict(make_plan(profile_inputs("24g", clip_of(*SMALL, prompts=count))), CARD) for count in (1, 2))
    assert two.step.compute_s == pytest.approx(2 * one.step.compute_s)
    short = predict(make_plan(profile_inputs("6g", clip_of((256, 256), 1, steps=1))), CARD)
    assert short.steps_s < short.text_s + short.schedule_s
    assert short.clip_s == short.text_s + short.schedule_s + short.steps_s


def test_a_cpu_pays_for_reading_with_its_own_time() -> None:
    slow = Curve(((1, 1e11),))
    rates = Rates(
        made_by="a test",
        compute={"fp32": Compute(matmul=slow, attention=slow, elementwise=Curve(((1, 1e10),)))},
        dequantise={"nf4": 1e9},
        disk_read=2e9,
        disk_cpu=2e-10,
    )
    inputs = inputs_of(clip_of((256, 256), 1), 4.0, 0, stored("bf16", "nf4"))
    task = replace(inputs.task, kind="cpu", dtype="fp32", text_dtype="fp32", vae_dtype="fp32")
    task = replace(task, stored=stored("fp32", "nf4"))
    plan = make_plan(replace(inputs, task=task))
    busy, free = (predict(plan, each) for each in (rates, replace(rates, disk_cpu=0.0)))
    spent = busy.step.compute_s - free.step.compute_s
    assert spent == pytest.approx(plan.bytes_per_step * 2e-10)


def test_what_was_not_measured_costs_nothing() -> None:
    plan = make_plan(inputs_of(clip_of((256, 256), 1), 2.6, 4, stored("bf16", "nf4")))
    measured = replace(CARD, compute={"bf16": CARD.compute["bf16"]}, disk_read=None)
    assert predict(plan, measured).step.disk_wait_s == 0
    assert predict(plan, measured).step.copy_wait_s > 0
    unknown = predict(plan, replace(measured, host_to_device=None))
    assert unknown.step.seconds == unknown.step.compute_s
    assert unknown.load_s == 0


def test_what_an_exact_decode_moves_is_as_slow_as_the_disk() -> None:
    """810 GB: what it takes on top of the work."""
    clip = clip_of(*HD)
    assert predict(make_plan(profile_inputs("24g", clip)), CARD).spill_s == 0
    exact = make_plan(profile_inputs("24g", clip, asked=Asked(tiles=EXACT)))
    assert predict(exact, CARD).spill_s == pytest.approx(809.7e9 / 3.5e9, rel=0.001)
    small = make_plan(profile_inputs("24g", clip_of((256, 256), 33), asked=Asked(tiles=EXACT)))
    assert small.spilled is not None
    assert predict(small, CARD).spill_s == pytest.approx(small.spilled.moved_bytes / (31.5e9 * 0.8))
