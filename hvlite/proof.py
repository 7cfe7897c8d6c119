"""The proof of a plan: the very line that renders, run on meta with the real dims, and every byte counted."""

from collections.abc import Callable
from dataclasses import replace

from hvlite.events import Stage
from hvlite.line import generate
from hvlite.memory.geometry import AUTO, AskedTiles
from hvlite.memory.needs import TEXT_TOKENS
from hvlite.memory.trace import StagePeak, Trace
from hvlite.opened import Model
from hvlite.planning import Wishes
from hvlite.request import Request
from hvlite.run import Outputs


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
