"""A worker that renders nothing and behaves as a job's prompt tells it; `test_supervisor` runs it as a process.

    python -m tests.fake_worker DEVICE PID

A prompt is words; each is done in turn, those with `@N` at the Nth attempt only. What is not said is a clip in good
order: planned, a step, a checkpoint, a file.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from hvlite.dims import HUNYUANVIDEO
from hvlite.events import Note, Stage, StepDone
from hvlite.jobs.port import Port, Terminated, open_port
from hvlite.jobs.wire import Ended, Kept, Planned, Ready, Render, spoken
from hvlite.jobs.worker import die_with, leave


def wait_for_ever() -> NoReturn:
    while True:
        signal.pause()


class Fake:
    def __init__(self, port: Port) -> None:
        self.port = port
        self.output = Path()

    def render(self, order: Render) -> Ended:
        """The last word on this clip."""
        resolved = order.request.resolve(HUNYUANVIDEO)
        resumes = order.has_checkpoint
        while "load" in order.request.prompt and not self.port.stop_asked:  # for ever, but for a Stop
            time.sleep(0.01)
        self.port.say(Planned(resolved=resolved, predicted_bytes=7, suffix=".mp4", resumes=resumes))
        go = self.port.answer(order.job)
        if go is None:
            return Ended(kind="stopped")
        self.output = go.output
        self.port.say(spoken(Stage("denoise")))
        for word in order.request.prompt.split():
            name, _, attempt = word.partition("@")
            if not attempt or int(attempt) == order.attempt:
                ended: Ended | None = getattr(self, name, self.nothing)(order)
                if ended is not None:
                    return ended
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(f"{os.getpid()} {order.request.prompt} {len(order.ahead)}", encoding="utf-8")
        return Ended(kind="done", output=self.output, seconds_per_step=0.5, timings={"denoise": 1.0}, held_bytes=0)

    def nothing(self, _order: Render) -> None:
        """A word of no meaning."""

    def keep(self, order: Render) -> None:
        self.port.say(spoken(StepDone(order.attempt - 1, 50, 0.1)))
        self.port.say(Kept(order.attempt))

    def die(self, _order: Render) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def quit(self, _order: Render) -> None:
        os._exit(3)

    def freeze(self, _order: Render) -> None:
        """Says nothing and does nothing, and SIGTERM does not help."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_ever()

    def compute(self, _order: Render) -> None:
        """Says nothing for a second, but computes."""
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            sum(range(1000))

    def spin(self, _order: Render) -> None:
        while True:
            sum(range(1000))

    def wait(self, _order: Render) -> Ended:
        """Until it is told to stop."""
        while not self.port.stop_asked:
            time.sleep(0.01)
        return Ended(kind="stopped")

    def ignore(self, _order: Render) -> None:
        """A Stop, that is; SIGTERM helps."""
        wait_for_ever()

    def babble(self, _order: Render) -> None:
        os.write(self.port._outgoing, b"hello\n")
        wait_for_ever()

    def memory(self, _order: Render) -> Ended:
        return Ended(kind="memory", reason="out of memory in denoise", error="out of memory", is_last=True)

    def device(self, _order: Render) -> Ended:
        return Ended(kind="device", is_last=True)

    def busy(self, _order: Render) -> Ended:
        return Ended(kind="busy", error="another hvlite is packing")

    def fail(self, _order: Render) -> Ended:
        return Ended(kind="failed", reason="weights", error="weights are missing")

    def swell(self, order: Render) -> Ended:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(str(os.getpid()), encoding="utf-8")
        return Ended(kind="done", output=self.output, held_bytes=order.job * 700_000_000)

    def park(self, order: Render) -> Ended:
        self.keep(order)
        return Ended(kind="parked")

    def interrupt(self, _order: Render) -> None:
        """What Ctrl+C sends to the supervisor."""
        os.kill(os.getppid(), signal.SIGINT)

    def interrupt_again(self, _order: Render) -> None:
        """The second Ctrl+C, once the first was heard."""
        while not self.port.stop_asked:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)

    def terminate(self, _order: Render) -> None:
        os.kill(os.getppid(), signal.SIGTERM)

    def hang_up(self, _order: Render) -> None:
        """What a closed terminal sends to it."""
        os.kill(os.getppid(), signal.SIGHUP)

    def misfile(self, _order: Render) -> None:
        self.output = self.output.with_stem("another")

    def note(self, _order: Render) -> None:
        self.port.say(spoken(Note("something to know")))


def main() -> None:
    die_with(int(sys.argv[2]))
    port = open_port()
    fake = Fake(port)
    signal.signal(signal.SIGTERM, leave)
    port.say(Ready("0"))
    while (order := port.next_order()) is not None:
        try:
            ended = fake.render(order)
        except Terminated:
            ended = Ended(kind="stopped", is_last=True)
        port.say(ended)
        if ended.is_last:
            break
    os._exit(0)


if __name__ == "__main__":
    main()
