"""The queue as the screens see it: one connection on a thread of its own, and one look at it at a time.

A screen says what it wants to see (`Wanted`) and gets a `View`; a look where nothing has changed costs next to nothing.
What a user does is a function of the store, done on the same thread in the order of the keys.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hvlite.errors import QueueError, RequestError
from hvlite.jobs.job import ENDED, OPEN, Job, Settings, State
from hvlite.jobs.store import Store, open_store
from hvlite.tui import words

T = TypeVar("T")

ALL: tuple[State, ...] = OPEN + ENDED
# Rows that one look reads for a table: more than any screen shows, so that a key press finds its row there.
PAGE = 150
# Jobs that a filter reads at a time.
CHUNK = 500
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
    total: int
    start: int
    jobs: Sequence[Job]
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
        self._seen: tuple[object, ...] | None = None
        self._deeds = 0

    async def call(self, deed: Callable[[Store], T]) -> T:
        """`deed` on the queue's thread, behind those that were asked for earlier."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._do, deed)

    async def look(self, wanted: Wanted) -> View | None:
        """What is there now; None if it is what the last look saw."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._look, wanted)

    def forget(self) -> None:
        """The next look answers in any case."""
        self._seen = None

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
        seen = (store.data_version(), self._deeds, wanted, int(self.clock() / FORECAST_SECONDS))
        if seen == self._seen:
            return None
        view = look(store, wanted, self.clock())
        self._seen = seen
        return view

    def _opened(self) -> Store:
        if self._store is None:
            self._store = open_store(clock=self.clock)
            self.notes = list(self._store.notes)
        return self._store

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def look(store: Store, wanted: Wanted, now: float) -> View:
    """Read what is wanted."""
    counts = store.counts()
    running = store.page(("running",))
    if wanted.words:
        found = matching(store, wanted)
        start, total = wanted.start, len(found)
        jobs: Sequence[Job] = found[start : start + PAGE]
    else:
        total = sum(counts[state] for state in wanted.states)
        start = min(wanted.start, max(0, total - 1))
        jobs = store.page(wanted.states, limit=PAGE, offset=start)
    view = View(
        wanted=wanted,
        at=now,
        counts=counts,
        settings=store.settings(),
        running=running,
        total=total,
        start=start,
        jobs=jobs,
        followed=_followed(store, wanted, counts, start, jobs),
        gone=_gone(store, wanted.marked),
    )
    return _with_forecast(store, view, now)


def matching(store: Store, wanted: Wanted) -> list[Job]:
    """Every job that has all the words."""
    needles = wanted.words.lower().split()
    found: list[Job] = []
    offset = 0
    while chunk := store.page(wanted.states, limit=CHUNK, offset=offset):
        found += [job for job in chunk if all(needle in haystack(job) for needle in needles)]
        offset += len(chunk)
    return found


def haystack(job: Job) -> str:
    """What a filter looks at."""
    seed = "" if job.request is None else f"seed{job.request.seed}"
    profile, model = (None, None) if job.how is None else (job.how.profile, job.how.model)
    draft = "draft" if job.stop_after else ""
    return f"#{job.id} {job.state} {job.prompt} {words.shape_text(job)} {seed} {profile} {model} {draft}".lower()


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


def _with_forecast(store: Store, view: View, now: float) -> View:
    """When each job ends, as far as the done ones tell."""
    from hvlite.jobs.eta import History, finish_times, queue_end

    if not view.counts["queued"] and not view.running:
        return view
    history = History(store.page(("done",), limit=LEARN_FROM))
    queued, is_active = store.page(("queued",), limit=FORECAST), view.settings.queue == "active"
    ends = finish_times(view.running, queued, history, now, is_active=is_active)
    return replace(view, ends=ends, end=queue_end(ends))
