"""The plan fits every card it is made for, says what it chose, and tells the truth about what would fit."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvlite.dims import HUNYUANVIDEO, latent_shape
from hvlite.errors import DoesNotFit, ExitCode
from hvlite.memory.choice import Asked, Budget, Inputs, Others
from hvlite.memory.geometry import EXACT, Exact
from hvlite.memory.needs import ITEM_BYTES, Knobs, conditioning_bytes
from hvlite.memory.plan import Plan, make_plan
from hvlite.memory.stages import STAGES, Choice, Stage, stage_need
from hvlite.memory.tiers import STAGING, spread
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry
from hvlite.memory.workspaces import Kind
from tests.plans import GIB, HD, PROFILES, SMALL, clip_of, inputs_of, profile_inputs, stored

BLOCKS = HUNYUANVIDEO.dit.blocks


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("size", [HD, SMALL])
@pytest.mark.parametrize("weights", [None, "bf16"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_every_card_profile_fits(
    name: str, size: tuple[tuple[int, int], int], weights: str | None, prompts: int
) -> None:
    inputs = profile_inputs(name, clip_of(*size, prompts=prompts), weights)
    plan = make_plan(inputs)
    assert plan.fits
    assert [need.name for need in plan.stages] == list(STAGES)
    assert plan.peak_bytes == max(need.peak_bytes for need in plan.stages) <= plan.budget_bytes
    assert plan.tiles == PUBLISHED_TILES
    assert plan.host_bytes <= inputs.budget.host_bytes
    assert plan.resident_blocks + plan.streamed_blocks == BLOCKS
    plan.check()


def test_all_blocks_streamed_in_bf16_stay_below_the_goal() -> None:
    task = profile_inputs("6g", clip_of(*HD), "bf16").task
    choice = Choice(knobs=Knobs(token_chunk=2048, head_groups=4), residents=(), tiles=PUBLISHED_TILES)
    assert stage_need(task, choice, "denoise").live_bytes <= 4.5 * GIB
    assert stage_need(task, choice, "denoise").peak_bytes <= 4.5 * GIB


def test_large_cards_keep_everything_between_clips() -> None:
    plan = make_plan(profile_inputs("60g", clip_of(*HD)))
    assert plan.warm == ("dit", "text", "vae")
    assert plan.resident_blocks == BLOCKS
    assert plan.text_residents == tuple(range(HUNYUANVIDEO.llama.used_layers))
    assert (plan.head_groups, plan.token_chunk) == (1, 2048)
    assert plan.bytes_per_step == 0
    slabs = plan.inputs.task.stored.slabs
    passing = [size for name, size in slabs.items() if name.startswith(("text_layers", "double", "single"))]
    vectors = conditioning_bytes(HUNYUANVIDEO.dit, clip_of(*HD), ITEM_BYTES["bf16"], 50)
    assert plan.host_bytes == STAGING * max(passing) + vectors  # through which all of it came once; which wait there
    cold = make_plan(profile_inputs("6g", clip_of(*HD)))
    assert not cold.warm
    assert not cold.text_residents


def test_residents_are_as_many_as_fit_and_evenly_spread() -> None:
    plan = make_plan(profile_inputs("12g", clip_of(*HD), "bf16"))
    assert plan.residents == spread(plan.resident_blocks, BLOCKS)
    assert plan.head_groups <= 4
    more = replace(plan.choice, residents=spread(plan.resident_blocks + 1, BLOCKS))
    assert stage_need(plan.inputs.task, more, "denoise").peak_bytes > plan.budget_bytes


def test_hard_knobs_are_for_where_nothing_else_fits() -> None:
    plan = make_plan(inputs_of(clip_of(*HD), 2.9, 12, stored("bf16", "nf4")))
    assert plan.fits
    assert plan.resident_blocks == 0
    assert plan.head_groups > 4


def test_what_was_asked_for_is_kept() -> None:
    asked = Asked(token_chunk=640, head_groups=7, tiles=replace(PUBLISHED_TILES, frames=32, frames_stride=24))
    plan = make_plan(profile_inputs("24g", clip_of(*SMALL), asked=asked))
    assert plan.token_chunk == 640
    assert plan.head_groups == 6  # the next number below that divides 24 heads
    assert plan.tiles == asked.tiles


def test_smaller_tiles_where_the_published_ones_do_not_fit_and_a_note() -> None:
    plan = make_plan(inputs_of(clip_of(*SMALL), 3.4, 12, stored("bf16", "nf4")))
    assert plan.fits
    assert isinstance(plan.tiles, TileGeometry)
    assert plan.tiles.height < PUBLISHED_TILES.height
    assert plan.tiles.frames == PUBLISHED_TILES.frames
    assert any("decode tiles" in note for note in plan.notes)


@pytest.mark.parametrize("name", PROFILES)
def test_an_exact_decode_fits_every_card_and_goes_to_disk(name: str) -> None:
    plan = make_plan(profile_inputs(name, clip_of(*HD), asked=Asked(tiles=EXACT)))
    assert plan.fits
    assert plan.spilled is not None
    assert (plan.tiles, plan.spilled.place, plan.decoded_volume) == (Exact(), "disk", 1.0)
    assert plan.spilled.nbytes == pytest.approx(91.3e9, rel=0.001)
    assert any("85.03 GiB on disk" in note for note in plan.notes)
    assert json.loads(json.dumps(plan.as_dict()))["decode_tile"] == "exact"


def test_a_small_clip_is_kept_in_the_hosts_memory_beside_its_weights() -> None:
    small = clip_of((256, 256), 33)
    plan = make_plan(profile_inputs("24g", small, asked=Asked(tiles=EXACT)))
    assert plan.spilled is not None
    assert plan.spilled.place == "host"
    tight = make_plan(
        inputs_of(small, 22, plan.spilled.nbytes / GIB - 0.01, stored("int8", "nf4"), asked=Asked(tiles=EXACT))
    )
    assert tight.tiles == Exact(on_disk=True)


def test_a_disk_that_is_too_small_is_refused_with_both_numbers_and_what_fits() -> None:
    inputs = profile_inputs("24g", clip_of(*HD), asked=Asked(tiles=EXACT))
    inputs = replace(inputs, budget=replace(inputs.budget, disk_bytes=40 * GIB))
    plan = make_plan(inputs)
    assert not plan.fits
    with pytest.raises(
        DoesNotFit, match=r"85\.03 GiB in .*scratch, where 40\.00 GiB may be used\. Try --decode-tile auto"
    ):
        plan.check()
    assert make_plan(replace(inputs, stages=("denoise",))).fits


def test_what_follows_an_exact_decode_is_what_would_be_taken_without_asking() -> None:
    plan = make_plan(profile_inputs("24g", clip_of(*HD), asked=Asked(tiles=EXACT)))
    colder = plan.next_rung("decode")
    assert colder is not None
    assert (colder.tiles, colder.warm) == (Exact(), ())
    tiled = colder.next_rung("decode")
    assert tiled is not None
    assert tiled.tiles == PUBLISHED_TILES


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(0, 32),
    size=st.sampled_from(HUNYUANVIDEO.defaults.known_sizes),
    device_gib=st.floats(0.5, 60),
    weights=st.sampled_from(("bf16", "int8", "nf4")),
)
def test_a_plan_never_exceeds_its_budget_unless_it_says_so(
    frames: int, size: tuple[int, int], device_gib: float, weights: str
) -> None:
    plan = make_plan(inputs_of(clip_of(size, 4 * frames + 1), device_gib, 8, stored(weights, "nf4")))
    assert plan.fits == (plan.peak_bytes <= plan.budget_bytes)
    assert all(need.peak_bytes >= need.live_bytes == need.weights_bytes + need.activation_bytes for need in plan.stages)


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(0, 31), groups=st.sampled_from((1, 2, 4, 24)), chunk=st.sampled_from((512, 2048)))
def test_more_frames_never_take_less(frames: int, groups: int, chunk: int) -> None:
    choice = Choice(knobs=Knobs(token_chunk=chunk, head_groups=groups), residents=(), tiles=PUBLISHED_TILES)
    short, long = (
        [stage_need(profile_inputs("6g", clip_of(SMALL[0], 4 * count + 1)).task, choice, stage) for stage in STAGES]
        for count in (frames, frames + 1)
    )
    assert all(one.live_bytes <= other.live_bytes for one, other in zip(short, long, strict=True))


def changed(inputs: Inputs, flags: str) -> Inputs:
    """What a user does who follows the advice."""
    task, clip = inputs.task, inputs.task.clip
    for flag, value in re.findall(r"--(\S+) ([^-]\S*(?: \d+)?)", flags):
        if flag == "frames":
            clip = replace(clip, shape=replace(clip.shape, frames=(int(value) - 1) // 4 + 1))
        elif flag == "size":
            height, width = map(int, value.split())
            frames = (clip.shape.frames - 1) * 4 + 1
            clip = replace(clip, shape=latent_shape((height, width), frames, HUNYUANVIDEO.vae))
        elif flag == "steps":
            clip = replace(clip, steps=int(value))
        elif flag == "cfg-scale":
            clip = replace(clip, prompts=1)
        elif flag == "weights":
            task = replace(task, stored=stored(value, task.stored.text_weights))
        elif flag == "profile":
            inputs = replace(inputs, budget=Budget(device_bytes=round(PROFILES[value][0] * GIB)))
        else:
            assert value == "auto"
            asked = inputs.asked
            inputs = replace(
                inputs,
                asked=Asked(
                    token_chunk="auto" if flag == "token-chunk" else asked.token_chunk,
                    head_groups="auto" if flag == "head-groups" else asked.head_groups,
                    tiles="auto" if flag == "decode-tile" else asked.tiles,
                ),
            )
    return replace(inputs, task=replace(task, clip=clip))


@pytest.mark.parametrize(
    ("inputs", "stage"),
    [
        (inputs_of(clip_of(*HD), 2.2, 12, stored("bf16", "nf4")), "denoise"),
        (inputs_of(clip_of(*HD, prompts=2), 3.0, 12, stored("bf16", "nf4")), "denoise"),
        (inputs_of(clip_of(*HD), 4.0, 12, stored("int8", "nf4"), asked=Asked(head_groups=1)), "denoise"),
        (inputs_of(clip_of(*HD), 3.6, 12, stored("int8", "nf4"), asked=Asked(tiles=PUBLISHED_TILES)), "decode"),
    ],
)
def test_what_does_not_fit_is_refused_with_changes_that_do(inputs: Inputs, stage: Stage) -> None:
    others = Others(formats=[stored("nf4", "nf4")], profiles=[("6g", Budget(device_bytes=round(5.2 * GIB)))])
    plan = make_plan(replace(inputs, others=lambda: others))
    assert not plan.fits
    with pytest.raises(DoesNotFit) as refusal:
        plan.check()
    assert refusal.value.exit_code is ExitCode.DOES_NOT_FIT
    need = f"{plan.stage(stage).peak_bytes / GIB:.2f} GiB in stage {stage}"
    assert need in str(refusal.value)
    assert f"the budget is {plan.budget_bytes / GIB:.2f} GiB" in str(refusal.value)
    advice = plan.advice()
    assert len(advice) == 3
    for flags in advice:
        assert flags in str(refusal.value)
        assert make_plan(changed(inputs, flags)).fits


@pytest.mark.parametrize(("device_gib", "steps", "prompts"), [(4.9, 550, 2), (2.7, 1000, 1), (2.0, 1000, 1)])
def test_too_many_steps_are_answered_with_fewer(device_gib: float, steps: int, prompts: int) -> None:
    """Also where the clip itself is too large besides."""
    inputs = inputs_of(clip_of(*HD, steps=steps, prompts=prompts), device_gib, 12, stored("int8", "nf4"))
    advice = make_plan(inputs).advice()
    assert any(re.search(r"--steps \d{3}", flags) for flags in advice)
    assert all(make_plan(changed(inputs, flags)).fits for flags in advice)


@pytest.mark.parametrize(
    ("kind", "room_gib", "words"),
    [
        ("cuda", None, "it needs another card"),
        ("cuda", 0.5, "it needs another card"),
        ("cuda", 7.5, "raise --memory, 7.50 GiB may be used here"),
        ("cpu", 0.5, "it needs more memory"),
        ("cpu", 20, "raise --memory, 20.00 GiB may be used here"),
    ],
)
def test_where_nothing_fits_the_way_out_is_named(kind: Kind, room_gib: float | None, words: str) -> None:
    inputs = inputs_of(clip_of(*HD), 0.5, 12, stored("bf16", "nf4"))
    room = None if room_gib is None else round(room_gib * GIB)
    inputs = replace(inputs, task=replace(inputs.task, kind=kind), budget=replace(inputs.budget, room_bytes=room))
    with pytest.raises(DoesNotFit, match=rf"No smaller clip fits either: {words}\."):
        make_plan(inputs).check()


@pytest.mark.parametrize("stage", STAGES)
def test_every_rung_frees_memory_until_there_is_none_left(stage: Stage) -> None:
    plan: Plan | None = make_plan(profile_inputs("24g", clip_of(*HD), "bf16"))
    rungs = []
    while plan is not None:
        rungs.append(plan)
        plan = plan.next_rung(stage)
    peaks = [rung.stage(stage).peak_bytes for rung in rungs]
    assert all(low <= 0.92 * high for high, low in pairwise(peaks))
    assert not rungs[-1].warm
    if stage == "denoise":
        assert len(rungs) < 30
        assert rungs[1].resident_blocks == rungs[0].resident_blocks
        assert rungs[-1].resident_blocks == 0
    if stage == "decode":
        heights = [rung.tiles.height for rung in rungs if isinstance(rung.tiles, TileGeometry)]
        assert heights[-1] < heights[0]


def test_a_rung_leaves_alone_what_was_asked_for() -> None:
    plan: Plan | None = make_plan(profile_inputs("24g", clip_of(*HD), asked=Asked(token_chunk=2048, head_groups=2)))
    while plan is not None:
        assert (plan.token_chunk, plan.head_groups) == (2048, 2)
        plan = plan.next_rung("denoise")


@pytest.mark.parametrize(("host_gib", "from_disk"), [(11.2, True), (22.4, False), (44.8, False)])
def test_the_host_keeps_streamed_blocks_and_the_disk_gives_the_rest(host_gib: float, from_disk: bool) -> None:
    plan = make_plan(inputs_of(clip_of(*HD), 5.2, host_gib, stored("bf16", "nf4")))
    assert plan.fits_host != from_disk
    assert (plan.disk_bytes_per_step > 0) == from_disk
    assert plan.host_bytes <= host_gib * GIB
    assert set(plan.pinned).isdisjoint(plan.residents)
    assert (len(plan.pinned) < plan.streamed_blocks) == from_disk
    assert any("read from disk at every step" in note for note in plan.notes) == from_disk
    slabs = plan.inputs.task.stored.slabs
    streamed = sum(size for name, size in slabs.items() if re.match(r"(double|single)_blocks", name))
    assert plan.bytes_per_step < streamed
    assert 16.8 * GIB < streamed < 17 * GIB


@pytest.mark.parametrize(("device_gib", "host_gib", "is_told"), [(5.2, 0, True), (22, 0, True), (22, 1, False)])
def test_host_memory_that_is_taken_all_the_same_is_told(device_gib: float, host_gib: float, is_told: bool) -> None:
    plan = make_plan(inputs_of(clip_of(*HD), device_gib, host_gib, stored("int8", "nf4")))
    assert (plan.host_bytes > host_gib * GIB) == is_told
    assert any("0.60 GiB of host memory are taken" in note for note in plan.notes) == is_told


def test_a_plan_for_some_stages_looks_at_no_other() -> None:
    plan = make_plan(inputs_of(clip_of(*HD), 1.0, 12, stored("bf16", "nf4"), stages=("text",)))
    assert plan.fits
    assert [need.name for need in plan.stages] == ["text"]
    assert plan.residents == ()


def test_a_checkpoint_is_loaded_whole() -> None:
    whole = replace(stored("bf16", "fp16"), is_streamed=False)
    plan = make_plan(inputs_of(clip_of(*SMALL), 57, 30, whole))
    assert plan.fits
    assert plan.bytes_per_step == 0
    blocks = sum(size for name, size in whole.slabs.items() if re.match(r"(double|single)_", name))
    assert plan.stage("denoise").weights_bytes >= blocks
    assert not make_plan(inputs_of(clip_of(*SMALL), 22, 30, whole)).fits


def test_a_plan_is_json() -> None:
    plan = make_plan(profile_inputs("8g", clip_of(*HD)))
    shown = json.loads(json.dumps(plan.as_dict()))
    assert {"fits", "fits_host", "budget_bytes", "peak_bytes", "host_bytes"} <= shown.keys()
    assert {"resident_blocks", "streamed_blocks", "bytes_per_step"} <= shown.keys()
    assert shown["stages"][0].keys() == {
        "name",
        "weights_bytes",
        "activation_bytes",
        "workspace_bytes",
        "live_bytes",
        "peak_bytes",
    }
    assert "inputs" not in shown
