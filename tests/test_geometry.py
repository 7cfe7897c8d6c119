"""Which tiles: what the flag says, what fits a budget, and what comes next on the ladder."""

from collections.abc import Iterable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvlite.dims import HUNYUANVIDEO, LatentShape, latent_shape
from hvlite.errors import RequestError
from hvlite.memory.decode_needs import decode_tile_bytes, encode_tile_bytes
from hvlite.memory.geometry import (
    Exact,
    Need,
    decoded_volume,
    ladder,
    make_tiles,
    parse_tiles,
    smaller,
    tile_need,
    tiles_text,
    wide_ladder,
)
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, tile_shapes

REAL = HUNYUANVIDEO.vae
LARGE = latent_shape((720, 1280), 129, REAL)
NEED = partial(decode_tile_bytes, REAL, dtype_bytes=2)
GIB = 2**30


def named(geometry: TileGeometry) -> str:
    return tiles_text(geometry).split("+")[0]


def test_the_words() -> None:
    assert parse_tiles("published") == PUBLISHED_TILES
    assert [parse_tiles(word) for word in ("auto", "wide", "exact")] == ["auto", "wide", "exact"]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("65x256", "65x256x256+16x64x64"),
        ("33x256x384", "33x256x384+8x64x96"),
        ("17x64", "17x64x64+4x16x16"),
        ("65x256+16x128", "65x256x256+16x128x128"),
        ("5x8x16", "5x8x16+0x0x8"),
        ("17x720x1280+4x0", "17x720x1280+4x0x0"),
        ("65x200x104+0x0x40", "65x200x104+0x0x40"),
    ],
)
def test_sizes_are_read_and_the_overlap_is_a_quarter(text: str, whole: str) -> None:
    geometry = parse_tiles(text)
    assert isinstance(geometry, TileGeometry)
    assert tiles_text(geometry) == whole


def test_the_published_tiles_are_the_default_of_their_size() -> None:
    assert parse_tiles("65x256") == PUBLISHED_TILES
    assert make_tiles(64, 256, 256) == PUBLISHED_TILES


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_every_geometry_has_a_name_that_is_read_back(frames: int, height: int, width: int, data: st.DataObject) -> None:
    strides = [data.draw(st.integers(1, size)) for size in (frames, height, width)]
    geometry = TileGeometry(
        frames=4 * frames,
        frames_stride=4 * strides[0],
        height=8 * height,
        height_stride=8 * strides[1],
        width=8 * width,
        width_stride=8 * strides[2],
    )
    assert parse_tiles(tiles_text(geometry)) == geometry


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("huge", "'huge' is none of auto, published, wide, exact"),
        ("65", "none of"),
        ("65x256x256x256", "none of"),
        ("-65x256", "none of"),
        ("64x256", "4k\\+1 from 5 on; got 64. Nearest: 65"),
        ("1x256", "got 1. Nearest: 5"),
        ("65x250", "height must be a multiple of 8 pixels; got 250"),
        ("65x256x0", "width must be a multiple of 8 pixels; got 0"),
        ("65x256+64", "overlap in frames must be a multiple of 4 below 64; got 64"),
        ("65x256+16x60", "overlap in height must be a multiple of 8 below 256; got 60"),
        ("65x256+16x64x256", "overlap in width must be a multiple of 8 below 256; got 256"),
    ],
)
def test_what_is_no_tile_is_refused_with_its_numbers(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_tiles(text)


def first_that_fits(
    candidates: Iterable[TileGeometry], available_gib: float, need: Need = NEED, shape: LatentShape = LARGE
) -> str:
    return next(named(tiles) for tiles in candidates if tile_need(shape, tiles, need) <= available_gib * GIB)


# Beside the decoder's weights, 0.27 GiB.
@pytest.mark.parametrize(
    ("available_gib", "chosen"),
    [
        (3.3, "65x256x256"),
        (3.0, "65x192x192"),
        (1.5, "65x128x128"),
        (0.4, "65x64x64"),
        (0.3, "49x64x64"),
        (0.15, "17x64x64"),
    ],
)
def test_tiles_get_smaller_in_space_and_only_then_shorter(available_gib: float, chosen: str) -> None:
    assert first_that_fits([PUBLISHED_TILES, *ladder(PUBLISHED_TILES, LARGE)], available_gib) == chosen


def test_whole_frames_as_long_as_they_fit() -> None:
    wide = wide_ladder(LARGE)
    assert first_that_fits(wide, 60) == "65x720x1280"
    assert first_that_fits(wide, 20) == "17x720x1280"
    assert decoded_volume(LARGE, wide[0]) == pytest.approx((17 + 17 + 9) / 33)


def test_encoding_takes_less() -> None:
    need = partial(encode_tile_bytes, REAL, dtype_bytes=2)
    assert first_that_fits([PUBLISHED_TILES, *ladder(PUBLISHED_TILES, LARGE)], 2.2, need) == "65x256x256"


def test_the_ladder_of_a_large_clip() -> None:
    assert [named(geometry) for geometry in ladder(PUBLISHED_TILES, LARGE)] == [
        "65x192x192",
        "65x128x128",
        "65x96x96",
        "65x64x64",
        "49x64x64",
        "33x64x64",
        "17x64x64",
    ]
    assert next(ladder(wide_ladder(LARGE)[0], LARGE)) == PUBLISHED_TILES


def test_a_small_clip_skips_what_would_not_shrink_its_tiles() -> None:
    small = latent_shape((64, 96), 17, REAL)
    assert [named(geometry) for geometry in ladder(PUBLISHED_TILES, small)] == ["65x64x64"]
    assert smaller(PUBLISHED_TILES, latent_shape((64, 64), 17, REAL)) is None


@st.composite
def clips(draw: st.DrawFn) -> LatentShape:
    return LatentShape(draw(st.integers(1, 40)), draw(st.integers(1, 170)), draw(st.integers(1, 170)))


@given(clips(), st.sampled_from([4, 16, 64, 128]), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_each_rung_takes_less_and_the_ladder_ends(shape: LatentShape, frames: int, height: int, width: int) -> None:
    geometry = make_tiles(frames, 8 * height, 8 * width)
    needs = [tile_need(shape, rung, NEED) for rung in (geometry, *ladder(geometry, shape))]
    assert needs == sorted(needs, reverse=True)
    assert len(needs) <= 10


def test_on_the_ladder_tiles_keep_the_temporal_grid_while_they_shrink_in_space() -> None:
    in_space = [rung for rung in ladder(PUBLISHED_TILES, LARGE) if rung.frames == PUBLISHED_TILES.frames]
    assert {rung.frames_stride for rung in in_space} == {PUBLISHED_TILES.frames_stride}


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((720, 1280), 2.15),
        ((1104, 832), 2.20),
        ((960, 960), 2.09),
        ((544, 960), 2.04),
        ((624, 832), 2.19),
        ((720, 720), 2.09),
    ],
)
def test_the_decoded_volume_is_that_of_the_spec(size: tuple[int, int], factor: float) -> None:
    assert decoded_volume(latent_shape(size, 129, REAL), PUBLISHED_TILES) == pytest.approx(factor, abs=0.006)


def test_without_tiles_nothing_is_decoded_twice() -> None:
    assert decoded_volume(LARGE, Exact()) == 1.0
    assert parse_tiles(tiles_text(Exact())) == "exact"


def test_tiles_cover_the_clip_once_where_nothing_overlaps() -> None:
    geometry = parse_tiles("17x64x128+0x0x0")
    assert isinstance(geometry, TileGeometry)
    assert {tile.frames for tile in tile_shapes(LatentShape(9, 16, 32), geometry)} == {5}
