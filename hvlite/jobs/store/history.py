"""What users did to the queue, so that it can be undone, also by another process.

An Action notes, for every job that it touches, what the changed columns held before and the revision that it left
behind. Undo takes the last action and puts those columns back, job by job; a job whose revision is another one now (a
worker has it, or somebody changed it since) stays as it is, and the reason is told. Removed jobs stay in the table, out
of sight, for as long as their removal is remembered.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

REMEMBERED = 100


class Action:
    """One deed of a user, within the transaction that does it; one that touches no job is not remembered."""

    def __init__(self, connection: "sqlite3.Connection", kind: str, now: float) -> None:
        self.connection = connection
        self.kind = kind
        self.now = now

    @cached_property
    def id(self) -> int:
        """Its number; with it, the oldest deeds are forgotten and the jobs that only they remembered go."""
        sql = "INSERT INTO action (kind, at) VALUES (?, ?) RETURNING id"
        number = int(self.connection.execute(sql, (self.kind, self.now)).fetchone()["id"])
        self.connection.execute("DELETE FROM action WHERE id <= ?", (number - REMEMBERED,))
        self.connection.execute("DELETE FROM job WHERE removed IS NOT NULL AND removed NOT IN (SELECT id FROM action)")
        return number

    def update(self, row: "sqlite3.Row", values: Mapping[str, object]) -> None:
        """Change columns of a job, and remember what they held."""
        before = {name: row[name] for name in values if name != "sort_key"}
        sort_key = row["sort_key"] if "sort_key" in values else None
        self._note(row["id"], row["revision"] + 1, json.dumps(before), sort_key)
        set_columns(self.connection, row, values)

    def remove(self, row: "sqlite3.Row") -> None:
        """Take a job out of sight."""
        self.update(row, {"removed": self.id})

    def created(self, job_id: int) -> None:
        """Remember that the job was not there before."""
        self._note(job_id, 0, None, None)

    def cannot_undo(self, row: "sqlite3.Row", why: str) -> None:
        """Remember a deed that has left the queue for the world."""
        sql = "INSERT INTO change (action, job, revision, obstacle) VALUES (?, ?, ?, ?)"
        self.connection.execute(sql, (self.id, row["id"], row["revision"], why))

    def _note(self, job_id: int, revision: int, before: str | None, sort_key: int | None) -> None:
        sql = "INSERT INTO change (action, job, revision, before, sort_key) VALUES (?, ?, ?, ?, ?)"
        self.connection.execute(sql, (self.id, job_id, revision, before, sort_key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """What an undo did: the jobs that are as before, and for each other one why it is not."""

    kind: str
    jobs: Sequence[int]
    obstacles: Sequence[str]


def set_columns(connection: "sqlite3.Connection", row: "sqlite3.Row", values: Mapping[str, object]) -> None:
    """Change columns of a job, which gets a new revision. Names come from code, never from outside."""
    names = "".join(f"{name} = ?, " for name in values)
    connection.execute(f"UPDATE job SET {names}revision = revision + 1 WHERE id = ?", (*values.values(), row["id"]))


def undo_last(connection: "sqlite3.Connection") -> Undone | None:
    """Undo the last action and forget it, whether or not it could be; None if there is none."""
    action = connection.execute("SELECT * FROM action ORDER BY id DESC LIMIT 1").fetchone()
    if action is None:
        return None
    jobs, obstacles = [], []
    for change in connection.execute("SELECT * FROM change WHERE action = ? ORDER BY job", (action["id"],)).fetchall():
        row = connection.execute("SELECT * FROM job WHERE id = ?", (change["job"],)).fetchone()
        obstacle = _obstacle(connection, change, row)
        if obstacle is not None:
            obstacles.append(obstacle)
            continue
        jobs.append(int(change["job"]))
        _restore(connection, change)
    connection.execute("DELETE FROM action WHERE id = ?", (action["id"],))
    return Undone(kind=action["kind"], jobs=jobs, obstacles=obstacles)


def _obstacle(connection: "sqlite3.Connection", change: "sqlite3.Row", row: "sqlite3.Row | None") -> str | None:
    """Why this job cannot be put back; None if it can."""
    if change["obstacle"] is not None:
        return str(change["obstacle"])
    if row is None:
        return f"job {change['job']} is gone"
    if row["revision"] != change["revision"]:
        what = "was started or changed since" if row["state"] == "queued" else f"is {row['state']} now"
        return f"job {row['id']} {what}"
    before = json.loads(change["before"] or "{}")
    after = {**dict(row), **before}
    for column in ("output", "latents"):
        if after["removed"] is None and after[column] is not None and (other := name_taken(connection, column, after)):
            return f"job {row['id']} would write {after[column]}, which is job {other}'s now"
    return None


def name_taken(connection: "sqlite3.Connection", column: str, values: Mapping[str, object]) -> int | None:
    """The job that may still write the file that `values` (with their `id`) name, if there is another one."""
    if values.get("state", "queued") not in ("queued", "running", "parked"):
        return None
    found = connection.execute(
        f"SELECT id FROM job WHERE {column} = ? AND id IS NOT ? AND removed IS NULL "
        "AND state IN ('queued', 'running', 'parked')",
        (values[column], values.get("id")),
    ).fetchone()
    return None if found is None else int(found["id"])


def _restore(connection: "sqlite3.Connection", change: "sqlite3.Row") -> None:
    if change["before"] is None:
        connection.execute("DELETE FROM job WHERE id = ?", (change["job"],))
        return
    values = json.loads(change["before"])
    if change["sort_key"] is not None:
        values["sort_key"] = change["sort_key"]
    names = "".join(f"{name} = ?, " for name in values)
    # The revision goes back too, so that the action before this one can be undone next.
    sql = f"UPDATE job SET {names}revision = revision - 1 WHERE id = ?"
    connection.execute(sql, (*values.values(), change["job"]))
