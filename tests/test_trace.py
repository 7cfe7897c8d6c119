"""The trace counts what is held, when it is held, and says where the most of it was asked for."""

import gc

import pytest
import torch
from torch import Tensor

from hvlite.dims import DitDims, LatentShape
from hvlite.memory.trace import Trace, not_counted
from hvlite.model.dit import Activations, Dit
from hvlite.model.ops import modulate

KIB = 1024


def meta(kib: int) -> Tensor:
    """So many KiB."""
    return torch.empty(kib * KIB, dtype=torch.uint8, device="meta")


def test_what_is_held_counts_until_its_last_view_has_gone() -> None:
    with Trace() as trace:
        first = meta(4)
        second = meta(2)
        assert trace.live_bytes == 6 * KIB
        view = first.view(2, -1)[1]
        del first
        assert trace.live_bytes == 6 * KIB
        del view, second
        assert trace.live_bytes == 0
    assert trace.peak("").peak_bytes == 6 * KIB


def test_sizes_are_rounded_as_the_allocator_rounds_them() -> None:
    with Trace() as trace:
        held = [torch.empty(size, dtype=torch.uint8, device="meta") for size in (0, 1, 512, 513)]
        assert trace.live_bytes == 0 + 512 + 512 + 1024
    assert len(held) == 4


def test_views_and_operations_in_place_add_nothing() -> None:
    with Trace() as trace:
        x = meta(8)
        rows = x.view(8, -1).add_(1).t()
        rows[:8].copy_(rows[8:16]).mul_(2)
        assert trace.live_bytes == trace.peak("").peak_bytes == 8 * KIB
        x + 1
        assert trace.live_bytes == 8 * KIB
        assert trace.peak("").peak_bytes == 16 * KIB


def test_what_was_there_before_or_is_declared_empty_does_not_count() -> None:
    before = meta(64)
    with Trace() as trace:
        with not_counted():
            placeholder = meta(32)
        host = torch.empty(KIB)
        parts = before[:KIB], placeholder.view(2, -1), host.view(2, -1), torch.ops.aten._unsafe_view(before, [64, KIB])
        assert trace.live_bytes == 0
        product = parts[3] + 1
        assert trace.live_bytes == 64 * KIB
        del product
    assert trace.live_bytes == 0


def test_each_stage_has_its_own_peak_which_holds_what_is_left_from_before() -> None:
    with Trace() as trace:
        trace.begin("text")
        kept = meta(1)
        meta(10)
        trace.begin("denoise")
        meta(4)
        trace.begin("rest")
        trace.begin("denoise")
        meta(5)
    assert [(peak.stage, peak.peak_bytes // KIB) for peak in trace.peaks] == [
        ("", 0),
        ("text", 11),
        ("denoise", 6),
        ("rest", 1),
    ]
    assert kept.nbytes == KIB


def test_the_peak_names_the_line_of_hvlite_and_the_operation() -> None:
    x = torch.empty(64, 8, device="meta")
    with Trace() as trace:
        trace.begin("norm")
        modulate(x, x[0], x[0])
    place = trace.peak("norm").place
    assert place.startswith("ops.py:")
    assert "modulate: aten." in place


TINY = DitDims(
    hidden=128,
    heads=4,
    double_blocks=1,
    single_blocks=1,
    refiner_blocks=1,
    mlp_ratio=4,
    latent_channels=16,
    text_width=64,
    pooled_width=32,
    rope_axes=(8, 12, 12),
    rope_theta=256.0,
    has_guidance=True,
)


def traced_step(device: str, knobs: Activations) -> list[int]:
    """The peak bytes of a step's parts, really computed on a CPU or not."""
    shape = LatentShape(5, 20, 22)  # 550 tokens
    with torch.device(device):
        dit = Dit(TINY).bfloat16()
        latents, text = torch.zeros(1, 16, 5, 20, 22), torch.zeros(9, 128, dtype=torch.bfloat16)
        vectors = torch.zeros(2, 6, 128, dtype=torch.bfloat16)
    work = dit.make_workspace(shape, 9, knobs, torch.bfloat16)
    with Trace(device) as trace:
        trace.begin("embed")
        x = dit.embed(latents, text)
        trace.begin("double")
        dit.double_blocks[0](x, vectors, work)
        trace.begin("single")
        dit.single_blocks[0](x, vectors[0, :3], work)
        trace.begin("head")
        dit.head(x, vectors[0, :2], shape, knobs.token_chunk)
    del x
    gc.collect()
    assert trace.live_bytes == 0
    return [peak.peak_bytes for peak in trace.peaks]


@pytest.mark.parametrize("chunk", [64, 128, 1024])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_run_on_meta_holds_what_a_real_one_holds(chunk: int, groups: int) -> None:
    knobs = Activations(token_chunk=chunk, head_groups=groups)
    assert traced_step("meta", knobs) == traced_step("cpu", knobs)
