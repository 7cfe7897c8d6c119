"""The words the engine speaks while it renders: frozen values, one class each, no behaviour."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hvlite.metadata import MemoryUsed


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage has begun: `text`, `schedule`, `denoise`, `decode`."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDone:
    """A block of a step is finished (both count from 0); it waited `waited_s` seconds for its weights."""

    step: int
    steps: int
    block: int
    blocks: int
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepDone:
    """Step `step` of `steps` (from 0) is finished and took `seconds`."""

    step: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """Of the weights that stay at hand while steps are made, so many bytes are there."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TileDone:
    """Decode tile `tile` of `tiles` (from 0) is finished."""

    tile: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where this clip will lie, and its latents until then; neither is there yet."""

    clip: Path
    latents: Path


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """What step `step` of `steps` (from 0) takes the finished clip for: latents [1,C,T,H,W], fp32, on the CPU."""

    step: int
    steps: int
    latents: "Tensor"


@dataclass(frozen=True, slots=True)
class Parked:
    """The run ends, as asked, with `done` of `steps` steps; `latents` is what goes on from there."""

    latents: Path
    done: int
    steps: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A file is complete under its final name. `kind`: `unfinished`, `latents`, `video`, `image`."""

    kind: str
    path: Path


@dataclass(frozen=True, slots=True)
class Note:
    """Something a user should know; never an error."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The clip is done. `timings` are seconds per stage; `memory` is what the device gave for it."""

    path: Path | None
    timings: dict[str, float]
    memory: "MemoryUsed | None" = None


Event = Stage | Loaded | BlockDone | StepDone | TileDone | Preview | Chosen | Saved | Parked | Note | Finished
