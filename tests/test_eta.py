"""When the queue is done: by measured seconds of like jobs, scaled where there is nothing better, or not at all."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvlite.events import Stage, StepDone
from hvlite.jobs.course import Course
from hvlite.jobs.eta import History, Shape, finish_times, queue_end
from hvlite.jobs.job import How, Job, Progress, State
from hvlite.progress import Plain, Talk
from hvlite.request import Request

NOW = 1_000_000.0
HOW = How(model="shapes")
SMALL = Request("a", size=(64, 64), frames=17, steps=10)
LARGE = replace(SMALL, size=(128, 128))


def job(number: int, request: Request = SMALL, state: State = "queued", how: How = HOW, **fields: Any) -> Job:
    return Job(id=number, state=state, position=None, revision=0, request=request, how=how, **fields)


def done(
    seconds_per_step: float | None, request: Request = SMALL, other: float = 5.0, how: How = HOW, **fields: Any
) -> Job:
    timings: Mapping[str, float] = {"text": 1.0, "denoise": 99.0, "decode": other - 1.0}
    return job(1, request, "done", how, seconds_per_step=seconds_per_step, timings=timings, **fields)


def test_the_median_of_like_jobs_is_taken() -> None:
    history = History([done(2.0), done(900.0), done(3.0)])
    assert history.seconds(SMALL, HOW) == 10 * 3.0 + 5.0
    assert history.seconds(replace(SMALL, steps=20), HOW) == 20 * 3.0 + 5.0
    assert history.seconds(SMALL, HOW, from_step=4) == 6 * 3.0 + 5.0
    assert history.seconds(SMALL, HOW, stop_after=4) == 4 * 3.0


def test_the_latest_nine_count() -> None:
    history = History([done(1.0)] * 9 + [done(50.0)] * 20)
    assert history.seconds(SMALL, HOW) == 15.0


def test_nothing_is_said_without_history() -> None:
    assert History([]).seconds(SMALL, HOW) is None
    other = How(model="shapes", weights="int8")
    assert History([done(2.0, how=other), done(None)]).seconds(SMALL, HOW) is None
    assert History([done(2.0)]).seconds(Request("a"), HOW) is None


def test_another_shape_is_scaled_from_the_nearest() -> None:
    near, far = replace(SMALL, size=(96, 96)), replace(SMALL, size=(64, 80))
    history = History([done(2.0, far), done(4.0, near)])
    estimate = history.estimate(Shape((128, 128), 17, 10, 1), HOW)
    assert estimate is not None
    assert not estimate.same_shape
    assert estimate.seconds_per_step == pytest.approx(4.0 * (128 / 96) ** 2, rel=0.02)
    assert estimate.other_seconds == pytest.approx(5.0 * (128 / 96) ** 2)
    same = History([done(7.0, LARGE), done(4.0, near)]).estimate(Shape((128, 128), 17, 10, 1), HOW)
    assert same is not None
    assert (same.seconds_per_step, same.same_shape) == (7.0, True)


def test_true_guidance_costs_twice() -> None:
    history = History([done(2.0)])
    assert history.seconds(replace(SMALL, cfg_scale=6.0), HOW) == 10 * 4.0 + 5.0


def test_at_720p_attention_outweighs_the_rest() -> None:
    full, half = Shape((720, 1280), 129, 50, 1), Shape((720, 640), 129, 50, 1)
    assert full.tokens == 118_800
    assert 3.0 < full.work / half.work < 4.0


def test_defaults_are_known_or_learned() -> None:
    assert History([]).shape_of(Request("a"), How(model="hunyuanvideo")) == Shape((720, 1280), 129, 50, 1)
    assert History([]).shape_of(Request("a"), HOW) is None
    resolved = {"size": [64, 64], "frames": 33, "steps": 20}
    history = History([done(2.0, Request("b"), resolved=resolved)])
    assert history.shape_of(Request("a"), HOW) == Shape((64, 64), 33, 20, 1)
    assert history.seconds(Request("a", frames=33), HOW) == 20 * 2.0 + 5.0


def test_jobs_follow_each_other_by_the_clock() -> None:
    history = History([done(2.0)])
    running = job(2, state="running", progress=Progress(stage="denoise", step=3, steps=10, eta=NOW + 12))
    ends = finish_times([running], [job(3), job(4)], history, NOW)
    assert ends == {2: NOW + 16, 3: NOW + 41, 4: NOW + 66}
    assert queue_end(ends) == NOW + 66


def test_two_workers_share_the_line() -> None:
    history = History([done(2.0)])
    running = [
        job(number, state="running", progress=Progress(stage="denoise", eta=NOW + 10 * number)) for number in (1, 2)
    ]
    ends = finish_times(running, [job(3), job(4), job(5)], history, NOW)
    assert [ends[number] for number in (3, 4, 5)] == [NOW + 39, NOW + 49, NOW + 64]


def test_a_running_job_is_judged_by_the_steps_that_are_left() -> None:
    history = History([done(2.0)])
    at_step_4 = job(1, state="running", progress=Progress(stage="denoise", step=4, steps=10))
    late = replace(at_step_4, progress=Progress(stage="decode", eta=NOW - 50))
    assert finish_times([at_step_4], [], history, NOW) == {1: NOW + 17}
    assert finish_times([late], [], history, NOW) == {1: NOW}


def test_the_decode_follows_the_steps_of_a_running_job() -> None:
    history = History([done(2.0)])
    at_work = job(1, state="running", progress=Progress(stage="denoise", step=4, steps=10, eta=NOW + 12))
    draft = replace(at_work, stop_after=6)
    longer = replace(at_work, stop_after=10)  # no draft: the steps end first
    decoding = replace(at_work, progress=Progress(stage="decode", eta=NOW + 3))
    ends = [finish_times([each], [], history, NOW)[1] for each in (at_work, draft, longer, decoding)]
    assert ends == [NOW + 16, NOW + 12, NOW + 16, NOW + 3]
    assert history.seconds(SMALL, HOW, stop_after=12) == 10 * 2.0 + 5.0


def test_a_job_that_goes_on_counts_from_its_checkpoint_while_it_is_loaded() -> None:
    loading = job(1, state="running", progress=Progress(stage="load"), checkpoint_step=8)
    assert finish_times([loading], [], History([done(2.0)]), NOW) == {1: NOW + 9}


def test_nobody_knows_when_a_paused_queue_goes_on() -> None:
    running = job(1, state="running", progress=Progress(stage="decode", eta=NOW + 3))
    ends = finish_times([running], [job(2)], History([done(2.0)]), NOW, is_active=False)
    assert ends == {1: NOW + 3, 2: None}
    assert queue_end(ends) is None


def test_a_course_counts_the_steps_of_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvlite.jobs.course.time.time", lambda: NOW)
    etas = []
    for stop_after in (None, 10):
        course = Course(job(1, state="running", stop_after=stop_after))
        course.follow(Stage("denoise"))
        for event in (StepDone(step, 50, 2.0) for step in range(5)):
            course.follow(event)
        etas.append(course.progress.eta)
    assert etas == [NOW + 90, NOW + 10]


def test_a_plain_line_counts_from_what_was_done_when_it_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 20.0])
    monkeypatch.setattr("hvlite.progress.time.monotonic", lambda: next(clock))
    meter = Plain(Talk(), "denoise")
    meter.show(61, 100, "step 61")
    meter.show(81, 100, "step 81")
    assert capsys.readouterr().err.splitlines() == ["denoise  61 %  step 61", "denoise  81 %  step 81  eta 0:19"]


def test_what_waits_for_the_unknown_is_unknown() -> None:
    history = History([done(2.0)])
    ends = finish_times([], [job(1), job(2, how=How(model="other")), job(3)], history, NOW)
    assert ends == {1: NOW + 25, 2: None, 3: None}
    assert queue_end(ends) is None
    assert queue_end({}) is None
    unreadable = replace(job(1), request=None, how=None)
    assert finish_times([], [unreadable], history, NOW) == {1: None}


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 4))
def test_more_work_never_takes_less(seconds: list[float], wide: int, long: int) -> None:
    history = History([done(each) for each in seconds])
    more = replace(SMALL, size=(64 * wide, 64), frames=17 + 4 * (long - 1))
    small, large = history.seconds(SMALL, HOW), history.seconds(more, HOW)
    assert small is not None
    assert large is not None
    assert large >= small
