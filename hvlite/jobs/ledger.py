"""What the supervisor writes to the queue of the jobs that it has claimed, and says once it is written.

A disk that is full for an hour, or a queue that another process holds, costs time and nothing else: a change is tried
until it is made. Only a sign of life is left out.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import Literal, TypeVar

from hvlite import paths
from hvlite.atomic import remove_leftovers
from hvlite.errors import Busy, OutputError
from hvlite.jobs.course import Course
from hvlite.jobs.devices import Place, is_free
from hvlite.jobs.hook import Hook
from hvlite.jobs.job import Job, Outcome, job_json
from hvlite.jobs.orders import Halt, Watcher
from hvlite.jobs.store import Claims, Store
from hvlite.jobs.wire import Ended, Go, Planned
from hvlite.request import Request

T = TypeVar("T")

REPORT_SECONDS = 1.0
TICK_SECONDS = 0.2
# How many prompts are read in one pass over the text encoder's weights, and the most text that is looked ahead at.
AHEAD = 16
AHEAD_CHARACTERS = 20_000


class Ledger:
    """`tally` counts how jobs have ended. `retry` is in seconds."""

    def __init__(self, store: Store, claims: Claims, watcher: Watcher, hook: Hook, halt: Halt, retry: float) -> None:
        self.tally: Counter[str] = Counter()
        self._store, self._claims, self._watcher = store, claims, watcher
        self._hook, self._halt, self._retry = hook, halt, retry
        self._seen = -1  # the version of the queue that was last looked at

    def claim(self) -> Job | None:
        """The next job for this device."""
        self._seen = self._store.data_version()
        return self._written(self._claims.claim)

    @property
    def is_news(self) -> bool:
        """Whether another process has changed the queue since the last claim or report."""
        return self._store.data_version() != self._seen

    def recover(self, place: Place) -> None:
        """Take over from supervisors that are gone with their workers: nobody holds the locks of their claims."""

        def is_dead(job: Job) -> bool:
            return job.lock is None or job.lock == place.lock or is_free(job.lock)

        for job in self._written(lambda: self._claims.recover(is_dead)):
            self._tell_back(job, "its worker is gone")

    def sweep(self) -> None:
        """Remove checkpoints that no job, and no undo, can go on from any more."""
        folder = paths.checkpoint_file(0).parent
        remove_leftovers(folder)
        there = list(folder.glob("*.safetensors"))  # before the queue is asked: what is newer is somebody's
        running = {paths.checkpoint_file(job.id).name for job in self._store.page(("running",))}
        wanted = running | {path.name for path in self._store.checkpoints()}
        for path in there:
            if path.name not in wanted:
                with suppress(OSError):
                    path.unlink()

    def ahead(self, job: Job) -> list[Request]:
        """What is likely to come next with the same model; what has a checkpoint needs its prompt no more."""
        found, room = [], AHEAD_CHARACTERS
        for other in self._claims.next_alike(job, AHEAD):
            assert other.request is not None
            room -= len(other.request.prompt) + len(other.request.negative_prompt or "")
            if other.checkpoint is None and room > 0:
                found.append(other.request)
        return found

    def accept(self, job: Job, planned: Planned) -> Go:
        """Record what is going to be made, and choose the file for it."""
        self._written(lambda: self._claims.record_plan(job.id, planned.resolved, planned.predicted_bytes))
        if job.checkpoint is not None and not planned.resumes:
            self._written(lambda: self._claims.drop_checkpoint(job.id))
        return Go(job.id, self._written(lambda: self._claims.reserve_output(job.id, planned.suffix)))

    def keep(self, job: Job, step: int) -> None:
        """Its checkpoint of `step` steps is complete."""
        self._written(lambda: self._claims.save_checkpoint(job.id, paths.checkpoint_file(job.id), step))

    def report(self, course: Course) -> None:
        """Now and then, say how far the job is, and at once when the queue has changed hear what its users ask."""
        now = time.monotonic()
        with suppress(Busy, OutputError):
            if not self.is_news and now - course.reported_at < REPORT_SECONDS:
                return
            course.reported_at, self._seen = now, self._store.data_version()
            asked = self._claims.report(course.job.id, course.progress)
            if asked is not None:
                course.leave(asked)

    def give_back(self, job: Job, why: str) -> None:
        """It is queued again, with its checkpoint."""
        self._tell_back(self._written(lambda: self._claims.give_back(job.id)), why)

    def crashed(self, job: Job, how: str, error: str | None = None) -> None:
        """Its worker died or hung: it is queued again, or quarantined. `error` is its last word, if it had one."""
        after = self._written(lambda: self._claims.crashed(job.id, how, error))
        if after.state == "queued":
            self._tell_back(after, f"its worker {how}")
        else:
            self._tell_end(after)

    def end(self, job: Job, state: Literal["done", "failed", "cancelled", "parked"], ended: Ended | None) -> None:
        """It is over; `ended` is what the worker says of it, if it still could."""
        outcome = Outcome(state=state, log=paths.job_log(job.id), version=version("hvlite"))
        if ended is not None:
            names = ("reason", "error", "timings", "seconds_per_step", "peak_bytes")
            outcome = replace(outcome, **{name: getattr(ended, name) for name in names})
        if state == "cancelled":
            outcome = replace(outcome, reason="cancelled by user", error=None)
        self._tell_end(self._written(lambda: self._claims.end(job.id, outcome)))

    def _tell_back(self, job: Job, why: str) -> None:
        if job.state != "queued":
            self._tell_end(job)
            return
        where = f"from step {job.checkpoint_step}" if job.checkpoint_step else "from its start"
        self._watcher.say(f"job {job.id} is queued again ({why}); it will go on {where}")

    def _tell_end(self, job: Job) -> None:
        self.tally[job.state] += 1
        self._hook.run(job.state, job_json(job))
        self._watcher.ended(job)
        settings = self._store.settings()
        if job.state == "failed" and settings.queue != "active" and settings.pause_reason:
            self._watcher.say(f"the queue is paused: {settings.pause_reason}. Go on with: hvlite queue resume")
            self._hook.run("paused", {"error": settings.pause_reason, **self.tally})

    def _written(self, change: Callable[[], T]) -> T:
        """The result of `change`. Raises what prevents it only when this run is to end."""
        told = False
        while True:
            try:
                return change()
            except (Busy, OutputError) as error:
                if self._halt.is_asked():
                    raise
                if not told:
                    self._watcher.say(f"{error} (it is tried again)")
                told = True
                ends = time.monotonic() + self._retry
                while not self._halt.is_asked() and time.monotonic() < ends:
                    time.sleep(TICK_SECONDS)
