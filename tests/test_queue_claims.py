"""The worker's side: claims, signs of life, checkpoints, deaths of every kind; and processes that are killed at it."""

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.jobs.job import QUARANTINED, How, Job, Outcome, Progress
from hvlite.jobs.store import ClaimLost, Claims, Store, open_store
from tests.queue_hands import ROOT, new_job
from tests.refusal import refusal
from tests.test_queue_store import Clock, fill


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with open_store(tmp_path / "queue.db", clock) as opened:
        yield opened


def worker(store: Store, owner: str = "worker", lock: str = "cpu") -> Claims:
    return store.claims(owner, lock, {None, "cpu"})


def claimed(claims: Claims) -> Job:
    job = claims.claim()
    assert job is not None
    return job


def test_a_claim_takes_the_first_in_line(store: Store, clock: Clock) -> None:
    ids = fill(store, 2)
    clock.now += 5
    job = claimed(worker(store))
    assert (job.id, job.state, job.position, job.attempts) == (ids[0], "running", None, 1)
    assert (job.owner, job.lock, job.started, job.heartbeat) == ("worker", "cpu", clock.now, clock.now)
    assert store.job(ids[1]).position == 1


def test_a_claim_leaves_jobs_for_other_devices(store: Store) -> None:
    store.add([new_job("gpu", how=How(device="cuda:1")), new_job("any"), new_job("cpu", how=How(device="cpu"))])
    claims = worker(store)
    assert [claimed(claims).prompt, claimed(claims).prompt, claims.claim()] == ["any", "cpu", None]
    assert claimed(store.claims("other", "GPU-1", {"cuda:1"})).prompt == "gpu"


def test_jobs_that_need_the_same_models_can_be_encoded_together(store: Store) -> None:
    same, other = How(model="a"), How(model="a", weights="int8")
    store.add([new_job(str(number), how=other if number == 2 else same) for number in range(6)])
    job = claimed(worker(store))
    assert [alike.prompt for alike in worker(store).next_alike(job, 3)] == ["1", "3", "4"]


def test_a_report_is_a_sign_of_life_and_brings_requests_back(store: Store, clock: Clock) -> None:
    fill(store, 1)
    claims = worker(store)
    job = claimed(claims)
    clock.now += 60
    progress = Progress(stage="denoise", step=2, steps=9, detail="block 3/60", eta=clock.now + 99)
    assert claims.report(job.id, progress) is None
    assert claims.report(job.id) is None
    seen = store.job(job.id)
    assert (seen.progress, seen.beats, seen.heartbeat) == (progress, 2, clock.now)
    store.cancel([job.id])
    assert claims.report(job.id) == "cancel"
    assert claims.end(job.id, Outcome(state="cancelled", reason="cancelled by user")).state == "cancelled"


def test_whoever_lost_a_claim_is_told_at_every_call(store: Store) -> None:
    fill(store, 1)
    old, new = worker(store, "old"), worker(store, "new")
    job = claimed(old)
    new.recover(lambda _job: True)
    assert claimed(new).id == job.id
    for call in (
        lambda: old.report(job.id),
        lambda: old.end(job.id, Outcome(state="done")),
        lambda: old.give_back(job.id),
        lambda: old.crashed(job.id, "died"),
        lambda: old.save_checkpoint(job.id, Path("/c"), 1),
        lambda: old.reserve_output(job.id, ".mp4"),
    ):
        refusal(call, "not this worker's any more", "claimed by new", kind=ClaimLost)
    new.end(job.id, Outcome(state="done"))
    refusal(lambda: new.report(job.id), "it is done, claimed by nobody", kind=ClaimLost)


def test_an_outcome_is_kept_whole(store: Store, clock: Clock) -> None:
    fill(store, 1)
    claims = worker(store)
    job = claimed(claims)
    assert job.request is not None
    resolved = job.request.resolve(HUNYUANVIDEO)
    claims.record_plan(job.id, resolved, 12)
    clock.now += 100
    done = claims.end(
        job.id,
        Outcome(
            state="done",
            timings={"text": 1.5, "denoise": 90.0},
            seconds_per_step=1.8,
            peak_bytes=11,
            log=Path("/logs/1.log"),
            version="0.1.0",
        ),
    )
    assert done.resolved is not None
    assert done.resolved["size"] == [720, 1280]
    assert (done.predicted_bytes, done.peak_bytes, done.seconds_per_step) == (12, 11, 1.8)
    assert (done.timings, done.log, done.version) == ({"text": 1.5, "denoise": 90.0}, Path("/logs/1.log"), "0.1.0")
    assert (done.finished, done.owner, done.lock) == (clock.now, None, None)


def test_output_names_are_the_jobs_own_and_stay(store: Store, tmp_path: Path) -> None:
    store.add([new_job("A Cat!", folder=tmp_path, seed=5), new_job("b", output=tmp_path / "mine.mp4")])
    claims = worker(store)
    first, second = claimed(claims), claimed(claims)
    path = claims.reserve_output(first.id, ".mp4")
    assert path.parent == tmp_path
    assert path.name.endswith("-0001_a-cat_seed5.mp4")
    assert claims.reserve_output(second.id, ".mp4") == tmp_path / "mine.mp4"
    path.touch()
    assert claims.reserve_output(first.id, ".mp4") == path  # its own file, from before a death
    claims.give_back(first.id)
    assert claims.reserve_output(claimed(claims).id, ".mp4") == path


def test_an_output_name_avoids_files_and_other_jobs(store: Store, tmp_path: Path) -> None:
    store.add([new_job("a", folder=tmp_path)])
    claims = worker(store)
    job = claimed(claims)
    free = claims.reserve_output(job.id, ".mp4")
    claims.end(job.id, Outcome(state="failed"))
    store.retry([job.id])
    free.symlink_to(tmp_path / "nowhere")
    taken = free.with_stem(free.stem + "-2")
    other = store.add([new_job("b", output=taken)])[0]
    assert claimed(claims).id == job.id
    assert claims.reserve_output(job.id, ".mp4") == free.with_stem(free.stem + "-3")
    assert store.job(other).output == taken


def test_two_crashes_quarantine_and_a_new_checkpoint_forgives(store: Store) -> None:
    job_id = fill(store, 2)[0]
    claims = worker(store)
    claimed(claims)
    assert claims.crashed(job_id, "died").crashes == 1
    assert claimed(claims).id == job_id  # at the head of the line again
    claims.save_checkpoint(job_id, Path("/c"), 3)
    assert claims.crashed(job_id, "died").crashes == 0
    claimed(claims)
    claims.save_checkpoint(job_id, Path("/c"), 3)  # no further than the last one
    assert claims.crashed(job_id, "died").crashes == 1
    claimed(claims)
    claims.drop_checkpoint(job_id)
    claims.save_checkpoint(job_id, Path("/c"), 2)
    job = claims.crashed(job_id, "hung")
    assert (job.state, job.reason, job.crashes, job.attempts) == ("failed", QUARANTINED, 2, 4)
    assert "hung 2 times in a row" in str(job.error)
    assert (job.log, job.version) == (paths.job_log(job_id), version("hvlite"))
    assert job.finished is not None
    store.retry([job_id])
    assert store.job(job_id).crashes == 0


def test_the_last_words_of_a_lost_device_are_kept(store: Store) -> None:
    fill(store, 1)
    store.change_settings(crash_limit=1)
    claims = worker(store)
    job = claims.crashed(claimed(claims).id, "lost its device", "CUDA error: unspecified launch failure")
    assert "lost its device 1 times in a row" in str(job.error)
    assert "(last: CUDA error: unspecified launch failure)" in str(job.error)


def test_the_dead_are_inherited_in_order(store: Store) -> None:
    ids = fill(store, 4)
    gone, alive, heir = worker(store, "gone"), worker(store, "alive", "GPU-2"), worker(store, "heir")
    claimed(gone), claimed(alive), claimed(gone)
    claims = heir.recover(lambda job: job.lock == "cpu")
    assert sorted(job.id for job in claims) == [ids[0], ids[2]]
    assert [job.id for job in store.page(("queued",))] == [ids[0], ids[2], ids[3]]
    assert (store.job(ids[0]).lost, store.job(ids[0]).crashes, store.job(ids[1]).state) == (1, 0, "running")
    assert heir.recover(lambda job: job.lock == "cpu") == []


def test_eight_losses_in_a_row_quarantine(store: Store) -> None:
    job_id = fill(store, 1)[0]
    for number in range(8):
        claimed(worker(store, f"owner {number}"))
        worker(store, "heir").recover(lambda _job: True)
    job = store.job(job_id)
    assert (job.state, job.reason, job.lost, job.crashes) == ("failed", QUARANTINED, 8, 0)


def test_a_cancel_outlives_its_worker(store: Store) -> None:
    job_id = fill(store, 1)[0]
    claimed(worker(store, "gone"))
    store.cancel([job_id])
    worker(store, "heir").recover(lambda _job: True)
    assert (store.job(job_id).state, store.job(job_id).reason) == ("cancelled", "cancelled by user")


def fail(store: Store, reason: str) -> None:
    claims = worker(store)
    claims.end(claimed(claims).id, Outcome(state="failed", reason=reason, error="..."))


def test_three_equal_failures_in_a_row_pause_the_queue(store: Store) -> None:
    fill(store, 12)
    for reason in ("disk full", "disk full", "no memory", "disk full", "disk full"):
        fail(store, reason)
    claims = worker(store)
    claims.end(claimed(claims).id, Outcome(state="done"))
    fail(store, "disk full")
    fail(store, "disk full")
    assert store.settings().queue == "active"
    fail(store, "disk full")
    assert (store.settings().queue, store.settings().pause_reason) == ("paused", "3 failures in a row: disk full")
    assert worker(store).claim() is None
    store.resume()
    fail(store, "disk full")
    assert store.settings().queue == "active"  # counted anew


def test_quarantines_count_as_failures(store: Store) -> None:
    fill(store, 4)
    store.change_settings(crash_limit=1)
    claims = worker(store)
    for _ in range(3):
        claims.crashed(claimed(claims).id, "died")
    assert store.settings().pause_reason == f"3 failures in a row: {QUARANTINED}"


def test_a_pause_by_failures_waits_for_the_other_worker(store: Store) -> None:
    fill(store, 4)
    other = worker(store, "other", "GPU-2")
    job = claimed(other)
    for _ in range(3):
        fail(store, "disk full")
    assert store.settings().queue == "draining"
    other.end(job.id, Outcome(state="done"))
    assert store.settings().queue == "paused"


CLAIM_ALL = """
import json, sys
from pathlib import Path
from hvlite.jobs.job import Outcome
from hvlite.jobs.store import open_store
path, owner = sys.argv[1:]
mine = []
with open_store(Path(path)) as store:
    claims = store.claims(owner, owner, {None})
    print("ready", flush=True)
    sys.stdin.readline()
    while (job := claims.claim()) is not None:
        mine.append(job.id)
        claims.end(job.id, Outcome(state="done"))
print(json.dumps(mine))
"""


def test_processes_that_claim_at_once_share_no_job(store: Store, tmp_path: Path) -> None:
    ids = fill(store, 60)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_ALL, str(tmp_path / "queue.db"), f"worker {number}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    claimed_by = [json.loads(process.communicate("go\n", timeout=120)[0]) for process in processes]
    assert sorted(job for mine in claimed_by for job in mine) == ids
    assert store.counts()["done"] == 60


def test_sigkill_in_the_middle_of_writes_loses_nothing_that_was_told(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    told: dict[str, set[int]] = {"added": set(), "done": set(), "ready": set()}
    for round_ in range(3):
        storms = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.queue_storm", str(path), f"owner {round_} {number}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        for count, storm in enumerate(storms):
            assert storm.stdout is not None
            for line in (storm.stdout.readline() for _ in range(20 + 9 * round_ + 5 * count)):
                word, number = line.split()
                told[word].add(int(number))
            storm.send_signal(signal.SIGKILL)
            for line in storm.communicate()[0].splitlines(keepends=True):
                if line.endswith("\n"):
                    word, number = line.split()
                    told[word].add(int(number))
        with closing(sqlite3.connect(path)) as raw:
            assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        with open_store(path) as store:
            worker(store, f"heir {round_}").recover(lambda _job: True)
            assert store.notes == []
            states = {job.id: job.state for job in store.page()}
            assert told["added"] <= set(states)
            assert {states[job] for job in told["done"]} <= {"done"}
            assert store.counts()["running"] == 0
    assert len(told["added"]) > 40
