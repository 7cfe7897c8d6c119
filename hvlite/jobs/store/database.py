"""The queue's database: read and changed in transactions, every error of SQLite as one that a user can act on.

SQLite in WAL mode, every commit synced. Several processes use one file. A connection belongs to the thread that opened
it and does not survive a fork. Only this package knows sqlite3 and SQL.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvlite.errors import Busy, OutputError, QueueError
from hvlite.jobs.store.schema import APPLICATION, Migrations

Clock = Callable[[], float]

BUSY_SECONDS = 10.0


class Database:
    """An open queue database. `notes` is what its user should be told of the opening."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int, clock: Clock, notes: list[str]) -> None:
        self.path = path
        self.connection = connection
        self.lock = lock
        self.clock = clock
        self.notes = notes

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Several queries that see one state."""
        with explained_sql(self.path):
            self.connection.execute("BEGIN")
            try:
                yield self.connection
            finally:
                if self.connection.in_transaction:  # SQLite ends it by itself after some errors
                    self.connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One change, alone; on disk when the block has ended, undone where it raises."""
        with explained_sql(self.path):
            # IMMEDIATE: a transaction that begins by reading would be refused, not made to wait, when it writes.
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
                raise

    def data_version(self) -> int:
        """A number that changes when another connection has changed the file; costs next to nothing."""
        with explained_sql(self.path):
            return int(self.connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        self.connection.close()
        os.close(self.lock)


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.text_factory = lambda text: text.decode("utf-8", "backslashreplace")  # a flipped bit costs one row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "journal_size_limit = 8388608"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing, for a file that may be damaged or of another program."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
    connection.row_factory = sqlite3.Row
    return connection


def migrate(connection: sqlite3.Connection, migrations: Migrations) -> None:
    """Every step that the file has not seen, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        for statements in migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's own code without its extension; 0 for errors that Python raised."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


@contextmanager
def explained_sql(path: Path) -> Iterator[None]:
    """What SQLite says, as an error that a user can act on."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, path) from error


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    match primary_code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Busy(f"{path} was busy for {BUSY_SECONDS:g} seconds: another hvlite process is writing; try again")
        case sqlite3.SQLITE_FULL:
            return OutputError(f"{path} cannot grow: the disk is full. Make room; the queue is as it was before")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return OutputError(f"{path} cannot be written ({error}): look at its rights, or set HVLITE_HOME")
        case sqlite3.SQLITE_IOERR:
            return OutputError(f"{path}: the disk does not read or write ({error}); look at the system's log")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return QueueError(
                f"{path} is damaged ({error}): stop the worker and the terminal UI; the next command sets it aside and "
                "saves what can be read"
            )
        case _:
            return error
