"""How far a claimed job is: what its worker has told of it, when, and what its users want of it meanwhile.

Durations are measured by a clock that never jumps; only the time at which it is expected to be done is one of the wall.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvlite.events import BlockDone, Event, Loaded, Stage, StepDone, TileDone
from hvlite.jobs.job import Job, Progress
from hvlite.jobs.wire import Holds, Packed

# Why a clip is left: its user cancels it, the queue is paused now, or this supervisor ends.
Why = Literal["cancel", "pause", "end"]
# The first steps also warm caches up: an estimate from fewer is worth nothing.
STEPS_BEFORE_ETA = 2
LATE = "it does not stop: SIGTERM was sent, SIGKILL comes next"


@dataclass(slots=True)
class Course:
    """One claim of one job. Times are of time.monotonic."""

    job: Job
    stage: str = "starting"
    step: int = 0
    steps: int = 0
    detail: str = ""
    output: Path | None = None
    """The file that the worker was told to write."""
    why: Why | None = None
    asked_at: float = 0.0
    rung: int = 0
    """How hard the worker was asked to leave: 0 not yet, 1 told, 2 SIGTERM, 3 SIGKILL."""
    heard_at: float = field(default_factory=time.monotonic)
    """When the worker last said anything."""
    alive_at: float = field(default_factory=time.monotonic)
    """When it last said or did anything."""
    looked_at: float = 0.0
    """When it was last looked whether it does anything."""
    reported_at: float = 0.0
    stage_began: float = field(default_factory=time.monotonic)
    step_seconds: list[float] = field(default_factory=list)
    tiles: tuple[int, int] = (0, 0)
    holds: Holds | None = None
    """What torch has of the card, as the worker last said."""

    def heard(self) -> None:
        """The worker has said something."""
        self.heard_at = self.alive_at = time.monotonic()

    def follow(self, event: Event) -> None:
        """Take in what the engine says."""
        match event:
            case Stage(name):
                self.stage, self.detail, self.stage_began = name, "", time.monotonic()
            case Loaded(done, total):
                self.detail = f"loaded {done / 1e9:.1f} of {total / 1e9:.1f} GB"
            case BlockDone():
                self.step, self.steps = event.step, event.steps
                self.detail = f"block {event.block + 1}/{event.blocks}"
            case StepDone(step, steps, seconds):
                self.step, self.steps = step + 1, steps
                self.step_seconds.append(seconds)
            case TileDone(tile, tiles):
                self.tiles = (tile + 1, tiles)
                self.detail = f"tile {tile + 1}/{tiles}"
            case _:
                pass

    def follow_packing(self, packed: Packed) -> None:
        """A checkpoint is packed first, which takes its time."""
        self.stage, self.detail = "pack", f"{packed.done_bytes / 1e9:.1f} of {packed.total_bytes / 1e9:.1f} GB"

    def leave(self, why: Why) -> None:
        """Somebody wants the clip left; a cancel outranks the others."""
        if self.why is None or (why == "cancel" and self.why != "cancel"):
            self.why, self.asked_at = why, time.monotonic()

    @property
    def progress(self) -> Progress:
        """For the queue's other users."""
        return Progress(
            stage=self.stage,
            step=self.step,
            steps=self.steps,
            detail=LATE if self.rung > 1 else self.detail,
            eta=self._eta(),
            tensor_bytes=None if self.holds is None else self.holds.tensor_bytes,
            torch_bytes=None if self.holds is None else self.holds.torch_bytes,
        )

    def _eta(self) -> float | None:
        """The clock time at which the stage will be over, as far as it tells; a draft has fewer steps."""
        if self.stage == "denoise" and len(self.step_seconds) >= STEPS_BEFORE_ETA:
            left = min(self.steps, self.job.stop_after or self.steps) - self.step
            return time.time() + statistics.median(self.step_seconds) * max(0, left)
        done, tiles = self.tiles
        if self.stage == "decode" and done:
            return time.time() + (time.monotonic() - self.stage_began) / done * (tiles - done)
        return None
