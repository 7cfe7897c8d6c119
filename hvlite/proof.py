"""The proof of a plan: the very line that renders, run on meta with the real dims, and every byte counted."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from hvlite.events import Stage
from hvlite.line import generate
from hvlite.memory.geometry import AUTO, AskedTiles
from hvlite.memory.needs import TEXT_TOKENS
from hvlite.memory.trace import StagePeak, Trace
from hvlite.opened import Model
from hvlite.origin import DimsOnly, find_origin
from hvlite.planning import Setting, Wishes
from hvlite.profile import Profile
from hvlite.request import Request
from hvlite.run import Outputs


def open_on_meta(
    model: str | Path, profile: Profile, setting: Setting, files: Mapping[str, Path | None]
) -> closing[Model]:
    """What is planned for: weights in these formats, packed or not yet, or a checkpoint that is used as it is."""
    formats = setting.formats
    origin = find_origin(model, files) if formats is None else DimsOnly(setting.dims, formats, setting.dynamic)
    return closing(Model(origin, profile, torch.device("meta")))


def trace_clip(
    request: Request, model: Model, tiles: AskedTiles = AUTO, told: Callable[[str], None] = lambda stage: None
) -> list[StagePeak]:
    """The most that each stage holds on the device, in a run after another one, to be held against `live_bytes`.

    `model` is on meta, `tiles` are those asked for; `told` hears of each stage as it begins. The prompts are not the
    request's but the longest ones, for which a plan is made; two, since the same text is encoded once.
    """
    assert model.device.type == "meta", model.device
    prompt, negative = (f"{word} " * (TEXT_TOKENS + 1) for word in ("a", "b"))
    request = replace(request, prompt=prompt, negative_prompt=negative)
    plan = model.plan(request.resolve(model.dims), Wishes(tiles=tiles))
    trace, stages = Trace(), list[str]()
    with trace:
        model.preload(plan)
        for event in generate(request, model, outputs=Outputs(decode_tile=tiles)):
            if isinstance(event, Stage):
                told(event.name)
                trace.begin(event.name)
                stages.append(event.name)
    return [trace.peak(stage) for stage in stages]
