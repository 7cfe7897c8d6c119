"""What to change where a clip does not fit: every change here was tried, and fits. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hvlite.dims import latent_shape
from hvlite.memory.choice import Asked, Inputs, Others, choose, fits

CHANGES = 3
# What a change takes away from the clip, to put the cheapest first; of frames and pixels it is their share. Formats by
# the error of their weights (benchmarks/formats.py).
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
    others = inputs.others()
    changes = [*_settings(inputs), *_formats(inputs, others), *_budgets(inputs, others), *_sizes(inputs)]
    found = [change for change in changes if _fits(change.inputs)]
    found = [change for change in found if not any(other.parts < change.parts for other in found)]
    fewer = _fewer_frames(inputs)
    return [change.flag for change in sorted([*found, *fewer], key=lambda change: change.cost)[:CHANGES]]


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
    low, high = 0, shape.frames  # latent frames: `low` fit (0: none known to), `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(_with_clip(inputs, frames=middle)):
            low = middle
        else:
            high = middle
    if not low:
        return []
    frames = (low - 1) * ratio + 1
    return [Change(f"--frames {frames}", 1 - low / shape.frames, _with_clip(inputs, frames=low))]


def _with_clip(inputs: Inputs, *, prompts: int | None = None, **lengths: int) -> Inputs:
    """Another number of prompts, or latents of another shape."""
    clip = inputs.task.clip
    clip = replace(clip, prompts=prompts or clip.prompts, shape=replace(clip.shape, **lengths))
    return replace(inputs, task=replace(inputs.task, clip=clip))
