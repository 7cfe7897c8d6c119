"""Which tiles a clip is decoded or encoded in: what `--decode-tile` says, what fits, and what comes next if it did not.

Tiles change the clip (GroupNorm spans a tile), so the published ones are used wherever they fit. Where they do not,
tiles get smaller in space before they get shorter in time, since short ones flicker. No torch.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from hvlite.dims import LatentShape
from hvlite.errors import RequestError
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, tile_shapes

AUTO: Final = "auto"
PUBLISHED: Final = "published"
WIDE: Final = "wide"
EXACT: Final = "exact"
SIDES = (256, 192, 128, 96, 64)
"""Heights and widths, in pixels, of the tiles that are tried, largest first."""
LENGTHS = (64, 48, 32, 16)
"""Their nominal frames: a tile decodes one more."""

TILE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?(?:\+(\d+)(?:x(\d+))?(?:x(\d+))?)?")


@dataclass(frozen=True, slots=True)
class Exact:
    """No tiles: the whole clip layer after layer, with what lies between two layers on disk or in host memory."""

    on_disk: bool = True


Tiles = TileGeometry | Exact
AskedTiles = TileGeometry | str
"""A geometry, or one of AUTO, WIDE and EXACT."""
Need = Callable[[LatentShape], int]
"""Bytes that a tile of this many latents takes (`decode_needs`)."""


def parse_tiles(text: str) -> AskedTiles:
    """`auto`, `published`, `wide`, `exact`, or FRAMESxHEIGHTxWIDTH+OVERLAP such as `65x256` or `65x256x384+16x64x96`.

    FRAMES is 4k+1, as everywhere; a missing WIDTH is the height; the overlap, in frames and pixels, is a quarter of
    the tile where it is not given. RequestError for anything else.
    """
    if text == PUBLISHED:
        return PUBLISHED_TILES
    if text in (AUTO, WIDE, EXACT):
        return text
    match = TILE.fullmatch(text)
    if match is None:
        raise RequestError(
            f"decode tile {text!r} is none of auto, published, wide, exact and FRAMESxHEIGHTxWIDTH[+OVERLAP]. "
            f"The published one is {tiles_text(PUBLISHED_TILES)}."
        )
    frames, height = int(match[1]), int(match[2])
    width = height if match[3] is None else int(match[3])
    time_overlap, row_overlap, column_overlap = (None if part is None else int(part) for part in match.groups()[3:])
    if frames % 4 != 1 or frames < 5:
        nearest = max(5, round((frames - 1) / 4) * 4 + 1)
        raise RequestError(f"decode tile {text!r}: frames must be 4k+1 from 5 on; got {frames}. Nearest: {nearest}.")
    if row_overlap is not None and column_overlap is None:
        column_overlap = row_overlap
    return TileGeometry(
        frames=frames - 1,
        frames_stride=_stride(text, "frames", frames - 1, time_overlap, 4),
        height=height,
        height_stride=_stride(text, "height", height, row_overlap, 8),
        width=width,
        width_stride=_stride(text, "width", width, column_overlap, 8),
    )


def _stride(text: str, name: str, size: int, overlap: int | None, ratio: int) -> int:
    if size < ratio or size % ratio:
        raise RequestError(f"decode tile {text!r}: its {name} must be a multiple of {ratio} pixels; got {size}.")
    if overlap is None:
        return _default_stride(size, ratio)
    if overlap % ratio or overlap >= size:
        raise RequestError(
            f"decode tile {text!r}: the overlap in {name} must be a multiple of {ratio} below {size}; got {overlap}."
        )
    return size - overlap


def _default_stride(size: int, ratio: int) -> int:
    """An overlap of a quarter, in whole latents, and of at least one latent where the tile has two."""
    overlap = max(size // 4 // ratio, 1 if size > ratio else 0) * ratio
    return size - overlap


def tiles_text(tiles: Tiles) -> str:
    """What `parse_tiles` reads the same from; also the name in metadata."""
    if isinstance(tiles, Exact):
        return EXACT
    time, height, width = tiles.pixels
    return (
        f"{time.tile + 1}x{height.tile}x{width.tile}"
        f"+{time.tile - time.stride}x{height.tile - height.stride}x{width.tile - width.stride}"
    )


def make_tiles(frames: int, height: int, width: int) -> TileGeometry:
    """Tiles of these sizes (nominal frames) with the published overlap of a quarter."""
    return TileGeometry(
        frames=frames,
        frames_stride=_default_stride(frames, 4),
        height=height,
        height_stride=_default_stride(height, 8),
        width=width,
        width_stride=_default_stride(width, 8),
    )


def tile_need(shape: LatentShape, geometry: TileGeometry, need: Need) -> int:
    """Bytes of the largest tile."""
    return max(need(tile) for tile in set(tile_shapes(shape, geometry)))


def ladder(geometry: TileGeometry, shape: LatentShape) -> Iterator[TileGeometry]:
    """The geometries after this one, each with smaller tiles of this clip than the one before."""
    rung = smaller(geometry, shape)
    while rung is not None:
        yield rung
        rung = smaller(rung, shape)


def smaller(geometry: TileGeometry, shape: LatentShape) -> TileGeometry | None:
    """The next geometry whose largest tile of this clip is smaller; None at the end of the ladder."""
    largest = _largest(geometry, shape)
    candidate = _next(geometry)
    while candidate is not None and _largest(candidate, shape) >= largest:
        candidate = _next(candidate)
    return candidate


def _next(geometry: TileGeometry) -> TileGeometry | None:
    """From larger tiles than the published ones to those; then smaller in space; then shorter."""
    frames, height, width = (cut.tile for cut in geometry.pixels)
    published = PUBLISHED_TILES.frames * PUBLISHED_TILES.height * PUBLISHED_TILES.width
    if frames * height * width > published:
        return PUBLISHED_TILES
    side = next((side for side in SIDES if side < max(height, width)), None)
    if side is not None:
        return replace(make_tiles(frames, min(height, side), min(width, side)), frames_stride=geometry.frames_stride)
    length = next((length for length in LENGTHS if length < frames), None)
    return None if length is None else make_tiles(length, height, width)


def _largest(geometry: TileGeometry, shape: LatentShape) -> int:
    return max(tile.frames * tile.height * tile.width for tile in set(tile_shapes(shape, geometry)))


def wide_ladder(shape: LatentShape) -> list[TileGeometry]:
    """Tiles of whole frames, longest first: no seam but in time, and nothing decoded twice in space."""
    return [
        TileGeometry(
            frames=length,
            frames_stride=_default_stride(length, 4),
            height=8 * shape.height,
            height_stride=8 * shape.height,
            width=8 * shape.width,
            width_stride=8 * shape.width,
        )
        for length in LENGTHS
    ]


def decoded_volume(shape: LatentShape, tiles: Tiles) -> float:
    """Latents decoded, overlaps included, for each latent of the clip: 2.15 for the published tiles at 720x1280x129."""
    if isinstance(tiles, Exact):
        return 1.0
    decoded = sum(tile.frames * tile.height * tile.width for tile in tile_shapes(shape, tiles))
    return decoded / (shape.frames * shape.height * shape.width)
