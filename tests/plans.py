"""Inputs for plans of the published model, as a profile would give them."""

from functools import cache
from typing import Any

from hvlite.dims import HUNYUANVIDEO, latent_shape
from hvlite.memory.choice import Budget, Inputs
from hvlite.memory.needs import Clip
from hvlite.memory.stages import Stored, Task
from hvlite.weights.layout import Formats, slab_placements

GIB = 1 << 30
# memory less reserve, host, weights, text weights: the profiles for cards.
PROFILES: dict[str, tuple[float, float, str, str]] = {
    "6g": (5.2, 12, "int8", "nf4"),
    "8g": (7.0, 12, "int8", "nf4"),
    "12g": (10.8, 12, "int8", "nf4"),
    "16g": (14.5, 12, "int8", "nf4"),
    "24g": (22.0, 12, "int8", "nf4"),
    "45g": (42.0, 23, "bf16", "int8"),
    "60g": (57.0, 30, "bf16", "fp16"),
}
HD, SMALL = ((720, 1280), 129), ((544, 960), 129)


@cache
def stored(weights: str, text_weights: str) -> Stored:
    """What a store in these formats holds."""
    formats = Formats(weights=weights.removesuffix("-dynamic"), text_weights=text_weights)
    slabs = {name: placement.data_bytes for name, placement in slab_placements(HUNYUANVIDEO, formats).items()}
    return Stored(weights=weights, text_weights=text_weights, slabs=slabs)


def clip_of(size: tuple[int, int], frames: int, steps: int = 50, prompts: int = 1) -> Clip:
    return Clip(shape=latent_shape(size, frames, HUNYUANVIDEO.vae), steps=steps, prompts=prompts)


def inputs_of(clip: Clip, device_gib: float, host_gib: float, weights: Stored, **rest: Any) -> Inputs:
    """On a card, in the dtypes of the published tool."""
    task = Task(
        clip=clip,
        dims=HUNYUANVIDEO,
        stored=weights,
        kind="cuda",
        attention="sdpa",
        dtype="bf16",
        text_dtype="fp16",
        vae_dtype="fp16",
    )
    budget = Budget(device_bytes=round(device_gib * GIB), host_bytes=round(host_gib * GIB))
    return Inputs(task=task, budget=budget, **rest)


def profile_inputs(name: str, clip: Clip, weights: str | None = None, **rest: Any) -> Inputs:
    """Under a profile, with its weights or others."""
    device_gib, host_gib, own, text_weights = PROFILES[name]
    return inputs_of(clip, device_gib, host_gib, stored(weights or own, text_weights), **rest)
