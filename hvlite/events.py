"""The words the engine speaks while it renders: frozen values, one class each, no behaviour."""

from dataclasses import dataclass
from pathlib import Path


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
class TileDone:
    """Decode tile `tile` of `tiles` (from 0) is finished."""

    tile: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A file is complete under its final name. `kind`: `latents`, `video`, `image`."""

    kind: str
    path: Path


@dataclass(frozen=True, slots=True)
class Note:
    """Something a user should know; never an error."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The clip is done. `timings` are seconds per stage."""

    path: Path | None
    timings: dict[str, float]


Event = Stage | BlockDone | StepDone | TileDone | Saved | Note | Finished
