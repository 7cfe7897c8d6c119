"""What a clip shows, from its pixels alone: colour, shape, direction, background."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from data import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene
from numpy.typing import NDArray

Pixels = NDArray[np.floating[Any]]
ROUGH_DISTANCE = 0.25
MIN_PIXELS = 12
TEMPLATE_SIDE = 32


@dataclass(frozen=True, slots=True)
class Seen:
    """The four words that a clip shows; None where there is no object."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Attribute -> whether the clip shows what the scene says."""
        names = ("colour", "shape", "direction", "background")
        return {name: getattr(self, name) == getattr(scene, name) for name in names}


def look_at(frames: NDArray[np.uint8]) -> Seen:
    """frames [F,H,W,3] -> what they show."""
    clip: Pixels = frames.astype(np.float32) / np.float32(255)
    back = np.median(_border(clip), axis=0)
    background = _nearest(back, BACKGROUNDS)
    rough = np.linalg.norm(clip - back, axis=-1) > ROUGH_DISTANCE
    if min(rough[0].sum(), rough[-1].sum()) < MIN_PIXELS:
        return Seen(None, None, None, background)
    front = np.median(clip[rough], axis=0)
    masks = _inside(clip, back, front)
    if min(masks[0].sum(), masks[-1].sum()) < MIN_PIXELS:
        return Seen(None, None, None, background)
    move = _centroid(masks[-3:]) - _centroid(masks[:3])
    direction = max(DIRECTIONS, key=lambda word: float(np.dot(move, DIRECTIONS[word])))
    return Seen(_nearest(front, COLOURS), _shape_of(masks), direction, background)


def _inside(clip: Pixels, back: Pixels, front: Pixels) -> NDArray[np.bool_]:
    """Pixels more than half way from the background's colour to the object's: where a soft edge has its middle."""
    axis = front - back
    share: Pixels = (clip - back) @ axis / (axis @ axis)
    return share > 0.5


def _border(clip: Pixels) -> Pixels:
    edges = (clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1])
    return np.concatenate([edge.reshape(-1, 3) for edge in edges])


def _nearest(colour: Pixels, named: dict[str, tuple[float, float, float]]) -> str:
    return min(named, key=lambda word: float(np.linalg.norm(colour - np.asarray(named[word]))))


def _centroid(masks: NDArray[np.bool_]) -> Pixels:
    """Mean (x, y) of the object over some frames."""
    _, ys, xs = np.nonzero(masks)
    return np.asarray([xs.mean(), ys.mean()], np.float32)


def _shape_of(masks: NDArray[np.bool_]) -> str:
    """The ideal mask with the largest overlap, summed over the frames."""
    scores = dict.fromkeys(SHAPES, 0.0)
    for mask in masks:
        if mask.sum() < MIN_PIXELS:
            continue
        boxed = _boxed(mask)
        for shape in SHAPES:
            ideal = _ideal(shape)
            scores[shape] += float((boxed & ideal).sum() / (boxed | ideal).sum())
    return max(scores, key=lambda shape: scores[shape])


def _boxed(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's bounding box, scaled to a square by nearest neighbour."""
    ys, xs = np.nonzero(mask)
    picked_y = np.linspace(ys.min(), ys.max() + 1, TEMPLATE_SIDE, endpoint=False).astype(int)
    picked_x = np.linspace(xs.min(), xs.max() + 1, TEMPLATE_SIDE, endpoint=False).astype(int)
    boxed: NDArray[np.bool_] = mask[np.ix_(picked_y, picked_x)]
    return boxed


def _ideal(shape: str) -> NDArray[np.bool_]:
    """The shape that fills its bounding box."""
    axis = (np.arange(TEMPLATE_SIDE) + 0.5) / TEMPLATE_SIDE
    y, x = np.meshgrid(axis, axis, indexing="ij")
    if shape == "square":
        return np.ones_like(x, dtype=np.bool_)
    if shape == "circle":
        return np.asarray((x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25)
    return np.asarray(np.abs(x - 0.5) <= y / 2)
