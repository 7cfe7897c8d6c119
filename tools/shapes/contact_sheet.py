"""A picture of many clips: each row is a prompt, its frames from left to right.

python tools/shapes/contact_sheet.py --clips results/evaluation --to docs/shapes.png [--rows 12]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hvlite.video.mp4 import read_frames, read_metadata

SHOWN = (0, 4, 8, 12, 16)
SCALE = 2
CAPTION_HEIGHT = 16
GAP = 6


def strip_of(clip: Path) -> Image.Image:
    """One clip's frames side by side with its prompt and seed below."""
    frames = list(read_frames(clip))
    picked = np.concatenate([frames[min(index, len(frames) - 1)] for index in SHOWN], axis=1)
    picture = Image.fromarray(picked).resize((picked.shape[1] * SCALE, picked.shape[0] * SCALE))
    request = json.loads(read_metadata(clip))["request"]
    strip = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "white")
    strip.paste(picture)
    text = f"{request['prompt']} (seed {request['seed']})"
    ImageDraw.Draw(strip).text((2, picture.height + 2), text, fill="black")
    return strip


def sheet_of(clips: list[Path], columns: int) -> Image.Image:
    """All strips in columns."""
    strips = [strip_of(clip) for clip in clips]
    width, height = strips[0].size
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for index, strip in enumerate(strips):
        column, row = index % columns, index // columns
        sheet.paste(strip, (column * (width + GAP), row * (height + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, default=Path("results/evaluation"))
    parser.add_argument("--to", type=Path, default=Path("docs/shapes.png"))
    parser.add_argument("--rows", type=int, default=7)
    parser.add_argument("--columns", type=int, default=2)
    arguments = parser.parse_args()
    clips = sorted(arguments.clips.glob("*.mp4"))
    step = max(1, len(clips) // (arguments.rows * arguments.columns))
    picked = clips[::step][: arguments.rows * arguments.columns]
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(picked, arguments.columns).save(arguments.to, optimize=True)
    print(arguments.to)


if __name__ == "__main__":
    main()
