"""What a report says of one clip, and the two places it is known from: a job of the queue, a file's own metadata."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from hvlite import metadata, paths
from hvlite.errors import RequestError
from hvlite.events import Note
from hvlite.jobs.job import UNREADABLE, Job, State
from hvlite.metadata import Metadata
from hvlite.video.mp4 import read_metadata

SUFFIXES = (".mp4", ".png")
# What is told elsewhere on the page, or says nothing to a reader.
NO_SETTINGS = frozenset({"prompt", "model", "format", "timings", "created", "request"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One clip of a report. Times are seconds since 1970.

    `kind` names clips that take about equally long (model, size, frames). `is_whole`: timings and peak do not end
    before the decode. `strip` is a preview of what has no clip, `command` is what a user may do next. The files need
    not exist.
    """

    name: str
    state: State
    prompt: str
    kind: str
    settings: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    began: float | None = None
    ended: float | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    is_whole: bool = True
    reason: str | None = None
    error: str | None = None
    command: str | None = None
    clip: Path | None = None
    strip: Path | None = None
    log: Path | None = None


def entries_of_jobs(jobs: Iterable[Job], since: float | None) -> list[Entry]:
    """Of the jobs that ended at `since` or later, in that order; a row that cannot be read has no such time."""
    ended = [job for job in jobs if since is None or job.finished is None or job.finished >= since]
    return [entry_of_job(job) for job in sorted(ended, key=lambda job: (job.finished or 0.0, job.id))]


def entry_of_job(job: Job) -> Entry:
    """What the queue knows of a clip."""
    request: Mapping[str, Any] = job.resolved or msgspec.to_builtins(job.request) or {}
    how = msgspec.to_builtins(job.how, enc_hook=str) or {}
    counts = {name: getattr(job, name) for name in ("attempts", "crashes", "lost")}
    counts = {name: count for name, count in counts.items() if count > (name == "attempts")}
    return Entry(
        name=f"job {job.id}",
        state=job.state,
        prompt=str(request.get("prompt", job.prompt)),
        kind=_kind(how.get("model") or "default model", request),
        settings=_settings(request, how, counts, {"hvlite": job.version}),
        timings=job.timings,
        seconds_per_step=job.seconds_per_step,
        began=job.started,
        ended=job.finished,
        predicted_bytes=job.predicted_bytes,
        peak_bytes=job.peak_bytes,
        reason=job.reason,
        error=job.error,
        command=_command(job),
        clip=job.output if job.state == "done" else None,
        strip=None if job.state == "done" else paths.preview_file(job.id),
        log=job.log if job.state == "failed" else None,
    )


def _command(job: Job) -> str | None:
    if job.state == "parked":
        return f"hvlite queue finish {job.id}"
    is_retryable = job.state in ("failed", "cancelled") and job.reason != UNREADABLE
    return f"hvlite queue retry {job.id}" if is_retryable else None


def entries_of_folder(folder: Path, since: float | None) -> Iterator[Entry | Note]:
    """Of the clips that lie in `folder`, by what they say of themselves, oldest first; a Note for what says nothing."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    except OSError as error:
        raise RequestError(f"{folder} cannot be listed: {error.strerror or error}") from error
    found: list[Entry] = []
    for file in files:
        try:
            entry = entry_of_file(file, metadata.decode(read_metadata(file), file))
        except RequestError as error:
            yield Note(f"left out: {error}")
            continue
        if since is None or (entry.ended or 0.0) >= since:
            found.append(entry)
    yield from sorted(found, key=lambda entry: (entry.ended or 0.0, entry.name))


def entry_of_file(file: Path, made: Metadata) -> Entry:
    """What a finished clip says of itself; its header was written before its decode."""
    request = msgspec.to_builtins(made.request)
    machine = {each.name: getattr(made, each.name) for each in msgspec.structs.fields(Metadata)}
    versions, memory = machine.pop("versions"), machine.pop("memory")
    # a clip that went on from saved latents prepared no schedule: its time is not that of all steps
    leaner = {"out of memory, so": "; ".join(memory.descents)} if memory else {}
    denoise = made.timings.get("denoise") if "schedule" in made.timings else None
    return Entry(
        name=file.name,
        state="done",
        prompt=made.request.prompt,
        kind=_kind(made.model.name, request),
        settings=_settings(request, machine, {"weights": made.model.fingerprint[:12]}, leaner, versions),
        timings=made.timings,
        seconds_per_step=None if denoise is None else denoise / made.request.steps,
        ended=_seconds(made.created) or file.stat().st_mtime,
        predicted_bytes=memory.predicted_bytes if memory else None,
        peak_bytes=memory.actual_bytes if memory else None,
        is_whole=False,
        clip=file,
    )


def _kind(model: str, request: Mapping[str, Any]) -> str:
    size, frames = request.get("size"), request.get("frames")
    return ", ".join([model, *([_text(size)] if size else []), *([f"{frames} frames"] if frames else [])])


def _settings(*parts: Mapping[str, Any]) -> dict[str, str]:
    """All that says something, as text."""
    values = {name: value for part in parts for name, value in part.items() if name not in NO_SETTINGS}
    return {name: _text(value) for name, value in values.items() if value not in (None, "", {}, [])}


def _text(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return "x".join(str(each) for each in value)
        case dict():
            return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
        case _:
            return str(value)


def _seconds(stamp: str) -> float | None:
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (ValueError, OverflowError):
        return None
