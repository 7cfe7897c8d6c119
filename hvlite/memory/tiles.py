"""Cut a clip into overlapping tiles, run a function on each, blend and stitch (spec 3.5): decode and encode alike.

Knows no model: the function is given. Finished frames leave as soon as no later tile can touch them, so that no
more than one temporal tile is held, whatever the clip's length. Blending is done in fp32, where the function's results
lie. Importing this imports no torch, so that the plan can use the geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hvlite.dims import LatentShape
from hvlite.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

TIME, HEIGHT, WIDTH = 1, 2, 3
"""The axes of [C,F,H,W]."""


class Cut(NamedTuple):
    """One axis: a tile of `tile` begins every `stride`; the rest is overlap."""

    tile: int
    stride: int


Cuts = tuple[Cut, Cut, Cut]
"""Time, height, width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGeometry:
    """Tiles in frames and pixels. Neighbours overlap by size minus stride; a size beyond the clip's leaves it whole.

    The ratios are the VAE's: frames and pixels to a latent.
    """

    frames: int
    frames_stride: int
    height: int
    height_stride: int
    width: int
    width_stride: int
    temporal_ratio: int = 4
    spatial_ratio: int = 8

    def __post_init__(self) -> None:
        ratios = (self.temporal_ratio, self.spatial_ratio, self.spatial_ratio)
        for name, (tile, stride), ratio in zip(("frames", "height", "width"), self.pixels, ratios, strict=True):
            if tile % ratio or stride % ratio or not 0 < stride <= tile:
                raise RequestError(
                    f"a tile's {name} must be a multiple of {ratio} and its stride a smaller or equal one; "
                    f"got {tile} with stride {stride}. Try {max(1, tile // ratio) * ratio} and "
                    f"{max(1, tile // ratio * 3 // 4) * ratio}."
                )

    @property
    def pixels(self) -> Cuts:
        """The cuts in frames and pixels."""
        return (
            Cut(self.frames, self.frames_stride),
            Cut(self.height, self.height_stride),
            Cut(self.width, self.width_stride),
        )

    @property
    def latents(self) -> Cuts:
        """The same cuts in latents."""
        time, height, width = self.pixels
        return (
            Cut(time.tile // self.temporal_ratio, time.stride // self.temporal_ratio),
            Cut(height.tile // self.spatial_ratio, height.stride // self.spatial_ratio),
            Cut(width.tile // self.spatial_ratio, width.stride // self.spatial_ratio),
        )


PUBLISHED_TILES = TileGeometry(frames=64, frames_stride=48, height=256, height_stride=192, width=256, width_stride=192)
"""What the reference implementation decodes with; other tiles give another clip (GroupNorm spans a tile)."""


@dataclass(frozen=True, slots=True)
class TileStep:
    """Tile `tile` of `tiles` (from 0) is done. `frames` [C,F,H,W], fp32, are those that became final with it."""

    tile: int
    tiles: int
    frames: Tensor | None = None


@dataclass(slots=True)
class Joint:
    """Where a decode stands after its last whole temporal tile: all that another one needs to go on from there.

    `start` is the latent at which the next temporal tile begins, whatever its geometry; `frames` have left, of `tiles`;
    `tail` [C,F,H,W] are decoded frames beyond those, into which the next tile fades. Without a tail there is no going
    on but from the beginning.
    """

    start: int = 0
    frames: int = 0
    tiles: int = 0
    tail: Tensor | None = None


def decode_tiles(
    latents_BCTHW: Tensor,
    decode: Callable[[Tensor], Tensor],
    geometry: TileGeometry = PUBLISHED_TILES,
    joint: Joint | None = None,
) -> Iterator[TileStep]:
    """Decode latents [1,16,T,H,W] tile by tile; the frames of all steps, joined, are the clip's 4T-3.

    `decode` makes [1,3,4t-3,8h,8w] of [1,16,t,h,w]; what it returns is blended in place. With the `joint` of a decode
    that broke off, by this geometry or another, the frames are those that follow the ones that had left.
    """
    strides = (geometry.frames_stride, geometry.height_stride, geometry.width_stride)
    return _stitch(latents_BCTHW, decode, geometry.latents, strides, joint or Joint())


def encode_tiles(
    frames_BCTHW: Tensor, encode: Callable[[Tensor], Tensor], geometry: TileGeometry = PUBLISHED_TILES
) -> Tensor:
    """Encode frames [1,3,F,H,W] tile by tile -> moments [1,32,T,H/8,W/8], fp32, blended as moments."""
    height, width = frames_BCTHW.shape[3:]
    assert height % geometry.spatial_ratio == 0 == width % geometry.spatial_ratio, (height, width)
    time_cut, height_cut, width_cut = geometry.latents
    strides = (time_cut.stride, height_cut.stride, width_cut.stride)
    steps = _stitch(frames_BCTHW, encode, geometry.pixels, strides, Joint())
    parts = [step.frames for step in steps if step.frames is not None]
    moments = parts[0].new_empty(parts[0].shape[0], sum(part.shape[TIME] for part in parts), *parts[0].shape[2:])
    stop = 0
    for part in parts:
        start, stop = stop, stop + part.shape[TIME]
        moments[:, start:stop] = part
    return moments[None]


def tile_shapes(shape: LatentShape, geometry: TileGeometry = PUBLISHED_TILES) -> list[LatentShape]:
    """The tiles that `decode_tiles` gives to its function for latents of this shape, one after the other."""
    times = _lengths(_time_cuts(shape.frames, geometry.latents), shape.frames)
    rows, columns = space_cuts(shape.height, shape.width, geometry)
    return [LatentShape(time, row, column) for time in times for row in rows for column in columns]


def space_cuts(height: int, width: int, geometry: TileGeometry) -> tuple[list[int], list[int]]:
    """How high the rows of tiles are and how wide the columns, in latents."""
    rows, columns = _space_cuts(height, width, geometry.latents)
    return _lengths(rows, height), _lengths(columns, width)


def _lengths(cuts: list[slice], whole: int) -> list[int]:
    return [len(range(whole)[cut]) for cut in cuts]


def _time_cuts(frames: int, cuts: Cuts, start: int = 0) -> list[slice]:
    """Tiles hold one frame more than the nominal size: the first of all but the first tile is dropped afterwards.

    A tile that would hold that one frame alone adds nothing and is left out.
    """
    tile, stride = cuts[0]
    if start == 0 and frames <= tile:
        return [slice(0, frames)]
    begins = range(start, frames, stride)
    return [slice(begin, begin + tile + 1) for begin in begins if begin == 0 or begin + 1 < frames]


def _space_cuts(height: int, width: int, cuts: Cuts) -> tuple[list[slice], list[slice]]:
    """Rows and columns. Where one axis exceeds its tile both are cut, even if the other one would fit (spec 3.5)."""
    _, rows, columns = cuts
    if height <= rows.tile and width <= columns.tile:
        return [slice(0, height)], [slice(0, width)]
    return (
        [slice(start, start + rows.tile) for start in range(0, height, rows.stride)],
        [slice(start, start + columns.tile) for start in range(0, width, columns.stride)],
    )


def _stitch(
    source: Tensor, run: Callable[[Tensor], Tensor], cuts: Cuts, strides: tuple[int, int, int], joint: Joint
) -> Iterator[TileStep]:
    """`cuts` are in units of `source` [1,C,T,H,W], `strides` (time, height, width) in units of what `run` returns."""
    assert source.shape[0] == 1, f"one clip at a time, got {source.shape[0]}"
    assert joint.start == 0 or joint.tail is not None, "without a tail a clip begins at its beginning"
    times = _time_cuts(source.shape[2], cuts, joint.start)
    space = _space_cuts(source.shape[3], source.shape[4], cuts)
    tile, in_space = joint.tiles, len(space[0]) * len(space[1])
    tiles = tile + len(times) * in_space
    for time in times:
        stride = None if time is times[-1] else strides[0]
        for whole in _stitch_space(source[:, :, time], run, space, cuts, strides):
            frames = None
            if whole is not None:
                frames, joint.tail = _join(joint.tail, whole, stride)
                joint.start += cuts[0].stride
                joint.frames += frames.shape[TIME]
                joint.tiles += in_space
            yield TileStep(tile, tiles, frames)
            tile += 1
            whole = frames = None  # they are the caller's now: not to be held beside the next ones


def _stitch_space(
    source: Tensor,
    run: Callable[[Tensor], Tensor],
    space: tuple[list[slice], list[slice]],
    cuts: Cuts,
    strides: tuple[int, int, int],
) -> Iterator[Tensor | None]:
    """One temporal tile, row by row: None after each tile but the last, then [C,F,H,W].

    "Above" and "left" are neighbours after their own blending (spec 3.5). Of them only what the overlap covers is
    kept: everything beyond the stride.
    """
    rows, columns = space
    if len(rows) == len(columns) == 1:
        yield run(source)[0].float()
        return
    down, right = strides[1:]
    whole: Tensor | None = None
    above: dict[int, Tensor] = {}
    for row_index, row in enumerate(rows):
        left: Tensor | None = None
        for index, column in enumerate(columns):
            tile = run(source[:, :, :, row, column])[0].float()
            blend(above.get(index), tile, HEIGHT)
            blend(left, tile, WIDTH)
            above[index], left = tile[:, :, down:].clone(), tile[:, :, :, right:]
            is_last = row_index + 1 == len(rows) and index + 1 == len(columns)
            if not is_last:
                yield None  # before `whole` is made: by now the caller has let go of the previous one
            if whole is None:
                size = (source.shape[3] * down // cuts[1].stride, source.shape[4] * right // cuts[2].stride)
                whole = tile.new_empty(*tile.shape[:2], *size)
            kept = tile[:, :, :down, :right]
            y, x = row_index * down, index * right
            whole[:, :, y : y + kept.shape[HEIGHT], x : x + kept.shape[WIDTH]] = kept
    del above, left, tile, kept  # not to be held beside what joining makes
    yield whole


def _join(tail: Tensor | None, whole: Tensor, stride: int | None) -> tuple[Tensor, Tensor | None]:
    """(frames that are final, frames that the next temporal tile will touch); all are final without a `stride`."""
    if tail is not None:
        whole = whole[:, 1:]
        blend(tail[:, : whole.shape[TIME]], whole, TIME)  # a tail of a longer tile may reach beyond this one
    if stride is None:
        return whole, None
    keep = stride + 1 if tail is None else stride
    return whole[:, :keep], whole[:, keep:].clone()


def blend(before: Tensor | None, tile: Tensor, axis: int) -> None:
    """Fade from the end of `before` into the beginning of `tile`, in place; the tile's weight starts at exactly 0."""
    extent = 0 if before is None else min(before.shape[axis], tile.shape[axis])
    if before is None or extent == 0:
        return
    shape = [extent if dim == axis else 1 for dim in range(tile.dim())]
    rising = tile.new_tensor([step / extent for step in range(extent)]).view(shape)
    falling = tile.new_tensor([1 - step / extent for step in range(extent)]).view(shape)
    ending = before.narrow(axis, before.shape[axis] - extent, extent)
    beginning = tile.narrow(axis, 0, extent).mul_(rising)
    for channel, faded in zip(beginning, ending, strict=True):  # so that no product of the whole overlap is held
        channel.add_(faded * falling[0])
