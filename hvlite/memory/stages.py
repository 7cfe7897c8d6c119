"""What every stage of a run holds on its device: weights, activations, and what libraries take beside them. No torch.

Weights + activations is what a trace of the stage finds; the peak adds workspaces and the allocator's slack, and is
what is compared with the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

from hvlite.dims import DitDims, LatentShape, LlamaDims, ModelDims
from hvlite.memory import workspaces
from hvlite.memory.decode_needs import decode_host_bytes, decode_tile_bytes, decoder_weight_bytes
from hvlite.memory.exact_needs import ExactNeeds, exact_needs
from hvlite.memory.geometry import Exact, Tiles, tile_need
from hvlite.memory.needs import (
    FP32,
    ITEM_BYTES,
    Clip,
    Knobs,
    Product,
    clip_bytes,
    conditioning_bytes,
    denoise_activations,
    latent_bytes,
    rest_bytes,
    schedule_activations,
    step_bytes,
    text_activations,
    texts_bytes,
)
from hvlite.memory.tiers import slot_sizes
from hvlite.memory.workspaces import Kind

Stage = Literal["text", "schedule", "denoise", "decode"]
STAGES: tuple[Stage, ...] = ("text", "schedule", "denoise", "decode")
Part = Literal["dit", "text", "vae"]
PART_OF: Mapping[Stage, Part] = {"text": "text", "schedule": "dit", "denoise": "dit", "decode": "vae"}
# What an allocator that takes memory in segments cannot give away of it.
SLACK = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The weights as they are stored: their formats' names, and the bytes of every slab's data by its name.

    Of a checkpoint, which has no slabs, they are those that it would have in its products' dtypes; its parts are loaded
    whole (`is_streamed` False).
    """

    weights: str
    text_weights: str
    slabs: Mapping[str, int]
    is_streamed: bool = True

    def bytes_of(self, names: Sequence[str]) -> list[int]:
        """Of each of these slabs."""
        return [self.slabs[name] for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done, and with what: all that a plan cannot choose. The dtypes are those of the products."""

    clip: Clip
    dims: ModelDims
    stored: Stored
    kind: Kind
    attention: str
    dtype: str
    text_dtype: str
    vae_dtype: str

    @property
    def product(self) -> Product:
        """The transformer's."""
        return Product(weights=self.stored.weights, dtype=self.dtype)

    @property
    def text_product(self) -> Product:
        return Product(weights=self.stored.text_weights, dtype=self.text_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a plan chooses: knobs, the blocks that stay on the device, the decode's tiles, the parts that stay between
    clips."""

    knobs: Knobs
    residents: tuple[int, ...]
    tiles: Tiles
    warm: frozenset[Part] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeed:
    """Bytes of one stage on the device. `weights_bytes`: also those of parts that stay there meanwhile."""

    name: Stage
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    live_bytes: int
    peak_bytes: int


def stage_need(task: Task, choice: Choice, stage: Stage) -> StageNeed:
    """All of one stage."""
    weights_of, activations_of = _STAGES[stage]
    others = sum(_kept_bytes(task, choice, part) for part in choice.warm if part != PART_OF[stage])
    weights, activations = weights_of(task, choice) + others, activations_of(task, choice)
    workspace = sum(entry.nbytes for entry in workspace_entries(task, choice, stage))
    return StageNeed(
        name=stage,
        weights_bytes=weights,
        activation_bytes=activations,
        workspace_bytes=workspace,
        live_bytes=weights + activations,
        peak_bytes=round((weights + activations + workspace) * SLACK),
    )


def workspace_entries(task: Task, choice: Choice, stage: Stage) -> list[workspaces.Entry]:
    """What libraries take in this stage, each with its source."""
    entries = [workspaces.products(task.kind)]
    if stage == "denoise":
        dims = task.dims.dit
        entries.append(workspaces.attention(task.kind, task.attention, dims, task.clip, choice.knobs))
        entries.append(workspaces.short_prompts(dims, task.clip, task.product))
    if stage == "decode":
        entries.append(workspaces.convolutions(task.kind))
    return entries


# Slabs, by the names that they have in a store (weights.layout).


def block_slabs(dims: DitDims) -> list[str]:
    """Of the transformer's blocks, in the order in which a step visits them."""
    return _numbered("double_blocks", dims.double_blocks) + _numbered("single_blocks", dims.single_blocks)


def modulation_slabs(dims: DitDims) -> list[str]:
    """Of their modulation, in the same order."""
    return _numbered("double_mods", dims.double_blocks) + _numbered("single_mods", dims.single_blocks)


def layer_slabs(dims: LlamaDims) -> list[str]:
    """Of the text encoder's layers that are used."""
    return _numbered("text_layers", dims.used_layers)


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{index}" for index in range(count)]


# Weights.


def resident_bytes(task: Task, residents: Sequence[int]) -> int:
    """Of the blocks that stay on the device."""
    names = block_slabs(task.dims.dit)
    return sum(task.stored.slabs[names[index]] for index in residents)


def streamed_bytes(task: Task, residents: Sequence[int]) -> list[int]:
    """Of each block that does not, in the order of a step."""
    stay = set(residents)
    return task.stored.bytes_of([name for index, name in enumerate(block_slabs(task.dims.dit)) if index not in stay])


def _text_weights(task: Task, choice: Choice) -> int:
    """CLIP whole, and either all of Llama's layers or the ring that they pass through; its table is on the host."""
    layers = task.stored.bytes_of(layer_slabs(task.dims.llama))
    stays = "text" in choice.warm or not task.stored.is_streamed
    return sum(layers if stays else slot_sizes(layers)) + clip_bytes(task.dims.clip, ITEM_BYTES[task.text_dtype])


def _schedule_weights(task: Task, choice: Choice) -> int:
    """All but the blocks, whose modulation passes through a ring, and the blocks that an earlier clip left there."""
    if not task.stored.is_streamed:
        return rest_bytes(task.dims.dit, ITEM_BYTES[task.dtype]) + _whole_blocks(task)
    stays = step_bytes(task.dims.dit, ITEM_BYTES[task.dtype])
    return stays + _passing_bytes(task) + (resident_bytes(task, choice.residents) if "dit" in choice.warm else 0)


def _passing_bytes(task: Task) -> int:
    """What of a streamed transformer is there for its schedule alone."""
    dims, item = task.dims.dit, ITEM_BYTES[task.dtype]
    ring = slot_sizes(task.stored.bytes_of(modulation_slabs(dims)))
    return rest_bytes(dims, item) - step_bytes(dims, item) + sum(ring)


def _denoise_weights(task: Task, choice: Choice) -> int:
    """The first and the last product's, the resident blocks, and the ring of all others."""
    if not task.stored.is_streamed:
        return rest_bytes(task.dims.dit, ITEM_BYTES[task.dtype]) + _whole_blocks(task)
    return _dit_bytes(task, choice) + sum(slot_sizes(streamed_bytes(task, choice.residents)))


def _dit_bytes(task: Task, choice: Choice) -> int:
    """What stays of the transformer from step to step."""
    return step_bytes(task.dims.dit, ITEM_BYTES[task.dtype]) + resident_bytes(task, choice.residents)


def _whole_blocks(task: Task) -> int:
    dims = task.dims.dit
    return sum(task.stored.bytes_of([*block_slabs(dims), *modulation_slabs(dims)]))


def _decode_weights(task: Task, choice: Choice) -> int:
    return decoder_weight_bytes(task.dims.vae, ITEM_BYTES[task.vae_dtype])


def _kept_bytes(task: Task, choice: Choice, part: Part) -> int:
    """What a part that stays takes in the other parts' stages."""
    match part:
        case "text":
            return _text_weights(task, choice)
        case "vae":
            return _decode_weights(task, choice)
        case "dit":
            return _dit_bytes(task, choice) if task.stored.is_streamed else _denoise_weights(task, choice)


# Activations.


def _text_activations(task: Task, choice: Choice) -> int:
    return text_activations(task.dims.llama, task.clip, task.text_product)


def _schedule_activations(task: Task, choice: Choice) -> int:
    """At its end the noise is made, beside the texts and what waits for the steps, in place of weights that pass."""
    dims, clip, item = task.dims.dit, task.clip, task.product.item
    ending = texts_bytes(dims, clip, item) + _waiting_bytes(task) + latent_bytes(dims, clip)
    gone = _passing_bytes(task) if task.stored.is_streamed else 0
    return max(schedule_activations(dims, clip, task.product), ending - gone)


def _denoise_activations(task: Task, choice: Choice) -> int:
    return _waiting_bytes(task) + denoise_activations(task.dims.dit, task.clip, choice.knobs, task.product)


def _waiting_bytes(task: Task) -> int:
    """The conditioning of all steps waits on the host, which a CPU is itself."""
    clip = task.clip
    return conditioning_bytes(task.dims.dit, clip, task.product.item, clip.steps) if task.kind == "cpu" else 0


def _decode_activations(task: Task, choice: Choice) -> int:
    """The clip's latents, as they are and as the decoder takes them, and one tile, or one layer, at work.

    Tiles are joined on the host, and layers may be kept there, which a CPU is itself.
    """
    given, scaled = (latent_bytes(task.dims.dit, task.clip, item) for item in (FP32, ITEM_BYTES[task.vae_dtype]))
    if isinstance(choice.tiles, Exact):
        needs = exact_bytes(task)
        kept = 0 if choice.tiles.on_disk or task.kind == "cuda" else needs.stored_bytes
        return given + scaled + kept + needs.device_bytes
    joined = decode_host_bytes(task.clip.shape, choice.tiles) if task.kind == "cpu" else 0
    return given + scaled + joined + tile_need(task.clip.shape, choice.tiles, partial(tile_bytes, task))


def exact_bytes(task: Task) -> ExactNeeds:
    """Of decoding the clip without tiles."""
    return _exact_needs(task.dims.vae, task.clip.shape, ITEM_BYTES[task.vae_dtype], task.kind)


def tile_bytes(task: Task, tile: LatentShape) -> int:
    """Of decoding one tile."""
    return _tile_bytes(task.dims.vae, tile, ITEM_BYTES[task.vae_dtype], task.kind)


# Of few tiles and clips, asked for by every choice that is tried.
_tile_bytes = cache(decode_tile_bytes)
_exact_needs = cache(exact_needs)


_Bytes = Callable[[Task, Choice], int]
_STAGES: Mapping[Stage, tuple[_Bytes, _Bytes]] = {
    "text": (_text_weights, _text_activations),
    "schedule": (_schedule_weights, _schedule_activations),
    "denoise": (_denoise_weights, _denoise_activations),
    "decode": (_decode_weights, _decode_activations),
}
