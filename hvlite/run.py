"""One run of the line: what is wanted, on which model, by which plan, and what became of it so far."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hvlite import paths, sampler
from hvlite.errors import DoesNotFit
from hvlite.events import Note
from hvlite.memory.device import device_name, is_out_of_memory
from hvlite.memory.geometry import AskedTiles
from hvlite.memory.plan import Plan
from hvlite.memory.stages import Stage
from hvlite.metadata import MemoryUsed
from hvlite.opened import Model
from hvlite.profile import GIB
from hvlite.request import ResolvedRequest
from hvlite.unfinished import Knobs

SMALLER_CLIP = "Try a smaller --size, or fewer --frames."
# Of a clip that is resumed, size and length stay as they are.
MORE_MEMORY = "Its steps are kept: go on with them where more memory is free."


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where results go: the new file `file` (.mp4, .png for one frame), else a free name in `folder`.

    While a clip is made, its latents lie in hvlite's own folder, or in `latents`, where they stay, or in `unfinished`,
    where they may take the place of older ones; they are saved at the first step that ends `save_seconds` or more after
    the last time, and always before decode. `stop_after` steps the run is parked; every `preview_steps` steps there is
    a Preview.
    """

    file: Path | None = None
    folder: Path = paths.DEFAULT_OUTPUT
    latents: Path | None = None
    unfinished: Path | None = None
    save_seconds: float = 60.0
    stop_after: int | None = None
    preview_steps: int | None = None
    decode_tile: AskedTiles = "auto"


class Timings:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.monotonic() - began, 3)


@dataclass(slots=True)
class Run:
    """What all stages of one clip share; `plan` is replaced by a leaner one where memory runs out."""

    model: Model
    resolved: ResolvedRequest
    outputs: Outputs
    plan: Plan
    bit_exact: bool = True
    """Whether all of it was made with the same knobs."""
    decoded_in: str | None = None
    """The way to decode that was gone over to where the planned one found no memory."""
    timings: Timings = field(default_factory=Timings)
    descents: list[str] = field(default_factory=list)

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [steps + 1], fp32."""
        return sampler.make_sigmas(self.resolved.steps, self.resolved.flow_shift, self.resolved.flow_reverse)

    @property
    def last_step(self) -> int:
        """How many steps are done when this run ends."""
        asked = self.outputs.stop_after
        return self.resolved.steps if asked is None else min(asked, self.resolved.steps)

    def wants_preview(self, step: int) -> bool:
        """Whether a picture after this step is asked for; the last one needs none, its clip follows."""
        every = self.outputs.preview_steps
        is_last = step + 1 == self.resolved.steps
        return every is not None and self.model.device.type != "meta" and not is_last and (step + 1) % every == 0

    def leaner(self, stage: Stage, error: BaseException) -> Plan:
        """The next rung for a stage that ran out of memory; raises `error` again if it did not, or at the last rung."""
        leaner = self.plan.next_rung(stage) if is_out_of_memory(error) else None
        if leaner is None:
            raise error
        return leaner

    def descend(self, leaner: Plan, where: str) -> Note:
        """Go on with `leaner`, with everything given back that was loaded for the plan before it."""
        before, self.plan = self.plan, leaner
        self.bit_exact &= (leaner.choice.knobs, leaner.tiles) == (before.choice.knobs, before.tiles)
        self.model.release()
        note = f"out of memory in {where}: going on with {leaner.knobs_text}"
        self.descents.append(note)
        return Note(note)

    @property
    def knobs(self) -> Knobs:
        """What changes the clip's last bits without being asked for."""
        return knobs_of(self.plan)

    @property
    def memory(self) -> MemoryUsed:
        """What the clip was given and has taken until now."""
        return MemoryUsed(
            budget_bytes=self.plan.budget_bytes,
            predicted_bytes=self.plan.peak_bytes,
            actual_bytes=self.model.peak_bytes(),
            descents=tuple(self.descents),
        )


def knobs_of(plan: Plan) -> Knobs:
    """Those of a clip that is made by this plan in this process."""
    task = plan.inputs.task
    return Knobs(
        device=task.kind,
        dtype=task.dtype,
        attention=task.attention,
        token_chunk=plan.token_chunk,
        head_groups=plan.head_groups,
        threads=torch.get_num_threads(),
    )


def differences(before: Knobs | None, now: Knobs) -> list[str]:
    """What a user should know of a clip that goes on with other knobs than it began with."""
    if before is None or before == now:
        return []
    fields = [name for name in before.__struct_fields__ if getattr(before, name) != getattr(now, name)]
    changes = ", ".join(f"{name} {getattr(before, name)} -> {getattr(now, name)}" for name in fields)
    return [f"the clip goes on with other settings than it began with ({changes}): its last bits may differ"]


@contextmanager
def released(model: Model, plan: Callable[[], Plan], advice: str = SMALLER_CLIP) -> Iterator[None]:
    """Give back what the plan does not keep: first what an earlier clip left, at the end, also after a failure, the
    rest. A failed allocation becomes DoesNotFit, with `advice`."""
    try:
        model.keep_only(plan())
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"out of memory on {device_name(model.device)}, with a budget of {plan().budget_bytes / GIB:.2f} GiB: "
            f"{str(error) or type(error).__name__}. {advice}"
        ) from error
    finally:
        model.release(keep=plan().warm)
