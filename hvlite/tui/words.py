"""What the screens say of jobs, sizes and times: plain functions from values to text."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from hvlite.jobs.job import How, Job, State
from hvlite.profile import GIB
from hvlite.request import Request

# A sign beside the word, so that nothing hangs on colour.
SIGNS: Mapping[State, str] = {
    "running": "\u25b6",
    "queued": "\u00b7",
    "parked": "\u25c6",
    "done": "\u2713",
    "failed": "\u2717",
    "cancelled": "\u2013",
}
# So many jobs are told by their numbers.
NAMED = 6
FULL, EMPTY = "\u2501", "\u2500"


def plain(text: str) -> str:
    """In one line, without what could steer a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()


def state_text(job: Job) -> str:
    """Sign and word."""
    return f"{SIGNS[job.state]} {job.state}"


def asked_text(job: Job) -> str:
    """What a running job was asked to do, "" if nothing."""
    return {"cancel": "stopping", "pause": "pausing"}.get(job.asked or "", "")


def size_text(job: Job) -> str:
    """HEIGHTxWIDTH, `model's` where the model's default is not known yet."""
    size = _value(job, "size")
    return f"{size[0]}x{size[1]}" if isinstance(size, list | tuple) else "default"


def shape_text(job: Job) -> str:
    """HEIGHTxWIDTHxFRAMES, as far as it is known."""
    frames = _value(job, "frames")
    return size_text(job) if frames is None else f"{size_text(job)}x{frames}"


def clip_text(job: Job) -> str:
    """Size and length, as far as they are known."""
    size, frames = _value(job, "size"), _value(job, "frames")
    if size is None and frames is None:
        return "the model's size and length"
    shown = "default size" if size is None else size_text(job)
    return f"{shown}, {'default length' if frames is None else f'{frames} frames'}"


def _value(job: Job, name: str) -> object:
    asked = None if job.request is None else getattr(job.request, name)
    return asked if asked is not None else (job.resolved or {}).get(name)


def fraction(job: Job) -> float | None:
    """Of its steps; None before the first and for jobs that do not run."""
    if job.state != "running" or job.progress is None or not job.progress.steps:
        return None
    return min(1.0, job.progress.step / job.progress.steps)


def progress_text(job: Job) -> str:
    """Where it is: the stage and step of a running job, the checkpoint of a waiting one, the reason of a failed one."""
    if job.state == "running":
        if job.progress is None:
            return "starting"
        steps = f" {job.progress.step}/{job.progress.steps}" if job.progress.steps else ""
        return f"{plain(job.progress.stage)}{steps}"
    if job.state in ("queued", "parked"):
        return f"from step {job.checkpoint_step}" if job.checkpoint_step else ""
    if job.state == "done":
        return "" if job.started is None or job.finished is None else duration(job.finished - job.started)
    return plain(job.reason or "")


def bar(share: float, width: int) -> str:
    full = round(share * width)
    return FULL * full + EMPTY * (width - full)


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(at: float, now: float) -> str:
    """The time of day; with its weekday or date, where that is not today's."""
    then, today = time.localtime(at), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %H:%M" if abs(at - now) < 6 * 86400 else "%d %b %H:%M", then)


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def counted(count: int, what: str = "job") -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def named(ids: Sequence[int]) -> str:
    """Jobs by their numbers, which stand in their order; a few are named, the others are counted."""
    ordered = sorted(ids)
    if len(ordered) == 1:
        return f"job {ordered[0]}"
    if ordered[-1] - ordered[0] == len(ordered) - 1 > 1:
        return f"jobs {ordered[0]} to {ordered[-1]}"
    first, last = ordered[:-1], str(ordered[-1])
    if len(ordered) > NAMED:
        first, last = ordered[:NAMED], f"{len(ordered) - NAMED} more"
    return f"jobs {', '.join(map(str, first))} and {last}"


def number(value: float) -> str:
    """Without needless zeros, and so that it reads back as the same."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def command_of(request: Request, how: How) -> str:
    """The command line that renders the same."""
    words = ["hvlite", "gen", request.prompt]
    for field in fields(Request)[1:]:
        words += _flag(field.name, getattr(request, field.name), field.default)
    for field in fields(How):
        words += _flag(field.name, getattr(how, field.name), field.default)
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    """As a shell takes it, in one line and without what could steer a terminal."""
    if word.isprintable():
        return shlex.quote(word)
    signs = {"\n": "\\n", "\t": "\\t", "'": "\\'", "\\": "\\\\"}
    return f"$'{''.join(signs.get(sign) or (sign if sign.isprintable() else _escape(sign)) for sign in word)}'"


def _escape(sign: str) -> str:
    number = ord(sign)
    return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _flag(name: str, value: object, default: object) -> list[str]:
    if value == default and name != "seed":
        return []
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, tuple) else (value,)
    return [flag, *(number(each) if isinstance(each, float) else str(each) for each in values)]


def short_path(path: Path) -> str:
    """With ~ for the home folder."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)
