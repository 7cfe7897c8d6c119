"""A damaged queue database is set aside, never deleted, and what can still be read of it starts the new one.

Whoever calls this is alone with the file. A kill at any point leaves the damaged file, the finished new one, or both.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from hvlite.atomic import free_path, sync_folder
from hvlite.jobs.store.database import connect, connect_to_read, migrate, sync_file
from hvlite.jobs.store.schema import Migrations

SIDES = ("-wal", "-shm")
# Rows are asked for one by one up to this number where not even the last one can be found.
MOST_GUESSED = 20_000


def replace_damaged(path: Path, fault: str, now: float, migrations: Migrations) -> str:
    """Put a new database in the place of the damaged one -> what to tell of it."""
    temporary = path.with_name(path.name + ".salvage.part")
    for leftover in (temporary, *(_side(temporary, side) for side in SIDES)):
        leftover.unlink(missing_ok=True)
    jobs = _salvage(path, temporary, migrations)
    sync_file(temporary)
    os.rename(temporary, _salvaged(path))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    aside = free_path(path.parent, f"{path.name}.damaged-{stamp}", "")
    os.rename(path, aside)
    _set_sides_aside(path, aside)
    take_salvaged(path)
    return (
        f"the queue's database was damaged ({fault}); it was set aside as {aside}, and {jobs} jobs were saved from it"
    )


def take_salvaged(path: Path) -> None:
    """Finish a replacement that was cut off before its last rename."""
    if not path.exists() and _salvaged(path).exists():
        # SQLite would take a log that lies beside the new file for that file's own.
        _set_sides_aside(path, free_path(path.parent, f"{path.name}.damaged", ""))
        os.rename(_salvaged(path), path)
        sync_folder(path.parent)


def _set_sides_aside(path: Path, aside: Path) -> None:
    for side in SIDES:
        with suppress(FileNotFoundError):
            os.rename(_side(path, side), _side(aside, side))


def _salvaged(path: Path) -> Path:
    return path.with_name(path.name + ".salvaged")


def _side(path: Path, side: str) -> Path:
    return path.with_name(path.name + side)


def _salvage(path: Path, target: Path, migrations: Migrations) -> int:
    """Write every row that is still whole to a new database -> how many jobs."""
    new = connect(target)
    with closing(new):
        migrate(new, migrations)
        new.execute("BEGIN IMMEDIATE")
        jobs = _insert(new, "job", _readable_jobs(path))
        _insert(new, "setting", _readable_settings(path))
        new.execute("COMMIT")
        new.execute("PRAGMA journal_mode = DELETE")  # one file, without sides that a rename would leave behind
    return jobs


def _insert(new: sqlite3.Connection, table: str, rows: Iterable[sqlite3.Row]) -> int:
    """How many rows the new table takes; columns that it does not know are left out."""
    known = {column[1] for column in new.execute(f"PRAGMA table_info({table})")}
    taken = 0
    for row in rows:
        names = [name for name in row.keys() if name in known]  # noqa: SIM118  # a Row iterates over its values
        marks = ", ".join("?" * len(names))
        with suppress(sqlite3.Error):
            new.execute(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", [row[name] for name in names])
            taken += 1
    return taken


def _readable_jobs(path: Path) -> Iterator[sqlite3.Row]:
    """Each row that SQLite can still find by its number; a damaged page costs the rows on it."""
    with suppress(sqlite3.Error), closing(_opened_as_it_is(path)) as old:
        for number in range(1, _last_job(old) + 1):
            with suppress(sqlite3.Error):
                yield from old.execute("SELECT * FROM job WHERE id = ? AND removed IS NULL", (number,)).fetchall()


def _readable_settings(path: Path) -> list[sqlite3.Row]:
    with suppress(sqlite3.Error), closing(_opened_as_it_is(path)) as old:
        return old.execute("SELECT * FROM setting").fetchall()
    return []


def _last_job(old: sqlite3.Connection) -> int:
    for question in ("SELECT max(id) FROM job", "SELECT seq FROM sqlite_sequence WHERE name = 'job'"):
        with suppress(sqlite3.Error):
            found = old.execute(question).fetchone()
            if found and found[0]:
                return int(found[0])
    return MOST_GUESSED


def _opened_as_it_is(path: Path) -> sqlite3.Connection:
    connection = connect_to_read(path)
    connection.execute("PRAGMA writable_schema = ON")  # else SQLite reads nothing at all of a file that was cut short
    return connection
