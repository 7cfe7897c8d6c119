"""When is the queue done: seconds from jobs that are done, as clock times for those that are not. Pure functions.

Only what was measured is used: the median of the latest jobs of the same shape on the same weights and device; where
there is none, that of the nearest other shape, scaled by the work of a step. No history, no answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from math import inf, log
from statistics import median
from typing import Any

from hvlite.dims import HUNYUANVIDEO, latent_shape
from hvlite.jobs.job import How, Job
from hvlite.request import Request

# As many of the latest jobs count: enough for a median, few enough to follow a change of the machine.
LATEST = 9
# In the published dims a token costs as much in the Linears as in attention over this many tokens: 8 x hidden.
LINEAR_TOKENS = 8 * HUNYUANVIDEO.dit.hidden


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how long a clip takes on one machine. `passes` is 2 with true guidance."""

    size: tuple[int, int]
    frames: int
    steps: int
    passes: int

    @property
    def tokens(self) -> int:
        return latent_shape(self.size, self.frames, HUNYUANVIDEO.vae).tokens

    @property
    def work(self) -> int:
        """Relative cost of a step: Linears grow with the tokens, attention with their square."""
        return self.tokens * (self.tokens + LINEAR_TOKENS) * self.passes

    def costs_like(self, other: "Shape") -> bool:
        """Whether a step is the same work; how many there are does not matter."""
        return (self.size, self.frames, self.passes) == (other.size, other.frames, other.passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds per step, seconds beside the steps, and how many of those the decode takes.

    `same_shape`: measured on this very shape, not scaled.
    """

    seconds_per_step: float
    other_seconds: float
    decode_seconds: float
    same_shape: bool


@dataclass(frozen=True, slots=True)
class Past:
    """What a done job took."""

    shape: Shape
    seconds_per_step: float
    other_seconds: float
    decode_seconds: float


class History:
    """The done jobs, latest first, as far as they tell something."""

    def __init__(self, done: Iterable[Job]) -> None:
        self.defaults: dict[str | None, dict[str, Any]] = {}
        self.past: dict[How, list[Past]] = {}
        for job in done:
            self._learn(job)

    def _learn(self, job: Job) -> None:
        if job.request is None or job.how is None:
            return
        resolved = job.resolved or {}
        known = self.defaults.setdefault(job.how.model, {})
        for name in ("size", "frames", "steps"):  # what a field that was left to the model turned out to be
            if getattr(job.request, name) is None:
                known.setdefault(name, resolved.get(name))
        shape = _shape(job.request, resolved)
        if shape is not None and job.seconds_per_step is not None:
            other = sum(seconds for stage, seconds in job.timings.items() if stage != "denoise")
            past = Past(shape, job.seconds_per_step, other, job.timings.get("decode", 0.0))
            self.past.setdefault(job.how, []).append(past)

    def shape_of(self, request: Request, how: How) -> Shape | None:
        """None while the model's defaults are unknown."""
        published = asdict(HUNYUANVIDEO.defaults) if how.model == HUNYUANVIDEO.name else {}
        return _shape(request, published | self.defaults.get(how.model, {}))

    def estimate(self, shape: Shape, how: How) -> Estimate | None:
        """What the past says of clips like this; None if it says nothing."""
        past = self.past.get(how, [])
        same = [each for each in past if each.shape.costs_like(shape)]
        chosen = (same or _nearest(past, shape))[:LATEST]
        if not chosen:
            return None
        return Estimate(
            seconds_per_step=median(each.seconds_per_step * shape.work / each.shape.work for each in chosen),
            other_seconds=median(each.other_seconds * shape.tokens / each.shape.tokens for each in chosen),
            decode_seconds=median(each.decode_seconds * shape.tokens / each.shape.tokens for each in chosen),
            same_shape=bool(same),
        )

    def seconds(self, request: Request, how: How, *, stop_after: int | None = None, from_step: int = 0) -> float | None:
        """From the start, or from a checkpoint, to the end; a draft ends earlier, and without a decode to speak of."""
        shape = self.shape_of(request, how)
        estimate = None if shape is None else self.estimate(shape, how)
        if shape is None or estimate is None:
            return None
        is_draft = stop_after is not None and stop_after < shape.steps
        steps = max(0, min(shape.steps, stop_after or shape.steps) - from_step)
        return estimate.seconds_per_step * steps + (0.0 if is_draft else estimate.other_seconds)

    def seconds_of_decode(self, request: Request, how: How, *, stop_after: int | None = None) -> float:
        """What follows the last step; 0 where nothing tells, and for a draft, which has no decode."""
        shape = self.shape_of(request, how)
        estimate = None if shape is None else self.estimate(shape, how)
        is_draft = stop_after is not None and (shape is None or stop_after < shape.steps)
        return 0.0 if estimate is None or is_draft else estimate.decode_seconds


def _shape(request: Request, resolved: Mapping[str, Any]) -> Shape | None:
    size, frames, steps = (getattr(request, name) or resolved.get(name) for name in ("size", "frames", "steps"))
    if size is None or frames is None or steps is None:
        return None
    height, width = size
    return Shape((height, width), frames, steps, 2 if request.cfg_scale > 1 else 1)


def _nearest(past: Sequence[Past], shape: Shape) -> list[Past]:
    """The jobs of that shape whose step costs most nearly what one of `shape` does."""
    if not past:
        return []
    nearest = min(past, key=lambda each: abs(log(each.shape.work / shape.work))).shape
    return [each for each in past if each.shape.costs_like(nearest)]


def finish_times(
    running: Sequence[Job], queued: Sequence[Job], history: History, now: float, *, is_active: bool = True
) -> dict[int, float | None]:
    """When each job will be done, by the clock; None where nothing tells, and for all that wait for such a job.

    There are as many workers as jobs run, at least one; each takes the next job in line when it is free. Where the
    queue is not active, nobody knows when those that wait are taken.
    """
    ends: dict[int, float | None] = {job.id: _end_of_running(job, history, now) for job in running}
    free = [inf if end is None else end for end in ends.values()] or [now]
    heapify(free)
    if not is_active:
        return ends | {job.id: None for job in queued}
    for job in queued:
        seconds = _seconds(job, history)
        end = heappop(free) + (inf if seconds is None else seconds)
        heappush(free, end)
        ends[job.id] = None if end == inf else end
    return ends


def _seconds(job: Job, history: History, from_step: int = 0) -> float | None:
    if job.request is None or job.how is None:
        return None
    done = max(from_step, job.checkpoint_step or 0)  # a job that goes on counts no steps before it is loaded
    return history.seconds(job.request, job.how, stop_after=job.stop_after, from_step=done)


def _end_of_running(job: Job, history: History, now: float) -> float | None:
    """By the worker's word of its stage and the past's of the decode; else by the past, for the steps that are left."""
    progress = job.progress
    if progress is None or progress.eta is None:
        seconds = _seconds(job, history, 0 if progress is None else progress.step)
        return None if seconds is None else now + seconds
    end = max(now, progress.eta)
    if progress.stage != "denoise" or job.request is None or job.how is None:
        return end
    return end + history.seconds_of_decode(job.request, job.how, stop_after=job.stop_after)


def queue_end(ends: Mapping[int, float | None]) -> float | None:
    """When the last job is done; None if one of them is unknown, or there is none."""
    known = [end for end in ends.values() if end is not None]
    return max(known) if known and len(known) == len(ends) else None
