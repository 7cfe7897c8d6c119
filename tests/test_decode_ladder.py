"""Memory that runs out in any tile: every frame is there once, and is what the rungs before and after it make."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from hvlite.dims import LatentShape, VaeDims
from hvlite.memory.decode_ladder import Fell, Rung, decode_on_ladder, tile_rungs
from hvlite.memory.device import is_out_of_memory
from hvlite.memory.geometry import parse_tiles, tiles_text
from hvlite.memory.tiles import PUBLISHED_TILES, Joint, TileGeometry, TileStep, decode_tiles, tile_shapes
from hvlite.model.vae import Vae

FIRST = TileGeometry(frames=16, frames_stride=12, height=32, height_stride=24, width=32, width_stride=24)
SMALLER = TileGeometry(frames=16, frames_stride=12, height=16, height_stride=8, width=16, width_stride=8)
SHORTER = TileGeometry(frames=8, frames_stride=4, height=16, height_stride=8, width=16, width_stride=8)
UNALIGNED = TileGeometry(frames=20, frames_stride=8, height=24, height_stride=16, width=40, width_stride=40)
SHAPE = (9, 5, 6)
OVERLAP = 4


def clip() -> Tensor:
    return torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(1))


def decode(latents: Tensor) -> Tensor:
    """Tiles do not fit: each shows its own mean, and the place within the tile."""
    shown = [math.ceil(frame / 4) for frame in range(4 * latents.shape[2] - 3)]
    frames = latents[:, :, shown].repeat_interleave(8, 3).repeat_interleave(8, 4)
    return frames + latents.mean() + torch.linspace(0, 1, frames[0].numel()).view(frames.shape[1:])


class FailsAt:
    """`decode`, but the tile with this number, counted over all rungs, finds no memory."""

    def __init__(self, *calls: int, error: Exception | None = None) -> None:
        self.calls = calls
        self.called = 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.03 GiB.")

    def __call__(self, latents: Tensor) -> Tensor:
        self.called += 1
        if self.called - 1 in self.calls:
            raise self.error
        return decode(latents)


def follow(rungs: Iterable[Rung], give_back: Callable[[], None] = lambda: None) -> tuple[Tensor, list[Fell]]:
    """What a caller makes of it: frames joined, dropped where the clip begins anew; and the falls."""
    frames: list[Tensor] = []
    falls: list[Fell] = []
    for step in decode_on_ladder(rungs, is_out_of_memory, give_back):
        if isinstance(step, Fell):
            falls.append(step)
            if step.anew:
                frames.clear()
            assert step.frame == sum(part.shape[1] for part in frames)
        elif step.frames is not None:
            frames.append(step.frames)
    return torch.cat(frames, 1), falls


def rungs_of(*geometries: TileGeometry, fails: Callable[[Tensor], Tensor], latents: Tensor | None = None) -> list[Rung]:
    latents = clip() if latents is None else latents
    return [Rung(name=tiles_text(g), run=partial(decode_tiles, latents, fails, g)) for g in geometries]


def clean(geometry: TileGeometry) -> Tensor:
    return join(decode_tiles(clip(), decode, geometry))


def join(steps: Iterator[TileStep]) -> Tensor:
    return torch.cat([step.frames for step in steps if step.frames is not None], 1)


def temporal_tile(geometry: TileGeometry, start: int) -> Tensor:
    """What one temporal tile shows, all its frames: decoded as a clip of its own that time does not cut."""
    length = geometry.frames // 4 + 1
    uncut = TileGeometry(
        frames=64,
        frames_stride=64,
        height=geometry.height,
        height_stride=geometry.height_stride,
        width=geometry.width,
        width_stride=geometry.width_stride,
    )
    return join(decode_tiles(clip()[:, :, start : start + length], decode, uncut))


def continued(first: TileGeometry, second: TileGeometry, temporal_tiles: int) -> Tensor:
    """The rule read aloud: `first` for so many temporal tiles, then `second` from there, fading into what was."""
    start = temporal_tiles * first.frames_stride // 4
    parts = [clean(first)[:, : 4 * start + 1]]
    overlap = first.frames - first.frames_stride
    before = temporal_tile(first, start - first.frames_stride // 4)[:, -overlap:]
    while start + 1 < SHAPE[0]:
        tile = temporal_tile(second, start)[:, 1:]
        extent = min(before.shape[1], tile.shape[1])
        for frame in range(extent):
            weight = frame / extent
            tile[:, frame] = tile[:, frame] * weight + before[:, frame] * (1 - weight)
        start += second.frames_stride // 4
        is_last = start + 1 >= SHAPE[0]
        parts.append(tile if is_last else tile[:, : second.frames_stride])
        before = tile[:, second.frames_stride :]
    return torch.cat(parts, 1)


def tiles_in_space(geometry: TileGeometry) -> int:
    return len(tile_shapes(LatentShape(1, *SHAPE[1:]), geometry))


TILES = len(tile_shapes(LatentShape(*SHAPE), FIRST))


def test_there_are_tiles_enough_to_fail() -> None:
    assert TILES == 12
    assert tiles_in_space(FIRST) == 4


@pytest.mark.parametrize("second", [SMALLER, SHORTER, UNALIGNED], ids=["smaller", "shorter", "unaligned"])
@pytest.mark.parametrize("failing", range(TILES))
def test_whichever_tile_fails_the_next_rung_goes_on_at_the_first_frame_that_has_not_left(
    failing: int, second: TileGeometry
) -> None:
    frames, falls = follow(rungs_of(FIRST, second, fails=FailsAt(failing)))
    done = failing // tiles_in_space(FIRST)
    left = 12 * done + 1 if done else 0
    assert falls == [Fell(name=tiles_text(second), frame=left, anew=False, reason=falls[0].reason)]
    assert "Tried to allocate 2.03 GiB" in falls[0].reason
    assert frames.shape == (3, 33, 40, 48)
    if done == 0:
        assert torch.equal(frames, clean(second))
    else:
        assert torch.equal(frames[:, :left], clean(FIRST)[:, :left])
        torch.testing.assert_close(frames, continued(FIRST, second, done), atol=1e-6, rtol=0)


@pytest.mark.parametrize("second", [SMALLER, SHORTER], ids=["smaller", "shorter"])
@pytest.mark.parametrize("failing", range(4, TILES))
def test_on_a_common_grid_all_beyond_the_fade_is_the_second_rung_alone(failing: int, second: TileGeometry) -> None:
    frames, falls = follow(rungs_of(FIRST, second, fails=FailsAt(failing)))
    faded = falls[0].frame + OVERLAP
    assert torch.equal(frames[:, faded:], clean(second)[:, faded:])


def test_the_published_ladder_has_a_common_grid_in_space_and_multiples_of_it_in_time() -> None:
    names = [rung.name for rung in tile_rungs(torch.empty(1, 16, 33, 90, 160), decode, PUBLISHED_TILES)]
    geometries = [parse_tiles(name) for name in names]
    assert geometries[0] == PUBLISHED_TILES
    assert len(geometries) == 8
    assert all(isinstance(rung, TileGeometry) and rung.frames_stride in (48, 36, 24, 12) for rung in geometries)


def test_several_falls_down_to_the_processor() -> None:
    latents, fails = clip(), FailsAt(5, 9, 12)
    on_cpu = Rung(name="on cpu", run=partial(decode_tiles, latents, decode, FIRST))
    frames, falls = follow([*rungs_of(FIRST, SMALLER, SHORTER, fails=fails, latents=latents), on_cpu])
    assert [fall.name for fall in falls] == [tiles_text(SMALLER), tiles_text(SHORTER), "on cpu"]
    assert [fall.frame for fall in falls] == [13, 13, 13]
    torch.testing.assert_close(frames, continued(FIRST, FIRST, 1), atol=1e-6, rtol=0)


def test_a_fall_to_the_same_geometry_changes_no_bit() -> None:
    for failing in range(TILES):
        frames, _ = follow(rungs_of(FIRST, FIRST, fails=FailsAt(failing)))
        assert torch.equal(frames, clean(FIRST))


def test_tiles_are_counted_on_from_those_that_are_kept() -> None:
    counts = [
        (step.tile, step.tiles)
        for step in decode_on_ladder(rungs_of(FIRST, SMALLER, fails=FailsAt(6)), is_out_of_memory, lambda: None)
        if isinstance(step, TileStep)
    ]
    in_space = tiles_in_space(SMALLER)
    assert counts[:6] == [(tile, 12) for tile in range(6)]
    assert counts[6:] == [(tile, 4 + 2 * in_space) for tile in range(4, 4 + 2 * in_space)]


def without_tail(joint: Joint) -> Iterator[TileStep]:
    """An exact decode: it leaves no tail, and runs out of memory when 7 frames have left."""
    yield TileStep(0, 3)
    joint.frames = 7
    yield TileStep(1, 3, torch.zeros(3, 7, 40, 48))
    raise MemoryError("no room")


def test_what_leaves_no_tail_is_begun_anew() -> None:
    exact = Rung(name="exact", run=without_tail)
    frames, falls = follow([exact, *rungs_of(FIRST, fails=decode)])
    assert falls == [Fell(name=tiles_text(FIRST), frame=0, anew=True, reason="no room")]
    assert torch.equal(frames, clean(FIRST))


def test_at_the_end_of_the_ladder_the_failure_is_raised() -> None:
    fails = FailsAt(5, 6)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.03 GiB"):
        follow(rungs_of(FIRST, SMALLER, fails=fails))
    assert fails.called == 7


def test_another_error_is_not_taken_for_want_of_memory() -> None:
    fails = FailsAt(2, error=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        follow(rungs_of(FIRST, SMALLER, fails=fails))
    assert fails.called == 3


def test_what_the_failed_tile_held_is_gone_when_memory_is_given_back() -> None:
    held: list[weakref.ref[Tensor]] = []
    gone = []

    def fails(latents: Tensor) -> Tensor:
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        if len(held) == 3:
            raise torch.OutOfMemoryError("no room")
        return decode(latents)

    _, falls = follow(rungs_of(FIRST, SMALLER, fails=fails), lambda: gone.append(held[-1]() is None))
    assert len(falls) == 1
    assert gone == [True]


def test_an_abandoned_ladder_leaves_nothing_running() -> None:
    closed = []

    def run(joint: Joint) -> Iterator[TileStep]:
        try:
            yield TileStep(0, 2)
            yield TileStep(1, 2)
        finally:
            closed.append(True)

    steps = decode_on_ladder([Rung(name="x", run=run)], is_out_of_memory, lambda: None)
    next(iter(steps))
    del steps
    assert closed == [True]


def test_a_real_decoder_falls_like_the_fakes() -> None:
    dims = VaeDims(channels=(8, 8, 8, 16), layers_per_block=1, norm_groups=4, latent_channels=4, scaling_factor=1.0)
    torch.manual_seed(0)
    vae, latents = Vae(dims), torch.randn(1, 4, 6, 5, 4)
    calls = 0

    def fails(tile: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise torch.OutOfMemoryError("no room")
        return vae.decode(tile)

    frames, falls = follow(rungs_of(FIRST, SMALLER, fails=fails, latents=latents))
    one, other = (join(decode_tiles(latents, vae.decode, geometry)) for geometry in (FIRST, SMALLER))
    assert falls[0].frame == 13
    assert torch.equal(frames[:, :13], one[:, :13])
    assert torch.equal(frames[:, 13 + OVERLAP :], other[:, 13 + OVERLAP :])
