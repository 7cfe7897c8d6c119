"""The queue as the screens see it: one connection on a thread of its own, and one look at it at a time.

A screen says what it wants to see (`Wanted`) and gets a `View`; a look where nothing has changed costs next to nothing.
What a user does is a function of the store, done on the same thread in the order of the keys.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hvlite.errors import HvliteError, QueueError, RequestError
from hvlite.jobs.job import ENDED, OPEN, Job, Settings, State
from hvlite.jobs.store import Store, open_store

T = TypeVar("T")

ALL: tuple[State, ...] = OPEN + ENDED
# Rows that one look reads for a table: more than any screen shows, so that a key press finds its row there.
PAGE = 150
# Waiting jobs that the forecast looks at, and done ones that it learns from.
FORECAST = 300
# So old a forecast may be: the clock goes on where nothing happens.
FORECAST_SECONDS = 15
LEARN_FROM = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The rows around the cursor of a list of jobs in these states; `follow` is the job under the cursor.

    `marked` are jobs of which is asked whether they are still there.
    """

    states: tuple[State, ...] = ALL
    start: int = 0
    words: str = ""
    follow: int | None = None
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One look. `jobs` are rows `start`, `start` + 1, ... of `total`; `followed` is the row of the followed job."""

    wanted: Wanted
    at: float
    counts: Mapping[State, int]
    settings: Settings
    running: Sequence[Job]
    total: int = 0
    start: int = 0
    jobs: Sequence[Job] = ()
    followed: int | None = None
    gone: frozenset[int] = frozenset()
    ends: Mapping[int, float | None] = field(default_factory=dict)
    end: float | None = None
    """When the queue is done; where it is longer than the forecast looks, not before then."""


class Desk:
    """Opens the queue at the first call, and again after a failure."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.notes: list[str] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="queue")
        self._store: Store | None = None
        self._view: View | None = None
        self._state: tuple[object, ...] = ()
        self._deeds = 0

    async def call(self, deed: Callable[[Store], T]) -> T:
        """`deed` on the queue's thread, behind those that were asked for earlier."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._do, deed)

    async def look(self, wanted: Wanted) -> View | None:
        """What is there now; None if it is what the last look saw."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._look, wanted)

    def forget(self) -> None:
        """The next look answers in any case."""
        self._view = None

    def close(self) -> None:
        self._pool.submit(self._close)
        self._pool.shutdown(wait=False)

    def _do(self, deed: Callable[[Store], T]) -> T:
        self._deeds += 1
        return deed(self._opened())

    def _look(self, wanted: Wanted) -> View | None:
        try:
            return self._looked(wanted)
        except QueueError:
            self._close()  # it is damaged: the next opening sets it aside, for which it must be nobody's
            raise

    def _looked(self, wanted: Wanted) -> View | None:
        store = self._opened()
        state = (store.data_version(), self._deeds, int(self.clock() / FORECAST_SECONDS))
        before = self._view if state == self._state else None
        if before is not None and before.wanted == wanted:
            return None
        self._view, self._state = look(store, wanted, self.clock(), before), state
        return self._view

    def _opened(self) -> Store:
        if self._store is None:
            self._store = open_store(clock=self.clock)
            self.notes = list(self._store.notes)
        return self._store

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def view_now(seen: View | None) -> View | None:
    """The totals as they are by now, for a window that has closed; what was `seen` last where they cannot be read."""
    with suppress(HvliteError):
        if seen is not None:
            with open_store() as store:
                return look(store, Wanted(states=()), seen.at)
    return seen


def look(store: Store, wanted: Wanted, now: float, before: View | None = None) -> View:
    """Read what is wanted. `before` is a view of the same jobs through another window, whose totals still hold."""
    totals = before or _totals(store, wanted, now)
    if wanted.words:
        ids, jobs = store.search(wanted.states, wanted.words, limit=PAGE, offset=wanted.start)
        start, total = wanted.start, len(ids)
    else:
        total = sum(totals.counts[state] for state in wanted.states)
        start = min(wanted.start, max(0, total - 1))
        jobs = store.page(wanted.states, limit=PAGE, offset=start)
    return replace(
        totals,
        wanted=wanted,
        at=now,
        total=total,
        start=start,
        jobs=jobs,
        followed=_followed(store, wanted, totals.counts, start, jobs),
        gone=_gone(store, wanted.marked),
    )


def _followed(store: Store, wanted: Wanted, counts: Mapping[State, int], start: int, jobs: Sequence[Job]) -> int | None:
    """Where the job under the cursor is now; None if it has left the list, or is somewhere among the ended ones."""
    for index, job in enumerate(jobs):
        if job.id == wanted.follow:
            return start + index
    if wanted.follow is None or wanted.words or wanted.states != ALL:
        return None
    try:
        job = store.job(wanted.follow)
    except RequestError:
        return None
    return None if job.position is None else counts["running"] + job.position - 1


def _gone(store: Store, marked: frozenset[int]) -> frozenset[int]:
    """Those that another window has taken off the list."""
    if not marked:
        return marked
    try:
        return marked - set(store.numbers([(min(marked), max(marked))]))
    except RequestError:
        return marked


def _totals(store: Store, wanted: Wanted, now: float) -> View:
    """How the queue stands, and when each job ends, as far as the done ones tell; no rows yet."""
    from hvlite.jobs.eta import History, finish_times, queue_end

    view = View(
        wanted=wanted, at=now, counts=store.counts(), settings=store.settings(), running=store.page(("running",))
    )
    if not view.counts["queued"] and not view.running:
        return view
    history = History(store.page(("done",), limit=LEARN_FROM))
    queued, is_active = store.page(("queued",), limit=FORECAST), view.settings.queue == "active"
    ends = finish_times(view.running, queued, history, now, is_active=is_active)
    return replace(view, ends=ends, end=queue_end(ends))
