"""On a card: a clip takes no more than its plan says, and where the blocks lie changes none of its bits."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_store import small_model, write_random_store
from torch import Tensor

from hvlite import Outputs, Request, open_model
from hvlite.dims import HUNYUANVIDEO
from hvlite.events import Finished, Note
from hvlite.line import begin, denoise, generate
from hvlite.memory.plan import Plan
from hvlite.model.text import PromptStates
from hvlite.opened import Model
from hvlite.planning import Setting, plan_clip
from hvlite.profile import Room, load_profile
from hvlite.run import Run
from hvlite.weights.layout import Formats

REQUEST = Request("random", size=(256, 448), frames=9, steps=2)
BLOCKS = 6
GIB = 1 << 30
LARGE = Room(kind="cuda", total_bytes=64 * GIB, free_bytes=64 * GIB)


@pytest.fixture(scope="module", params=["bf16", "int8", "nf4"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of the published width, 1.8 GB of them in bf16."""
    folder = tmp_path_factory.mktemp("stores") / request.param
    return write_random_store(folder, small_model(2, BLOCKS - 2), Formats(weights=request.param))


def states() -> list[PromptStates]:
    """Those of a prompt that no encoder has read."""
    generator = torch.Generator().manual_seed(3)
    dims = HUNYUANVIDEO.dit
    text = torch.randn(40, dims.text_width, generator=generator)
    return [PromptStates(text=text, pooled=torch.randn(dims.pooled_width, generator=generator))]


@pytest.fixture
def model(store: Path, card: torch.device) -> Iterator[Model]:
    with open_model(store, load_profile("24g"), str(card)) as opened:
        yield opened


def final_latents(model: Model, plan: Plan) -> Tensor:
    """By the line, with the blocks where `plan` has them."""
    run = Run(model, REQUEST.resolve(model.dims), Outputs(), plan)
    events = begin(run, states())
    while True:
        try:
            next(events)
        except StopIteration as ended:
            clip = ended.value
            break
    for _ in denoise(run, clip):
        pass
    latents: Tensor = clip.latents.cpu()
    return latents


def test_where_blocks_lie_changes_no_bit(model: Model) -> None:
    plan = model.plan(REQUEST.resolve(model.dims))
    every = tuple(range(BLOCKS))
    expected = final_latents(model, replace(plan, residents=every, pinned=()))
    assert torch.isfinite(expected).all()
    for residents, pinned in (((), ()), ((), every), ((0, 3), (1, 4)), ((1, 2, 3, 4), ())):
        found = final_latents(model, replace(plan, residents=residents, pinned=pinned))
        assert torch.equal(found, expected), f"residents {residents}, pinned {pinned}"


def budgets(setting: Setting) -> tuple[float, float]:
    """GiB: the least that the clip fits in, and the least that keeps every block."""
    profiles = (load_profile("24g", memory_gib=tenths / 10, reserve_gib=0.0) for tenths in range(1, 160))
    plans = [plan_clip(REQUEST.resolve(setting.dims), profile, setting, LARGE) for profile in profiles]
    fitting = [plan for plan in plans if plan.fits]
    whole = next(plan for plan in fitting if plan.resident_blocks == BLOCKS)
    return fitting[0].budget_bytes / GIB, whole.budget_bytes / GIB


def test_a_clip_takes_no_more_than_its_plan_says(store: Path, card: torch.device, tmp_path: Path) -> None:
    """From the least that fits to what keeps every block, and more."""
    with open_model(store, load_profile("24g"), str(card)) as opened:
        least, whole = budgets(opened.setting)
    residents = []
    for budget in (least, (least + whole) / 2, whole, 2 * whole):
        profile = load_profile("24g", memory_gib=budget + 0.5, reserve_gib=0.5)
        with open_model(store, profile, str(card)) as opened:
            plan = opened.plan(REQUEST.resolve(opened.dims))
            events = list(generate(REQUEST, opened, prompts=states(), outputs=Outputs(folder=tmp_path)))
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.memory is not None
        assert last.memory.actual_bytes is not None
        assert last.memory.actual_bytes <= plan.peak_bytes <= plan.budget_bytes
        assert not [event for event in events if isinstance(event, Note) and "out of memory" in event.text]
        residents.append(plan.resident_blocks)
    assert residents == sorted(residents)
    assert residents[-1] == BLOCKS
