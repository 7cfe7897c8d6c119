"""A row of the database as a Job, and back. A row that does not parse is no error: it becomes a failed Job."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from hvlite.jobs.job import UNREADABLE, How, Job, NewJob, Progress
from hvlite.request import Request

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T", Request, How)

# Columns that a Job takes as they are.
PLAIN = (
    *("id", "revision", "stop_after", "attempts", "crashes", "lost", "owner", "lock", "heartbeat", "beats", "asked"),
    *("checkpoint_step", "best_step", "seconds_per_step", "predicted_bytes", "peak_bytes", "version"),
    *("created", "started", "finished"),
)
PATHS = ("folder", "output", "latents", "checkpoint", "log")


class Unreadable(Exception):
    """Why a row's Request does not parse; never leaves this package."""


def read_job(row: "sqlite3.Row", position: int | None = None) -> Job:
    """The Job of a whole row; `position` is its place in line, if it is queued."""
    values = dict(zip(row.keys(), row, strict=True))  # a Row looks for a name from its first column on, every time
    fault, request, how = None, None, None
    try:
        request, how = parsed(values["request"], Request), parsed_how(values["how"])
    except Unreadable as error:
        fault = str(error)
    columns: dict[str, Any] = {name: values[name] for name in PLAIN}
    columns |= {name: None if values[name] is None else Path(values[name]) for name in PATHS}
    return Job(
        **columns,
        state=values["state"] if fault is None else "failed",
        position=position if fault is None else None,
        request=request,
        how=how,
        raw="" if fault is None else values["request"],
        reason=values["reason"] if fault is None else UNREADABLE,
        error=values["error"] if fault is None else fault,
        resolved=_object(values["resolved"]) or None,
        progress=_progress(values["progress"]),
        progressed=bool(values["progressed"]),
        timings=_object(values["timings"]),
    )


@lru_cache(maxsize=256)
def parsed_how(text: str) -> How:
    """Most jobs of a queue are made in the same way."""
    return parsed(text, How)


def parsed(text: str, kind: type[T]) -> T:
    """A Request or How from its JSON; Unreadable names the field that this version of hvlite cannot take."""
    try:
        values = msgspec.json.decode(text)
        if not isinstance(values, dict):
            raise Unreadable(f"the {kind.__name__} of this row is no JSON object")
        # msgspec would ignore a field that it does not know, and the clip would be another one.
        unknown = values.keys() - kind.__dataclass_fields__.keys()
        if unknown:
            raise Unreadable(
                f"this row has {', '.join(sorted(unknown))}, which this hvlite does not know: update hvlite"
            )
        return msgspec.convert(values, kind, dec_hook=_decode)
    except (msgspec.MsgspecError, ValueError) as error:
        raise Unreadable(f"the {kind.__name__} of this row does not parse: {error}") from None


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"{value!r} is no {kind.__name__}")


def encoded(value: object) -> str:
    """JSON text; equal values give equal text."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def new_row(new: NewJob) -> dict[str, object]:
    """The columns that a NewJob fills."""
    return {
        "request": encoded(new.request),
        "how": encoded(new.how),
        "folder": str(new.folder),
        "output": text_of(new.output),
        "named": int(new.output is not None),
        "latents": text_of(new.latents),
        "stop_after": new.stop_after,
    }


def text_of(path: Path | None) -> str | None:
    """A path for a column."""
    return None if path is None else str(path)


def _object(text: str | None) -> Mapping[str, Any]:
    """What is only shown may be broken without harm: then there is nothing to show."""
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _progress(text: str | None) -> Progress | None:
    try:
        return None if text is None else msgspec.json.decode(text, type=Progress)
    except msgspec.MsgspecError:
        return None
