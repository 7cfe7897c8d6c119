"""Tables that line up whatever the prompts are written in, and times as people say them."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hvlite.cli_tables import clock_at, job_table, progress_text, ranges_text, span
from hvlite.jobs.job import How, Job, Progress, ids_of
from hvlite.request import Request

NOW = 1_800_000_000.0
JOB = Job(id=7, state="queued", position=1, revision=0, request=Request("a cat"), how=How(model="/models/tuned"))


def test_only_columns_with_something_in_them_are_shown() -> None:
    assert job_table([JOB], {}, NOW, 80) == [
        *("id  state   #  prompt  seed  model", " 7  queued  1  a cat      0  tuned"),
    ]
    both = [JOB, replace(JOB, id=12, request=Request("b", size=(64, 96), frames=17, steps=8))]
    assert job_table(both, {7: NOW}, NOW, 80)[0].split() == [
        *("id", "state", "#", "prompt", "size", "frames", "steps", "seed", "model", "end"),
    ]


def test_what_the_model_made_of_a_request_is_shown() -> None:
    resolved = replace(JOB, resolved={"size": [64, 64], "frames": 33, "steps": 20})
    assert "64x64      33     20" in job_table([resolved], {}, NOW, 80)[1]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.integers(50, 120))
def test_lines_are_as_wide_as_the_terminal_at_most(prompts: list[str], width: int) -> None:
    prompts = [prompt.replace("\0", "") for prompt in prompts]
    jobs = [replace(JOB, request=replace(Request("a"), prompt=prompt)) for prompt in prompts]
    assert max(cell_len(line) for line in job_table(jobs, {}, NOW, width)) <= width
    models = {line.rfind("tuned") for line in job_table(jobs, {}, NOW, width)[1:] if line.isascii()}
    assert len(models) <= 1


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (replace(JOB, checkpoint_step=4, crashes=1), "from step 4, crashed 1x"),
        (replace(JOB, stop_after=4, lost=2), "draft, 4 steps, lost 2x"),
        (replace(JOB, state="running", heartbeat=NOW), "starting"),
        (
            replace(JOB, state="running", heartbeat=NOW, progress=Progress(stage="decode", detail="tile 2/9")),
            "decode tile 2/9",
        ),
        (replace(JOB, state="running", heartbeat=NOW - 600), "no sign of life for 10 min 00 s"),
        (replace(JOB, state="running", heartbeat=NOW, asked="cancel"), "cancelling, starting"),
        (replace(JOB, state="parked", stop_after=4, checkpoint_step=4), "draft, 4 steps"),
        (replace(JOB, state="done", started=NOW - 90, finished=NOW, output=Path("/c/a.mp4")), "1 min 30 s, a.mp4"),
        (replace(JOB, state="failed", reason="disk full"), "disk full"),
    ],
)
def test_one_thing_is_told_of_each_job(job: Job, text: str) -> None:
    assert progress_text(job, NOW) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (170_000, "47 h 13 min"),
        (300_000, "3 d 11 h"),
    ],
)
def test_spans_have_two_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_clock_times_name_their_day_where_it_is_not_today() -> None:
    noon = time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1))
    assert clock_at(noon + 3600, noon) == "13:00"
    assert clock_at(noon + 86_400, noon) == "Sat 12:00"
    assert clock_at(noon + 9 * 86_400, noon) == "2026-11-29 12:00"
    assert clock_at(noon, noon, always_day=True) == "2026-11-20 12:00"


@given(st.sets(st.integers(1, 40), min_size=1))
def test_ranges_are_what_the_commands_take(ids: set[int]) -> None:
    back = {number for first, last in ids_of([ranges_text(sorted(ids))]) for number in range(first, last + 1)}
    assert back == ids
