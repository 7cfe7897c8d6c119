"""What is told when jobs end while somebody looks: notes in the corner, a bell, a note on the desktop."""

from collections.abc import Collection, Sequence
from typing import Literal

from hvlite.errors import RequestError
from hvlite.jobs.job import Job
from hvlite.jobs.store import Store, Undone
from hvlite.tui import words
from hvlite.tui.desk import View

Severity = Literal["information", "warning", "error"]
# What is told of one job; the others of the same look are counted.
MOST = 3
# So many obstacles to an undo.
TOLD = 5


def found(store: Store, ids: Sequence[int]) -> list[Job]:
    """Those that still are in the queue."""
    jobs = []
    for job_id in ids:
        try:
            jobs.append(store.job(job_id))
        except RequestError:
            continue
    return jobs


def words_of(jobs: Sequence[Job], view: View) -> list[tuple[str, Severity]]:
    """A line for each job that has ended, and one for the queue."""
    told = [line for job in jobs if (line := _line(job)) is not None]
    if len(told) > MOST:
        told[MOST:] = [(f"and {words.counted(len(told) - MOST, 'more job')} ended", "information")]
    if _is_over(view) and told:
        told.append((_sum(view), "information"))
    return told


def alarm_of(jobs: Sequence[Job], view: View) -> str | None:
    """What is worth a bell: a failure, and the end of the queue."""
    failed = next((job for job in jobs if job.state == "failed"), None)
    if failed is not None:
        return words.plain(f"job {failed.id} has failed: {failed.reason or failed.error or ''}")
    return _sum(view) if _is_over(view) and any(job.state in ("done", "parked") for job in jobs) else None


def desktop_note(text: str) -> str:
    """By the terminal: OSC 9 (iTerm2, kitty, WezTerm, Windows Terminal) and OSC 777 (foot, urxvt, VTE)."""
    safe = words.plain(text).replace(";", ",")
    return f"\x1b]9;hvlite: {safe}\x1b\\\x1b]777;notify;hvlite;{safe}\x1b\\"


def undone_words(undone: Undone) -> tuple[str, Severity]:
    """What an undo brought back, and what it could not."""
    obstacles, more = list(undone.obstacles[:TOLD]), len(undone.obstacles) - TOLD
    if more > 0:
        obstacles.append(f"and {more} more")
    if not undone.jobs:
        return f"`{undone.kind}` cannot be undone: {'; '.join(obstacles)}", "error"
    said = f"`{undone.kind}` of {words.named(undone.jobs)} is undone"
    if not obstacles:
        return said, "information"
    return f"{said}; not undone: {'; '.join(obstacles)}", "warning"


def farewell(view: View | None, workers: Collection[int], ending: Collection[int] = ()) -> str | None:
    """What goes on, or waits in vain, when the window is closed; None if nothing does.

    `ending` are the workers that were asked to end from here.
    """
    said, staying = [], set(workers) - set(ending)
    leaving = set(workers) & set(ending)
    if leaving:
        said.append(f"{_named(leaving)} saves its clip and ends")
    waiting = 0 if view is None else view.counts["queued"]
    wait = f"{words.counted(waiting)} wait{'s' * (waiting == 1)}"
    if view is not None and view.settings.queue != "active" and (waiting or staying):
        if staying:
            said.append(f"{_named(staying)} {'ends the running job' if view.running else 'has nothing to do'}")
        then = "" if staying else ", then hvlite work"
        said.append(f"{f'{wait} and ' if waiting else ''}the queue is paused: hvlite queue resume{then}")
    elif staying:
        said.append(f"{_named(staying)} goes on; hvlite tui looks again, hvlite queue ls --watch too")
    elif waiting or leaving:
        said.append(f"{f'{wait} and ' if waiting else ''}no worker runs{' then' * bool(leaving)}: hvlite work")
    return "; ".join(said) or None


def _named(workers: Collection[int]) -> str:
    return f"the worker (process {', '.join(map(str, sorted(workers)))})"


def _line(job: Job) -> tuple[str, Severity] | None:
    match job.state:
        case "done":
            took = f" after {words.progress_text(job)}" if words.progress_text(job) else ""
            return f"job {job.id} is done{took}; 3: gallery", "information"
        case "parked":
            return f"the draft of job {job.id} is ready; f renders it to its end", "information"
        case "failed":
            return words.plain(f"job {job.id} has failed: {job.error or job.reason or ''}"), "error"
        case "cancelled":
            return f"job {job.id} has stopped; r queues it again", "information"
        case _:
            return None


def _is_over(view: View) -> bool:
    return not view.running and not view.counts["queued"]


def _sum(view: View) -> str:
    failed = f", {view.counts['failed']} failed" if view.counts["failed"] else ""
    return f"the queue is done: {words.counted(view.counts['done'], 'clip')}{failed}"
