"""A night of the queue in a test: a supervisor in this process, and whoever watches it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hvlite.events import Event
from hvlite.jobs.devices import Place, take_lock
from hvlite.jobs.job import Job
from hvlite.jobs.orders import Halt, Orders, Patience
from hvlite.jobs.store import Store
from hvlite.jobs.supervisor import Supervisor
from hvlite.jobs.wire import Packed

ROOT = Path(__file__).resolve().parent.parent
FAKE = (sys.executable, "-m", "tests.fake_worker")
PLACE = Place(device="cpu", lock="cpu-here")
# Short, but long against what a fake worker needs to answer.
HASTY = Patience(cancel=20.0, pause=20.0, term=10.0, idle=60.0, silent=60.0, retry=0.05, rest=0.3)


@dataclass
class Watcher:
    """Remembers all that it is shown; `on_event` and `on_end` may act in the middle of it."""

    said: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[Job] = field(default_factory=list)
    on_start: Callable[[Job], object] = lambda _job: None
    on_event: Callable[[Job, Event], None] = lambda _job, _event: None
    on_say: Callable[[str], None] = lambda _text: None

    def say(self, text: str) -> None:
        self.said.append(text)
        self.on_say(text)

    def worker_started(self, pid: int) -> None:
        self.pids.append(pid)

    def started(self, job: Job) -> None:
        self.starts.append(job.id)
        self.on_start(job)

    def event(self, job: Job, event: Event) -> None:
        self.on_event(job, event)

    def packed(self, job: Job, packed: Packed) -> None:
        raise AssertionError("nothing is packed here")

    def ended(self, job: Job) -> None:
        self.ends.append(job)


def night(
    store: Store,
    watcher: Watcher,
    *,
    halt: Halt | None = None,
    patience: Patience = HASTY,
    command: Sequence[str] = FAKE,
    place: Place = PLACE,
    **orders: object,
) -> Supervisor:
    """Run a supervisor to its end, by default when the queue is empty."""
    lock = take_lock(place.lock)
    assert lock is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        try:
            given = replace(Orders(until_empty=True), **orders)  # type: ignore[arg-type]  # by name, checked there
            supervisor = Supervisor(
                store, (place, lock), watcher, given, halt or Halt(), patience=patience, command=command
            )
            supervisor.run()
        finally:
            lock.close()
    return supervisor


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and no mere remains of one."""
    try:
        return f"{pid} (" in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
