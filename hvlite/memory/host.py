"""Where the weights are that are not on the device, and how many bytes travel: of each step, and of a whole clip.

Of the weights, only blocks are worth the host's memory: they travel at every step. What a clip needs once (the text
encoder's layers, the modulation, the VAE) is read when it is needed. No torch.
"""

from dataclasses import dataclass

from hvlite.memory.needs import ITEM_BYTES, clip_bytes, conditioning_bytes, rest_bytes
from hvlite.memory.stages import Choice, Task, block_slabs, layer_slabs, modulation_slabs, resident_bytes
from hvlite.memory.tiers import STAGING, spread, stays_in_slot


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """`pinned` are indexes of blocks. Bytes from disk are part of the bytes that travel.

    `host_bytes`: pinned blocks, the buffers that the others pass through, and the vectors of all steps; the last two
    also where the budget is less. `once_bytes` is what a clip needs one time, and what resident blocks take if they
    are not there yet.
    """

    pinned: tuple[int, ...]
    host_bytes: int
    wanted_bytes: int
    bytes_per_step: int
    disk_bytes_per_step: int
    once_bytes: int


def plan_host(task: Task, choice: Choice, budget_bytes: int) -> HostPlan:
    """As many streamed blocks in the host's memory as the budget allows, evenly spread; the others come from disk."""
    names = block_slabs(task.dims.dit)
    streamed = [index for index in range(len(names)) if index not in choice.residents]
    sizes = {index: task.stored.slabs[names[index]] for index in streamed} if task.stored.is_streamed else {}
    once, passing, waiting = _once_bytes(task, choice), _largest_passing(task, choice), _waiting_bytes(task)
    if stays_in_slot(len(sizes)) or task.kind == "cpu":
        # each is loaded once; a CPU reads slabs from disk straight into the slots
        step = 0 if stays_in_slot(len(sizes)) else sum(sizes.values())
        return HostPlan(
            pinned=(),
            host_bytes=0 if task.kind == "cpu" else waiting + STAGING * max([passing, *sizes.values()]),
            wanted_bytes=0,
            bytes_per_step=step,
            disk_bytes_per_step=step,
            once_bytes=once + (sum(sizes.values()) if step == 0 else 0),
        )
    order = list(sizes)
    pinned: tuple[int, ...] = ()
    host = 0
    for count in range(len(order), -1, -1):
        pinned = tuple(order[place] for place in spread(count, len(order)))
        staged = max([passing, *(size for index, size in sizes.items() if index not in pinned)])
        host = waiting + sum(sizes[index] for index in pinned) + STAGING * staged
        if host <= budget_bytes:
            break
    return HostPlan(
        pinned=pinned,
        host_bytes=host,
        wanted_bytes=sum(sizes.values()),
        bytes_per_step=sum(sizes.values()),
        disk_bytes_per_step=sum(size for index, size in sizes.items() if index not in pinned),
        once_bytes=once,
    )


def _waiting_bytes(task: Task) -> int:
    """The conditioning of all steps, which waits beside a card until its step comes."""
    return conditioning_bytes(task.dims.dit, task.clip, ITEM_BYTES[task.dtype], task.clip.steps)


def _largest_passing(task: Task, choice: Choice) -> int:
    """Of what passes through the staging buffers once a clip: layers, modulation and blocks that stay."""
    if not task.stored.is_streamed:
        return 0
    dims, blocks = task.dims, block_slabs(task.dims.dit)
    names = [*layer_slabs(dims.llama), *modulation_slabs(dims.dit), *(blocks[index] for index in choice.residents)]
    return max(task.stored.bytes_of(names), default=0)


def _once_bytes(task: Task, choice: Choice) -> int:
    """What is not kept from an earlier clip: layers, CLIP, the transformer's rest and modulation, resident blocks."""
    stored, dims = task.stored, task.dims
    nbytes = rest_bytes(dims.dit, ITEM_BYTES[task.dtype]) + sum(stored.bytes_of(modulation_slabs(dims.dit)))
    if "text" not in choice.warm:
        nbytes += sum(stored.bytes_of(layer_slabs(dims.llama))) + clip_bytes(dims.clip, ITEM_BYTES[task.text_dtype])
    if "dit" not in choice.warm:
        nbytes += resident_bytes(task, choice.residents)
    return nbytes
