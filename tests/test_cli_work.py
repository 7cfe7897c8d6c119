"""`hvlite work`: what it says, how it ends, and what it does not let end it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from hvlite import cli_work
from hvlite.cli_work import next_time
from hvlite.jobs.devices import CPU_LOCK, sign, take_lock
from hvlite.jobs.job import Progress
from hvlite.jobs.store import Store, open_store
from hvlite.jobs.supervisor import Supervisor
from tests.command_line import call
from tests.nights import FAKE, HASTY, ROOT
from tests.queue_hands import new_job


@pytest.fixture(autouse=True)
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch in these tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(cli_work, "Supervisor", partial(Supervisor, command=FAKE, patience=HASTY))


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store() as opened:
        yield opened


def queue(store: Store, tmp_path: Path, *prompts: str) -> list[int]:
    return store.add([new_job(prompt, folder=tmp_path / "clips") for prompt in prompts])


def test_an_empty_queue_is_done_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "work", "--until-empty", "--device", "cpu")
    assert (code, out) == (0, "")
    assert "working on cpu, 0 jobs queued" in err
    assert "no job is left for this device" in err


def test_a_paused_queue_is_not_empty(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue(store, tmp_path, "one")
    store.pause()
    code, _, err = call(capsys, "work", "--until-empty", "--device", "cpu")
    assert code == 1
    assert "go on: hvlite queue resume" in err


def test_results_are_on_stdout_and_the_talk_is_not(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue(store, tmp_path, "one", "park", "fail")
    code, out, err = call(capsys, "work", "--until-empty", "--device", "cpu")
    assert code == 6, err
    assert out == f"{store.job(1).output}\n"
    assert "job 2 is parked at step 1: hvlite queue finish 2" in err
    assert "job 3 failed: weights are missing" in err
    assert "1 done, 1 parked, 1 failed; 0 queued" in err


def test_json_is_a_line_for_every_event(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue(store, tmp_path, "keep note")
    code, out, err = call(capsys, "work", "--until-empty", "--device", "cpu", "--json", "--quiet")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    named = {line["event"]: line for line in lines}
    expected = ["Note", "JobStarted", "WorkerStarted", "Stage", "StepDone", "Note", "JobEnded", "Note", "Summary"]
    assert [line["event"] for line in lines] == expected
    assert named["StepDone"] == {"event": "StepDone", "job": 1, "step": 0, "steps": 50, "seconds": 0.1}
    assert named["JobEnded"]["job"]["state"] == "done"
    assert named["Summary"] == {"event": "Summary", "done": 1, "queued": 0}


@pytest.mark.parametrize(("prompt", "code"), [("keep interrupt wait", 130), ("keep terminate wait", 143)])
def test_a_signal_saves_the_clip_and_ends_with_its_code(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, code: int
) -> None:
    queue(store, tmp_path, prompt, "next")
    ended, out, err = call(capsys, "work", "--device", "cpu")
    assert (ended, out) == (code, ""), err
    assert "job 1 stops at the next block or tile, with the work saved" in err
    assert (store.job(1).state, store.job(1).checkpoint_step, store.job(2).state) == ("queued", 1, "queued")


def test_a_second_signal_waits_for_nothing(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue(store, tmp_path, "interrupt interrupt_again freeze")
    began = time.monotonic()
    assert call(capsys, "work", "--device", "cpu")[0] == 130
    assert time.monotonic() - began < HASTY.pause
    assert store.job(1).state == "queued"


def test_a_closed_terminal_does_not_end_the_night(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue(store, tmp_path, "hang_up", "next")
    assert call(capsys, "work", "--device", "cpu", "--until-empty")[0] == 0
    assert [job.state for job in store.page()] == ["done", "done"]


def test_readers_that_go_away_cost_the_talk_alone() -> None:
    script = (
        "import os, sys\n"
        "from hvlite.cli_work import Shown\n"
        "from hvlite.progress import Talk\n"
        "shown = Shown(Talk(), as_json=True)\n"
        "for _ in range(3): shown.say('x' * 9999)\n"
        "os.write(int(sys.argv[1]), b'alive')\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    told, tells = os.pipe()
    command = [sys.executable, "-c", script, str(tells)]
    done = subprocess.run(command, stdout=writer, stderr=writer, pass_fds=(tells,), cwd=ROOT, check=False)
    os.close(tells)
    assert (done.returncode, os.read(told, 9)) == (0, b"alive")
    os.close(writer)
    os.close(told)


def test_a_second_worker_is_refused_and_told_what_is_going_on(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvlite.jobs.devices.LOCK_SECONDS", 0.0)
    lock = take_lock(CPU_LOCK)
    assert lock is not None
    sign(lock)
    queue(store, tmp_path, "one")
    done_at = datetime(2026, 11, 23, 2, 40).timestamp()
    claims = store.claims("first", CPU_LOCK, {None})
    code, _, err = call(capsys, "work", "--device", "cpu")
    assert code == 4
    assert f"cpu is served by a worker (process {os.getpid()}): it makes no clip now" in err
    claims.claim()
    claims.report(1, Progress(stage="denoise", step=17, steps=50, eta=done_at))
    code, _, err = call(capsys, "work", "--device", "cpu")
    lock.close()
    assert code == 4
    assert "it makes job 1 (denoise step 17/50, until about 02:40)" in err
    assert "hvlite queue add" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stop-at", "7 o'clock"), "07:00"),
        (("--max-jobs", "0"), "at least 1"),
        (("--save-every", "-1"), "seconds"),
        (("--device", "meta"), "cpu, cuda or cuda:N"),
    ],
)
def test_what_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = call(capsys, "work", *arguments)
    assert code == 2
    assert words in err


@pytest.mark.parametrize(
    ("now", "text", "wanted"),
    [
        (datetime(2026, 11, 22, 23, 0), "07:00", datetime(2026, 11, 23, 7, 0)),
        (datetime(2026, 11, 23, 6, 59), "07:00", datetime(2026, 11, 23, 7, 0)),
        (datetime(2026, 11, 23, 7, 0), "07:00", datetime(2026, 11, 24, 7, 0)),
        (datetime(2026, 12, 31, 8, 0), "7:30", datetime(2027, 1, 1, 7, 30)),
    ],
)
def test_a_time_of_day_is_the_next_one(now: datetime, text: str, wanted: datetime) -> None:
    assert next_time(text, now) == wanted
