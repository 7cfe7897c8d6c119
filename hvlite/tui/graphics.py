"""Real pictures, in terminals that can draw them, by the extra `images` (textual-image); imported only when asked for.

It asks the terminal for the size of a cell, which only works before textual has taken the terminal.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textual.widget import Widget

from hvlite.errors import ProfileError
from hvlite.tui.settings import Drawing

if TYPE_CHECKING:
    from hvlite.video.frames import Frame

# Pixels between two pictures of a row.
GAP = 4


def widget_for(drawing: Drawing) -> type[Widget] | None:
    """A widget with an `image`; None for half blocks. ProfileError where there can be none."""
    if drawing == "blocks":
        return None
    try:
        from textual_image.widget import SixelImage, TGPImage
    except ImportError:
        raise ProfileError(f'pictures = "{drawing}" needs the extra `images`: pip install "hvlite[images]"') from None
    except Exception as error:  # it divides by what a terminal says of its size
        raise ProfileError(f'pictures = "{drawing}": this terminal does not tell its size ({error})') from None
    found: type[Widget] = {"kitty": TGPImage, "sixel": SixelImage}[drawing]
    return found


def beside(frames: "Sequence[Frame]") -> Any:
    """The frames in a row, as a PIL image."""
    import numpy as np
    from PIL import Image

    height = max(frame.shape[0] for frame in frames)
    parts: list[Frame] = []
    for frame in frames:
        rest = height - frame.shape[0]
        parts += [np.pad(frame, ((0, rest), (0, 0), (0, 0))), np.zeros((height, GAP, 3), np.uint8)]
    return Image.fromarray(np.concatenate(parts[:-1], axis=1))
