"""How long until the device is free: `queue cancel`, `queue pause --now` and the first Ctrl+C, against a real worker.

    python benchmarks/stopping.py [--times 15] [--seed 0] [--model shapes]

A clip is begun, and left at a random moment of each of its stages in turn. A cancel and a pause are measured from the
start of the command, with all that Python takes to start, until the worker has left the clip and its end is in the
queue; Ctrl+C from the signal until both processes are gone. Exit code 1 where one took over 2 s.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from hvlite.jobs.job import How, NewJob
from hvlite.jobs.store import open_store
from hvlite.request import Request

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 2.0
STILL_SECONDS = 120.0
STAGES = ("start", "text", "schedule", "denoise", "decode")
WAYS = ("cancel", "pause --now", "Ctrl+C")


@dataclass(slots=True)
class Work:
    """A running `hvlite work`; `stage` is what it does now, `left` when it last left a clip."""

    home: Path
    process: subprocess.Popen[bytes] = field(init=False)
    stage: str = ""
    left: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            command("work", "--device", "cpu", "--json", "--quiet"), stdout=subprocess.PIPE, env=environment(self.home)
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.changed:
                self._hear(json.loads(line))
                self.changed.notify_all()

    def _hear(self, event: dict[str, str]) -> None:
        match event:
            case {"event": "JobStarted"}:
                self.stage = "start"
            case {"event": "Stage", "name": name}:
                self.stage = name
            case {"event": "JobEnded"}:
                self.stage, self.left = "", time.monotonic()
            case {"event": "Note", "text": text} if "queued again" in text:
                self.stage, self.left = "", time.monotonic()

    def until(self, *stages: str) -> bool:
        """Wait until it does one of these; False if it does not come to that."""
        with self.changed:
            return self.changed.wait_for(lambda: self.stage in stages, STILL_SECONDS)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "hvlite.cli", *words]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HVLITE_HOME": str(home), "PYTHONPATH": str(ROOT)}


def ask(home: Path, *words: str) -> None:
    subprocess.run(command("queue", *words), env=environment(home), check=True, capture_output=True)


def queue_clip(home: Path, model: str, number: int) -> int:
    """A clip with a prompt of its own, so that each is read, and a second or so in each stage."""
    request = Request(f"a red circle moving left, number {number}", size=(96, 96), frames=33, steps=40, seed=number)
    with open_store(home / "queue.db") as store:
        return store.add([NewJob(request=request, how=How(model=model), folder=home / "clips")])[0]


def leave(work: Work, way: str, job: int) -> float:
    """Have it leave the clip -> seconds until it has."""
    began = time.monotonic()
    match way:
        case "Ctrl+C":
            work.process.send_signal(signal.SIGINT)
            work.process.wait()
            return time.monotonic() - began
        case "cancel":
            ask(work.home, "cancel", str(job))
        case _:
            ask(work.home, "pause", "--now")
    assert work.until(""), f"{way} was not heard"
    if way != "cancel":
        ask(work.home, "clear", "--yes")
        ask(work.home, "resume")
    return work.left - began


def measure(home: Path, model: str, times: int, noise: random.Random) -> dict[tuple[str, str], list[float]]:
    """By way and stage, the seconds of each time."""
    found: dict[tuple[str, str], list[float]] = {}
    for way in WAYS:
        work = Work(home)
        for number in range(times):
            stage = STAGES[number % len(STAGES)]
            job = queue_clip(home, model, number)
            assert work.until(*STAGES[STAGES.index(stage) :])
            time.sleep(noise.uniform(0, 0.5 if stage in ("denoise", "decode") else 0.05))
            if not work.stage:  # it was faster
                continue
            reached = work.stage
            found.setdefault((way, reached), []).append(leave(work, way, job))
            if way == "Ctrl+C":
                with open_store(home / "queue.db") as store:
                    store.clear()
                work = Work(home)
        work.process.send_signal(signal.SIGTERM)
        work.process.wait()
    return found


def show(found: dict[tuple[str, str], list[float]]) -> float:
    """The table -> the longest time of all."""
    print(f"{'way':14} {'stage':10} {'times':>5} {'median s':>9} {'worst s':>8}")
    for (way, stage), times in sorted(found.items(), key=lambda each: (WAYS.index(each[0][0]), each[0][1])):
        print(f"{way:14} {stage:10} {len(times):5} {statistics.median(times):9.2f} {max(times):8.2f}")
    return max(max(times) for times in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="shapes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        worst = show(measure(Path(folder), asked.model, asked.times, random.Random(asked.seed)))
    print(f"worst {worst:.2f} s, allowed {LIMIT_SECONDS:g} s")
    return 0 if worst <= LIMIT_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
