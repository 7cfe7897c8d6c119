"""The plan equals a trace of the whole line on meta: what is said beforehand is what the code that runs will hold.

The grid is walked with a model of few blocks, all as wide as the published one's; some cases with all of them.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import TypeVar, cast

import pytest
import torch

from hvlite.clip import finish_on_meta
from hvlite.dims import HUNYUANVIDEO, ModelDims, latent_shape
from hvlite.events import Event, Stage
from hvlite.line import begin, denoise, generate
from hvlite.memory.geometry import parse_tiles
from hvlite.memory.plan import Plan
from hvlite.memory.stages import STAGES
from hvlite.memory.stages import Stage as StageName
from hvlite.memory.trace import Trace
from hvlite.opened import Model, open_model
from hvlite.origin import DimsOnly
from hvlite.planning import Wishes
from hvlite.profile import load_profile
from hvlite.proof import open_on_meta, trace_clip
from hvlite.request import Request
from hvlite.run import Outputs, Run
from hvlite.weights.layout import Formats

Result = TypeVar("Result")
FEW_BLOCKS = replace(
    HUNYUANVIDEO,
    dit=replace(HUNYUANVIDEO.dit, double_blocks=2, single_blocks=4),
    llama=replace(HUNYUANVIDEO.llama, layers=5),
)
Size = tuple[int, int, int]
HD, SMALL, SHORT, IMAGE = (720, 1280, 129), (544, 960, 129), (256, 256, 33), (720, 1280, 1)


@contextmanager
def model_on_meta(dims: ModelDims, profile: str, weights: tuple[str, str], **overrides: float | str) -> Iterator[Model]:
    kind, text_kind = weights
    formats = Formats(weights=kind.removesuffix("-dynamic"), text_weights=text_kind)
    origin = DimsOnly(dims, formats, dynamic=kind == "int8-dynamic")
    model = Model(origin, load_profile(profile, **overrides), torch.device("meta"))
    try:
        yield model
    finally:
        model.close()


def request_of(clip: Size, prompts: int) -> Request:
    return Request("x", size=clip[:2], frames=clip[2], cfg_scale=6.0 if prompts == 2 else 1.0)


def watched(events: Generator[Event, None, Result], trace: Trace) -> Result:
    """Run to the end, with a mark in the trace for every stage."""
    while True:
        try:
            event = next(events)
        except StopIteration as ended:
            result: Result = ended.value
            return result
        if isinstance(event, Stage):
            trace.begin(event.name)


def compare(plan: Plan, trace: Trace) -> None:
    for need in plan.stages:
        if need.name in [peak.stage for peak in trace.peaks]:
            assert need.live_bytes == pytest.approx(trace.peak(need.name).peak_bytes, rel=0.02), trace.peak(need.name)


def check_all_but_decode(model: Model, request: Request) -> Plan:
    """With what an earlier clip would have left; a tile's decode has tests of its own."""
    plan = model.plan(request.resolve(model.dims))
    run = Run(model, request.resolve(model.dims), Outputs(), plan)
    with Trace() as trace:
        model.preload(plan)
        watched(denoise(run, watched(begin(run, None), trace)), trace)
    assert len(trace.peaks) == 4
    compare(plan, trace)
    return plan


FORMATS = [
    ("bf16", "fp16"),
    ("int8", "nf4"),
    ("int8-dynamic", "int8"),
    ("nf4", "nf4-double"),
    ("nf4-double", "bf16"),
    ("fp8", "fp8"),
    ("fp32", "fp32"),
]
# Memory for which a model of few blocks is streamed in part, and resident.
PLACES = [
    (HD, "6g", 5.2),
    (SMALL, "8g", 4.2),
    (SHORT, "12g", 3.4),
    (IMAGE, "16g", 3.7),
    (SMALL, "24g", 24.0),
    (HD, "60g", 60.0),
]


CASES = list(product(PLACES, FORMATS))[::2]  # every place with every other format, and the other way round


@pytest.mark.parametrize(("place", "weights"), CASES)
def test_plan_and_trace_agree(place: tuple[Size, str, float], weights: tuple[str, str]) -> None:
    clip, profile, memory_gib = place
    prompts = 1 + (PLACES.index(place) // 2 + FORMATS.index(weights)) % 2  # every format with and without guidance
    memory_gib *= 1.5 if weights[0] == "fp32" else 1
    with model_on_meta(FEW_BLOCKS, profile, weights, memory_gib=memory_gib) as model:
        check_all_but_decode(model, request_of(clip, prompts))


def test_the_products_dtype_is_the_profiles() -> None:
    with model_on_meta(FEW_BLOCKS, "24g", ("bf16", "fp16"), dtype="fp32") as model:
        plan = check_all_but_decode(model, request_of(SMALL, 1))
    with model_on_meta(FEW_BLOCKS, "24g", ("bf16", "fp16")) as model:
        narrow = model.plan(request_of(SMALL, 1).resolve(model.dims))
    assert plan.stage("denoise").activation_bytes > 1.8 * narrow.stage("denoise").activation_bytes


@pytest.mark.parametrize("prompts", [1, 2])
def test_an_image_has_a_template_of_its_own(prompts: int) -> None:
    """Where the text encoder is streamed, its prompt is felt beside its weights."""
    with model_on_meta(FEW_BLOCKS, "6g", ("int8", "nf4"), memory_gib=2.4) as model:
        check_all_but_decode(model, request_of(IMAGE, prompts))


@pytest.mark.parametrize(
    ("clip", "prompts", "formats"),
    [
        ((64, 64, 17), 2, None),
        ((544, 960, 33), 1, None),
        ((544, 960, 33), 1, Formats(weights="int8", text_weights="nf4")),
    ],
)
def test_a_tiny_model_holds_what_is_planned(clip: Size, prompts: int, formats: Formats | None) -> None:
    """Where blocks are narrow, the longest prompt, the noise and the latents cut in patches are what counts.

    In formats that it is not packed in it is traced as it would be.
    """
    request, profile = request_of(clip, prompts), load_profile("8g")
    with open_model("shapes", profile, "meta") as model:
        setting = replace(model.setting, formats=formats)
    with open_on_meta("shapes", profile, setting, {}) as model:
        plan = model.plan(request.resolve(model.dims))
        for peak in trace_clip(request, model):
            assert plan.stage(cast(StageName, peak.stage)).live_bytes == pytest.approx(peak.peak_bytes, rel=0.02), peak


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_fp8_weights_pass_through_bf16_on_their_way_to_another_dtype(dtype: str) -> None:
    with model_on_meta(FEW_BLOCKS, "16g", ("fp8", "fp8"), dtype=dtype) as model:
        check_all_but_decode(model, request_of(SHORT, 2))


@pytest.mark.parametrize(
    ("clip", "profile", "weights", "prompts"),
    [
        (HD, "6g", ("bf16", "nf4"), 2),
        (SMALL, "24g", ("int8", "nf4"), 1),
    ],
)
def test_the_whole_line_at_full_size(clip: Size, profile: str, weights: tuple[str, str], prompts: int) -> None:
    request = request_of(clip, prompts)
    with model_on_meta(HUNYUANVIDEO, profile, weights) as model, Trace() as trace:
        plan = model.plan(request.resolve(model.dims))
        model.preload(plan)
        watched(generate(request, model), trace)
    assert [peak.stage for peak in trace.peaks] == ["", *STAGES]
    compare(plan, trace)
    assert trace.peak("denoise").peak_bytes < plan.budget_bytes


def test_what_an_earlier_clip_left_is_given_back_where_it_is_not_planned_for() -> None:
    """An image leaves more on the card than a long clip has room for; begun anew, and gone on with."""
    with model_on_meta(FEW_BLOCKS, "16g", ("int8", "nf4"), memory_gib=4.8) as model:
        request = request_of(SMALL, 1)
        before, plan = (model.plan(each.resolve(model.dims)) for each in (request_of(IMAGE, 1), request))
        assert set(before.warm) > set(plan.warm)
        with Trace() as trace:
            model.preload(before)
            watched(generate(request, model), trace)
        compare(plan, trace)
        assert max(peak.peak_bytes for peak in trace.peaks[1:]) < plan.budget_bytes


@pytest.mark.parametrize("tiles", ["exact", "wide"])
def test_a_decode_holds_what_is_planned_however_it_is_cut(tiles: str) -> None:
    """All tiles are cut, joined and given away, so nothing of them may pile up on the card."""
    resolved = request_of((144, 208, 33), 1).resolve(FEW_BLOCKS)
    shape = latent_shape(resolved.size, resolved.frames, FEW_BLOCKS.vae)
    size = (1, FEW_BLOCKS.vae.latent_channels, shape.frames, shape.height, shape.width)
    with model_on_meta(FEW_BLOCKS, "24g", ("int8", "nf4")) as model:
        plan = model.plan(resolved, Wishes(tiles=parse_tiles(tiles)))
        with Trace() as trace:
            model.preload(plan)
            latents = torch.empty(size, device="meta")
            for event in finish_on_meta(Run(model, resolved, Outputs(), plan), latents):
                if isinstance(event, Stage):
                    trace.begin(event.name)
    need = plan.stage("decode")
    assert need.live_bytes == pytest.approx(trace.peak("decode").peak_bytes, rel=0.02), trace.peak("decode")
