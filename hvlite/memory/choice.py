"""The choice of a plan: the first way to render a clip that fits a budget, from what costs nothing to what costs time.

And back again: what to give up next where memory ran out all the same. No torch.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Literal

from hvlite.memory.geometry import EXACT, WIDE, AskedTiles, Exact, Tiles, ladder, smaller, wide_ladder
from hvlite.memory.host import plan_host
from hvlite.memory.needs import Knobs
from hvlite.memory.stages import STAGES, Choice, Part, Stage, StageNeed, Stored, Task, exact_bytes, stage_need
from hvlite.memory.tiers import spread
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry

Auto = Literal["auto"]
CHUNKS = (2048, 1024, 512)
# Each group norms and reads all tokens once more: few are hardly felt. More, and short chunks, are for where nothing
# else fits; before that blocks are streamed, which costs nothing while another block is computed.
EASY_GROUPS = 4
EASY_CHUNK = 1024
# In the order in which keeping them between clips saves time.
WARM: tuple[Part, ...] = ("dit", "text", "vae")
# What giving something up must free at least, of the peak of the stage that ran out of memory.
LEAST_GAIN = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that a run may take: of its device, of the host for what is not there, of a disk for the time of a decode.

    `room_bytes` is what it might be given of the device. None: nobody has looked.
    """

    device_bytes: int
    room_bytes: int | None = None
    host_bytes: int = 0
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a user has chosen; "auto" is left to the plan."""

    token_chunk: int | Auto = "auto"
    head_groups: int | Auto = "auto"
    tiles: AskedTiles = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """What else there is: weights in other formats, and the budgets of other profiles by their names."""

    formats: Sequence[Stored] = ()
    profiles: Sequence[tuple[str, Budget]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All that a choice is made from; `others` are to be asked where none fits.

    `stages` are those that are still to come, and `done` the steps that are not; `began` are the knobs of these, which
    stay where no others were asked for.
    """

    task: Task
    budget: Budget
    asked: Asked = Asked()
    stages: tuple[Stage, ...] = STAGES
    done: int = 0
    began: Knobs | None = None
    others: Callable[[], Others] = field(default=Others, compare=False, repr=False)


def steps_left(inputs: Inputs) -> int:
    """How many steps are still to come."""
    return inputs.task.clip.steps - inputs.done if "denoise" in inputs.stages else 0


def needs_of(inputs: Inputs, choice: Choice) -> tuple[StageNeed, ...]:
    """Of all stages that are still to come."""
    return tuple(stage_need(inputs.task, choice, stage) for stage in inputs.stages)


def fits(inputs: Inputs, choice: Choice) -> bool:
    """Whether every stage does, and what an exact decode keeps beside the device."""
    on_device = all(need.peak_bytes <= inputs.budget.device_bytes for need in needs_of(inputs, choice))
    return on_device and has_room_to_spill(inputs, choice)


def has_room_to_spill(inputs: Inputs, choice: Choice) -> bool:
    """Whether the disk, or the host's memory beside the weights in it, takes what an exact decode keeps there."""
    if not isinstance(choice.tiles, Exact) or "decode" not in inputs.stages:
        return True
    task, budget = inputs.task, inputs.budget
    stored = exact_bytes(task).stored_bytes
    if choice.tiles.on_disk:
        return budget.disk_bytes is None or stored <= budget.disk_bytes
    if task.kind == "cpu":
        return True  # it is the device's own memory, which is counted there
    return stored + plan_host(task, choice, budget.host_bytes).host_bytes <= budget.host_bytes


def choose(inputs: Inputs) -> Choice:
    """The first choice that fits, or the leanest one."""
    blocks = inputs.task.dims.dit.blocks
    choice = Choice(
        knobs=knobs_to_try(inputs, easy=True)[0],
        residents=() if inputs.task.stored.is_streamed else spread(blocks, blocks),
        tiles=next(tiles_to_try(inputs)),
    )
    if "decode" in inputs.stages:
        choice = _first(inputs, "decode", (replace(choice, tiles=tiles) for tiles in tiles_to_try(inputs)))
    if "denoise" in inputs.stages:
        # the ends first, so that what cannot fit is known at once; of a few small blocks a ring may be the larger end
        leanest = replace(choice, knobs=knobs_to_try(inputs, easy=False)[-1])
        whole = replace(leanest, residents=spread(blocks, blocks))
        can_fit = min(_peak(inputs, end, "denoise") for end in (leanest, whole)) <= inputs.budget.device_bytes
        choice = _first(inputs, "denoise", _denoise_choices(inputs, choice)) if can_fit else leanest
    for part in WARM:
        warmer = replace(choice, warm=choice.warm | {part})
        if fits(inputs, warmer) and (part != "dit" or choice.residents):
            choice = warmer
    in_memory = replace(choice, tiles=Exact(on_disk=False))
    return in_memory if isinstance(choice.tiles, Exact) and fits(inputs, in_memory) else choice


def _first(inputs: Inputs, stage: Stage, choices: Iterator[Choice]) -> Choice:
    """The first under which this stage fits, else the last one, which is the leanest."""
    for choice in choices:
        if _peak(inputs, choice, stage) <= inputs.budget.device_bytes:
            break
    return choice


def knobs_to_try(inputs: Inputs, *, easy: bool) -> list[Knobs]:
    """From the fastest to the leanest; a value that was asked for stays."""
    asked, began, heads = inputs.asked, inputs.began, inputs.task.dims.dit.heads
    chunk = began.token_chunk if began is not None and asked.token_chunk == "auto" else asked.token_chunk
    group = began.head_groups if began is not None and asked.head_groups == "auto" else asked.head_groups
    chunks = [chunk] if chunk != "auto" else list(CHUNKS)
    groups = [number for number in range(1, heads + 1) if heads % number == 0]
    if group != "auto":
        groups = [max(number for number in groups if number <= max(1, group))]
    if easy:
        chunks = [chunk for chunk in chunks if chunk >= EASY_CHUNK] or chunks
        groups = [number for number in groups if number <= EASY_GROUPS] or groups
    return [Knobs(token_chunk=chunk, head_groups=number) for chunk, number in product(chunks, groups)]


def tiles_to_try(inputs: Inputs) -> Iterator[Tiles]:
    """From what the published tool does to the smallest; only the tiles that were asked for, if some were."""
    asked, shape = inputs.asked.tiles, inputs.task.clip.shape
    if isinstance(asked, TileGeometry):
        yield asked
    elif asked == EXACT:
        yield Exact()
    elif asked == WIDE:
        yield from wide_ladder(shape)
    else:
        yield PUBLISHED_TILES
        yield from ladder(PUBLISHED_TILES, shape)


def _denoise_choices(inputs: Inputs, choice: Choice) -> Iterator[Choice]:
    """With as many residents as can be, and the first knobs for them; then again with knobs that cost more time."""
    blocks = inputs.task.dims.dit.blocks
    counts = range(blocks, -1, -1) if inputs.task.stored.is_streamed else [blocks]
    easy, every = (product(counts, knobs_to_try(inputs, easy=easy)) for easy in (True, False))
    for count, knobs in chain(easy, every):
        yield replace(choice, knobs=knobs, residents=spread(count, blocks))


def _peak(inputs: Inputs, choice: Choice, stage: Stage) -> int:
    return stage_need(inputs.task, choice, stage).peak_bytes


# Where memory ran out.


def leaner(inputs: Inputs, choice: Choice, stage: Stage) -> Choice | None:
    """The next choice under which this stage takes clearly less; None if there is nothing left to give up.

    An exact decode is followed by tiles that fit, also where they take as much: they are the common way.
    """
    limit = _peak(inputs, choice, stage) * (1 - LEAST_GAIN)
    for each in _leaner_choices(inputs, choice, stage):
        is_other_way = isinstance(choice.tiles, Exact) and not isinstance(each.tiles, Exact)
        if each != choice and (is_other_way or _peak(inputs, each, stage) <= limit):
            return each
    return None


def _leaner_choices(inputs: Inputs, choice: Choice, stage: Stage) -> Iterator[Choice]:
    """What other parts keep goes first, since it changes nothing; then knobs, then residents, or smaller tiles."""
    choice = replace(choice, warm=frozenset())
    yield choice
    if stage == "decode":
        yield from _smaller_tiles(inputs, choice)
    if stage == "denoise":
        yield from _fewer_at_once(inputs, choice)


def _smaller_tiles(inputs: Inputs, choice: Choice) -> Iterator[Choice]:
    """Also where some were asked for: other tiles are better than no clip."""
    if isinstance(choice.tiles, Exact):
        free = replace(inputs, asked=replace(inputs.asked, tiles="auto"))
        yield _first(free, "decode", (replace(choice, tiles=tiles) for tiles in tiles_to_try(free)))
        return
    tiles = smaller(choice.tiles, inputs.task.clip.shape)
    while tiles is not None:
        yield replace(choice, tiles=tiles)
        tiles = smaller(tiles, inputs.task.clip.shape)


def _fewer_at_once(inputs: Inputs, choice: Choice) -> Iterator[Choice]:
    """More groups of heads and shorter chunks as long as they are easy, then fewer residents, then the rest of both.

    What was asked for stays; what a clip began with does not.
    """
    inputs = replace(inputs, began=None)
    choice = yield from _leaner_knobs(inputs, choice, easy=True)
    if inputs.task.stored.is_streamed:
        for count in range(len(choice.residents) - 1, -1, -1):
            choice = replace(choice, residents=spread(count, inputs.task.dims.dit.blocks))
            yield choice
    yield from _leaner_knobs(inputs, choice, easy=False)


def _leaner_knobs(inputs: Inputs, choice: Choice, *, easy: bool) -> Generator[Choice, None, Choice]:
    """The same with every leaner pair of knobs; returns the leanest."""
    now = choice.knobs
    for knobs in knobs_to_try(inputs, easy=easy):
        if knobs.token_chunk <= now.token_chunk and knobs.head_groups >= now.head_groups:
            choice = replace(choice, knobs=knobs)
            yield choice
    return choice
