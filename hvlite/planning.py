"""From a Request, a Profile and a model's dims to a Plan: how `memory.plan`, which knows no weights, meets their sizes.

No torch: the command line and the terminal UI plan while one types.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

from hvlite.dims import HUNYUANVIDEO, ModelDims, latent_shape
from hvlite.memory.choice import Asked, Budget, Inputs, Others
from hvlite.memory.geometry import AUTO, AskedTiles, parse_tiles
from hvlite.memory.needs import TEMPLATE_TOKENS, Clip, Knobs
from hvlite.memory.plan import Plan, make_plan
from hvlite.memory.stages import STAGES, Stage, Stored, Task
from hvlite.profile import (
    CPU,
    GIB,
    Profile,
    Room,
    Verdict,
    budget_bytes,
    card_profiles,
    host_budget,
    load_profile,
)
from hvlite.request import Request, ResolvedRequest
from hvlite.weights.layout import Formats, slab_placements, store_bytes

Dtype = Literal["fp32", "bf16", "fp16"]
Kind = Literal["cuda", "cpu"]
STORED_AS = {"int8-dynamic": "int8"}
# What a plan that does not fit may advise.
SMALLER = ("int8", "nf4")
# A model whose weights take no more is loaded whole, from its checkpoint.
SMALL_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model on a machine. `formats` are None for a checkpoint, whose parts are loaded whole.

    `kind` is cuda or cpu; `attention` the back end; `dynamic` int8 weights are multiplied by int8 activations;
    `repacks`: with other flags the weights would be packed to other formats.
    """

    dims: ModelDims
    formats: Formats | None
    kind: Kind
    attention: str = "sdpa"
    dynamic: bool = False
    repacks: bool = False


def text_dtype(kind: str, dtype: Dtype) -> Dtype:
    """fp16 as published on a GPU; on the CPU the profile's dtype."""
    return "fp16" if kind != CPU and dtype != "fp32" else dtype


def vae_dtype(kind: str, dtype: Dtype) -> Dtype:
    """fp16 as published on a GPU; on the CPU fp32, the only one its convolutions are fast in."""
    return "fp16" if kind != CPU and dtype != "fp32" else "fp32"


def stored_formats(weights: str | None, text_weights: str | None) -> Formats:
    """The formats of a store for what is asked; None is the published precision."""
    plain = Formats()
    return Formats(
        weights=STORED_AS.get(weights or plain.weights, weights or plain.weights),
        text_weights=STORED_AS.get(text_weights or plain.text_weights, text_weights or plain.text_weights),
    )


def formats_for(dims: ModelDims, profile: Profile, *, asked: bool) -> Formats | None:
    """The formats that a checkpoint is packed to before it is used; None: it is used as it is.

    `asked`: by flag, not by profile alone. A small model is not packed unasked: it fits everywhere.
    """
    if not asked and store_bytes(dims, "bf16", "fp16") <= SMALL_BYTES:
        return None
    weights, text_weights = ((None if name == "auto" else name) for name in (profile.weights, profile.text_weights))
    return stored_formats(weights, text_weights)


def setting_of(dims: ModelDims, profile: Profile, *, asked: bool = False, kind: Kind | None = None) -> Setting:
    """What a run under this profile would meet, on a machine as it is named."""
    formats = formats_for(dims, profile, asked=asked)
    return Setting(
        dims=dims,
        formats=formats,
        kind=kind or profile.kind,
        attention=profile.attention or "sdpa",
        dynamic=profile.weights == "int8-dynamic",
        repacks=formats is not None,
    )


def named_room(profile: Profile) -> Room:
    """The machine that a profile is named after: its card, with nothing else on it."""
    named = round(profile.memory_gib * GIB)
    return Room(kind=profile.kind, total_bytes=named, free_bytes=named)


def fits_by_plan(profile: Profile, room: Room) -> Verdict:
    """Whether what the profile leaves to a run is free here, and the published model's default clip fits in it.

    Every profile's plan can be streamed into little, so the second alone would choose the largest on any card.
    """
    resolved = Request("any").resolve(HUNYUANVIDEO)
    plan = plan_clip(resolved, profile, setting_of(HUNYUANVIDEO, profile, asked=True), room)
    wanted = round((profile.memory_gib - profile.reserve_gib) * GIB)
    height, width = resolved.size
    clip = f"{height}x{width}x{resolved.frames} takes {plan.peak_bytes / GIB:.1f}"
    why = (
        f"wants {wanted / GIB:.1f} GiB ({profile.memory_gib:g} less {profile.reserve_gib:g} in reserve; {clip}), "
        f"{room.usable_bytes / GIB:.1f} GiB is free"
    )
    return Verdict(name=profile.name, fits=plan.fits and wanted <= room.usable_bytes, why=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a user or an earlier run has chosen, over the profile.

    `knobs` are those that a clip began with, kept where they fit and the profile names no others; `stages` those that
    are still to come, after `done` steps.
    """

    tiles: AskedTiles = "auto"
    knobs: Knobs | None = None
    stages: tuple[Stage, ...] = STAGES
    done: int = 0


def plan_clip(
    resolved: ResolvedRequest, profile: Profile, setting: Setting, room: Room | None = None, wishes: Wishes = Wishes()
) -> Plan:
    """The plan of one clip in `room` (None: as the profile is named); it may not fit (`Plan.check`)."""
    clip = Clip(
        shape=latent_shape(resolved.size, resolved.frames, setting.dims.vae),
        steps=resolved.steps,
        prompts=2 if resolved.uses_cfg else 1,
        template_tokens=TEMPLATE_TOKENS[resolved.template],
    )
    plan = make_plan(_inputs(clip, profile, setting, room, wishes))
    if plan.fits or wishes.knobs is None:
        return plan
    return make_plan(_inputs(clip, profile, setting, room, replace(wishes, knobs=None)))


def plan_text(prompts: int, profile: Profile, setting: Setting, room: Room | None = None) -> Plan:
    """The plan of encoding so many prompts in one pass over the weights."""
    smallest = latent_shape((16, 16), 1, setting.dims.vae)
    clip = Clip(shape=smallest, steps=1, prompts=prompts)
    return make_plan(_inputs(clip, profile, setting, room, Wishes(stages=("text",))))


def _inputs(clip: Clip, profile: Profile, setting: Setting, room: Room | None, wishes: Wishes) -> Inputs:
    knobs = profile.knobs
    tiles = parse_tiles(profile.knobs.decode_tile) if wishes.tiles == AUTO else wishes.tiles
    room = room or named_room(profile)
    return Inputs(
        task=Task(
            clip=clip,
            dims=setting.dims,
            stored=stored(setting, profile.dtype),
            kind=setting.kind,
            attention=setting.attention,
            dtype=profile.dtype,
            text_dtype=text_dtype(setting.kind, profile.dtype),
            vae_dtype=vae_dtype(setting.kind, profile.dtype),
        ),
        budget=Budget(
            device_bytes=budget_bytes(profile, room),
            room_bytes=max(0, room.usable_bytes - round(profile.reserve_gib * GIB)),
            host_bytes=host_budget(profile, room),
            disk_bytes=room.disk_bytes,
        ),
        asked=Asked(token_chunk=knobs.token_chunk, head_groups=knobs.head_groups, tiles=tiles),
        stages=wishes.stages,
        done=wishes.done,
        began=wishes.knobs,
        others=partial(_others, profile, setting, room),
    )


def _others(profile: Profile, setting: Setting, room: Room) -> Others:
    """Smaller formats, where the weights can be packed anew, and the profiles that would leave more of this machine."""
    formats = setting.formats
    if formats is None:
        return Others()
    larger = [load_profile(name) for name in card_profiles() if setting.kind != CPU]
    larger = [each for each in larger if budget_bytes(each, room) > budget_bytes(profile, room)]
    same = [each for each in larger if formats_for(setting.dims, each, asked=True) == formats]
    pairs = product(dict.fromkeys((formats.weights, *SMALLER)), dict.fromkeys((formats.text_weights, *SMALLER)))
    others = [replace(formats, weights=weights, text_weights=text) for weights, text in pairs][1:]
    return Others(
        formats=[stored(replace(setting, formats=each), profile.dtype) for each in others] if setting.repacks else [],
        profiles=[
            (each.name, Budget(device_bytes=budget_bytes(each, room), host_bytes=host_budget(each, room)))
            for each in same
        ],
    )


def stored(setting: Setting, dtype: Dtype) -> Stored:
    """The sizes of all slabs; of a checkpoint, those that it would have in the products' dtypes."""
    formats = setting.formats or Formats(weights=dtype, text_weights=text_dtype(setting.kind, dtype))
    weights = "int8-dynamic" if setting.dynamic and formats.weights == "int8" else formats.weights
    placements = slab_placements(setting.dims, formats)
    return Stored(
        weights=weights,
        text_weights=formats.text_weights,
        slabs={name: placement.data_bytes for name, placement in placements.items()},
        is_streamed=setting.formats is not None,
    )
