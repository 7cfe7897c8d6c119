"""Job: one clip in the queue, its states, and the rules by which they change. Pure: no database, no clock, no torch.

    queued -> running -> done | failed | cancelled | parked      parked: a draft that waits to be finished
    running -> queued       by `pause --now`, a new plan after out-of-memory, or the death of a worker
    parked -> queued        by `finish`;   failed, cancelled -> queued by `retry`
    queued, parked -> cancelled;   queued -> failed where the row cannot be read

The queue as a whole is active, draining (nothing new starts) or paused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from hvlite.errors import RequestError
from hvlite.profile import Overrides
from hvlite.request import Request

State = Literal["queued", "running", "done", "failed", "cancelled", "parked"]
QueueState = Literal["active", "draining", "paused"]
Ask = Literal["cancel", "pause"]
Place = Literal["top", "bottom", "before", "after", "up", "down"]

STATES: tuple[State, ...] = get_args(State)
# In the order in which a list shows them.
OPEN: tuple[State, ...] = ("running", "queued", "parked")
ENDED: tuple[State, ...] = ("failed", "done", "cancelled")

CHANGES: Mapping[State, frozenset[State]] = {
    "queued": frozenset({"running", "cancelled", "failed"}),
    "running": frozenset({"queued", "done", "failed", "cancelled", "parked"}),
    "parked": frozenset({"queued", "cancelled"}),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset({"queued"}),
    "done": frozenset(),
}

# What a user may do to a job in which state, and what to do instead elsewhere.
ACTIONS: Mapping[str, frozenset[State]] = {
    "cancel": frozenset({"queued", "parked", "running"}),
    "edit": frozenset({"queued", "failed", "cancelled"}),
    "finish": frozenset({"parked"}),
    "mv": frozenset({"queued"}),
    "retry": frozenset({"failed", "cancelled"}),
    "rm": frozenset({"queued", "parked", "done", "failed", "cancelled"}),
}
INSTEAD: Mapping[tuple[str, State], str] = {
    ("edit", "running"): "change a copy: hvlite queue dup {id}",
    ("edit", "done"): "change a copy: hvlite queue dup {id}",
    ("edit", "parked"): "change a copy: hvlite queue dup {id}",
    ("retry", "done"): "make it again: hvlite queue dup {id}",
    ("retry", "queued"): "it is waiting already",
    ("retry", "running"): "it is at work already",
    ("retry", "parked"): "it is a draft: hvlite queue finish {id}",
    ("rm", "running"): "first: hvlite queue cancel {id}",
    ("finish", "queued"): "it is waiting already, and no draft",
}

PARTS = ("dit", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
JOB_NUMBER = re.compile("[0-9]{1,18}")
QUARANTINED = "quarantined"
UNREADABLE = "unreadable"


@dataclass(frozen=True, kw_only=True)
class How(Overrides):
    """With which weights, where."""

    model: str | None = None
    """`shapes` (embedded), `hunyuanvideo`, or a checkpoint folder."""
    dit: Path | None = None
    """A transformer file or folder that replaces the model's."""
    vae: Path | None = None
    """A VAE file or folder that replaces the model's."""
    text_encoder: Path | None = None
    """A Llama file or folder that replaces the model's."""
    text_encoder_2: Path | None = None
    """A CLIP file or folder that replaces the model's."""
    tokenizer: Path | None = None
    """The folder of Llama's tokenizer (by default that of --text-encoder, else the model's)."""
    tokenizer_2: Path | None = None
    """The folder of CLIP's tokenizer (by default that of --text-encoder-2, else the model's)."""
    profile: str | None = None
    """How memory is used: a name (see `hvlite profiles ls`), a .toml file, or auto."""
    device: str | None = None
    """cpu, cuda, cuda:N or meta (by default the CUDA device with most free memory, else cpu)."""
    decode_tile: str | None = None
    """Decode tiles: auto (by default: the published ones where they fit), published, wide (whole frames), exact (none:
    layers are put aside on disk), or FRAMESxHEIGHTxWIDTH such as 65x256."""

    def files(self) -> dict[str, Path | None]:
        """The files that replace parts, by part."""
        return {part: getattr(self, part) for part in PARTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What somebody asks for. Paths are absolute: the worker runs in another folder.

    `output` names the file; where it is None, a free name in `folder` is chosen when the job is first run. `stop_after`
    makes a draft: the job is parked after that many steps.
    """

    request: Request
    how: How
    folder: Path
    output: Path | None = None
    latents: Path | None = None
    stop_after: int | None = None

    def __post_init__(self) -> None:
        if self.stop_after is not None and self.stop_after < 1:
            raise RequestError(f"--stop-after-step must be at least 1; got {self.stop_after}")
        steps = self.request.steps
        if self.stop_after is not None and steps is not None and self.stop_after >= steps:
            raise RequestError(f"--stop-after-step must be below --steps ({steps}); got {self.stop_after}")


def check_suffix(output: Path, request: Request) -> None:
    """RequestError for an .mp4 of one frame or a .png of several; unknown counts are left to the worker."""
    if request.frames is None:
        return
    suffix = ".png" if request.frames == 1 else ".mp4"
    if output.suffix.lower() != suffix:
        raise RequestError(f"{request.frames} frame(s) make a {suffix} file; the output is named {output.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a running job is. `eta` is the clock time, in seconds since 1970, at which the stage is expected to end.

    `tensor_bytes` of the card are in tensors, `torch_bytes` are all that torch keeps of it; None off a card.
    """

    stage: str
    step: int = 0
    steps: int = 0
    detail: str = ""
    eta: float | None = None
    tensor_bytes: int | None = None
    torch_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a claim ended. `reason` is short and equal for equal causes (`out of memory in decode`); `error` is the
    whole line. `seconds_per_step` is of one pass through the transformer's blocks and all of its steps alike."""

    state: Literal["done", "failed", "cancelled", "parked"]
    reason: str | None = None
    error: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    peak_bytes: int | None = None
    log: Path | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of the queue. Times are seconds since 1970.

    `position` is the place in line from 1, None for jobs that are not queued. `revision` grows with every change but
    progress. `request` and `how` are None where the row cannot be read; `raw` is then what it holds. `beats` counts the
    signs of life of this claim (a clock may jump, a counter may not), `heartbeat` is the time of the last one.
    `best_step` is the furthest checkpoint ever, `progressed` whether this claim moved it.
    """

    id: int
    state: State
    position: int | None
    revision: int
    request: Request | None
    how: How | None
    raw: str = ""
    resolved: Mapping[str, Any] | None = None
    folder: Path | None = None
    output: Path | None = None
    latents: Path | None = None
    stop_after: int | None = None
    reason: str | None = None
    error: str | None = None
    attempts: int = 0
    crashes: int = 0
    lost: int = 0
    owner: str | None = None
    lock: str | None = None
    heartbeat: float | None = None
    beats: int = 0
    asked: Ask | None = None
    progress: Progress | None = None
    checkpoint: Path | None = None
    checkpoint_step: int | None = None
    best_step: int = 0
    progressed: bool = False
    timings: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    log: Path | None = None
    version: str | None = None
    created: float = 0.0
    started: float | None = None
    finished: float | None = None

    @property
    def prompt(self) -> str:
        """What to show of it in a line."""
        return self.request.prompt if self.request is not None else self.raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of the queue, not of a job. `on_done` is a command for the worker, see `hook`."""

    queue: QueueState = "active"
    pause_reason: str | None = None
    crash_limit: int = 2
    lost_limit: int = 8
    failure_limit: int = 3
    on_done: str | None = None

    def __post_init__(self) -> None:
        for name in ("crash_limit", "lost_limit", "failure_limit"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a running job whose worker has gone."""

    state: Literal["queued", "failed", "cancelled"]
    crashes: int
    lost: int
    reason: str | None = None
    error: str | None = None


def may_change(old: State, new: State) -> bool:
    """Whether a job of state `old` may become `new`."""
    return new in CHANGES[old]


def refusal(action: str, job_id: int, state: State, *, is_draft: bool = False) -> str | None:
    """Why `action` is not for a job in this state; None if it is. A draft need not have run to be made whole."""
    if state in ACTIONS[action] or (is_draft and (action, state) == ("finish", "queued")):
        return None
    instead = INSTEAD.get((action, state))
    hint = f"; {instead.format(id=job_id)}" if instead else ""
    return f"job {job_id} is {state}: `{action}` takes {' and '.join(_in_order(ACTIONS[action]))} jobs{hint}"


def _in_order(states: frozenset[State]) -> list[State]:
    return [state for state in STATES if state in states]


def after_crash(job: Job, settings: Settings, what: str, error: str | None = None) -> Verdict:
    """A living supervisor saw the worker die or hang (`what` says which, in a few words; `error` is the worker's)."""
    crashes = job.crashes + (not job.progressed)
    if crashes >= settings.crash_limit:
        last = f" (last: {error.splitlines()[0]})" if error else ""
        return _quarantine(
            crashes, job.lost, f"its worker {what} {crashes} times in a row without a new checkpoint{last}"
        )
    return _again(job, crashes, job.lost)


def after_loss(job: Job, settings: Settings) -> Verdict:
    """Worker and supervisor are both gone: a power cut, a killed session, or a job that takes the machine down."""
    lost = job.lost + (not job.progressed)
    if lost >= settings.lost_limit:
        return _quarantine(job.crashes, lost, f"{lost} times in a row nothing was left of its worker")
    return _again(job, job.crashes, lost)


def _quarantine(crashes: int, lost: int, why: str) -> Verdict:
    error = f"quarantined: {why}; to try it again: hvlite queue retry"
    return Verdict(state="failed", crashes=crashes, lost=lost, reason=QUARANTINED, error=error)


def _again(job: Job, crashes: int, lost: int) -> Verdict:
    """Back into the queue; or out of it, where its user had asked for that before the worker went."""
    if job.asked == "cancel":
        return Verdict(state="cancelled", crashes=crashes, lost=lost, reason="cancelled by user")
    return Verdict(state="queued", crashes=crashes, lost=lost)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where to move jobs in the line; `anchor` is the job that `before` and `after` speak of."""

    place: Place
    anchor: int | None = None


def ids_of(text: Sequence[str]) -> list[tuple[int, int]]:
    """`3`, `3-7`, `3,5-6` -> inclusive ranges of job numbers."""
    ranges = []
    for part in ",".join(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not JOB_NUMBER.fullmatch(first) or (dash and not JOB_NUMBER.fullmatch(last)):
            raise RequestError(f"{part!r} is no job number: use 3, or 3-7, or 3,5-7")
        start, end = int(first), int(last or first)
        if start > end:
            raise RequestError(f"{part!r} counts backwards: use {end}-{start}")
        ranges.append((start, end))
    return ranges


def job_json(job: Job) -> dict[str, Any]:
    """Plain values under stable names, for `--json`; what was asked of the machine stands beside the rest."""
    values: dict[str, Any] = msgspec.to_builtins(job, enc_hook=str)
    how = values.pop("how") or {}
    head = {key: values.pop(key) for key in ("id", "state", "position")}
    return {**head, "model": how.get("model"), "profile": how.get("profile"), **values, **how}
