"""What to change where a clip does not fit: every change here was tried, and fits. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hvlite.dims import latent_shape
from hvlite.memory.choice import Asked, Inputs, Others, choose, fits
from hvlite.memory.stages import stage_need

CHANGES = 3
# What a change takes away from the clip, to put the cheapest first; of frames, pixels and steps it is their share.
# Formats by the error of their weights (benchmarks/formats.py).
ANOTHER_PROFILE = 0.01
NO_TRUE_GUIDANCE = 0.4
FORMAT_COSTS = {
    "bf16": 0.0,
    "fp16": 0.0,
    "int8": 0.03,
    "int8-dynamic": 0.05,
    "fp8": 0.06,
    "nf4": 0.1,
    "nf4-double": 0.1,
}


@dataclass(frozen=True, slots=True)
class Change:
    """A flag as a user writes it, what it costs, and what it makes of the inputs."""

    flag: str
    cost: float
    inputs: Inputs

    @property
    def parts(self) -> frozenset[str]:
        """Its flags, each with its value."""
        return frozenset(f" {self.flag}".split(" --")[1:])


def cheapest_changes(inputs: Inputs) -> list[str]:
    """The flags of the three cheapest changes after which the clip fits; none that is another one and more."""
    steps = _fewer_steps(inputs)
    others = inputs.others()
    changes = [*_settings(inputs), *_formats(inputs, others), *_budgets(inputs, others), *_sizes(inputs)]
    found = [change for change in changes if _fits(change.inputs)]
    found = [change for change in found if not any(other.parts < change.parts for other in found)]
    found += _fewer_frames(inputs)
    if steps and _fits(steps[0].inputs):
        found += steps
    if steps and not found:
        return [f"{steps[0].flag} {flags}" for flags in cheapest_changes(steps[0].inputs)]
    return [change.flag for change in sorted(found, key=lambda change: change.cost)[:CHANGES]]


def _fits(inputs: Inputs) -> bool:
    return fits(inputs, choose(inputs))


def _settings(inputs: Inputs) -> Iterator[Change]:
    """What was asked for, left to the plan; and one pass instead of two."""
    asked, clip = inputs.asked, inputs.task.clip
    for flag, free in (
        ("--token-chunk auto", replace(asked, token_chunk="auto")),
        ("--head-groups auto", replace(asked, head_groups="auto")),
        ("--decode-tile auto", replace(asked, tiles="auto")),
        ("--token-chunk auto --head-groups auto", Asked(tiles=asked.tiles)),
    ):
        if free != asked:
            yield Change(flag, 0.0, replace(inputs, asked=free))
    if clip.prompts > 1:
        yield Change("--cfg-scale 1", NO_TRUE_GUIDANCE, _with_clip(inputs, prompts=1))


def _formats(inputs: Inputs, others: Others) -> Iterator[Change]:
    now = inputs.task.stored
    for stored in others.formats:
        changed = {"weights": stored.weights, "text-weights": stored.text_weights}
        flags = [
            f"--{name} {value}" for name, value in changed.items() if value != getattr(now, name.replace("-", "_"))
        ]
        cost = FORMAT_COSTS.get(stored.weights, 0.0) + FORMAT_COSTS.get(stored.text_weights, 0.0)
        yield Change(" ".join(flags), cost, replace(inputs, task=replace(inputs.task, stored=stored)))


def _budgets(inputs: Inputs, others: Others) -> Iterator[Change]:
    for name, budget in others.profiles:
        yield Change(f"--profile {name}", ANOTHER_PROFILE, replace(inputs, budget=budget))


def _sizes(inputs: Inputs) -> Iterator[Change]:
    """The smaller ones of those that the model knows."""
    dims, shape = inputs.task.dims, inputs.task.clip.shape
    ratio = dims.vae.spatial_ratio
    for height, width in dims.defaults.known_sizes:
        smaller = latent_shape((height, width), 1, dims.vae)
        share = smaller.height * smaller.width / (shape.height * shape.width)
        turned = (height > width) != (shape.height > shape.width)
        if share < 1:
            cost = 1 - share + (0.01 if turned else 0)
            yield Change(
                f"--size {height} {width}", cost, _with_clip(inputs, height=height // ratio, width=width // ratio)
            )


def _fewer_frames(inputs: Inputs) -> list[Change]:
    """The most that fit, if any do."""
    shape, ratio = inputs.task.clip.shape, inputs.task.dims.vae.temporal_ratio
    most = _most_below(shape.frames, lambda frames: _fits(_with_clip(inputs, frames=frames)))
    if not most:
        return []
    frames = (most - 1) * ratio + 1
    return [Change(f"--frames {frames}", 1 - most / shape.frames, _with_clip(inputs, frames=most))]


def _fewer_steps(inputs: Inputs) -> list[Change]:
    """The most whose vectors have room in stage schedule, where those of all steps have not."""
    if "schedule" not in inputs.stages:
        return []
    cold = replace(choose(inputs), warm=frozenset())

    def with_steps(steps: int) -> Inputs:
        task = inputs.task
        return replace(inputs, task=replace(task, clip=replace(task.clip, steps=steps)))

    def has_room(steps: int) -> bool:
        return stage_need(with_steps(steps).task, cold, "schedule").peak_bytes <= inputs.budget.device_bytes

    now = inputs.task.clip.steps
    most = 0 if has_room(now) else _most_below(now, has_room)
    return [Change(f"--steps {most}", 1 - most / now, with_steps(most))] if most else []


def _most_below(high: int, does: Callable[[int], bool]) -> int:
    """The largest number below `high`, which does not fit, that does; 0: none."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if does(middle):
            low = middle
        else:
            high = middle
    return low


def _with_clip(inputs: Inputs, *, prompts: int | None = None, **lengths: int) -> Inputs:
    """Another number of prompts, or latents of another shape."""
    clip = inputs.task.clip
    clip = replace(clip, prompts=prompts or clip.prompts, shape=replace(clip.shape, **lengths))
    return replace(inputs, task=replace(inputs.task, clip=clip))
