"""How jobs look in a terminal: as a table, as one job whole, as the state of the queue. Nothing is printed here."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hvlite.jobs.job import ENDED, OPEN, Job, Settings, State
from hvlite.progress import printable

Ends = Mapping[int, float | None]

GIB = 1 << 30
DAY = 86_400.0
# A worker reports every second or so.
SILENT_SECONDS = 120.0
NARROWEST_PROMPT = 16
NO_WORKER = "no worker runs; start one: hvlite work"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table; it is left out where no job has anything in it."""

    title: str
    cell: Callable[[Job], object]
    right: bool = False


def job_table(jobs: Sequence[Job], ends: Ends, now: float, width: int, without: Collection[str] = ()) -> list[str]:
    """Lines, the first one the heads; the prompt takes what the other columns leave of `width`."""
    from rich.cells import cell_len, set_cell_size

    columns = [column for column in _columns(ends, now) if column.title not in without]
    cells = [[_text(column.cell(job)) for column in columns] for job in jobs]
    shown = [index for index in range(len(columns)) if any(row[index] for row in cells)]
    widths = {index: max(cell_len(columns[index].title), *(cell_len(row[index]) for row in cells)) for index in shown}
    prompt = next(index for index in shown if columns[index].title == "prompt")
    others = sum(widths[index] + 2 for index in shown if index != prompt)
    widths[prompt] = min(widths[prompt], max(width - others, NARROWEST_PROMPT))

    def line(row: Sequence[str]) -> str:
        parts = []
        for index in shown:
            text = row[index]
            if cell_len(text) > widths[index]:
                text = set_cell_size(text, widths[index] - 3) + "..."
            blank = " " * (widths[index] - cell_len(text))
            parts.append(blank + text if columns[index].right else text + blank)
        return "  ".join(parts).rstrip()

    return [line([column.title for column in columns]), *(line(row) for row in cells)]


def _columns(ends: Ends, now: float) -> list[Column]:
    return [
        Column("id", lambda job: job.id, right=True),
        Column("state", lambda job: job.state),
        Column("#", lambda job: job.position, right=True),
        Column("prompt", lambda job: " ".join(job.prompt.split()) or "(empty)"),
        Column("size", lambda job: (size := _resolved(job, "size")) and "{}x{}".format(*size)),
        Column("frames", lambda job: _resolved(job, "frames"), right=True),
        Column("steps", lambda job: _resolved(job, "steps"), right=True),
        Column("seed", lambda job: job.request and str(job.request.seed), right=True),
        Column("model", lambda job: job.how and job.how.model and Path(job.how.model).name),
        Column("profile", lambda job: job.how and job.how.profile),
        Column("weights", lambda job: job.how and job.how.weights),
        Column("progress", lambda job: progress_text(job, now)),
        Column("end", lambda job: _end_text(job, ends, now)),
    ]


def _resolved(job: Job, name: str) -> Any:
    """What was asked for; what the model made of it, once that is known; else None."""
    asked = None if job.request is None else getattr(job.request, name)
    return (job.resolved or {}).get(name) if asked is None else asked


def _text(value: object) -> str:
    return "" if value is None or value is False else printable(str(value))


def progress_text(job: Job, now: float) -> str:
    """The one thing to know of a job in its state."""
    match job.state:
        case "running":
            return _running_text(job, now)
        case "queued":
            return _waiting_text(job)
        case "parked":
            return f"draft, {job.checkpoint_step or job.stop_after} steps"
        case "done":
            took = "" if job.started is None or job.finished is None else span(job.finished - job.started)
            return ", ".join(part for part in (took, "" if job.output is None else job.output.name) if part)
        case _:
            return job.reason or ""


def _running_text(job: Job, now: float) -> str:
    asked = {"cancel": "cancelling, ", "pause": "pausing, "}.get(job.asked or "", "")
    if job.heartbeat is not None and now - job.heartbeat > SILENT_SECONDS:
        return f"{asked}no sign of life for {span(now - job.heartbeat)}"
    progress = job.progress
    if progress is None:
        return f"{asked}starting"
    step = f" {progress.step}/{progress.steps}" if progress.steps else ""
    detail = f" {progress.detail}" if progress.detail else ""
    return f"{asked}{progress.stage}{step}{detail}"


def _waiting_text(job: Job) -> str:
    parts = [
        f"from step {job.checkpoint_step}" if job.checkpoint_step else "",
        f"draft, {job.stop_after} steps" if job.stop_after else "",
        f"crashed {job.crashes}x" if job.crashes else "",
        f"lost {job.lost}x" if job.lost else "",
    ]
    return ", ".join(part for part in parts if part)


def _end_text(job: Job, ends: Ends, now: float) -> str:
    end = job.finished if job.state in ENDED else ends.get(job.id)
    return "" if end is None else clock_at(end, now)


def queue_lines(
    settings: Settings, counts: Mapping[State, int], end: float | None, now: float, *, is_served: bool
) -> list[str]:
    """The state of the queue as a whole, and what to do about it; `is_served`: a worker runs."""
    waiting = [f"{counts[state]} {state}" for state in ("running", "queued", "parked") if counts[state]]
    ended = [f"{counts[state]} {state}" for state in ENDED if counts[state]]
    lines = []
    if waiting:
        lines.append(", ".join(waiting) + ("" if end is None else f"; all done about {clock_at(end, now)}"))
    elif not ended:
        lines.append('the queue is empty; add a clip: hvlite queue add "PROMPT"')
    else:
        lines.append("nothing is waiting")
    if ended:
        lines[0] += f" ({', '.join(ended)}: hvlite queue ls --all)"
    if settings.queue != "active":
        why = f" ({settings.pause_reason})" if settings.pause_reason else ""
        what = "paused" if settings.queue == "paused" else "pausing: nothing new starts"
        lines.append(f"the queue is {what}{printable(why)}; go on: hvlite queue resume")
    if counts["running"] and not is_served:
        lines.append("the worker is gone; go on where it was: hvlite work")
    elif settings.queue == "active" and counts["queued"] and not is_served:
        lines.append(NO_WORKER)
    if counts["parked"]:
        lines.append("finish a draft: hvlite queue finish ID")
    return lines


def job_details(job: Job, end: float | None, now: float) -> list[str]:
    """Everything that is known of a job, a line each."""
    values: dict[str, Any] = {
        "job": f"{job.id}, {job.state}" + ("" if job.position is None else f", number {job.position} in line"),
        "progress": progress_text(job, now) if job.state in OPEN else None,
        "done about": None if end is None or job.state in ENDED else clock_at(end, now),
        "error": job.error,
        "reason": job.reason,
        "output": job.output or (None if job.folder is None else f"{job.folder}/ (named when it first runs)"),
        "latents": job.latents,
        "checkpoint": job.checkpoint and f"{job.checkpoint} (step {job.checkpoint_step})",
        "attempts": f"{job.attempts} (crashes {job.crashes}, lost {job.lost})" if job.attempts else None,
        "worker": job.owner and f"{job.owner} on {job.lock}",
        **{
            name: None if at is None else clock_at(at, now, always_day=True)
            for name, at in (("created", job.created), ("started", job.started), ("finished", job.finished))
        },
        "took": None if job.started is None or job.finished is None else span(job.finished - job.started),
        "timings": ", ".join(f"{stage} {span(seconds)}" for stage, seconds in job.timings.items()),
        "seconds per step": job.seconds_per_step and f"{job.seconds_per_step:.3g}",
        "memory": _memory_text(job),
        "log": job.log,
        "hvlite": job.version,
    }
    how = {} if job.how is None else asdict(job.how)
    request = {"request": job.raw} if job.request is None else asdict(job.request)
    if request.get("size"):
        request["size"] = "{}x{}".format(*request["size"])
    lines = []
    for section in (values, how, request):
        rows = [(key, value) for key, value in section.items() if value not in (None, "", 0) or key == "seed"]
        lines += ["", *(f"{key:17} {printable(str(value))}" for key, value in rows)] if rows else []
    return lines[1:]


def _memory_text(job: Job) -> str:
    known = (("predicted", job.predicted_bytes), ("peak", job.peak_bytes))
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in known if size is not None)


def clock_at(at: float, now: float, *, always_day: bool = False) -> str:
    """A clock time; with its day where that is not plain."""
    moment, today = time.localtime(at), time.localtime(now)
    if always_day or abs(at - now) > 6 * DAY:
        return time.strftime("%Y-%m-%d %H:%M", moment)
    return time.strftime("%H:%M" if moment[:3] == today[:3] else "%a %H:%M", moment)


def span(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def ranges_text(ids: Sequence[int]) -> str:
    """`3-5,9`: what the queue's commands take as job numbers."""
    ordered = sorted(ids)
    starts = [ordered[0], *(after for before, after in pairwise(ordered) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ordered) if after != before + 1), ordered[-1]]
    ranges = zip(starts, ends, strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
