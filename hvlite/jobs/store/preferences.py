"""The settings of the queue, its pause, and the count of equal failures that leads to one."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from hvlite.jobs.job import Settings

if TYPE_CHECKING:
    import sqlite3


def read_settings(connection: "sqlite3.Connection") -> Settings:
    """The stored values over the defaults; where this hvlite cannot take one of them, all are the defaults."""
    try:
        return msgspec.convert(_stored(connection), Settings)
    except msgspec.ValidationError:
        return Settings()


def write_settings(connection: "sqlite3.Connection", **values: Any) -> None:
    """Store values under their names; RequestError if one of them is out of range."""
    replace(read_settings(connection), **values)
    _store(connection, **values)


def pause(connection: "sqlite3.Connection", reason: str | None) -> None:
    """Start nothing more: paused if nothing runs, else draining until that has ended."""
    _store(connection, queue="draining" if _running(connection) else "paused", pause_reason=reason)


def resume(connection: "sqlite3.Connection") -> None:
    """Go on, and count failures anew."""
    _store(connection, queue="active", pause_reason=None, streak=0, streak_reason=None)


def note_ended(connection: "sqlite3.Connection", state: str, reason: object) -> None:
    """A job has left `running`: a drained queue is paused now, and equal failures in a row pause it."""
    settings = read_settings(connection)
    if settings.queue == "draining" and not _running(connection):
        _store(connection, queue="paused")
    if state in ("done", "parked"):
        _store(connection, streak=0, streak_reason=None)
    if state != "failed":
        return
    stored = _stored(connection)
    streak = 1 + (stored.get("streak", 0) if stored.get("streak_reason") == reason else 0)
    _store(connection, streak=streak, streak_reason=reason)
    if streak >= settings.failure_limit and settings.queue == "active":
        pause(connection, f"{streak} failures in a row: {reason}")


def _running(connection: "sqlite3.Connection") -> bool:
    found = connection.execute("SELECT 1 FROM job WHERE state = 'running' AND removed IS NULL LIMIT 1").fetchone()
    return found is not None


def _stored(connection: "sqlite3.Connection") -> dict[str, Any]:
    return {row["name"]: json.loads(row["value"]) for row in connection.execute("SELECT * FROM setting")}


def _store(connection: "sqlite3.Connection", **values: object) -> None:
    sql = "INSERT INTO setting (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    connection.executemany(sql, [(name, json.dumps(value)) for name, value in values.items()])
