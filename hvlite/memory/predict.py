"""How long a clip will take: a timeline of reading, copying and computing, block by block. Arithmetic, without torch.

    reader    block 1 | block 3    | block 5     |         disk -> staging buffer, two of them
    copies            | block 1 | block 2 | block 3 |      staging buffer or host memory -> slot, two of them
    computing  block 0          | block 1 | block 2 | ...  waits for its block, and frees its slot when it is done

It is the order that `memory.streamer` keeps to; the rates are measured (`hvlite doctor --measure`) or a card's figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from hvlite.memory.choice import steps_left
from hvlite.memory.needs import Product, rest_bytes
from hvlite.memory.plan import Plan
from hvlite.memory.rates import NOT_DEQUANTISED, BlockWork, Rates, block_seconds
from hvlite.memory.stages import block_slabs, layer_slabs, modulation_slabs, resident_bytes
from hvlite.memory.tiers import RING, stays_in_slot

Source = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A block in the timeline: what it takes to compute, and what has to come before, from where."""

    seconds: float
    nbytes: int
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Bytes per second. A device that is the host itself (`copy` None) has slabs read straight into its slots."""

    disk: float
    copy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One walk over all blocks: seconds of computing, and of waiting for copies and for the disk."""

    compute_s: float
    copy_wait_s: float
    disk_wait_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.copy_wait_s + self.disk_wait_s


class Timeline:
    """Where each lane is, in seconds from the beginning."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self.now = 0.0
        """When computing is done with all that it was given."""
        self._read = self._copied = 0.0
        self._slots = [0.0] * RING
        self._staging = [0.0] * RING
        self._loads = self._from_disk = 0

    def bring(self, work: Work) -> tuple[float, bool]:
        """When the next load is there, and whether it was the disk that it waited for in the end."""
        free = self._slots[self._loads % RING]
        self._loads += 1
        if self.ways.copy is None:
            self._read = max(self._read, free) + work.nbytes / self.ways.disk
            return self._read, True
        ready = 0.0
        if work.source == "disk":
            staging = self._from_disk % RING
            self._read = ready = max(self._read, self._staging[staging]) + work.nbytes / self.ways.disk
        begin = max(self._copied, free, ready)
        self._copied = begin + work.nbytes / self.ways.copy
        if work.source == "disk":
            self._staging[staging] = self._copied
            self._from_disk += 1
        return self._copied, begin == ready > 0

    def compute(self, work: Work, *, frees_slot: bool) -> None:
        """The block that came last, or one that was there."""
        self.now += work.seconds
        if frees_slot:
            self._slots[(self._loads - 1) % RING] = self.now


def walk(blocks: Sequence[Work], rounds: int, ways: Ways) -> list[Round]:
    """Each of so many walks over the blocks, the first load beginning with the first walk."""
    timeline, done = Timeline(ways), list[Round]()
    stay = stays_in_slot(sum(block.source != "device" for block in blocks))
    for number in range(rounds):
        compute = copy_wait = disk_wait = 0.0
        for block in blocks:
            is_streamed = block.source != "device" and not (stay and number > 0)
            if is_streamed:
                arrival, from_disk = timeline.bring(block)
                waited = max(0.0, arrival - timeline.now)
                timeline.now += waited
                disk_wait += waited if from_disk else 0.0
                copy_wait += 0.0 if from_disk else waited
            timeline.compute(block, frees_slot=is_streamed)
            compute += block.seconds
        done.append(Round(compute_s=compute, copy_wait_s=copy_wait, disk_wait_s=disk_wait))
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds, of what is still to come. `step` is one of the middle; `steps_s` all, the first one's waiting included.

    `load_s` brings what is kept from then on, in the first clip only: residents and host memory. Of the decode it is
    only known what an exact one moves (`spill_s`): how fast convolutions are is not.
    """

    step: Round
    steps_s: float
    text_s: float
    schedule_s: float
    load_s: float
    spill_s: float

    @property
    def clip_s(self) -> float:
        """A clip after the first one, without its decode."""
        return self.text_s + self.schedule_s + self.steps_s


def predict(plan: Plan, rates: Rates) -> Prediction:
    """What `rates` make of a plan; a way whose rate is not known is taken to cost nothing.

    Where the host computes itself, the seconds of a core that reading takes are added to its computing: a product is
    shared out evenly over all cores, so that the others wait for the one that reads as well.
    """
    task = plan.inputs.task
    copy = None if task.kind == "cpu" else rates.host_to_device or inf
    ways = Ways(disk=rates.disk_read or inf, copy=copy)
    reading = rates.disk_cpu if task.kind == "cpu" else 0.0
    stages, left = plan.inputs.stages, steps_left(plan.inputs)
    steps = walk(_block_work(plan, rates, reading), max(2, left), ways)
    text = walk(_layer_work(plan, rates, reading), int("text" in stages), ways)
    schedule = walk(_modulation_work(plan, rates, reading), int("schedule" in stages), ways)
    return Prediction(
        step=steps[-1],
        steps_s=sum(step.seconds for step in steps[:left]),
        text_s=sum(each.seconds for each in text),
        schedule_s=sum(each.seconds for each in schedule),
        load_s=_kept_bytes(plan) / min(ways.disk, ways.copy or ways.disk) if left else 0.0,
        spill_s=_spill_seconds(plan, ways),
    )


def _spill_seconds(plan: Plan, ways: Ways) -> float:
    """What an exact decode moves to where it is put aside, and back; writing is taken to be as fast as reading."""
    if plan.spilled is None:
        return 0.0
    on_the_way = [inf if ways.copy is None else ways.copy, ways.disk if plan.spilled.place == "disk" else inf]
    return plan.spilled.moved_bytes / min(on_the_way)


def _block_work(plan: Plan, rates: Rates, reading: float) -> list[Work]:
    """A step: every block, once for each prompt."""
    task = plan.inputs.task
    dims, clip = task.dims.dit, task.clip
    names = block_slabs(dims)
    work = []
    for index, name in enumerate(names):
        block = BlockWork(
            kind="double" if index < dims.double_blocks else "single",
            hidden=dims.hidden,
            mlp_ratio=dims.mlp_ratio,
            video_tokens=clip.shape.tokens,
            text_tokens=clip.text_tokens,
            chunk=plan.token_chunk,
            dtype=task.dtype,
            weights=task.stored.weights,
        )
        source: Source = "device" if index in plan.residents else "host" if index in plan.pinned else "disk"
        nbytes = task.stored.slabs[name]
        own = clip.prompts * block_seconds(rates, block) + (reading * nbytes if source == "disk" else 0.0)
        work.append(Work(seconds=own, nbytes=nbytes, source=source))
    return work


def _layer_work(plan: Plan, rates: Rates, reading: float) -> list[Work]:
    """The text encoder's layers, each for all prompts, as long as the longest prompt."""
    task = plan.inputs.task
    dims = task.dims.llama
    keys = dims.hidden // dims.heads * dims.kv_heads
    weights = 2 * dims.hidden * (dims.hidden + keys) + 3 * dims.hidden * dims.mlp_hidden
    tokens = task.clip.encoded_tokens
    own = task.clip.prompts * _product_seconds(rates, task.text_product, weights, tokens)
    source: Source = "device" if plan.text_residents else "disk"
    sizes = task.stored.bytes_of(layer_slabs(dims))
    return [Work(seconds=own + reading * size, nbytes=size, source=source) for size in sizes]


def _modulation_work(plan: Plan, rates: Rates, reading: float) -> list[Work]:
    """One vector a time through each block's modulation, for every step and prompt; and the refiner before them."""
    task = plan.inputs.task
    dims, times = task.dims.dit, task.clip.steps * task.clip.prompts
    refined = dims.refiner_blocks * (4 + 2 * dims.mlp_ratio) * dims.hidden**2
    plain = Product(weights=task.dtype, dtype=task.dtype)
    rest = rest_bytes(dims, plain.item)
    first = times * _product_seconds(rates, plain, refined, task.clip.text_tokens)
    work = [Work(seconds=first + reading * rest, nbytes=rest, source="disk")]
    for index, size in enumerate(task.stored.bytes_of(modulation_slabs(dims))):
        weights = (12 if index < dims.double_blocks else 3) * dims.hidden**2
        own = times * _product_seconds(rates, task.product, weights, 1)
        work.append(Work(seconds=own + reading * size, nbytes=size, source="disk"))
    return work


def _product_seconds(rates: Rates, product: Product, weights: int, tokens: int) -> float:
    """Of so many weights with so many tokens."""
    # in 16 bits of either kind a device computes alike
    dtype = product.dtype if product.dtype in rates.compute else "bf16"
    seconds = 2 * weights * tokens / rates.compute[dtype].matmul.at(tokens)
    if product.weights not in NOT_DEQUANTISED:
        seconds += weights / rates.dequantise[product.weights]
    return seconds


def _kept_bytes(plan: Plan) -> int:
    """Resident blocks, and those that the host keeps."""
    task = plan.inputs.task
    names = block_slabs(task.dims.dit)
    return resident_bytes(task, plan.residents) + sum(task.stored.slabs[names[index]] for index in plan.pinned)
