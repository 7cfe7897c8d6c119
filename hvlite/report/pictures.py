"""What a report shows of a clip: some of its frames, or the strip of a preview, as data inside the page."""

import base64
import math
from pathlib import Path

import numpy as np

from hvlite.video.frames import Frame
from hvlite.video.mp4 import jpeg_bytes, read_some
from hvlite.video.png import SIGNATURE

SHOWN = 4
# Wider frames are shrunk by a whole number, so that they come to this or somewhat less.
WIDTH = 400
# A strip is some hundred kB at most; what is larger is none.
MAX_STRIP_BYTES = 8 * 2**20


def frames_of(clip: Path) -> list[str]:
    """A few frames of an mp4 as URLs of JPEG data. RequestError if it cannot be read."""
    return [data_url("image/jpeg", jpeg_bytes(shrunk(frame))) for frame in read_some(clip, SHOWN)]


def strip_of(file: Path) -> str | None:
    """A preview's PNG as a URL of data; None where there is none, or it is none."""
    try:
        if file.stat().st_size > MAX_STRIP_BYTES:
            return None
        content = file.read_bytes()
    except OSError:
        return None
    return data_url("image/png", content) if content.startswith(SIGNATURE) else None


def shrunk(frame: Frame) -> Frame:
    """The means of whole squares of pixels."""
    height, width, _ = frame.shape
    factor = min(math.ceil(width / WIDTH), height)
    cut = frame[: height // factor * factor, : width // factor * factor]
    squares = cut.reshape(height // factor, factor, width // factor, factor, 3)
    means: Frame = squares.mean(axis=(1, 3)).round().astype(np.uint8)
    return means


def data_url(kind: str, content: bytes) -> str:
    """`content` as a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
