"""The queue as its users see it: jobs are listed, added, moved, edited and taken back.

Every method that changes something is one transaction, on disk when it returns. Jobs are named by number and looked at
first: where one of them does not allow the action, nothing is changed and the error names each that does not.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hvlite.errors import RequestError
from hvlite.jobs.job import STATES, Job, NewJob, Settings, Spot, State, refusal
from hvlite.jobs.store import preferences
from hvlite.jobs.store.claims import Claims
from hvlite.jobs.store.database import Clock, Database
from hvlite.jobs.store.history import Action, Undone, name_taken, undo_last
from hvlite.jobs.store.listing import page, search
from hvlite.jobs.store.opening import open_database
from hvlite.jobs.store.ordering import QUEUED, fetch_job, keys_at_end, keys_at_front, place
from hvlite.jobs.store.rows import new_row, read_job

if TYPE_CHECKING:
    import sqlite3

Change = Callable[[NewJob], NewJob]

# What a job forgets when it is to run as if for the first time, but for its checkpoint.
FORGIVEN: Mapping[str, object] = {
    "state": "queued",
    "reason": None,
    "error": None,
    "crashes": 0,
    "lost": 0,
    "progress": None,
}
AT_START: Mapping[str, object] = {"checkpoint": None, "checkpoint_step": None, "best_step": 0}


class Store:
    """An open queue. `notes` is what its user should be told: a migration, a repair."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.notes = database.notes

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.database.close()

    def claims(self, owner: str, lock: str, serves: Collection[str | None]) -> Claims:
        """The worker's side of this queue, over the same connection."""
        return Claims(self.database, owner, lock, serves)

    # Looking.

    def job(self, job_id: int) -> Job:
        """One job; RequestError if there is none of that number."""
        with self.database.reading() as connection:
            job = fetch_job(connection, job_id)
        if job is None:
            raise RequestError(_missing(job_id))
        return job

    def page(self, states: Sequence[State] = STATES, *, limit: int | None = None, offset: int = 0) -> list[Job]:
        """Jobs, state after state: queued ones in line order, ended ones from the last that ended."""
        jobs: list[Job] = []
        with self.database.reading() as connection:
            counts = _counts(connection)
            for state in states:
                wanted = -1 if limit is None else limit - len(jobs)
                jobs += page(connection, state, wanted, offset)
                offset = max(0, offset - counts[state])
        return jobs

    def search(
        self, states: Sequence[State], words: str, *, limit: int = 0, offset: int = 0
    ) -> tuple[list[int], list[Job]]:
        """Every job that has all the words, in the order of `page`; `limit` of them, from `offset` on, are read."""
        with self.database.reading() as connection:
            found = [each for state in states for each in search(connection, state, words)]
            return [job for job, _ in found], [
                read_job(connection.execute("SELECT * FROM job WHERE id = ?", (job,)).fetchone(), position)
                for job, position in found[offset : offset + limit]
            ]

    def counts(self) -> dict[State, int]:
        """How many jobs of each state there are."""
        with self.database.reading() as connection:
            return _counts(connection)

    def numbers(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """The jobs in inclusive ranges, each once; RequestError where a range, or a single number, has none."""
        found: dict[int, None] = {}
        with self.database.reading() as connection:
            for first, last in ranges:
                sql = "SELECT id FROM job WHERE id BETWEEN ? AND ? AND removed IS NULL ORDER BY id"
                jobs = [int(row["id"]) for row in connection.execute(sql, (first, last))]
                if not jobs:
                    raise RequestError(_missing(first) if first == last else f"there are no jobs {first} to {last}")
                found.update(dict.fromkeys(jobs))
        return list(found)

    def settings(self) -> Settings:
        with self.database.reading() as connection:
            return preferences.read_settings(connection)

    def data_version(self) -> int:
        """A number that changes when another process has changed the queue; asking costs next to nothing."""
        return self.database.data_version()

    def checkpoints(self) -> set[Path]:
        """Every checkpoint that a job, or an undo, may still need."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT checkpoint FROM job UNION SELECT json_extract(before, '$.checkpoint') FROM change"
            )
            return {Path(row["checkpoint"]) for row in rows if row["checkpoint"] is not None}

    # Acting.

    def add(self, new: Sequence[NewJob], *, first: bool = False, kind: str = "add") -> list[int]:
        """Queue jobs, in this order, at the end of the line or at its head -> their numbers."""
        with self._acting(kind) as action:
            return self._insert(action, new, first)

    def duplicate(self, ids: Sequence[int], change: Change = lambda new: new, *, first: bool = False) -> list[int]:
        """Queue the same again, changed by `change`, under free file names -> the new jobs."""
        with self._acting("dup") as action:
            originals = [_as_new(row) for row in _rows(action.connection, ids)]
            return self._insert(action, [change(new) for new in originals], first)

    def edit(self, ids: Sequence[int], change: Change) -> None:
        """Change what is asked for; what was computed of another clip is dropped.

        Steps of the same clip stay, whatever it is to be made with now: the worker refuses those of other weights.
        """
        with self._acting("edit") as action:
            for row in _rows(action.connection, ids, "edit"):
                old = _as_new(row, with_files=True)
                new = change(old)
                values = new_row(new)
                if new.request != old.request:
                    values |= AT_START
                if (new.request, new.how) != (old.request, old.how):
                    values |= {"crashes": 0, "lost": 0, "resolved": None, "predicted_bytes": None}
                elif not (row["named"] or values["named"]) and values["folder"] == row["folder"]:
                    values["output"] = row["output"]  # reserved when the job first ran
                _check_names(action.connection, values, row)
                action.update(row, values)

    def move(self, ids: Sequence[int], spot: Spot) -> None:
        """Move queued jobs, together and in their line order."""
        with self._acting("mv") as action:
            for job_id, key in place(action.connection, _rows(action.connection, ids, "mv"), spot).items():
                # read again: where the line was full, its keys are others now
                row = action.connection.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchone()
                action.update(row, {"sort_key": key})

    def remove(self, ids: Sequence[int]) -> None:
        """Take jobs off the list; their files stay."""
        with self._acting("rm") as action:
            for row in _rows(action.connection, ids, "rm"):
                action.remove(row)

    def clear(self) -> int:
        """Remove every queued job, and no other -> how many."""
        with self._acting("clear") as action:
            rows = action.connection.execute(f"SELECT * FROM job WHERE {QUEUED}").fetchall()
            for row in rows:
                action.remove(row)
            return len(rows)

    def cancel(self, ids: Sequence[int]) -> list[int]:
        """Cancel waiting jobs at once and ask the worker to stop running ones -> those that still run."""
        running = []
        with self._acting("cancel") as action:
            now = self.database.clock()
            for row in _rows(action.connection, ids, "cancel"):
                if row["state"] == "running":
                    running.append(int(row["id"]))
                    action.connection.execute("UPDATE job SET asked = 'cancel' WHERE id = ?", (row["id"],))
                    action.cannot_undo(row, f"job {row['id']} was running: hvlite queue retry {row['id']}")
                else:
                    action.update(row, {"state": "cancelled", "reason": "cancelled by user", "finished": now})
        return running

    def retry(self, ids: Sequence[int], *, first: bool = False, anew: bool = False) -> None:
        """Queue failed and cancelled jobs again, with their counts forgiven; `anew` forgets the checkpoint too."""
        with self._acting("retry") as action:
            self._requeue(action, _rows(action.connection, ids, "retry"), AT_START if anew else {}, first)

    def finish(self, ids: Sequence[int], *, first: bool = False) -> None:
        """Have drafts go to their end: parked ones are queued again, those that still wait keep their place."""
        whole: Mapping[str, object] = {"stop_after": None}
        with self._acting("finish") as action:
            rows = _rows(action.connection, ids, "finish")
            moved = [row for row in rows if first or row["state"] == "parked"]
            self._requeue(action, moved, whole, first)
            for row in rows:
                if row not in moved:
                    action.update(row, whole)

    def undo(self) -> Undone:
        """Take back the last action of any user, job by job; RequestError if nothing is remembered."""
        with self.database.writing() as connection:
            undone = undo_last(connection)
        if undone is None:
            raise RequestError("there is nothing to undo")
        return undone

    def pause(self, *, now: bool = False, reason: str | None = None) -> Settings:
        """Start no more jobs; `now` also asks the worker to give running ones back with their checkpoints."""
        with self.database.writing() as connection:
            preferences.pause(connection, reason)
            if now:
                connection.execute("UPDATE job SET asked = 'pause' WHERE state = 'running' AND asked IS NULL")
            return preferences.read_settings(connection)

    def resume(self) -> None:
        """Go on; a worker that was asked to pause and has not yet is asked no more."""
        with self.database.writing() as connection:
            preferences.resume(connection)
            connection.execute("UPDATE job SET asked = NULL WHERE state = 'running' AND asked = 'pause'")

    def change_settings(self, **values: Any) -> Settings:
        """Store limits and `on_done`; RequestError if one of them is out of range."""
        with self.database.writing() as connection:
            preferences.write_settings(connection, **values)
            return preferences.read_settings(connection)

    @contextmanager
    def _acting(self, kind: str) -> Iterator[Action]:
        with self.database.writing() as connection:
            yield Action(connection, kind, self.database.clock())

    def _insert(self, action: Action, new: Sequence[NewJob], first: bool) -> list[int]:
        keys = (keys_at_front if first else keys_at_end)(action.connection, len(new))
        ids = []
        for job, key in zip(new, keys, strict=True):
            values = {**new_row(job), "state": "queued", "sort_key": key, "created": self.database.clock()}
            _check_names(action.connection, values)
            marks = ", ".join("?" * len(values))
            sql = f"INSERT INTO job ({', '.join(values)}) VALUES ({marks}) RETURNING id"
            job_id = int(action.connection.execute(sql, tuple(values.values())).fetchone()["id"])
            action.created(job_id)
            ids.append(job_id)
        return ids

    def _requeue(
        self, action: Action, rows: "Sequence[sqlite3.Row]", values: Mapping[str, object], first: bool
    ) -> None:
        keys = (keys_at_front if first else keys_at_end)(action.connection, len(rows))
        for row, key in zip(rows, keys, strict=True):
            again = {**FORGIVEN, **values, "sort_key": key, "finished": None}
            if not row["named"]:
                again["output"] = None  # chosen anew: another job or program may have taken it meanwhile
            _check_names(action.connection, {**dict(row), **again}, row)
            action.update(row, again)


def open_store(path: Path | None = None, clock: Clock = time.time) -> Store:
    """The queue of this HVLITE_HOME, or of `path`; see `opening.open_database` for what is refused."""
    return Store(open_database(path, clock))


def _missing(job_id: int) -> str:
    return f"there is no job {job_id}; hvlite queue ls --all shows all"


def _rows(connection: "sqlite3.Connection", ids: Sequence[int], action: str | None = None) -> "list[sqlite3.Row]":
    """The rows of these jobs, all of which allow `action`; RequestError names every one that does not."""
    if not ids:
        raise RequestError("no job was named")
    rows, refusals = [], []
    for job_id in dict.fromkeys(ids):
        row = connection.execute("SELECT * FROM job WHERE id = ? AND removed IS NULL", (job_id,)).fetchone()
        reason = _missing(job_id) if row is None else action and _refusal(action, row)
        if reason:
            refusals.append(reason)
        rows.append(row)
    if refusals:
        raise RequestError("; ".join(refusals))
    return rows


def _refusal(action: str, row: "sqlite3.Row") -> str | None:
    return refusal(action, row["id"], row["state"], is_draft=row["stop_after"] is not None)


def _as_new(row: "sqlite3.Row", *, with_files: bool = False) -> NewJob:
    """What was once asked for; without the files that the user named, which only one job can write."""
    job = read_job(row)
    if job.request is None or job.how is None or job.folder is None:
        raise RequestError(f"job {job.id} cannot be read: {job.error}")
    named = with_files and row["named"]
    return NewJob(
        request=job.request,
        how=job.how,
        folder=job.folder,
        output=job.output if named else None,
        latents=job.latents if with_files else None,
        stop_after=job.stop_after,
    )


def _check_names(
    connection: "sqlite3.Connection", values: Mapping[str, object], row: "sqlite3.Row | None" = None
) -> None:
    """RequestError where a file that `values` name is another job's."""
    for column in ("output", "latents"):
        mine = {column: values[column], "id": None if row is None else row["id"]}
        other = None if values[column] is None else name_taken(connection, column, mine)
        if other is not None:
            raise RequestError(f"{values[column]} is what job {other} will write; choose another name")


def _counts(connection: "sqlite3.Connection") -> dict[State, int]:
    found = dict.fromkeys(STATES, 0)
    for row in connection.execute("SELECT state, count(*) AS jobs FROM job WHERE removed IS NULL GROUP BY state"):
        found[row["state"]] = int(row["jobs"])
    return found
