"""Tiles: the published cuts and blend, by diffusers' tiling, by a plain reading of the spec, and by law."""

import copy
import gc
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, LatentShape, VaeDims, latent_shape
from hvlite.errors import RequestError
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, TileStep, decode_tiles, encode_tiles, tile_shapes
from hvlite.model.vae import Vae

# Both implementations lie up to 2e-5 from what fp64 gives with these weights.
TOLERANCE = 4e-5

DIMS = VaeDims(channels=(8, 8, 8, 16), layers_per_block=1, norm_groups=4, latent_channels=4, scaling_factor=1.0)
# The published proportions, eight times smaller in space and four times in time.
SMALL = TileGeometry(frames=16, frames_stride=12, height=32, height_stride=24, width=32, width_stride=24)
SHAPES = [(1, 4, 4), (2, 5, 3), (4, 4, 7), (5, 4, 4), (5, 3, 5), (7, 7, 4), (10, 5, 6), (13, 2, 2)]


@cache
def pair(tiles: TileGeometry) -> tuple[Any, Vae]:
    """diffusers' class with these tiles, and ours with its weights."""
    torch.manual_seed(0)
    reference: Any = AutoencoderKLHunyuanVideo(
        block_out_channels=DIMS.channels, layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    reference.enable_tiling(
        tile_sample_min_height=tiles.height,
        tile_sample_min_width=tiles.width,
        tile_sample_min_num_frames=tiles.frames,
        tile_sample_stride_height=tiles.height_stride,
        tile_sample_stride_width=tiles.width_stride,
        tile_sample_stride_num_frames=tiles.frames_stride,
    )
    model = Vae(DIMS)
    model.load_state_dict(reference.state_dict())
    return reference.eval(), model


def join(steps: Iterator[TileStep]) -> Tensor:
    return torch.cat([step.frames for step in steps if step.frames is not None], 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled_decode_is_the_published_one(shape: tuple[int, int, int]) -> None:
    reference, model = pair(SMALL)
    latents = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.decode(latents).sample[0]
    torch.testing.assert_close(join(decode_tiles(latents, model.decode, SMALL)), expected, atol=TOLERANCE, rtol=0)


# The published temporal tiles, and a clip of odd sizes in latents that spatial tiles cut both ways.
LONG = TileGeometry(frames=64, frames_stride=48, height=32, height_stride=24, width=32, width_stride=24)


@pytest.mark.parametrize("frames", [1, 5, 13, 65, 69, 129])
def test_clips_of_every_length_are_the_published_ones(frames: int) -> None:
    reference, model = pair(LONG)
    latents = torch.randn(1, 4, (frames - 1) // 4 + 1, 5, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.decode(latents).sample[0]
    decoded = join(decode_tiles(latents, model.decode, LONG))
    assert decoded.shape == (3, frames, 40, 56)
    torch.testing.assert_close(decoded, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_rounding_only_the_norms_in_fp32_remain(shape: tuple[int, int, int]) -> None:
    reference, model = copy.deepcopy(pair(SMALL))
    reference.double()
    model.double()
    latents = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = reference.decode(latents).sample[0]
    decoded = join(decode_tiles(latents, model.decode, SMALL))
    torch.testing.assert_close(decoded.double(), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled_encode_is_the_published_one(shape: tuple[int, int, int]) -> None:
    reference, model = pair(SMALL)
    frames, height, width = shape
    clip = torch.randn(1, 3, 4 * frames - 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference.encode(clip).latent_dist.parameters
    torch.testing.assert_close(encode_tiles(clip, model.encode, SMALL), expected, atol=TOLERANCE, rtol=0)


# Fakes. Frame f of a clip shows latent ceil(f / ratio), whatever tile it is decoded in.


def enlarge(geometry: TileGeometry) -> Callable[[Tensor], Tensor]:
    """A decoder that copies: tiles of it fit without a seam."""
    time, space = geometry.temporal_ratio, geometry.spatial_ratio

    def decode(latents: Tensor) -> Tensor:
        shown = [math.ceil(frame / time) for frame in range(time * (latents.shape[2] - 1) + 1)]
        return latents[:, :, shown].repeat_interleave(space, 3).repeat_interleave(space, 4)

    return decode


def enlarge_unevenly(geometry: TileGeometry) -> Callable[[Tensor], Tensor]:
    """A decoder whose tiles do not fit: each also shows its own mean and the place within the tile."""
    copy = enlarge(geometry)

    def decode(latents: Tensor) -> Tensor:
        frames = copy(latents)
        return frames + latents.mean() + torch.linspace(0, 1, frames[0].numel()).view(frames.shape[1:])

    return decode


@st.composite
def geometries(draw: st.DrawFn) -> TileGeometry:
    """Any tile of 1 to 6 latents with any stride, for ratios of 1 to 4."""
    time, space = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    tiles = [draw(st.integers(1, 6)) for _ in range(3)]
    strides = [draw(st.integers(1, tile)) for tile in tiles]
    return TileGeometry(
        frames=tiles[0] * time,
        frames_stride=strides[0] * time,
        height=tiles[1] * space,
        height_stride=strides[1] * space,
        width=tiles[2] * space,
        width_stride=strides[2] * space,
        temporal_ratio=time,
        spatial_ratio=space,
    )


def clips() -> st.SearchStrategy[Tensor]:
    sizes = st.tuples(st.integers(1, 14), st.integers(1, 9), st.integers(1, 9))
    return sizes.map(lambda shape: torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(3)))


@given(geometries(), clips())
@settings(max_examples=150, deadline=None)
def test_tiles_that_agree_give_the_untiled_clip(geometry: TileGeometry, latents: Tensor) -> None:
    decode = enlarge(geometry)
    whole = decode(latents)[0]
    torch.testing.assert_close(join(decode_tiles(latents, decode, geometry)), whole, atol=1e-5, rtol=1e-5)


@given(geometries(), clips())
@settings(max_examples=100, deadline=None)
def test_moments_that_agree_give_the_untiled_ones(geometry: TileGeometry, latents: Tensor) -> None:
    frames = enlarge(geometry)(latents)
    time, space = geometry.temporal_ratio, geometry.spatial_ratio
    moments = encode_tiles(frames, lambda clip: clip[:, :, ::time, ::space, ::space].clone(), geometry)
    torch.testing.assert_close(moments, latents, atol=1e-5, rtol=1e-5)


@given(geometries(), clips())
@settings(max_examples=100, deadline=None)
def test_the_stream_is_bit_equal_to_blending_all_tiles_at_the_end(geometry: TileGeometry, latents: Tensor) -> None:
    decode = enlarge_unevenly(geometry)
    streamed = join(decode_tiles(latents, decode, geometry))
    assert torch.equal(streamed, decode_by_the_book(latents, decode, geometry))


@given(geometries(), clips())
@settings(max_examples=100, deadline=None)
def test_steps_count_every_tile_and_frames_leave_with_the_last_of_their_temporal_tile(
    geometry: TileGeometry, latents: Tensor
) -> None:
    calls = 0
    copy = enlarge(geometry)

    def decode(tile: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return copy(tile)

    shape = LatentShape(*latents.shape[2:])
    tiles = len(tile_shapes(shape, geometry))
    in_time = len(tile_shapes(LatentShape(shape.frames, 1, 1), geometry))
    emitted = 0
    for index, step in enumerate(decode_tiles(latents, decode, geometry)):
        assert (step.tile, step.tiles, calls) == (index, tiles, index + 1)
        done, inside = divmod(index + 1, tiles // in_time)
        assert (step.frames is None) == (inside > 0)
        if step.frames is not None:
            emitted += step.frames.shape[1]
            assert emitted == geometry.frames_stride * done + 1 or done == in_time
    assert calls == tiles
    assert emitted == geometry.temporal_ratio * (shape.frames - 1) + 1


def test_finished_frames_are_not_held_beside_the_next_ones() -> None:
    latents, copy = torch.zeros(1, 2, 8, 6, 6), enlarge(SMALL)
    held = []

    def canvases() -> set[int]:
        """Addresses of the storages that are as large as a whole temporal tile."""
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.layout is torch.strided]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {storage.data_ptr() for storage in storages if storage.nbytes() == 2 * 17 * 48 * 48 * 4}

    def decode(tile: Tensor) -> Tensor:
        held.append(len(canvases() - before))
        return copy(tile)

    gc.collect()
    before = canvases()  # what other tests have left

    for step in decode_tiles(latents, decode, SMALL):
        assert step.tiles == 12
    # Four tiles make a temporal tile. The first of the next one finds the caller still at the previous frames.
    assert held[:5] == [0, 1, 1, 1, 1]
    assert max(held) == 1


def decode_by_the_book(latents: Tensor, decode: Callable[[Tensor], Tensor], geometry: TileGeometry) -> Tensor:
    """Spec 3.5 read aloud: decode everything, blend in place in row-major order, cut, join."""
    (tile, stride), _, _ = geometry.latents
    if latents.shape[2] <= tile:
        return decode_space_by_the_book(latents, decode, geometry)
    row = []
    for start in range(0, latents.shape[2], stride):
        part = decode_space_by_the_book(latents[:, :, start : start + tile + 1], decode, geometry)
        row.append(part[:, 1:] if start > 0 else part)
    kept = []
    for index, part in enumerate(row):
        if index > 0:
            blend_by_the_book(row[index - 1], part, 1, geometry.frames - geometry.frames_stride)
        kept.append(part[:, : geometry.frames_stride + (index == 0)])
    return torch.cat(kept, 1)


def decode_space_by_the_book(latents: Tensor, decode: Callable[[Tensor], Tensor], geometry: TileGeometry) -> Tensor:
    _, (tall, down), (wide, right) = geometry.latents
    _, _, _, height, width = latents.shape
    if height <= tall and width <= wide:
        return decode(latents)[0]
    rows = [
        [decode(latents[..., y : y + tall, x : x + wide])[0] for x in range(0, width, right)]
        for y in range(0, height, down)
    ]
    joined = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                blend_by_the_book(rows[i - 1][j], tile, 2, geometry.height - geometry.height_stride)
            if j > 0:
                blend_by_the_book(row[j - 1], tile, 3, geometry.width - geometry.width_stride)
        joined.append(torch.cat([tile[:, :, : geometry.height_stride, : geometry.width_stride] for tile in row], 3))
    return torch.cat(joined, 2)


def blend_by_the_book(before: Tensor, tile: Tensor, axis: int, extent: int) -> None:
    extent = min(extent, before.shape[axis], tile.shape[axis])
    for step in range(extent):
        old = before.select(axis, before.shape[axis] - extent + step)
        new = tile.select(axis, step)
        new.copy_(old * (1 - step / extent) + new * (step / extent))


@pytest.mark.parametrize(
    ("size", "calls"),
    [
        ((720, 1280), 84),
        ((1104, 832), 90),
        ((960, 960), 75),
        ((544, 960), 45),
        ((624, 832), 60),
        ((720, 720), 48),
    ],
)
def test_published_tiles_are_counted_as_in_the_spec(size: tuple[int, int], calls: int) -> None:
    assert len(tile_shapes(latent_shape(size, 129, HUNYUANVIDEO.vae), PUBLISHED_TILES)) == calls


def test_a_tile_of_one_latent_that_would_add_nothing_is_not_decoded() -> None:
    # 97 frames are 25 latents: temporal tiles would begin at 0, 12 and 24, the last one holding a single latent.
    assert len(tile_shapes(LatentShape(25, 4, 4))) == 2
    assert len(tile_shapes(LatentShape(26, 4, 4))) == 3


def test_tiles_of_another_dtype_are_blended_in_fp32() -> None:
    latents = torch.randn(1, 2, 6, 6, 6, generator=torch.Generator().manual_seed(4))
    decode = enlarge_unevenly(SMALL)
    found = join(decode_tiles(latents, lambda tile: decode(tile).half(), SMALL))
    expected = join(decode_tiles(latents, lambda tile: decode(tile).half().float(), SMALL))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change", ["height", "width_stride", "frames"])
def test_a_tile_that_cuts_through_a_latent_is_refused(change: str) -> None:
    sizes = {"frames": 64, "frames_stride": 48, "height": 256, "height_stride": 192} | {
        "width": 256,
        "width_stride": 192,
    }
    with pytest.raises(RequestError, match="must be a multiple of"):
        TileGeometry(**sizes | {change: sizes[change] + 2})


def test_a_stride_beyond_its_tile_is_refused() -> None:
    with pytest.raises(RequestError, match="got 64 with stride 128"):
        TileGeometry(frames=16, frames_stride=16, height=64, height_stride=128, width=64, width_stride=64)
