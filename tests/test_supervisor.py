"""The supervisor, with workers that die, hang, refuse to stop and run out of memory on demand."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from hvlite import paths
from hvlite.errors import Busy, ExitCode, HvliteError
from hvlite.events import Event, Note, Stage
from hvlite.jobs.devices import take_lock
from hvlite.jobs.job import QUARANTINED, How, Job, Outcome
from hvlite.jobs.orders import Halt, Patience
from hvlite.jobs.store import Claims, Store, open_store
from tests.nights import HASTY, PLACE, Watcher, is_alive, night
from tests.queue_hands import new_job


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store() as opened:
        yield opened


@pytest.fixture
def other(store: Store) -> Iterator[Store]:
    """The queue as another process has it open."""
    with open_store() as opened:
        yield opened


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return tmp_path / "clips"


def queue(store: Store, clips: Path, *prompts: str, **fields: Any) -> list[int]:
    return store.add([new_job(prompt, folder=clips, **fields) for prompt in prompts])


def states(store: Store) -> list[str]:
    return [job.state for job in sorted(store.page(), key=lambda job: job.id)]


def test_every_job_is_made_in_order_by_one_worker(store: Store, clips: Path) -> None:
    queue(store, clips, "one", "two", "three")
    watcher = Watcher()
    supervisor = night(store, watcher)
    assert [job.prompt for job in watcher.ends] == ["one", "two", "three"]
    assert supervisor.tally == {"done": 3}
    assert len(watcher.pids) == 1
    assert not is_alive(watcher.pids[0])
    made = [job.output.read_text(encoding="utf-8") for job in watcher.ends if job.output is not None]
    pid = watcher.pids[0]
    assert made == [f"{pid} one 2", f"{pid} two 1", f"{pid} three 0"]
    last = store.job(3)
    assert (last.seconds_per_step, last.timings, last.predicted_bytes) == (0.5, {"denoise": 1.0}, 7)
    assert last.resolved is not None
    assert last.resolved["steps"] == 50
    assert last.log is not None


def test_a_job_whose_worker_dies_twice_is_quarantined_and_the_night_goes_on(store: Store, clips: Path) -> None:
    queue(store, clips, "die", "fine")
    watcher = Watcher()
    night(store, watcher)
    assert states(store) == ["failed", "done"]
    poison = store.job(1)
    assert (poison.reason, poison.attempts, poison.crashes) == (QUARANTINED, 2, 2)
    assert "its worker was killed by SIGKILL 2 times in a row" in str(poison.error)
    assert len(set(watcher.pids)) == 3


@pytest.mark.parametrize(("ask", "state"), [("cancel", "cancelled"), ("pause", "queued"), ("end", "queued")])
def test_a_worker_that_still_starts_is_not_waited_for(
    store: Store, other: Store, clips: Path, ask: str, state: str
) -> None:
    queue(store, clips, "never read")
    halt = Halt()

    class Asking(Watcher):
        def worker_started(self, pid: int) -> None:
            super().worker_started(pid)
            match ask:
                case "cancel":
                    other.cancel([1])
                case "pause":
                    other.pause(now=True)
                case _:
                    halt.code = ExitCode.INTERRUPTED

    watcher = Asking()
    night(store, watcher, halt=halt, command=(sys.executable, "-c", "import signal; signal.pause()"))
    assert states(store) == [state]
    assert (store.job(1).crashes, len(watcher.pids), is_alive(watcher.pids[0])) == (0, 1, False)


def test_progress_forgives_deaths(store: Store, clips: Path) -> None:
    queue(store, clips, "keep@1 die@1 keep@2 quit@2 keep@3 die@3")
    night(store, Watcher())
    job = store.job(1)
    assert (job.state, job.attempts, job.best_step, job.crashes) == ("done", 4, 3, 0)


def test_a_worker_that_hangs_is_killed_and_replaced(store: Store, clips: Path) -> None:
    queue(store, clips, "freeze@1")
    watcher = Watcher()
    night(store, watcher, patience=replace(HASTY, idle=1.5))
    assert states(store) == ["done"]
    assert "job 1 is queued again (its worker hung); it will go on from its start" in watcher.said
    assert not any(is_alive(pid) for pid in watcher.pids)


def test_a_worker_that_computes_in_silence_is_left_alone_on_a_cpu(store: Store, clips: Path) -> None:
    queue(store, clips, "compute")
    watcher = Watcher()
    night(store, watcher, patience=replace(HASTY, idle=0.5, silent=0.2))
    assert (states(store), len(watcher.pids)) == (["done"], 1)


def test_a_worker_that_spins_in_silence_on_a_card_is_killed(store: Store, clips: Path) -> None:
    queue(store, clips, "spin@1", how=How(device="cuda:1"))
    watcher = Watcher()
    night(store, watcher, place=replace(PLACE, device="cuda:1"), patience=replace(HASTY, silent=3.0))
    assert (states(store), len(watcher.pids)) == (["done"], 2)


@pytest.mark.parametrize(
    ("prompt", "patience", "said"),
    [
        ("wait", HASTY, ()),
        ("ignore", replace(HASTY, cancel=0.3), ("SIGTERM",)),
        ("freeze", replace(HASTY, cancel=0.3, term=0.3), ("SIGTERM", "SIGKILL")),
    ],
)
def test_a_cancel_climbs_the_ladder_as_far_as_it_must(
    store: Store, other: Store, clips: Path, prompt: str, patience: Patience, said: tuple[str, ...]
) -> None:
    queue(store, clips, prompt, "next")

    def cancel(job: Job, event: Event) -> None:
        if job.id == 1 and isinstance(event, Stage):
            other.cancel([1])

    watcher = Watcher(on_event=cancel)
    night(store, watcher, patience=patience)
    assert states(store) == ["cancelled", "done"]
    assert store.job(1).reason == "cancelled by user"
    rungs = [text for text in watcher.said if "did not stop" in text]
    assert len(rungs) == len(said)
    assert all(word in text for word, text in zip(said, rungs, strict=True))


def test_pause_now_gives_the_job_back_and_frees_the_device(store: Store, other: Store, clips: Path) -> None:
    queue(store, clips, "keep wait@1", "next")
    watcher = Watcher()

    def pause(job: Job, _event: Event) -> None:
        if job.attempts == 1:
            other.pause(now=True)

    def resume(text: str) -> None:
        if text == "the queue is paused":
            other.resume()

    watcher.on_event, watcher.on_say = pause, resume
    night(store, watcher, until_empty=False, max_jobs=2)
    assert states(store) == ["done", "done"]
    assert "job 1 is queued again (paused); it will go on from step 1" in watcher.said
    assert (store.job(1).attempts, len(set(watcher.pids))) == (2, 2)


def test_memory_that_runs_out_is_tried_again_once_by_a_fresh_worker(store: Store, clips: Path) -> None:
    queue(store, clips, "keep memory@1", "memory", "fine")
    watcher = Watcher()
    night(store, watcher)
    assert states(store) == ["done", "failed", "done"]
    assert store.job(2).reason == "out of memory in denoise"
    assert len(set(watcher.pids)) == 4


def test_a_lost_device_counts_as_a_crash(store: Store, clips: Path) -> None:
    queue(store, clips, "device@1", "device")
    night(store, Watcher())
    assert states(store) == ["done", "failed"]
    assert "lost its device 2 times in a row" in str(store.job(2).error)


def test_what_another_process_prevents_is_tried_later(store: Store, clips: Path) -> None:
    queue(store, clips, "busy@1 busy@2")
    night(store, Watcher())
    job = store.job(1)
    assert (job.state, job.attempts, job.crashes) == ("done", 3, 0)


def test_a_cancel_while_the_model_is_loaded_leaves_the_next_clips_alone(store: Store, clips: Path) -> None:
    """The worker says what it has planned when it was told to stop already: nothing of it may be left on the wire."""
    queue(store, clips, "load", "first", "second")
    night(store, Watcher(on_start=lambda job: store.cancel([job.id]) if job.id == 1 else None))
    assert states(store) == ["cancelled", "done", "done"]
    for number, prompt in ((2, "first"), (3, "second")):
        output = store.job(number).output
        assert output is not None
        assert prompt in output.read_text(encoding="utf-8")


def test_a_clip_in_another_file_is_not_done(store: Store, clips: Path) -> None:
    queue(store, clips, "misfile@1")
    watcher = Watcher()
    night(store, watcher)
    assert (states(store), store.job(1).crashes, len(watcher.pids)) == (["done"], 1, 2)


def events_in(told: Path) -> list[str]:
    """What a command that was run kept of its stdin."""
    return [json.loads(line)["event"] for line in told.read_text(encoding="utf-8").splitlines()]


def test_the_queue_is_empty_when_nothing_waits(store: Store, clips: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    queue(store, clips, "one", "wait")
    night(store, Watcher(on_start=lambda job: store.pause(now=True) if job.id == 2 else None), on_done=f"cat >> {told}")
    assert states(store) == ["done", "queued"]
    assert events_in(told) == ["done"]
    store.resume()
    store.cancel([2])
    queue(store, clips, "three")
    night(store, Watcher(), on_done=f"cat >> {told}")
    assert sorted(events_in(told)) == ["done", "done", "empty"]


def test_equal_failures_in_a_row_pause_the_queue(store: Store, clips: Path, tmp_path: Path) -> None:
    queue(store, clips, "fail", "fail", "fail", "never")
    told = tmp_path / "told"
    watcher = Watcher()
    supervisor = night(store, watcher, on_done=f"cat >> {told}")
    assert states(store) == ["failed", "failed", "failed", "queued"]
    assert supervisor.tally == {"failed": 3}
    assert any("the queue is paused: 3 failures in a row: weights" in text for text in watcher.said)
    assert sorted(events_in(told)) == ["failed", "failed", "failed", "paused"]  # and not "empty": one is queued


def test_a_worker_that_talks_nonsense_is_replaced(store: Store, clips: Path) -> None:
    queue(store, clips, "babble@1")
    night(store, Watcher())
    assert (states(store), store.job(1).crashes) == (["done"], 1)


def test_a_worker_that_holds_ever_more_is_replaced_between_jobs(store: Store, clips: Path) -> None:
    queue(store, clips, "swell", "swell", "swell", "swell")
    watcher = Watcher()
    night(store, watcher)
    assert states(store) == ["done"] * 4
    assert len(watcher.pids) == 2
    assert any("more than after its first clip" in text for text in watcher.said)


def test_a_worker_that_does_not_start_is_said_and_costs_no_job(store: Store, clips: Path) -> None:
    queue(store, clips, "one")
    broken = (sys.executable, "-c", "import sys; sys.exit('torch is broken')")
    with pytest.raises(HvliteError, match="3 times in a row it ended with code 1, saying: torch is broken"):
        night(store, Watcher(), command=broken)
    job = store.job(1)
    assert (job.state, job.crashes) == ("queued", 0)


def test_a_halt_saves_the_work_and_leaves_the_rest(store: Store, clips: Path) -> None:
    queue(store, clips, "keep wait", "next")
    halt = Halt()
    watcher = Watcher(on_event=lambda _job, _event: setattr(halt, "code", ExitCode.INTERRUPTED))
    night(store, watcher, halt=halt, until_empty=False)
    assert states(store) == ["queued", "queued"]
    assert (store.job(1).checkpoint_step, store.job(1).position) == (1, 1)
    assert not is_alive(watcher.pids[0])


def test_a_second_halt_waits_for_nobody(store: Store, clips: Path) -> None:
    queue(store, clips, "freeze")
    halt = Halt()

    def halt_twice(_job: Job, _event: Event) -> None:
        halt.code, halt.at_once = ExitCode.INTERRUPTED, True

    watcher = Watcher(on_event=halt_twice)
    night(store, watcher, halt=halt, patience=replace(HASTY, pause=999, term=999))
    assert states(store) == ["queued"]
    assert not is_alive(watcher.pids[0])


def test_a_worker_that_somebody_else_ends_is_replaced_without_blame(store: Store, clips: Path) -> None:
    queue(store, clips, "keep ignore@1")
    watcher = Watcher()
    watcher.on_event = lambda _job, event: os.kill(watcher.pids[0], signal.SIGTERM) if len(watcher.pids) == 1 else None
    night(store, watcher)
    job = store.job(1)
    assert (job.state, job.crashes, job.attempts) == ("done", 0, 2)


def test_enough_jobs_are_enough(store: Store, clips: Path) -> None:
    queue(store, clips, "one", "two", "three")
    night(store, Watcher(), until_empty=False, max_jobs=2)
    assert states(store) == ["done", "done", "queued"]


def test_at_the_given_time_the_clip_is_saved_and_the_run_ends(
    store: Store, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(store, clips, "keep note wait")
    now = time.time()

    def be_late(_job: Job, event: Event) -> None:
        if isinstance(event, Note):
            monkeypatch.setattr(time, "time", lambda: now + 3601)

    night(store, Watcher(on_event=be_late), until_empty=False, stop_at=now + 3600)
    assert (states(store), store.job(1).checkpoint_step) == (["queued"], 1)


def test_a_clock_that_jumps_makes_nobody_impatient(store: Store, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(store, clips, "keep compute", "next")
    real = time.time
    jumps = cycle((86_400.0, -400_000.0))
    watcher = Watcher(on_event=lambda _job, _event: monkeypatch.setattr(time, "time", lambda: real() + next(jumps)))
    night(store, watcher, patience=replace(HASTY, idle=5.0))
    assert (states(store), len(watcher.pids)) == (["done", "done"], 1)
    assert not [text for text in watcher.said if "stop" in text]


def test_a_draft_is_parked(store: Store, clips: Path) -> None:
    queue(store, clips, "park", stop_after=1)
    night(store, Watcher())
    assert (states(store), store.job(1).checkpoint_step) == (["parked"], 1)


def test_claims_of_the_dead_are_taken_over(store: Store, clips: Path) -> None:
    queue(store, clips, "mine", "elsewhere", "alive")
    for lock in ("cpu-here", "GPU-gone", "GPU-alive"):
        assert store.claims("another", lock, {None}).claim() is not None
    held = take_lock("GPU-alive")
    assert held is not None
    watcher = Watcher()
    night(store, watcher)
    held.close()
    assert states(store) == ["done", "done", "running"]
    assert store.job(1).lost == 1


def test_checkpoints_that_nobody_can_go_on_from_are_removed(store: Store, other: Store, clips: Path) -> None:
    queue(store, clips, "alive", "ended", "removed", "forgotten")
    files = [paths.checkpoint_file(number) for number in range(1, 6)]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(b"latents")
    claims = store.claims("another", "GPU-alive", {None})
    for number in (1, 2, 3):
        claims.claim()
        if number > 1:
            claims.save_checkpoint(number, paths.home() / "elsewhere" / f"{number}.safetensors", 1)
            claims.end(number, Outcome(state="failed"))
    store.remove([3])
    held = take_lock("GPU-alive")
    assert held is not None
    night(store, Watcher())
    held.close()
    assert [file.exists() for file in files] == [True, True, True, False, False]


def test_an_idle_worker_gives_its_device_back(store: Store, clips: Path) -> None:
    queue(store, clips, "one")
    watcher = Watcher()

    class UntilItIsGone(Halt):
        """Ends the supervisor's waiting when the worker that made the job has gone."""

        def is_asked(self) -> bool:
            return bool(watcher.ends) and not is_alive(watcher.pids[0])

    night(store, watcher, halt=UntilItIsGone(), until_empty=False)
    assert (states(store), len(watcher.pids)) == (["done"], 1)


def test_a_queue_that_cannot_be_written_for_a_while_costs_time_and_nothing_else(
    store: Store, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(store, clips, "keep", "next")
    faults = {"claim": 2, "save_checkpoint": 1, "reserve_output": 1, "end": 3, "report": 5}

    def faulty(name: str) -> Any:
        real = getattr(Claims, name)

        def call(self: Claims, *arguments: Any) -> Any:
            if faults[name]:
                faults[name] -= 1
                raise Busy("the queue is busy")
            return real(self, *arguments)

        return call

    for name in faults:
        monkeypatch.setattr(Claims, name, faulty(name))
    watcher = Watcher()
    night(store, watcher)
    assert states(store) == ["done", "done"]
    assert {name: left for name, left in faults.items() if name != "report"} == dict.fromkeys(
        ("claim", "save_checkpoint", "reserve_output", "end"), 0
    )
    assert "the queue is busy (it is tried again)" in watcher.said


def test_a_job_that_was_taken_away_is_left_alone(store: Store, other: Store, clips: Path) -> None:
    queue(store, clips, "keep wait@1", "next")

    def steal(job: Job, event: Event) -> None:
        if job.id == 1 and isinstance(event, Stage) and job.attempts == 1:
            other.claims("thief", "GPU-1", {None}).recover(lambda _job: True)

    watcher = Watcher(on_event=steal)
    night(store, watcher)
    assert any("is not this worker's any more" in text for text in watcher.said)
    assert states(store) == ["done", "done"]


def test_a_command_is_run_for_every_job_with_its_json_and_may_fail(store: Store, clips: Path, tmp_path: Path) -> None:
    queue(store, clips, 'it\'s "quoted" $(touch no)', "fail")
    told = tmp_path / "told"
    watcher = Watcher()
    command = f'(echo "$HVLITE_EVENT $HVLITE_ID $HVLITE_OUTPUT"; cat) >> {told}; test "$HVLITE_EVENT" != failed'
    night(store, watcher, on_done=command)
    text = told.read_text(encoding="utf-8")
    assert f"done 1 {store.job(1).output}\n" in text
    assert '"prompt": "it\'s \\"quoted\\" $(touch no)"' in text
    assert "failed 2" in text
    assert any("failed: code 1" in said and "--on-done" in said for said in watcher.said)


def test_the_command_of_the_queue_is_used_where_none_is_given(store: Store, clips: Path, tmp_path: Path) -> None:
    store.change_settings(on_done=f"echo $HVLITE_EVENT >> {tmp_path / 'told'}")
    queue(store, clips, "one")
    night(store, Watcher())
    assert sorted((tmp_path / "told").read_text(encoding="utf-8").split()) == ["done", "empty"]
