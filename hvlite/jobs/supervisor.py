"""The supervisor: claims jobs, has a worker render them, and sees to it that the night goes on whatever befalls it.

It computes nothing and imports no torch, so that little can befall itself; the worker (`worker`) is a process of its
own, which it watches, urges, kills and replaces (`child`). What it does to the queue is in `ledger`, how far the job at
work is in `course`. A kill of both at any point leaves claims that the next supervisor takes over, and checkpoints.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvlite import paths
from hvlite.errors import HvliteError
from hvlite.jobs.child import WORKER, Child
from hvlite.jobs.course import Course, Why
from hvlite.jobs.devices import DeviceLock, Place
from hvlite.jobs.hook import Hook
from hvlite.jobs.job import How, Job
from hvlite.jobs.ledger import TICK_SECONDS, Ledger
from hvlite.jobs.orders import Halt, Orders, Patience, Watcher
from hvlite.jobs.store import ClaimLost, Store
from hvlite.jobs.wire import Ended, FromWorker, Holds, Kept, Packed, Planned, Ready, Render, Spoke, Stop

# A worker that holds so much more than after its first clip, weights aside, is replaced.
CREEP_BYTES = 1 << 30
# So many workers in a row that do not come up are no accident.
STARTS = 3
WORK_KEPT: Mapping[Why | None, str] = {
    "pause": ", with the work saved",
    "end": ", with the work saved (Ctrl+C once more: now)",
    "cancel": "",
}
WHY_LEFT: Mapping[Why | None, str] = {
    "pause": "paused",
    "end": "this worker ends",
    None: "somebody ended its worker",
}


@dataclass(frozen=True, slots=True)
class Death:
    """The worker went, or was sent away, without a last word; `how` in words."""

    how: str


@dataclass(slots=True)
class Hand:
    """A started worker and what is known of it."""

    child: Child
    is_ready: bool = False
    first: tuple[How, int] | None = None
    """What it held, weights aside, after its first clip with a model."""


class Supervisor:
    """Serves one device."""

    def __init__(
        self,
        store: Store,
        device: tuple[Place, DeviceLock],
        watcher: Watcher,
        orders: Orders,
        halt: Halt,
        *,
        patience: Patience | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self._store, self._watcher, self._orders, self._halt = store, watcher, orders, halt
        self._place, self._lock = device
        self._patience = patience or Patience()
        self._command = (*command, self._place.device, str(os.getpid()))
        self._hook = Hook(orders.on_done or store.settings().on_done)
        owner = f"{socket.gethostname()}:{os.getpid()}:{time.time():.3f}"
        claims = store.claims(owner, self._place.lock, self._place.serves)
        self._ledger = Ledger(store, claims, watcher, self._hook, halt, self._patience.retry)
        self._hand: Hand | None = None
        self._failed_starts = 0
        self._retried: set[int] = set()  # jobs that had another try after memory ran out
        self._told = 0  # how many jobs had ended when the queue was last empty
        self._said: str | None = None

    @property
    def tally(self) -> Counter[str]:
        """How many jobs have ended, and how."""
        return self._ledger.tally

    def run(self) -> None:
        """Work until a signal, the orders or an empty queue ends it; what is in flight is saved and given back."""
        try:
            self._ledger.recover(self._place)
            self._ledger.sweep()
            while not self._is_over():
                job = self._ledger.claim()
                if job is not None:
                    self._work_on(job)
                elif not self._rest():
                    break
        finally:
            self._retire()
            for failure in self._hook.wait():
                self._watcher.say(failure)

    def _is_over(self) -> bool:
        orders = self._orders
        is_late = orders.stop_at is not None and time.time() >= orders.stop_at
        is_enough = orders.max_jobs is not None and self.tally.total() >= orders.max_jobs
        return self._halt.is_asked() or is_late or is_enough

    # Between jobs.

    def _rest(self) -> bool:
        """Nothing to do: wait until somebody changes the queue, or for a while. False if that ends this run."""
        settings = self._store.settings()
        is_empty = settings.queue == "active" and not self._store.counts()["queued"]
        if is_empty and self.tally.total() > self._told:
            self._told = self.tally.total()
            self._hook.run("empty", {**self.tally})
        if settings.queue == "active":
            self._say_once("no job is left for this device")
        else:
            self._say_once("the queue is paused" + (f": {settings.pause_reason}" if settings.pause_reason else ""))
            self._retire()  # whoever pauses the queue wants the device
        if self._orders.until_empty:
            return False
        ends = time.monotonic() + self._patience.rest
        while not self._is_over() and not self._ledger.is_news:
            self._pause(TICK_SECONDS)
            if time.monotonic() > ends:
                self._retire()
                self._ledger.recover(self._place)
                break
        return True

    def _pause(self, seconds: float) -> None:
        """Let time go by, or less if the run is over."""
        ends = time.monotonic() + seconds
        while not self._is_over() and (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, TICK_SECONDS))
        for failure in self._hook.failures():
            self._watcher.say(failure)

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._watcher.say(text)

    # The worker at its job.

    def _work_on(self, job: Job) -> None:
        """One claim, from here to wherever it ends."""
        self._said = None
        self._watcher.started(job)
        course = Course(job)
        try:
            ended = self._follow(course)
            if isinstance(ended, Death):
                self._settle_death(course, ended)
            else:
                self._settle(course, ended)
        except ClaimLost as error:
            self._watcher.say(f"{error}; its worker is ended")
            self._kill()

    def _follow(self, course: Course) -> Ended | Death:
        """Have the worker render it; watch, and carry what both sides want to the other."""
        hand = self._ready_hand()
        hand.child.send(self._order(course.job))
        while True:
            try:
                messages = hand.child.read(TICK_SECONDS)
            except ValueError as error:
                self._watcher.say(str(error))
                return Death("spoke nonsense")
            for message in messages:
                course.heard()
                if isinstance(message, Ended):
                    return message
                self._take(hand, course, message)
            if hand.child.is_gone:
                return Death(hand.child.end(self._patience.term))
            if self._is_over():
                course.leave("end")
            self._ledger.report(course)
            if course.why is None and self._is_hung(hand.child, course):
                return Death("hung")
            if course.why is not None and (death := self._urge(hand, course)):
                return death

    def _order(self, job: Job) -> Render:
        assert job.request is not None
        assert job.how is not None
        return Render(
            job=job.id,
            request=job.request,
            how=job.how,
            attempt=job.attempts,
            has_checkpoint=job.checkpoint is not None,
            latents=job.latents,
            stop_after=job.stop_after,
            save_seconds=self._orders.save_seconds,
            ahead=self._ledger.ahead(job),
        )

    def _take(self, hand: Hand, course: Course, message: FromWorker) -> None:
        """One message of the worker's: to the queue first, then to whoever watches."""
        job = course.job
        match message:
            case Ready():
                hand.is_ready = True
                self._failed_starts = 0
            case Planned() if course.why is None:  # else it waits for a Stop, which is on its way
                go = self._ledger.accept(job, message)
                course.output = go.output
                hand.child.send(go)
            case Kept(step):
                self._ledger.keep(job, step)
            case Holds():
                course.holds = message
            case Packed():
                course.follow_packing(message)
                self._watcher.packed(job, message)
            case Spoke():
                event = message.event
                course.follow(event)
                self._watcher.event(job, event)

    def _urge(self, hand: Hand, course: Course) -> Death | None:
        """Have the worker leave its clip: told, then SIGTERM, then SIGKILL; one that still starts holds nothing."""
        child, patience, waited = hand.child, self._patience, time.monotonic() - course.asked_at
        if not hand.is_ready:
            return Death(child.kill())
        first = patience.cancel if course.why == "cancel" else patience.pause
        late = f"job {course.job.id} did not stop for {waited:.0f} s:"
        if course.rung == 0:
            course.rung = 1
            self._watcher.say(f"job {course.job.id} stops at the next block or tile{WORK_KEPT[course.why]}")
            child.send(Stop())
        elif course.rung == 1 and waited > first:
            course.rung = 2
            self._watcher.say(f"{late} SIGTERM to its worker")
            child.terminate()
        elif self._halt.at_once or waited > first + patience.term:
            self._watcher.say(f"{late} SIGKILL to its worker")
            return Death(child.kill())
        return None

    def _is_hung(self, child: Child, course: Course) -> bool:
        """Whether the worker has said and done nothing for too long; on a card, whether it has said nothing."""
        now, patience = time.monotonic(), self._patience
        if now - max(course.alive_at, course.looked_at) > patience.idle / 10:
            course.looked_at = now
            if child.is_busy():
                course.alive_at = now
        is_silent = self._place.device != "cpu" and now - course.heard_at > patience.silent
        return is_silent or now - course.alive_at > patience.idle

    # The end of a claim.

    def _settle(self, course: Course, ended: Ended) -> None:
        """What becomes of the job by its worker's last word, and of the worker."""
        job = course.job
        match ended.kind:
            case "done" if ended.output != course.output or course.output is None or not course.output.exists():
                self._ledger.crashed(job, f"says that it wrote {ended.output}, where {course.output} was asked for")
                self._kill()
                return
            case "done" | "parked" | "failed":
                self._ledger.end(job, ended.kind, ended)
            case "stopped" | "busy" | "memory" if course.why == "cancel":
                self._ledger.end(job, "cancelled", ended)
            case "stopped":
                self._ledger.give_back(job, WHY_LEFT[course.why])
            case "busy":
                self._ledger.give_back(job, ended.error or ended.kind)
                self._pause(self._patience.retry)
            case "memory" if job.id not in self._retried:
                self._retried.add(job.id)
                self._ledger.give_back(job, f"{ended.reason}; a fresh worker tries it once more")
            case "memory":
                self._ledger.end(job, "failed", ended)
            case "device":
                self._ledger.crashed(job, "lost its device", ended.error)
        if ended.is_last or self._is_creeping(job, ended):
            self._retire()

    def _is_creeping(self, job: Job, ended: Ended) -> bool:
        """Whether the worker holds ever more; logged in the job's own file by the worker."""
        hand = self._hand
        if hand is None or ended.held_bytes is None or job.how is None:
            return False
        if hand.first is None or hand.first[0] != job.how:
            hand.first = (job.how, ended.held_bytes)
        grown = ended.held_bytes - hand.first[1]
        if grown > CREEP_BYTES:
            self._watcher.say(f"the worker holds {grown / 1e9:.1f} GB more than after its first clip: it is replaced")
        return grown > CREEP_BYTES

    def _settle_death(self, course: Course, death: Death) -> None:
        """What becomes of the job if its worker is gone, or of no use any more."""
        job, hand = course.job, self._hand
        self._kill()
        if course.why == "cancel":
            self._ledger.end(job, "cancelled", None)
        elif course.why is not None:
            self._ledger.give_back(job, WHY_LEFT[course.why])
        elif hand is not None and not hand.is_ready:
            self._failed_start(job, hand.child, death)
        else:
            self._ledger.crashed(job, death.how)

    def _failed_start(self, job: Job, child: Child, death: Death) -> None:
        """A worker that cannot even load its libraries says nothing about the job."""
        self._ledger.give_back(job, f"the worker {death.how} while it started")
        self._failed_starts += 1
        if self._failed_starts >= STARTS:
            said = child.last_words()
            raise HvliteError(
                f"the worker does not start: {STARTS} times in a row it {death.how}{said and f', saying: {said}'} "
                f"(log: {child.log})"
            )

    # The worker's process.

    def _ready_hand(self) -> Hand:
        """The worker, started where there is none; it may still be loading its libraries."""
        if self._hand is not None and self._hand.child.has_died:
            self._retire()
        if self._hand is None:
            log = paths.worker_log(self._place.lock)
            self._hand = Hand(Child(self._command, log, self._lock.handle))
            self._watcher.worker_started(self._hand.child.pid)
        return self._hand

    def _retire(self) -> None:
        """End the worker in good order: then it holds nothing of the device any more."""
        if self._hand is not None:
            self._hand.child.end(self._patience.term)
            self._hand = None

    def _kill(self) -> None:
        if self._hand is not None:
            self._hand.child.kill()
            self._hand = None
