"""What a worker's supervisor does to jobs: claim one, report, checkpoint, end it, give it back, take over from others.

A claim belongs to an `owner`, a word that names one run of one supervisor (host, process id, time of start), and is
made under the name of the device lock that the owner holds. Every later call must come from the same owner while the
job runs; otherwise the claim has been taken away, and ClaimLost says so. `report` is the sign of life and brings back
what users ask of the job. Whether an owner is alive is the caller's to judge: by the lock, which the kernel frees, and
by `beats`, which count up and do not depend on a clock that may jump.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from importlib.metadata import version
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvlite import paths
from hvlite.atomic import candidates
from hvlite.errors import QueueError
from hvlite.jobs.job import (
    UNREADABLE,
    Ask,
    Job,
    Outcome,
    Progress,
    Verdict,
    after_crash,
    after_loss,
    may_change,
)
from hvlite.jobs.store.database import Database
from hvlite.jobs.store.history import name_taken, set_columns
from hvlite.jobs.store.ordering import QUEUED, fetch_job, keys_at_front
from hvlite.jobs.store.preferences import note_ended, read_settings
from hvlite.jobs.store.rows import encoded, read_job, text_of
from hvlite.request import ResolvedRequest

if TYPE_CHECKING:
    import sqlite3

IN_LINE = f"SELECT * FROM job WHERE {QUEUED} ORDER BY sort_key, id"
NOT_CLAIMED: Mapping[str, object] = {"owner": None, "lock": None, "asked": None}


class ClaimLost(QueueError):
    """The job is no longer this owner's: somebody took it for dead, or ended it."""


class Claims:
    """The claims of one owner. `serves` holds the values of `--device` that it renders, None for "any"."""

    def __init__(self, database: Database, owner: str, lock: str, serves: Collection[str | None]) -> None:
        self.database = database
        self.owner = owner
        self.lock = lock
        self.serves = serves

    def claim(self) -> Job | None:
        """The first job in line for this device, now running; None if there is none or the queue is paused.

        Rows on the way that cannot be read are marked failed, so that they do not block the line.
        """
        with self.database.writing() as connection:
            if read_settings(connection).queue != "active":
                return None
            now = self.database.clock()
            unreadable, chosen = self._first_in_line(connection)
            for row in unreadable:
                error = read_job(row).error
                failed = {"state": "failed", "reason": UNREADABLE, "error": error, "finished": now}
                set_columns(connection, row, failed)
            if chosen is None:
                return None
            self._take(connection, chosen, now)
            return _read(connection, chosen["id"])

    def _first_in_line(self, connection: "sqlite3.Connection") -> "tuple[list[sqlite3.Row], sqlite3.Row | None]":
        unreadable = []
        for row in connection.execute(IN_LINE):
            job = read_job(row)
            if job.how is None:
                unreadable.append(row)
            elif job.how.device in self.serves:
                return unreadable, row
        return unreadable, None

    def _take(self, connection: "sqlite3.Connection", row: "sqlite3.Row", now: float) -> None:
        values: dict[str, object] = {
            "state": "running",
            "owner": self.owner,
            "lock": self.lock,
            "heartbeat": now,
            "beats": 0,
            "asked": None,
            "attempts": row["attempts"] + 1,
            "progressed": 0,
            "progress": None,
            "started": now,
        }
        set_columns(connection, row, values)

    def next_alike(self, job: Job, limit: int) -> list[Job]:
        """Queued jobs that follow and need the same models in the same form: their prompts can be encoded together."""
        found: list[Job] = []
        with self.database.reading() as connection:
            for row in connection.execute(IN_LINE):
                if len(found) == limit:
                    break
                other = read_job(row)
                if other.how == job.how and other.request is not None:
                    found.append(other)
        return found

    def report(self, job_id: int, progress: Progress | None = None) -> Ask | None:
        """A sign of life, with how far the job is; returns what its users ask for. Raises ClaimLost."""
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            connection.execute(
                "UPDATE job SET heartbeat = ?, beats = beats + 1, progress = coalesce(?, progress) WHERE id = ?",
                (self.database.clock(), None if progress is None else encoded(progress), job_id),
            )
            asked: Ask | None = row["asked"]
            return asked

    def record_plan(self, job_id: int, resolved: ResolvedRequest, predicted_bytes: int | None) -> None:
        """What the Request means for this model, and the memory that the plan predicts."""
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            set_columns(connection, row, {"resolved": encoded(resolved), "predicted_bytes": predicted_bytes})

    def reserve_output(self, job_id: int, suffix: str) -> Path:
        """The file that the job will write, the same one at every claim: the user's, else a free name in its folder.

        Reserved in the database, under a unique index: a reservation made by creating the file would lie there for
        hours as an empty clip. Against other programs `atomic.new_file` guards when the clip is published. A file that
        is there under a name reserved earlier was written by an earlier claim of this job.
        """
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            if row["output"] is not None:
                return Path(row["output"])
            job = read_job(row)
            assert job.request is not None
            assert job.folder is not None
            stem = paths.job_stem(job.id, job.request.prompt, job.request.seed, job.created)
            for path in candidates(job.folder / (stem + suffix)):
                if not lexists(path) and name_taken(connection, "output", {"output": str(path), "id": job_id}) is None:
                    set_columns(connection, row, {"output": str(path)})
                    return path
        raise AssertionError("the candidates never end")

    def save_checkpoint(self, job_id: int, path: Path, step: int) -> None:
        """A checkpoint of `step` finished steps is complete on disk. A new furthest one forgives all deaths so far."""
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            values: dict[str, object] = {"checkpoint": str(path), "checkpoint_step": step}
            if step > row["best_step"]:
                values |= {"best_step": step, "progressed": 1, "crashes": 0, "lost": 0}
            set_columns(connection, row, values)

    def drop_checkpoint(self, job_id: int) -> None:
        """The checkpoint does not fit or is broken: begin anew. `best_step` stays, so that this ends some day."""
        with self.database.writing() as connection:
            set_columns(connection, self._mine(connection, job_id), {"checkpoint": None, "checkpoint_step": None})

    def end(self, job_id: int, outcome: Outcome) -> Job:
        """The job is done, failed, cancelled or parked. So many failures in a row with one reason pause the queue."""
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            values: dict[str, Any] = {**asdict(outcome), "finished": self.database.clock()}
            values["timings"] = encoded(outcome.timings)
            values["log"] = text_of(outcome.log)
            if outcome.state == "done":
                values |= {"checkpoint": None, "checkpoint_step": None}
            self._end(connection, row, values)
            return _read(connection, job_id)

    def give_back(self, job_id: int) -> Job:
        """Back to the head of the line, with its checkpoint: paused, or to be tried with another plan.

        Where its user has cancelled it meanwhile, that is what it is.
        """
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            values: dict[str, object] = {"state": "queued", "sort_key": keys_at_front(connection, 1)[0]}
            if row["asked"] == "cancel":
                values = {"state": "cancelled", "reason": "cancelled by user", "finished": self.database.clock()}
            self._end(connection, row, values)
            return _read(connection, job_id)

    def crashed(self, job_id: int, what: str, error: str | None = None) -> Job:
        """The worker `died` or `hung`, seen by this living supervisor: the job is queued again, or quarantined.

        `error` is what the worker itself last said of it.
        """
        with self.database.writing() as connection:
            row = self._mine(connection, job_id)
            self._judge(connection, row, after_crash(read_job(row), read_settings(connection), what, error))
            return _read(connection, job_id)

    def recover(self, is_dead: Callable[[Job], bool]) -> list[Job]:
        """Take running jobs from owners that `is_dead` knows to be gone -> those jobs as they are now.

        Whoever holds a device's lock may be sure that all claims under its name but their own are dead.
        """
        with self.database.writing() as connection:
            rows = connection.execute(
                "SELECT * FROM job WHERE state = 'running' AND removed IS NULL ORDER BY started DESC, id DESC"
            ).fetchall()
            dead = [row for row in rows if row["owner"] != self.owner and is_dead(read_job(row))]
            for row in dead:  # the last one first: each goes to the head of the line
                self._judge(connection, row, after_loss(read_job(row), read_settings(connection)))
            return [_read(connection, row["id"]) for row in dead]

    def _judge(self, connection: "sqlite3.Connection", row: "sqlite3.Row", verdict: Verdict) -> None:
        values: dict[str, object] = {**asdict(verdict), "log": str(paths.job_log(row["id"]))}
        values["version"] = version("hvlite")
        if verdict.state == "queued":
            values["sort_key"] = keys_at_front(connection, 1)[0]
        else:
            values["finished"] = self.database.clock()
        self._end(connection, row, values)

    def _end(self, connection: "sqlite3.Connection", row: "sqlite3.Row", values: Mapping[str, object]) -> None:
        """Every way in which a claim ends goes through here."""
        assert may_change(row["state"], values["state"]), (row["state"], values)  # type: ignore[arg-type]
        set_columns(connection, row, {**NOT_CLAIMED, **values})
        note_ended(connection, str(values["state"]), values.get("reason"))

    def _mine(self, connection: "sqlite3.Connection", job_id: int) -> "sqlite3.Row":
        row = connection.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchone()
        if row is None or row["state"] != "running" or row["owner"] != self.owner:
            state = "gone" if row is None else f"{row['state']}, claimed by {row['owner'] or 'nobody'}"
            raise ClaimLost(f"job {job_id} is not this worker's any more: it is {state}")
        return row  # type: ignore[no-any-return]


def _read(connection: "sqlite3.Connection", job_id: int) -> Job:
    job = fetch_job(connection, job_id)
    assert job is not None
    return job
