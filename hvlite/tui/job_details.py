"""Everything about one job beside the list: facts, the picture it is at, the end of its log."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from hvlite import paths
from hvlite.jobs.job import Job
from hvlite.tui import words
from hvlite.tui.pictures import Pictures, read_strip

if TYPE_CHECKING:
    from hvlite.video.frames import Frame

TAIL_LINES = 12
TAIL_BYTES = 8192
LOG_BYTES = 1 << 20

Facts = list[tuple[str, str]]


class JobDetails(VerticalScroll, can_focus=False):
    """Shows a job; its files are read in the background, and again when the job has changed."""

    def compose(self) -> ComposeResult:
        yield Static(id="facts")
        yield Pictures(id="strip")
        yield Static(id="tail")

    def on_mount(self) -> None:
        self.found: Facts = []
        self.tail = ""

    @work(group="files", exclusive=True)
    async def show(self, job: Job | None, now: float, end: float | None) -> None:
        drawn = asyncio.Event()
        self.call_after_refresh(drawn.set)
        await drawn.wait()  # the list comes first: other facts may take other room, and all is laid out anew
        found = [] if job is None else facts(job, now, end)
        if found != self.found:
            self.found = found
            self.query_one("#facts", Static).update(facts_table(found))
        tail, strip = ("", []) if job is None else await asyncio.to_thread(_files_of, job)
        if tail != self.tail:
            self.tail = tail
            self.query_one("#tail", Static).update(Text(tail, style="dim", overflow="ellipsis", no_wrap=True))
        self.query_one(Pictures).show(strip)
        self.set_class(bool(strip), "-pictured")


def _files_of(job: Job) -> "tuple[str, list[Frame]]":
    lines = [words.plain(line) for line in log_text(job, TAIL_BYTES).splitlines() if line.strip()]
    wants_picture = job.state in ("running", "parked", "queued")
    return "\n".join(lines[-TAIL_LINES:]), read_strip(paths.preview_file(job.id)) if wants_picture else []


def log_file(job: Job) -> Path:
    """What the worker says of it; only an ended job's row names it."""
    return job.log or paths.job_log(job.id)


def log_text(job: Job, most: int = LOG_BYTES) -> str:
    """The end of its log, "" where there is none."""
    try:
        with log_file(job).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most))
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def facts_table(found: Facts) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found:
        table.add_row(name, Text(value))
    return table


def facts_text(found: Facts) -> Text:
    """The same as text that can be unwrapped."""
    text = Text()
    for index, (name, value) in enumerate(found):
        text.append("\n" if index else "")
        text.append(f"{name:9} ", "bold")
        text.append(value)
    return text


def facts(job: Job, now: float, end: float | None) -> Facts:
    """What to know of a job, most wanted first."""
    found: Facts = [("job", f"{job.id}  {words.state_text(job)}"), *_course(job, now, end)]
    if job.error:
        found.append(("error", words.plain(job.error)))
    elif job.reason and job.state != "done":
        found.append(("reason", words.plain(job.reason)))
    found.append(("prompt", words.plain(job.prompt)))
    if job.request is not None:
        found += _request_facts(job)
    if job.how is not None:
        found.append(("with", _how_text(job)))
    return [*found, *_result_facts(job), *_time_facts(job, now)]


def _course(job: Job, now: float, end: float | None) -> Facts:
    """Where it is, and when it will be ready."""
    if job.state not in ("running", "queued", "parked"):
        return []
    found: Facts = []
    if text := words.asked_text(job) or words.progress_text(job):
        detail = "" if job.progress is None or job.state != "running" else f", {words.plain(job.progress.detail)}"
        found.append(("at", text + detail.rstrip(", ")))
    if end is not None:
        found.append(("ready", f"{words.clock(end, now)}, in {words.duration(end - now)}"))
    return found


def _request_facts(job: Job) -> Facts:
    request, resolved = job.request, job.resolved or {}
    assert request is not None
    found = [words.clip_text(job)]
    for name in ("steps", "guidance", "flow_shift", "cfg_scale"):
        asked = getattr(request, name)
        value = asked if asked is not None else resolved.get(name)
        if value is not None and (name != "cfg_scale" or value != 1):
            found.append(f"{name.replace('_', ' ')} {words.number(value)}")
    facts: Facts = [("clip", ", ".join(found)), ("seed", str(request.seed))]
    if request.negative_prompt:
        facts.append(("not", words.plain(request.negative_prompt)))
    if job.stop_after is not None:
        facts.append(("draft", f"stops after step {job.stop_after}; f renders it to its end"))
    return facts


def _how_text(job: Job) -> str:
    assert job.how is not None
    values = {name: value for name, value in vars(job.how).items() if value is not None}
    model, profile = values.pop("model", "default model"), values.pop("profile", "auto")
    rest = "".join(f", {name.replace('_', '-')} {value}" for name, value in values.items())
    return words.plain(f"{model}, profile {profile}{rest}")


def _result_facts(job: Job) -> Facts:
    found: Facts = []
    if job.output is not None:
        gone = "" if job.state != "done" or job.output.exists() else "  (the file is gone)"
        found.append(("file", words.plain(words.short_path(job.output)) + gone))
    elif job.folder is not None:
        found.append(("folder", words.plain(words.short_path(job.folder))))
    peaks = [(f"{name} {words.gib(nbytes)}") for name, nbytes in _peaks(job) if nbytes is not None]
    if peaks:
        found.append(("memory", ", ".join(peaks)))
    if job.seconds_per_step is not None:
        found.append(("speed", f"{job.seconds_per_step:.2f} s a step{_timings(job)}"))
    return found


def _peaks(job: Job) -> list[tuple[str, int | None]]:
    return [("plan", job.predicted_bytes), ("peak", job.peak_bytes)]


def _timings(job: Job) -> str:
    parts = [f"{name} {words.duration(seconds)}" for name, seconds in job.timings.items()]
    return f" ({', '.join(parts)})" if parts else ""


def _time_facts(job: Job, now: float) -> Facts:
    times = [("queued", job.created), ("started", job.started), ("ended", job.finished)]
    found = [f"{name} {words.clock(at, now)}" for name, at in times if at]
    if job.attempts > 1:
        found.append(f"{job.attempts} attempts")
    if job.crashes or job.lost:
        found.append(f"{words.counted(job.crashes, 'crash').replace('crashs', 'crashes')}, lost {job.lost}")
    return [("times", ", ".join(found))]
