"""Pictures in a terminal: two pixels in each cell, the upper one as the colour of a half block, the lower behind it.

Files are read on other threads than the screen's. numpy and PyAV are imported when the first picture is wanted.
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.app import ComposeResult
from textual.geometry import Size
from textual.strip import Strip
from textual.widget import Widget

from hvlite.errors import RequestError
from hvlite.tui.graphics import beside

if TYPE_CHECKING:
    from hvlite.video.frames import Frame

UPPER_HALF = "\u2580"
# Columns between two pictures of a row.
GAP = 1
MOST_LINES = 40
MOMENTS = 3
# Pixels across that are kept of a picture: more than any terminal shows of one of three.
SHOWN_WIDTH = 480


class Pictures(Widget):
    """Frames side by side, as large as the place allows; nothing at all while there is none."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.frames: Sequence[Frame] = ()
        self.display = False
        self._lines: list[Strip] = []
        self._drawn_for = Size(0, 0)

    def compose(self) -> ComposeResult:
        graphic: type[Widget] | None = self.app.surroundings.graphic  # type: ignore[attr-defined]
        if graphic is not None:
            yield graphic(id="graphic")

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as the frames take at that width; the style sheet says how many there may be."""
        return len(half_blocks(self.frames, width, MOST_LINES))

    def show(self, frames: "Sequence[Frame]") -> None:
        if _same(frames, self.frames):
            return
        self.frames = frames
        self._drawn_for = Size(0, 0)
        self.display = bool(frames)
        for graphic in self.query("#graphic"):
            graphic.image = beside(frames) if frames else None  # type: ignore[attr-defined]
        self.refresh(layout=True)

    def render_line(self, y: int) -> Strip:
        if self.children:
            return Strip.blank(self.size.width, self.rich_style)
        if self._drawn_for != self.size:
            self._lines = half_blocks(self.frames, self.size.width, self.size.height)
            self._drawn_for = self.size
        if y < len(self._lines):
            return self._lines[y].adjust_cell_length(self.size.width).apply_style(self.rich_style)
        return Strip.blank(self.size.width, self.rich_style)


def _same(frames: "Sequence[Frame]", others: "Sequence[Frame]") -> bool:
    return len(frames) == len(others) and all(
        one.shape == other.shape and bool((one == other).all()) for one, other in zip(frames, others, strict=True)
    )


def half_blocks(frames: "Sequence[Frame]", width: int, height: int) -> list[Strip]:
    """The frames in a row of `width` columns and at most `height` lines, with their proportions kept."""
    each = (width - GAP * (len(frames) - 1)) // len(frames) if frames else 0
    if each < 2 or height < 1:
        return []
    drawn = [_shrunk(frame, each, 2 * height) for frame in frames]
    lines = []
    for row in range(max(picture.shape[0] for picture in drawn) // 2):
        segments: list[Segment] = []
        for picture in drawn:
            segments += [*_cells(picture, row), Segment(" " * GAP)]
        lines.append(Strip(segments[:-1]).simplify())
    return lines


def _cells(picture: "Frame", row: int) -> list[Segment]:
    if 2 * row + 1 >= picture.shape[0]:
        return [Segment(" " * picture.shape[1])]
    pairs = zip(picture[2 * row].tolist(), picture[2 * row + 1].tolist(), strict=True)
    return [Segment(UPPER_HALF, Style(color=Color.from_rgb(*up), bgcolor=Color.from_rgb(*low))) for up, low in pairs]


def _shrunk(frame: "Frame", width: int, height: int) -> "Frame":
    """To fit into so many pixels, each the mean of those that it stands for; an even number of lines."""
    import numpy as np

    rows, columns = frame.shape[:2]
    scale = min(width / columns, height / rows)
    high, wide = min(height, 2 * ceil(rows * scale / 2)), max(1, int(columns * scale))
    if high >= rows or wide >= columns:
        nearest: Frame = frame[np.arange(high) * rows // high][:, np.arange(wide) * columns // wide]
        return nearest
    sums = np.add.reduceat(frame.astype(np.uint32), np.arange(high) * rows // high, axis=0)
    sums = np.add.reduceat(sums, np.arange(wide) * columns // wide, axis=1)
    tall = np.diff(np.append(np.arange(high) * rows // high, rows))
    broad = np.diff(np.append(np.arange(wide) * columns // wide, columns))
    means: Frame = (sums // (tall[:, None, None] * broad[None, :, None])).astype(np.uint8)
    return means


def read_strip(path: Path) -> "list[Frame]":
    """The preview that the worker keeps beside a running job; none where it has not made one, or has just gone."""
    from hvlite.video.png import read_png

    try:
        return [read_png(path)]
    except (OSError, RequestError):
        return []


def read_moments(path: Path) -> "list[Frame]":
    """The first, the middle and the last frame of a clip, or its one picture, no larger than is ever shown.

    Raises RequestError.
    """
    from hvlite.video.mp4 import read_some
    from hvlite.video.png import read_png

    found = [read_png(path)] if path.suffix.lower() == ".png" else read_some(path, MOMENTS)
    return [_shrunk(frame, min(SHOWN_WIDTH, frame.shape[1]), frame.shape[0]) for frame in found]
