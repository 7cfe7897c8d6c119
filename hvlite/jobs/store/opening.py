"""How the queue's database is opened: made, migrated with a copy kept, replaced where it is damaged, or refused.

Each process holds a shared lock on `queue.db.lock` while it has the file open, so that whoever must change the file as
a whole knows whether it is alone. What is already sound and of this version is only looked at.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvlite import paths
from hvlite.atomic import explained, free_path, make_folder, sync_folder
from hvlite.errors import Busy, QueueError
from hvlite.jobs.store.database import (
    Clock,
    Database,
    connect,
    connect_to_read,
    explained_sql,
    migrate,
    primary_code,
    sync_file,
)
from hvlite.jobs.store.salvage import replace_damaged, take_salvaged
from hvlite.jobs.store.schema import APPLICATION, MIGRATIONS, Migrations
from hvlite.weights.mounts import unfit_file_system

ALONE_SECONDS = 5.0
# STRICT tables came with it.
OLDEST_SQLITE = (3, 37, 0)
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Damaged(Exception):
    """What was found wrong with the file; never leaves this module."""


def open_database(path: Path | None = None, clock: Clock = time.time, migrations: Migrations = MIGRATIONS) -> Database:
    """The queue's database, made where there is none, migrated where it is old, replaced where it is damaged.

    QueueError for one from a newer hvlite or of another program, which are left as they are; Busy where it would have
    to be changed as a whole while others use it; OutputError where the folder does not do.
    """
    path = path or paths.queue_file()
    _check_place(path)
    with explained(path):
        lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        notes: list[str] = []
        ends = time.monotonic() + ALONE_SECONDS
        while not _takes(lock, fcntl.LOCK_SH) or _needs_work(path, migrations):
            fcntl.flock(lock, fcntl.LOCK_UN)  # two that wait for each other's shared one would never be alone
            if _takes(lock, fcntl.LOCK_EX):
                with explained_sql(path):
                    _work(path, clock, migrations, notes)
            elif time.monotonic() > ends:
                raise Busy(
                    f"{path} has to be made, migrated or repaired, and other hvlite processes have it open: "
                    "stop the worker and the terminal UI, then try again"
                )
            else:  # whoever has it may be making it, and then go on with it
                time.sleep(0.02)
        with explained_sql(path):
            return Database(path, connect(path), lock, clock, notes)
    except BaseException:
        os.close(lock)
        raise


def _check_place(path: Path) -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise QueueError(f"the queue needs SQLite 3.37 or newer; this Python has {sqlite3.sqlite_version}")
    reason = unfit_file_system(path)
    if reason is not None:
        raise QueueError(f"{reason}: the queue would not be safe there. Set HVLITE_HOME to a folder on a local disk")
    make_folder(path.parent)


def _takes(lock: int, kind: int) -> bool:
    """Take or exchange the lock beside the file, if nobody is in the way."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _needs_work(path: Path, migrations: Migrations) -> bool:
    """Whether the file is anything but sound and of this version."""
    if not path.exists():
        return True
    try:
        return _version(path, migrations) != len(migrations)
    except Damaged:
        return True


def _work(path: Path, clock: Clock, migrations: Migrations, notes: list[str]) -> None:
    """Alone with the file: make it sound and of this version. Another process may have done it meanwhile."""
    take_salvaged(path)
    try:
        version = _version(path, migrations) if path.exists() else 0
    except Damaged as fault:
        notes.append(replace_damaged(path, str(fault), clock(), migrations))
        return
    if 0 < version < len(migrations):
        notes.append(_copy_aside(path, version))
    if version < len(migrations):
        connection = connect(path)
        try:
            migrate(connection, migrations)
        finally:
            connection.close()
        sync_folder(path.parent)


def _version(path: Path, migrations: Migrations) -> int:
    """Of a file that is there, read without a change to it: 0 is empty; QueueError if it is not for this hvlite."""
    with explained_sql(path), _looked_at(path) as connection:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        tables = int(connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
        if tables and int(connection.execute("PRAGMA application_id").fetchone()[0]) != APPLICATION:
            raise QueueError(f"{path} is a database of another program: move it away, or set HVLITE_HOME")
        if version > len(migrations):
            raise QueueError(
                f"{path} was made by a newer hvlite (database version {version}, this one knows {len(migrations)}): "
                "update hvlite, or set HVLITE_HOME to another folder. Nothing was changed"
            )
        found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if found != "ok":
        raise Damaged(" ".join(found.replace("*", " ").split()))
    return version


@contextmanager
def _looked_at(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write; Damaged where SQLite finds that the file is."""
    connection = connect_to_read(path)
    try:
        yield connection
    except sqlite3.DatabaseError as error:
        if primary_code(error) in DAMAGED:
            raise Damaged(str(error)) from error
        raise
    finally:
        connection.close()


def _copy_aside(path: Path, version: int) -> str:
    """Keep the old file beside the new one -> what to tell. SQLite copies: a `close` of ours would drop its locks."""
    copy = free_path(path.parent, f"{path.name}.version-{version}", "")
    temporary = copy.with_name(copy.name + ".part")
    temporary.unlink(missing_ok=True)
    source, target = connect(path), sqlite3.connect(temporary)
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
    sync_file(temporary)
    os.rename(temporary, copy)
    sync_folder(path.parent)
    return f"the queue was brought up to date; the old one was kept as {copy}"
