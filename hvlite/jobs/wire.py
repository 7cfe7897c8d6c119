"""What supervisor and worker say to each other: one JSON object a line, over the worker's stdin and stdout. No torch.

supervisor                                   worker
                                <-           Ready
Render                          ->
                                <-           Planned
Go (the file to write)          ->
Stop (at the next block)        ->
                                <-           Spoke*, Packed*, Holds*, Kept*
                                <-           Ended
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from hvlite.events import (
    BlockDone,
    Chosen,
    Event,
    Finished,
    Loaded,
    Note,
    Parked,
    Preview,
    Saved,
    Stage,
    StepDone,
    TileDone,
)
from hvlite.jobs.job import How
from hvlite.request import Request, ResolvedRequest

T = TypeVar("T")


def _from_text(kind: type[T], value: object) -> T:
    if issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    raise ValueError(f"{value!r} is no {kind.__name__}")


class Render(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make this clip. `ahead`: what is likely to come next with the same model, so that its prompts can be read now.

    `attempt` counts from 1; `has_checkpoint`: an earlier one has left what this one may go on from.
    """

    job: int
    request: Request
    how: How
    attempt: int
    has_checkpoint: bool
    latents: Path | None
    stop_after: int | None
    save_seconds: float
    ahead: list[Request] = []


class Go(msgspec.Struct, frozen=True, tag=True):
    """The answer to the Planned of `job`: write to `output`."""

    job: int
    output: Path


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave the clip at the next block or tile, with its steps saved."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker has loaded its libraries, and begins with its first Render."""

    version: str


class Planned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is open and the clip fits. `resumes`: it goes on from its checkpoint."""

    resolved: ResolvedRequest
    predicted_bytes: int
    suffix: str
    resumes: bool


class Spoke(msgspec.Struct, frozen=True, tag=True):
    """An event of the engine; `event` unpacks it."""

    kind: str
    values: dict[str, Any]

    @property
    def event(self) -> Event:
        return msgspec.convert(self.values, KINDS[self.kind], dec_hook=_from_text)


class Packed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How far the packing of a checkpoint is."""

    slab: str
    done_bytes: int
    total_bytes: int


class Holds(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What torch has of the card now: in tensors, and altogether."""

    tensor_bytes: int
    torch_bytes: int


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint is complete on disk, with `step` finished steps."""

    step: int


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No more of this clip. `output` is the file of a `done` one; `held_bytes` what the worker holds now.

    `stopped` as it was asked to; `busy`: another process prepares the same model, try again later; `memory` and
    `device`: memory ran out, or CUDA failed, while it ran. `is_last`: this worker ends now, a fresh one must go on.
    """

    kind: Literal["done", "parked", "stopped", "failed", "busy", "memory", "device"]
    output: Path | None = None
    reason: str | None = None
    error: str | None = None
    timings: Mapping[str, float] = {}
    seconds_per_step: float | None = None
    peak_bytes: int | None = None
    held_bytes: int | None = None
    is_last: bool = False


ToWorker = Render | Go | Stop
FromWorker = Ready | Planned | Spoke | Packed | Holds | Kept | Ended
# A Preview is not told: its tensor stays where it is.
KINDS: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (BlockDone, Chosen, Finished, Loaded, Note, Parked, Saved, Stage, StepDone, TileDone)
}
_from_worker = msgspec.json.Decoder(FromWorker, dec_hook=_from_text)
_to_worker = msgspec.json.Decoder(ToWorker, dec_hook=_from_text)


def line_of(message: ToWorker | FromWorker) -> bytes:
    """One line, with its end."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"


def from_worker(line: bytes) -> FromWorker:
    """Raises msgspec.MsgspecError for what no worker says."""
    message: FromWorker = _from_worker.decode(line)
    return message


def to_worker(line: bytes) -> ToWorker:
    """Raises msgspec.MsgspecError for what no supervisor says."""
    message: ToWorker = _to_worker.decode(line)
    return message


def spoken(event: Event) -> Spoke:
    """An event for the wire."""
    assert not isinstance(event, Preview)
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    return Spoke(type(event).__name__, {name: _plain(value) for name, value in values.items()})


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
