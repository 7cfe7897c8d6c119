"""The worker as seen from outside: is one there, and start one that outlives this window. Nothing of it is imported."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from hvlite import paths
from hvlite.atomic import explained
from hvlite.errors import ExitCode
from hvlite.jobs.job import Job
from hvlite.tui import words

LOCKS = Path("/proc/locks")
# -P: a folder in which somebody opens this window must not lend it its modules.
COMMAND = (sys.executable, "-P", "-m", "hvlite.cli", "work")
# Ends that were asked for; failed jobs are told of one by one.
ORDERLY = (ExitCode.DONE, ExitCode.SOME_FAILED, 130, 143)
# A worker says that it lives every second or so; a block of a large clip may keep it for longer.
SILENT_SECONDS = 60.0


def worker_log() -> Path:
    return paths.logs_folder() / "worker.log"


def start_worker() -> "subprocess.Popen[bytes]":
    """Start `hvlite work` in a session of its own, so that neither Ctrl+C nor a hang-up here reaches it."""
    log = worker_log()
    with explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                COMMAND,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )


def last_words(code: int) -> str | None:
    """Why a worker that was started here has ended; None if as it was asked to."""
    if code in ORDERLY:
        return None
    try:
        lines = worker_log().read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    return words.plain(f"the worker has ended ({how}): {lines[-1] if lines else 'its log is empty'}")


def stop_workers(pids: Collection[int]) -> str:
    """Ask them to end, as Ctrl+C in their own terminal does -> what to tell."""
    told = []
    for pid in pids:
        try:
            if pid <= 1:  # it lives in a container that this process cannot look into
                raise ProcessLookupError(errno.ESRCH, "it is not to be seen from here")
            os.kill(pid, signal.SIGTERM)
        except OSError as error:
            told.append(f"worker {pid} cannot be stopped: {error.strerror}")
        else:
            told.append(f"asked worker {pid} to save its clip and to end")
    return "; ".join(told)


def held_locks(folder: Path | None = None, locks: Path = LOCKS) -> dict[str, int]:
    """The devices that are served, by their lock's name, and the process that holds each lock.

    The kernel's list is only read: trying a lock could be in the way of a worker that is just starting.
    """
    folder = paths.lock_file("any").parent if folder is None else folder
    try:
        files = {file.stat().st_ino: file.stem for file in folder.glob("*.lock")}
        lines = locks.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    held = {}
    for line in lines:
        fields = line.split()
        # `1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF`; `1: -> ...` waits for it
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[3] == "WRITE":
            name = files.get(int(fields[5].rpartition(":")[2]))
            if name is not None:
                held[name] = int(fields[4])
    return held


class Pulse:
    """Notices when a running job gives no more sign of life; counts beats, since clocks may jump."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def silent(self, running: "list[Job]", now: float) -> dict[int, float]:
        """Seconds since the last beat, of those jobs that are silent for too long; `now` is a steady clock's."""
        self._seen = {
            job.id: self._seen[job.id] if self._seen.get(job.id, (-1, 0.0))[0] == job.beats else (job.beats, now)
            for job in running
        }
        return {job: now - since for job, (_, since) in self._seen.items() if now - since >= SILENT_SECONDS}


def worker_words(running: "list[Job]", held: Mapping[str, int], silent: Mapping[int, float]) -> str | None:
    """What is wrong with the workers, and what helps; None if nothing is."""
    for job in running:
        if job.lock is not None and job.lock not in held and held_is_known():
            return f"the worker of job {job.id} is gone: nothing is lost, W starts a new one, which goes on"
        if job.id in silent:
            return f"job {job.id}: no sign of life from its worker for {silent[job.id]:.0f} s; see its log (l)"
    return None


def held_is_known() -> bool:
    """Whether this system tells who holds locks, and a worker has ever been here."""
    return LOCKS.exists() and paths.lock_file("any").parent.is_dir()
