"""The worker as its supervisor sees it: a process that is sent lines, says lines, shows signs of life, and is ended.

Nothing here waits for the worker longer than it is told to: a worker may be stopped, hung or dead at any point. It runs
in a session of its own, so that neither Ctrl+C nor a closed terminal reaches it past its supervisor, and it holds the
lock of the device as long as it lives.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from hvlite.atomic import explained
from hvlite.jobs.wire import FromWorker, ToWorker, from_worker, line_of

# -P: a folder in which somebody starts a worker must not lend it its modules.
WORKER = (sys.executable, "-P", "-m", "hvlite.jobs.worker")
# Whoever uses less of a core than this, and neither reads nor writes, does nothing.
BUSY_SHARE = 0.01
CHUNK = 1 << 16
# A process that outlives SIGKILL for so long hangs in a driver.
KILL_SECONDS = 30.0


class Child:
    """A worker. `log` takes what it and its libraries write to stderr outside of jobs."""

    def __init__(self, command: Sequence[str], log: Path, lock: int) -> None:
        with explained(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            stderr = log.open("wb")
        with stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                pass_fds=(lock,),
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        os.set_blocking(self._to.fileno(), False)
        self.pid = self._process.pid
        self.log = log
        self._outgoing, self._incoming = b"", b""
        self._is_silent = False
        self._measured = (time.monotonic(), *self._used())

    def send(self, message: ToWorker) -> None:
        """Have it read this when it can."""
        self._outgoing += line_of(message)
        self._write()

    def read(self, seconds: float) -> list[FromWorker]:
        """What it has said; waits up to `seconds` for something. ValueError where that is not for us."""
        poll = select.poll()
        if self._is_silent:
            time.sleep(seconds)
            return []
        poll.register(self._from, select.POLLIN)
        if self._outgoing:
            poll.register(self._to, select.POLLOUT)
        for handle, _ in poll.poll(seconds * 1000):
            if handle == self._from.fileno():
                self._read()
            else:
                self._write()
        *lines, self._incoming = self._incoming.split(b"\n")
        try:
            return [from_worker(line) for line in lines]
        except msgspec.MsgspecError as error:
            raise ValueError(f"worker {self.pid} said what no worker says: {error}") from None

    def _read(self) -> None:
        said = os.read(self._from.fileno(), CHUNK)
        self._incoming += said
        self._is_silent = not said

    def _write(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):  # of a dead one, `read` tells
            self._outgoing = self._outgoing[os.write(self._to.fileno(), self._outgoing) :]

    @property
    def is_gone(self) -> bool:
        """Whether it will never say anything again."""
        return self._is_silent

    @property
    def has_died(self) -> bool:
        """Whether its process has ended, heard or not."""
        return self._process.poll() is not None

    def last_words(self) -> str:
        """The last line of its log."""
        with suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""

    def is_busy(self) -> bool:
        """Whether it has computed, read or written since the last time this was asked."""
        (then, cpu_before, moved_before), now = self._measured, time.monotonic()
        cpu, moved = self._used()
        self._measured = (now, cpu, moved)
        return cpu - cpu_before > BUSY_SHARE * (now - then) or moved != moved_before

    def _used(self) -> tuple[float, int]:
        """Seconds of a core, and bytes from and to disks."""
        try:
            process = psutil.Process(self.pid)
            times, moved = process.cpu_times(), process.io_counters()
        except (psutil.Error, OSError):
            return 0.0, 0
        return times.user + times.system, moved.read_bytes + moved.write_bytes

    def terminate(self) -> None:
        """SIGTERM: it leaves its clip at once, wherever it is."""
        self._process.terminate()

    def kill(self) -> str:
        """SIGKILL, where it is not gone by itself -> how it ended, in words."""
        self._process.kill()
        return self._ended(KILL_SECONDS) or "does not even end by SIGKILL (look at the system's log)"

    def end(self, seconds: float) -> str:
        """Take its stdin away and wait; kill it after `seconds` -> how it ended, in words."""
        with suppress(OSError):
            self._to.close()
        return self._ended(seconds) or self.kill()

    def _ended(self, seconds: float) -> str | None:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        for stream in (self._to, self._from):
            with suppress(OSError):
                stream.close()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
