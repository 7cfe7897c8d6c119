"""The worker's end of the wire. A thread listens, so that a Stop is heard in the middle of a block. No torch."""

import os
import threading
from contextlib import suppress
from queue import Empty, Queue
from typing import BinaryIO

from hvlite.jobs.wire import FromWorker, Go, Render, Stop, line_of, to_worker

ANSWER_SECONDS = 0.1


class Terminated(BaseException):
    """Leave the clip now, wherever it is. No Exception: nobody that handles errors may swallow it."""


class Port:
    """`stop_asked`: the supervisor wants this clip left at the next block, or has closed the wire."""

    def __init__(self, incoming: BinaryIO, outgoing: int) -> None:
        self.stop_asked = False
        self._incoming, self._outgoing = incoming, outgoing
        self._orders: Queue[Render | None] = Queue()
        self._answers: Queue[Go] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def next_order(self) -> Render | None:
        """The next clip to make; None when there will be none."""
        return self._orders.get()

    def answer(self, job: int) -> Go | None:
        """What the supervisor says to the Planned of `job`; None if it wants no more of this clip."""
        while not self.stop_asked:
            with suppress(Empty):
                go = self._answers.get(timeout=ANSWER_SECONDS)
                if go.job == job:  # else it is late, for a clip that was left meanwhile
                    return go
        return None

    def say(self, message: FromWorker) -> None:
        """Tell the supervisor; Terminated if there is none any more."""
        line = line_of(message)
        try:
            while line:
                line = line[os.write(self._outgoing, line) :]
        except BrokenPipeError:
            raise Terminated from None

    def _listen(self) -> None:
        for line in self._incoming:
            match to_worker(line):
                case Render() as order:
                    self.stop_asked = False
                    self._orders.put(order)
                case Go() as go:
                    self._answers.put(go)
                case Stop():
                    self.stop_asked = True
        self.stop_asked = True
        self._orders.put(None)


def open_port() -> Port:
    """Take the wire from stdin and stdout, and leave in their places what no library can spoil it through."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return Port(incoming, outgoing)
