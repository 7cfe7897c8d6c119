"""Jobs as they are listed: queued ones in line order, ended ones from the last that ended; a filter keeps some of them.

A search reads no whole row: SQLite picks the few values that are looked at, so that thousands of jobs take a moment.
"""

from typing import TYPE_CHECKING

from hvlite.jobs.job import ENDED, Job, State
from hvlite.jobs.store.rows import read_job

if TYPE_CHECKING:
    import sqlite3

# The words of the terminal UI's columns; of a row whose JSON is broken, all of it. A NULL drops what it is joined to.
_SEARCHED = """
SELECT id, place, '#' || id || ' ' || state
    || coalesce(' ' || json_extract(request, '$.prompt'), '')
    || ' ' || coalesce(
        json_extract(request, '$.size[0]') || 'x' || json_extract(request, '$.size[1]'),
        json_extract(resolved, '$.size[0]') || 'x' || json_extract(resolved, '$.size[1]'), 'default')
    || coalesce('x' || json_extract(request, '$.frames'), 'x' || json_extract(resolved, '$.frames'), '')
    || coalesce(' seed' || json_extract(request, '$.seed'), '')
    || ' ' || coalesce(json_extract(how, '$.profile'), 'auto')
    || coalesce(' ' || json_extract(how, '$.model'), '')
    || iif(stop_after IS NULL, '', ' draft') AS words
FROM (
    SELECT id, state, stop_after, row_number() OVER (ORDER BY {order}) AS place,
        iif(json_valid(request), request, json_object('prompt', request)) AS request,
        iif(json_valid(how), how, '{{}}') AS how,
        iif(json_valid(resolved), resolved, '{{}}') AS resolved
    FROM job WHERE state = ? AND removed IS NULL
) ORDER BY place
"""


def page(connection: "sqlite3.Connection", state: State, limit: int, offset: int) -> list[Job]:
    """Some jobs of one state; all for a limit of -1."""
    rows = connection.execute(
        f"SELECT * FROM job WHERE state = ? AND removed IS NULL ORDER BY {_order(state)} LIMIT ? OFFSET ?",
        (state, limit, offset),
    )
    return [read_job(row, _position(state, offset + index + 1)) for index, row in enumerate(rows)]


def search(connection: "sqlite3.Connection", state: State, words: str) -> list[tuple[int, int | None]]:
    """The jobs of one state that have all the words, whatever their case: numbers and positions in line."""
    needles = words.lower().split()
    rows = connection.execute(_SEARCHED.format(order=_order(state)), (state,))
    return [
        (int(job), _position(state, int(place)))
        for job, place, text in rows
        if all(needle in text.lower() for needle in needles)
    ]


def _order(state: State) -> str:
    return "finished DESC, id DESC" if state in ENDED else "sort_key, id"


def _position(state: State, place: int) -> int | None:
    return place if state == "queued" else None
