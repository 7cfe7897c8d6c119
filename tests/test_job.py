"""The rules of a job's life: which changes are allowed, when it is quarantined, and where moved jobs land."""

from dataclasses import replace

import pytest

from hvlite.errors import RequestError
from hvlite.jobs.job import (
    ACTIONS,
    CHANGES,
    QUARANTINED,
    STATES,
    How,
    Job,
    NewJob,
    Settings,
    after_crash,
    after_loss,
    ids_of,
    job_json,
    may_change,
    refusal,
)
from hvlite.paths import DEFAULT_OUTPUT
from hvlite.request import Request
from tests.refusal import refusal as refused

RUNNING = Job(id=3, state="running", position=None, revision=1, request=Request("a"), how=How(model="shapes"))


def test_every_state_has_its_changes_and_done_is_final() -> None:
    assert set(CHANGES) == set(STATES)
    assert not any(may_change("done", state) for state in STATES)
    assert {state for state in STATES if may_change(state, "running")} == {"queued"}
    assert {state for state in STATES if may_change("running", state)} == set(STATES) - {"running"}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", STATES)
def test_a_refused_action_says_what_it_takes(action: str, state: str) -> None:
    sentence = refusal(action, 3, state)  # type: ignore[arg-type]  # the parameters are the literal's own words
    assert (sentence is None) == (state in ACTIONS[action])
    if sentence is not None:
        assert sentence.startswith(f"job 3 is {state}: `{action}` takes ")


def test_two_crashes_in_a_row_quarantine() -> None:
    first = after_crash(RUNNING, Settings(), "died")
    assert (first.state, first.crashes, first.lost) == ("queued", 1, 0)
    second = after_crash(replace(RUNNING, crashes=1), Settings(), "hung")
    assert (second.state, second.reason, second.crashes) == ("failed", QUARANTINED, 2)
    assert second.error is not None
    assert "its worker hung 2 times in a row" in second.error
    assert after_crash(replace(RUNNING, crashes=1), Settings(crash_limit=3), "died").state == "queued"


def test_a_crash_after_a_new_checkpoint_does_not_count() -> None:
    progressed = replace(RUNNING, crashes=0, progressed=True)
    assert after_crash(progressed, Settings(), "died").crashes == 0
    assert after_loss(progressed, Settings()).lost == 0


def test_deaths_of_both_count_apart_up_to_eight() -> None:
    job = replace(RUNNING, crashes=1)
    for lost in range(7):
        verdict = after_loss(replace(job, lost=lost), Settings())
        assert (verdict.state, verdict.crashes, verdict.lost) == ("queued", 1, lost + 1)
    assert after_loss(replace(job, lost=7), Settings()).state == "failed"


def test_a_cancel_that_its_worker_did_not_live_to_see_is_kept() -> None:
    asked = replace(RUNNING, asked="cancel")
    assert after_loss(asked, Settings()).state == "cancelled"
    assert after_crash(asked, Settings(), "died").state == "cancelled"
    assert after_loss(replace(RUNNING, asked="pause"), Settings()).state == "queued"


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        (["3"], [(3, 3)]),
        (["3-7", "9"], [(3, 7), (9, 9)]),
        (["3,5-6, 8"], [(3, 3), (5, 6), (8, 8)]),
    ],
)
def test_job_numbers_and_ranges(text: list[str], ranges: list[tuple[int, int]]) -> None:
    assert ids_of(text) == ranges


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "3--4", "7-3", "3.5", "\N{SUPERSCRIPT TWO}", "9" * 19])
def test_what_is_no_job_number_is_refused(text: str) -> None:
    refused(lambda: ids_of([text]), repr(text), kind=RequestError)


def test_a_draft_stops_before_the_end() -> None:
    def draft(stop_after: int, steps: int | None) -> NewJob:
        return NewJob(request=Request("a", steps=steps), how=How(), folder=DEFAULT_OUTPUT, stop_after=stop_after)

    assert draft(4, None).stop_after == 4
    refused(lambda: draft(0, 5), "at least 1; got 0", kind=RequestError)
    refused(lambda: draft(5, 5), "below --steps (5); got 5", kind=RequestError)


def test_limits_are_at_least_one() -> None:
    refused(lambda: Settings(crash_limit=0), "crash_limit must be at least 1; got 0", kind=RequestError)


def test_json_has_the_names_of_the_contract() -> None:
    values = job_json(replace(RUNNING, how=How(model="shapes", profile="cpu")))
    assert list(values)[:3] == ["id", "state", "position"]
    contract = {"model", "profile", "request", "output", "error", "attempts", "crashes"}
    assert contract <= set(values)
    assert values["request"]["prompt"] == "a"
    assert job_json(replace(RUNNING, how=None, request=None, raw="{"))["raw"] == "{"
