"""The line of queued jobs: integer keys with room between them, so that a move writes only the jobs that move.

What others see of a key is the position that follows from it, counted from 1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvlite.errors import RequestError
from hvlite.jobs.job import Job, Spot
from hvlite.jobs.store.rows import read_job

if TYPE_CHECKING:
    import sqlite3

# 31 moves in a row to one and the same gap use it up; then all keys are spread anew.
GAP = 2**32

QUEUED = "state = 'queued' AND removed IS NULL"


def fetch_job(connection: "sqlite3.Connection", job_id: int) -> Job | None:
    """One job with its position; None if there is none of that number."""
    row = connection.execute("SELECT * FROM job WHERE id = ? AND removed IS NULL", (job_id,)).fetchone()
    if row is None or row["state"] != "queued":
        return None if row is None else read_job(row)
    ahead = connection.execute(
        f"SELECT count(*) FROM job WHERE {QUEUED} AND (sort_key, id) < (?, ?)", (row["sort_key"], job_id)
    ).fetchone()
    return read_job(row, int(ahead[0]) + 1)


def keys_at_end(connection: "sqlite3.Connection", count: int) -> list[int]:
    """Keys for `count` jobs behind everybody, also behind those that an undo may bring back."""
    last = connection.execute("SELECT max(sort_key) FROM job").fetchone()[0]
    found = keys_between(None if last is None else int(last), None, count)
    assert found is not None
    return found


def keys_at_front(connection: "sqlite3.Connection", count: int) -> list[int]:
    """Keys for `count` jobs ahead of everybody, also of those that an undo may bring back."""
    first = connection.execute("SELECT min(sort_key) FROM job").fetchone()[0]
    found = keys_between(None, None if first is None else int(first), count)
    assert found is not None
    return found


def place(connection: "sqlite3.Connection", moved: "Sequence[sqlite3.Row]", spot: Spot) -> dict[int, int]:
    """The new key of each moved row, in line order. Keys of others change only where there is no room left."""
    found = keys_between(*_neighbours(connection, moved, spot), len(moved))
    if found is None:
        _spread(connection)
        moved = [_row(connection, row["id"]) for row in moved]
        found = keys_between(*_neighbours(connection, moved, spot), len(moved))
        assert found is not None, f"{len(moved)} jobs do not fit into a fresh gap"
    return dict(zip((int(row["id"]) for row in sorted(moved, key=_key)), found, strict=True))


def _neighbours(
    connection: "sqlite3.Connection", moved: "Sequence[sqlite3.Row]", spot: Spot
) -> tuple[int | None, int | None]:
    """The keys of the two jobs between which `moved` come to stand; None is an end of the line."""
    line = sorted(map(_key, moved))
    ids = {number for _, number in line}
    if spot.place == "up":  # ahead of the one before the first of them
        ahead = _others(connection, ids, line[0], 2, backwards=True)
        return (_at(ahead, 1), _at(ahead, 0)) if ahead else _neighbours(connection, moved, Spot("top"))
    if spot.place == "down":
        behind = _others(connection, ids, line[-1], 2)
        return (_at(behind, 0), _at(behind, 1)) if behind else _neighbours(connection, moved, Spot("bottom"))
    if spot.place == "top":
        return None, _at(_others(connection, ids, None, 1), 0)
    if spot.place == "bottom":
        return _at(_others(connection, ids, None, 1, backwards=True), 0), None
    anchor = None if spot.anchor in ids else _row(connection, spot.anchor)
    if anchor is None or anchor["state"] != "queued" or anchor["removed"] is not None:
        raise RequestError(f"job {spot.anchor} is not another job in line: name one that is queued and stays")
    if spot.place == "before":
        return _at(_others(connection, ids, _key(anchor), 1, backwards=True), 0), int(anchor["sort_key"])
    return int(anchor["sort_key"]), _at(_others(connection, ids, _key(anchor), 1), 0)


def _key(row: "sqlite3.Row") -> tuple[int, int]:
    """What the line is ordered by."""
    return int(row["sort_key"]), int(row["id"])


def _at(keys: Sequence[int], index: int) -> int | None:
    return keys[index] if index < len(keys) else None


def _row(connection: "sqlite3.Connection", job_id: int | None) -> "sqlite3.Row":
    return connection.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchone()  # type: ignore[no-any-return]


def _others(
    connection: "sqlite3.Connection",
    moved: set[int],
    start: tuple[int, int] | None,
    count: int,
    *,
    backwards: bool = False,
) -> list[int]:
    """The keys of the next `count` jobs that stay where they are, from `start` on or from an end of the line."""
    beyond, order = ("<", "DESC") if backwards else (">", "ASC")
    where = "" if start is None else f"AND (sort_key, id) {beyond} (?, ?)"
    rows = connection.execute(
        f"SELECT id, sort_key FROM job WHERE {QUEUED} {where} ORDER BY sort_key {order}, id {order} LIMIT ?",
        (*(start or ()), count + len(moved)),
    )
    return [int(row["sort_key"]) for row in rows if row["id"] not in moved][:count]


def keys_between(low: int | None, high: int | None, count: int) -> list[int] | None:
    """`count` rising keys between two others, None being no neighbour; None as the answer where there is no room."""
    if high is None:
        start = low or 0
        return [start + GAP * step for step in range(1, count + 1)]
    if low is None:
        return [high - GAP * step for step in range(count, 0, -1)]
    if high - low <= count:
        return None
    return [low + (high - low) * step // (count + 1) for step in range(1, count + 1)]


def _spread(connection: "sqlite3.Connection") -> None:
    """Give every key room again, in one order with those that undo remembers."""
    connection.execute(
        "CREATE TEMP TABLE spread AS "
        "SELECT sort_key AS old, id, row_number() OVER (ORDER BY sort_key, id) AS rank FROM "
        "(SELECT sort_key, id FROM job UNION SELECT sort_key, job FROM change WHERE sort_key IS NOT NULL)"
    )
    for table, number in (("job", "id"), ("change", "job")):
        connection.execute(
            f"UPDATE {table} SET sort_key = spread.rank * {GAP} FROM temp.spread "
            f"WHERE spread.old = {table}.sort_key AND spread.id = {table}.{number}"
        )
    connection.execute("DROP TABLE temp.spread")
