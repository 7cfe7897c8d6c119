"""How quick the terminal UI is, and whether a night makes it larger: `python benchmarks/tui.py [JOBS] [UPDATES]`.

The first two parts start `hvlite tui` in a terminal of 140x45, on an empty queue and on one of JOBS jobs, and read what
it writes there: the time to the first screen and to the first job, and from a key to the row that it leads to. The
third lets UPDATES reports of a running job pass, one look each, and counts what Python keeps before and after.
Exits with 1 where a promise is broken: 1 s to an empty queue, 2 s with JOBS jobs, 100 ms for a key, nothing left over.
"""

import asyncio
import fcntl
import gc
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil

from hvlite.jobs.job import How, NewJob, Progress
from hvlite.jobs.store import open_store
from hvlite.request import Request
from hvlite.tui.app import HvliteApp
from hvlite.tui.surroundings import Surroundings

START_S, START_MANY_S, KEY_MS = 1.0, 2.0, 100.0
# What Python keeps of one update; an object that leaks is one or more.
BLOCKS = 1.0
# So many updates fill the caches.
WARM_UP = 1200
REPEATS = 5
ROWS, COLUMNS = 45, 140
KEYS = 40


class Terminal:
    """`hvlite tui` at the other end of a pseudo terminal."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        command = [sys.executable, "-m", "hvlite.cli", "tui"]
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
        os.close(side)

    def read_until(self, text: str, seconds: float = 30.0) -> float:
        """Seconds since the start when `text` is on the screen."""
        seen = b""
        while time.perf_counter() - self.began < seconds:
            if select.select([self.main], [], [], 0.05)[0]:
                seen += os.read(self.main, 1 << 16)
                if text.encode() in seen:
                    return time.perf_counter() - self.began
        raise SystemExit(f"{text!r} did not come in {seconds:.0f} s; the last of what did: {seen[-300:]!r}")

    def quieten(self) -> None:
        """Read on until nothing has come for a while."""
        while select.select([self.main], [], [], 0.3)[0]:
            os.read(self.main, 1 << 16)

    def press(self, key: str, text: str) -> float:
        """Milliseconds from a key to `text`."""
        self.quieten()
        self.began = time.perf_counter()
        os.write(self.main, key.encode())
        return 1000 * self.read_until(text)

    def computed(self) -> float:
        """Seconds that it has computed so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.main)


def prompt(number: int) -> str:
    return f"clip-{number:05} of a red circle moving left while the camera pans slowly across the scene"


def fill(count: int, folder: Path) -> None:
    how = How(model="shapes")
    with open_store() as store:
        store.add(
            [
                NewJob(request=Request(prompt(number), seed=number), how=how, folder=folder)
                for number in range(1, count + 1)
            ]
        )


def starts(text: str) -> float:
    """The median of the seconds from the command to `text`."""
    found, computed = [], []
    for _ in range(REPEATS):
        terminal = Terminal()
        found.append(terminal.read_until(text))
        computed.append(terminal.computed())
        terminal.close()
    print(f"  to {text!r}: {median(found):.2f} s, {median(computed):.2f} s of them computing, in {REPEATS} starts")
    return median(found)


def keys(count: int) -> list[float]:
    """Milliseconds of each of some keys, all over the list."""
    terminal = Terminal()
    terminal.read_until("clip-00001")
    terminal.quieten()
    before = terminal.computed()
    times = [terminal.press("j", f"clip-{number:05}") for number in range(2, KEYS)]
    times += [terminal.press("G", f"clip-{count:05}"), terminal.press("g", "clip-00001")]
    times += [terminal.press("G", f"clip-{count:05}"), terminal.press("k", f"clip-{count - 1:05}")]
    each = 1000 * (terminal.computed() - before) / len(times)
    terminal.close()
    slowest = f"slowest {max(times):.0f} ms of {len(times)}"
    print(f"  keys: median {median(times):.0f} ms, {slowest}; {each:.0f} ms computing each, all that follows included")
    return times


async def night(updates: int) -> float:
    """Blocks of Python's memory that stay behind for each of `updates` reports of a running job."""
    with open_store() as store:
        claims = store.claims("benchmark", "cpu", {None})
        job = claims.claim()
        assert job is not None
        surroundings = replace(Surroundings(), look_seconds=60.0, probe_seconds=0.05)
        app = HvliteApp(surroundings=surroundings)
        async with app.run_test(size=(COLUMNS, ROWS)) as pilot:

            async def pass_by(number: int) -> None:
                for index in range(number):
                    claims.report(
                        job.id, Progress(stage="denoise", step=index % 50, steps=50, detail=f"block {index % 60}/60")
                    )
                    looks = app.looks
                    app.look_again()
                    while app.looks == looks:
                        await asyncio.sleep(0.002)
                await pilot.pause()
                gc.collect()

            await pass_by(WARM_UP)
            blocks, resident = sys.getallocatedblocks(), psutil.Process().memory_info().rss
            await pass_by(updates)
            more = (sys.getallocatedblocks() - blocks) / updates
            grown = (psutil.Process().memory_info().rss - resident) / 2**20
    print(f"  {updates} updates: {more:+.2f} blocks of memory each, {grown:+.1f} MiB of RAM together")
    return more


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    updates = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    with tempfile.TemporaryDirectory() as home:
        os.environ["HVLITE_HOME"] = home
        print("an empty queue:")
        empty = starts("The queue is empty")
        fill(count, Path(home))
        print(f"{count} jobs:")
        many = starts("clip-00001")
        times = keys(count)
        print("a night:")
        left = asyncio.run(night(updates))
    kept = empty < START_S and many < START_MANY_S and max(times) < KEY_MS and left < BLOCKS
    print("every promise is kept" if kept else "A PROMISE IS BROKEN")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
