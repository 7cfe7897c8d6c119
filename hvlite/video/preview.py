"""Latents -> small pictures without a decoder: each position of the latents is one pixel, its channels times a matrix.

It costs milliseconds on any CPU. Colours are right, edges and textures are not. The matrices are in assets/previews:
that of `shapes` was fitted by tools/shapes/fit_preview.py, that of HunyuanVideo holds figures that ComfyUI publishes
(for latents in model space too, to RGB in [-1,1]). No torch at run time.
"""

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hvlite import paths
from hvlite.atomic import explained, replaced_file
from hvlite.video.frames import Frame
from hvlite.video.png import TITLE, png_bytes

if TYPE_CHECKING:
    from torch import Tensor

Values = NDArray[np.floating[Any]]
Pictures = NDArray[np.uint8]

MAPPED = frozenset({"hunyuanvideo", "shapes"})
# Far above what latents in model space reach: beyond it a number says no more than "broken".
LARGEST = 100.0
# Of a strip: how many pictures, the gap between two, the shorter side of a picture at least, in pixels.
SHOWN = 4
GAP = 2
LEAST_SIDE = 64


class LinearMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`factors` [C,3] and `bias` [3]: latents in model space -> RGB in [-1,1]."""

    source: str
    factors: list[tuple[float, float, float]]
    bias: tuple[float, float, float]


def preview(latents: "Tensor", model: str) -> Pictures:
    """Latents [1,C,T,H,W] in model space (before division by the scaling factor), on the CPU -> uint8 [T,H,W,3].

    A model without a map is shown in gray: the mean of its channels, which tells where something is and how it moves.
    What is not finite counts as 0.
    """
    assert latents.ndim == 5, f"latents are [1,C,T,H,W], got shape {tuple(latents.shape)}"
    values = np.asarray(latents.detach()[0].float().numpy())
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(-LARGEST, LARGEST)
    positions = np.moveaxis(finite, 0, -1)
    linear = linear_map(model)
    if linear is None or len(linear.factors) != positions.shape[-1]:
        shown = _gray(positions)
    else:
        shown = positions @ np.asarray(linear.factors, np.float32) + np.asarray(linear.bias, np.float32)
    return np.rint((shown.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def write_strip(path: Path, latents: "Tensor", model: str, *, title: str = "") -> None:
    """Some pictures of the clip side by side as a PNG, in place of what was at `path`. Raises OutputError."""
    picture = strip(preview(latents, model))
    with replaced_file(path) as temporary, explained(path):
        temporary.write_bytes(png_bytes(picture, {TITLE: title}))


def strip(pictures: Pictures) -> Frame:
    """Up to SHOWN of them from first to last, side by side; small ones are enlarged, a pixel becoming a square."""
    count, height, width, _ = pictures.shape
    picked = np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)
    factor = math.ceil(LEAST_SIDE / min(height, width))
    large = pictures[picked].repeat(factor, axis=1).repeat(factor, axis=2)
    gap = np.full((height * factor, GAP, 3), 128, np.uint8)
    parts = [part for picture in large for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)


@cache
def linear_map(model: str) -> LinearMap | None:
    """The shipped map of a model; None for a name that has none, which is never part of a path."""
    if model not in MAPPED:
        return None
    return msgspec.json.decode((paths.PREVIEW_MAPS / f"{model}.json").read_bytes(), type=LinearMap)


def _gray(positions: Values) -> Values:
    """[T,H,W,C] -> [T,H,W,3]: the channels' mean, stretched so that all but its outermost 2 % are in [-1,1]."""
    mean = positions.mean(axis=-1, keepdims=True)
    low, high = np.percentile(mean, (2, 98))
    stretched = (mean - low) / max(high - low, 1e-6) * 2 - 1
    return np.broadcast_to(stretched, (*mean.shape[:-1], 3))
