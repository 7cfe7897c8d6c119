"""`hvlite work`: render what is queued, all night if need be. See `cli` for the contract.

What it shows is for whoever looks; nobody has to. A terminal that is closed and a pipe that nobody reads any more cost
the talk, never the night.
"""

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime, timedelta
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from hvlite.errors import ExitCode, RequestError
from hvlite.events import Event
from hvlite.jobs.devices import places, take_place
from hvlite.jobs.job import Job, job_json
from hvlite.jobs.orders import Halt, Orders
from hvlite.jobs.store import open_store
from hvlite.jobs.supervisor import Supervisor
from hvlite.jobs.wire import Packed
from hvlite.progress import Talk, print_json


def work_command(
    *,
    device: str | None = None,
    until_empty: bool = False,
    stop_at: str | None = None,
    max_jobs: int | None = None,
    on_done: str | None = None,
    save_every: float = 60.0,
    json: bool = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False,
) -> int:
    """Render what is queued, on one device, until it is told to stop. Ctrl+C saves the clip at work and ends.

    Parameters
    ----------
    device
        cpu, cuda or cuda:N (by default the card with most free memory that no other worker serves, else cpu).
    until_empty
        End when no job is left, instead of waiting for more.
    stop_at
        End at this time of day (07:00), with the clip at work saved.
    max_jobs
        End after so many jobs.
    on_done
        A shell command to run after every job, and when the queue is empty or pauses itself: HVLITE_EVENT says which,
        stdin has the job as JSON.
    save_every
        Seconds of work between two checkpoints of a clip; 0 saves every step.
    json
        JSON lines of events on stdout.
    quiet
        Say nothing but errors on stderr.
    """
    ends = None if stop_at is None else next_time(stop_at, datetime.now()).timestamp()
    orders = Orders(until_empty=until_empty, stop_at=ends, max_jobs=max_jobs, on_done=on_done, save_seconds=save_every)
    _check(orders)
    shown = Shown(Talk(quiet=quiet), as_json=json)
    with open_store() as store:
        for note in store.notes:
            shown.say(note)
        place, lock = take_place(places(device), lambda: store.page(("running",)))
        shown.say(f"working on {place.device}, {store.counts()['queued']} jobs queued")
        with halted(shown) as halt:
            supervisor = Supervisor(store, (place, lock), shown, orders, halt)
            supervisor.run()
        queued, is_paused = store.counts()["queued"], store.settings().queue != "active"
        shown.summary({**supervisor.tally}, queued)
        if is_paused and queued:
            shown.say("the queue is paused; go on: hvlite queue resume")
    if halt.code is not None:
        return halt.code
    if supervisor.tally["failed"]:
        return ExitCode.SOME_FAILED
    return ExitCode.FAILED if until_empty and is_paused and queued else ExitCode.DONE


def _check(orders: Orders) -> None:
    if orders.max_jobs is not None and orders.max_jobs < 1:
        raise RequestError(f"--max-jobs must be at least 1; got {orders.max_jobs}")
    if not 0 <= orders.save_seconds <= 86400:
        raise RequestError(f"--save-every is in seconds, 0 to 86400; got {orders.save_seconds:g}")


def next_time(text: str, now: datetime) -> datetime:
    """The next moment at which a clock on the wall shows `text`."""
    try:
        wanted = datetime.strptime(text, "%H:%M")
    except ValueError:
        raise RequestError(f"--stop-at takes a time of day like 07:00; got {text!r}") from None
    today = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    return today if today > now else today + timedelta(days=1)


class Shown:
    """The talk of a worker: bars on a terminal, plain lines elsewhere, JSON lines on stdout where they are wanted."""

    def __init__(self, talk: Talk, *, as_json: bool) -> None:
        self.talk = talk
        self.as_json = as_json

    def say(self, text: str) -> None:
        self._show(lambda: self.talk.say(text))
        self._tell("Note", text=text)

    def worker_started(self, pid: int) -> None:
        self._tell("WorkerStarted", pid=pid, supervisor=os.getpid())

    def started(self, job: Job) -> None:
        attempt = f", attempt {job.attempts}" if job.attempts > 1 else ""
        self._show(lambda: self.talk.say(f"job {job.id}{attempt}: {job.prompt}"))
        self._tell("JobStarted", job=job_json(job))

    def event(self, job: Job, event: Event) -> None:
        self._show(lambda: self.talk.event(event))
        self._tell(type(event).__name__, job=job.id, **{each.name: getattr(event, each.name) for each in fields(event)})

    def packed(self, job: Job, packed: Packed) -> None:
        size = f"{packed.done_bytes / 1e9:.2f} of {packed.total_bytes / 1e9:.2f} GB"
        self._show(lambda: self.talk.advance("pack", packed.done_bytes, packed.total_bytes, size))
        self._tell("Packed", job=job.id, done_bytes=packed.done_bytes, total_bytes=packed.total_bytes)

    def ended(self, job: Job) -> None:
        self._show(lambda: self._say_end(job))
        self._tell("JobEnded", job=job_json(job))

    def _say_end(self, job: Job) -> None:
        self.talk.close()
        match job.state:
            case "done":
                self.talk.say(f"job {job.id} is done: {job.output}")
                if not self.as_json:
                    self.talk.result(str(job.output))
            case "parked":
                self.talk.say(f"job {job.id} is parked at step {job.checkpoint_step}: hvlite queue finish {job.id}")
            case "failed":
                self.talk.insist(f"job {job.id} failed: {job.error}")
            case _:
                self.talk.say(f"job {job.id} is {job.state}")

    def summary(self, tally: dict[str, int], queued: int) -> None:
        """The last line."""
        self.talk.close()
        ended = ", ".join(f"{count} {state}" for state, count in tally.items()) or "nothing"
        self._show(lambda: self.talk.say(f"{ended}; {queued} queued"))
        self._tell("Summary", **tally, queued=queued)

    def _tell(self, name: str, /, **values: object) -> None:
        if self.as_json:
            self._show(lambda: print_json({"event": name, **values}))

    def _show(self, show: Callable[[], None]) -> None:
        try:
            show()
        except (OSError, SystemExit):  # rich exits where its pipe is broken
            forget_dead_outputs()


def forget_dead_outputs() -> None:
    """Let stdout and stderr go nowhere from now on where their reader, or their terminal, is gone."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        poll = select.poll()
        poll.register(handle, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0)):
            os.dup2(nothing, handle)
    os.close(nothing)


@contextmanager
def halted(shown: Shown) -> Iterator[Halt]:
    """Ctrl+C and SIGTERM end the work with the clip saved, twice at once; a closed terminal does not end it."""
    halt = Halt()

    # Nothing is said in here: a signal may come in the middle of saying something else.
    def heard(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            forget_dead_outputs()
            return
        halt.at_once = halt.is_asked()
        halt.code = halt.code or (ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's word stands
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield halt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shown.talk.close()
