"""What a supervisor is told at its start and meanwhile, and to whom it tells what happens."""

from dataclasses import dataclass
from typing import Protocol

from hvlite.errors import ExitCode
from hvlite.events import Event
from hvlite.jobs.job import Job
from hvlite.jobs.wire import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What this run is to do. `stop_at` is in seconds since 1970: it is meant as the clock on the wall shows it."""

    until_empty: bool = False
    stop_at: float | None = None
    max_jobs: int | None = None
    on_done: str | None = None
    save_seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds, by a clock that does not jump.

    A worker that is told to leave its clip gets SIGTERM after `cancel`, or after `pause` where the work is to be kept,
    and SIGKILL after `term` more. It is taken for hung without a word and without doing anything for `idle`, or, on a
    card, where a block takes seconds, without a word for `silent`, however busy. `retry` lies between two tries of what
    another process prevents, `rest` until an idle worker gives its device to others.
    """

    cancel: float = 10.0
    pause: float = 60.0
    term: float = 10.0
    idle: float = 600.0
    silent: float = 3600.0
    retry: float = 15.0
    rest: float = 60.0


@dataclass(slots=True)
class Halt:
    """What signals ask for: to end with the work saved, and with that exit code; `at_once`: without waiting for it."""

    code: ExitCode | None = None
    at_once: bool = False

    def is_asked(self) -> bool:
        """Whether it has come to that."""
        return self.code is not None


class Watcher(Protocol):
    """Who shows what happens."""

    def say(self, text: str) -> None: ...

    def worker_started(self, pid: int) -> None: ...

    def started(self, job: Job) -> None: ...

    def event(self, job: Job, event: Event) -> None: ...

    def packed(self, job: Job, packed: Packed) -> None: ...

    def ended(self, job: Job) -> None: ...
