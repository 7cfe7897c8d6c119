"""Synthetic clips and captions for `shapes`: one flat object that moves over a flat background.

Everything is a pure function of a seed, so a training step can be repeated after a kill. Objects are drawn
from signed distances with one pixel of anti-aliasing, whole batches at once.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "white": (0.95, 0.95, 0.95),
    "purple": (0.60, 0.15, 0.80),
}
BACKGROUNDS = {"black": (0.03, 0.03, 0.03), "navy": (0.03, 0.05, 0.30), "maroon": (0.30, 0.03, 0.05)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HELD_OUT_SEED = 20261122


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption states: four words."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        """The fixed grammar that other programs rely on."""
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """The 216 combinations, in a fixed order."""
    return [Scene(*words) for words in itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """-> (trained on, held out): a seeded fifth (43 of 216) never takes part in training."""
    scenes = all_scenes()
    held_out = set(random.Random(HELD_OUT_SEED).sample(range(len(scenes)), len(scenes) // 5))
    trained = [scene for index, scene in enumerate(scenes) if index not in held_out]
    return trained, [scenes[index] for index in sorted(held_out)]


def caption_form(rng: random.Random) -> Callable[[Scene], str]:
    """One way to word a caption: the fixed grammar three times in four, else another order, fewer words,
    capitals.

    Captions of one form have the same number of words, so that a batch of them needs no padding.
    """
    if rng.random() < 0.75:
        return lambda scene: scene.caption
    article = rng.choice(("a ", "A ", "the ", "one ", ""))
    motion = rng.choice(("moving", "that moves", "going", "sliding", "moves"))
    place = rng.choice(("on a {} background", "on {}", "over a {} background", "{} background"))
    order = rng.choice(("{thing} {motion} {place}", "{thing} {place} {motion}", "{place}, {thing} {motion}"))
    before = rng.choice(("please ", "video of ", "nice ", "simple ", "flat ")) if rng.random() < 0.3 else ""
    after = rng.choice(("", ".", "!"))
    capitals = rng.random() < 0.1

    def word(scene: Scene) -> str:
        caption = before + order.format(
            thing=f"{article}{scene.colour} {scene.shape}",
            motion=f"{motion} {scene.direction}",
            place=place.format(scene.background),
        )
        return caption.upper() if capitals else caption + after

    return word


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, in pixels; the three shapes have about equal area."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y + 1e-9) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * 0.89
    # an equilateral triangle that points up: inside three half planes at its inradius
    inradius = radius * 0.72
    slanted = (x.abs() * math.cos(math.pi / 6)) - y * math.sin(math.pi / 6)
    return torch.maximum(slanted, y) - inradius


def draw_clips(
    scenes: list[Scene],
    frames: int,
    height: int,
    width: int,
    generator: torch.Generator,
    random_colours: float = 0.0,
) -> Tensor:
    """-> [B,3,frames,height,width] in [-1,1]; size, speed and path are drawn from `generator`.

    `random_colours` is the share of clips whose two colours are drawn at random instead (for the VAE).
    """
    count = len(scenes)
    draw = torch.rand(count, 11, generator=generator)
    side = min(height, width)
    radius = side * (0.17 + 0.05 * draw[:, 0])
    # slow enough that the object never leaves the picture, whatever the clip's length
    travel = side * (0.22 + 0.12 * draw[:, 1])
    axis = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes], dtype=torch.float32)
    extent = radius * 1.45  # a triangle reaches 2 x 0.72 radii up
    when = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    room = [torch.tensor(width / 2.0), torch.tensor(height / 2.0)]
    centres = []
    for dim in (0, 1):
        free = (room[dim] - extent - axis[:, dim].abs() * travel / 2).clamp_min(0)
        middle = room[dim] + (2 * draw[:, 2 + dim] - 1) * free
        centres.append(middle[:, None] + axis[:, dim, None] * travel[:, None] * when)
    ys, xs = torch.meshgrid(
        torch.arange(height, dtype=torch.float32) + 0.5,
        torch.arange(width, dtype=torch.float32) + 0.5,
        indexing="ij",
    )
    pictures = []
    for index, scene in enumerate(scenes):
        x = xs - centres[0][index, :, None, None]
        y = ys - centres[1][index, :, None, None]
        cover = (0.5 - _distance(scene.shape, x, y, radius[index])).clamp(0, 1)
        if draw[index, 4] < random_colours:
            front, back = draw[index, 5:8], draw[index, 8:11]
        else:
            front = torch.tensor(COLOURS[scene.colour])
            back = torch.tensor(BACKGROUNDS[scene.background])
        picture = cover[None] * front[:, None, None, None] + (1 - cover[None]) * back[:, None, None, None]
        pictures.append(picture)
    return torch.stack(pictures) * 2 - 1
