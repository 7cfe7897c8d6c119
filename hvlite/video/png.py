"""One frame -> PNG whose text chunks hold the request, and the request back. Standard library and numpy."""

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hvlite.atomic import explained, new_file
from hvlite.errors import RequestError
from hvlite.video.frames import Frame, FrameLike, as_frame

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COMMENT = "comment"
TITLE = "title"
# A chunk of text longer than this is none of ours, and is not read into memory.
MAX_TEXT_BYTES = 16 * 2**20
# A strip of four pictures side by side at the largest size that a Request may have.
MAX_SIDE = 40_000


def write_png(path: Path, frame: FrameLike, *, metadata: str, title: str) -> None:
    """`frame` as a new file `path`, which must not exist; `metadata` is a JSON text. Raises OutputError."""
    whole = png_bytes(frame, {TITLE: title, COMMENT: metadata})
    with new_file(path) as temporary, explained(path):
        temporary.write_bytes(whole)


def png_bytes(frame: FrameLike, texts: Mapping[str, str]) -> bytes:
    """A whole PNG file; `texts` by keyword (Latin letters)."""
    pixels = as_frame(frame)
    height, width = pixels.shape[:2]
    chunks = (
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *(_chunk(b"iTXt", _text(keyword, text)) for keyword, text in texts.items()),
        _chunk(b"IDAT", zlib.compress(_filtered(pixels), 6)),
        _chunk(b"IEND", b""),
    )
    return SIGNATURE + b"".join(chunks)


def read_png_comment(path: Path) -> str | None:
    """The metadata that `write_png` was given, None without any. A broken file raises RequestError."""
    found = None
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise RequestError(f"{path} is no PNG file.")
        for kind, length in _chunks(path, file):
            if kind == b"iTXt" and length <= MAX_TEXT_BYTES:
                found = _comment(_checked(path, file, kind, length)) or found
    return found


def read_png(path: Path) -> Frame:
    """The frame of a PNG that hvlite wrote. RequestError for a broken one, or one of another program."""
    size, pixels = None, b""
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise RequestError(f"{path} is no PNG file.")
        for kind, length in _chunks(path, file):
            if kind == b"IHDR":
                size = struct.unpack(">IIBBBBB", _checked(path, file, kind, length))
            elif kind == b"IDAT":
                pixels += _checked(path, file, kind, length)
    if size is None or size[2:] != (8, 2, 0, 0, 0) or max(size[:2]) > MAX_SIDE:
        raise RequestError(f"{path} is no picture as hvlite writes them.")
    return _unfiltered(path, pixels, width=size[0], height=size[1])


def _unfiltered(path: Path, packed: bytes, *, width: int, height: int) -> Frame:
    """What `_filtered` was given."""
    wanted = height * (3 * width + 1)
    try:
        unpacked = zlib.decompressobj().decompress(packed, wanted)
    except zlib.error as error:
        raise RequestError(f"{path} is damaged: {error}.") from None
    lines = np.frombuffer(unpacked, np.uint8)
    if lines.size != wanted or (lines[:: 3 * width + 1] != 2).any():
        raise RequestError(f"{path} is no picture as hvlite writes them.")
    rows = lines.reshape(height, -1)[:, 1:]
    return np.cumsum(rows, axis=0, dtype=np.uint8).reshape(height, width, 3)


def _text(keyword: str, text: str) -> bytes:
    """An iTXt body: keyword, not compressed, no language, no translated keyword, UTF-8 text."""
    return keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", "replace")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _filtered(pixels: Frame) -> bytes:
    """Scanlines, each a byte 2 (filter "up") and the differences to the line above, modulo 256."""
    height = pixels.shape[0]
    rows = pixels.reshape(height, -1)
    lines = np.empty((height, rows.shape[1] + 1), np.uint8)
    lines[:, 0] = 2
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    return lines.tobytes()


def _chunks(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk before the last, while `file` stands at its body."""
    size = path.stat().st_size
    end = len(SIGNATURE)
    while end + 12 <= size:
        file.seek(end)
        length, kind = struct.unpack(">I4s", file.read(8))
        end += length + 12
        if kind == b"IEND":
            return
        if end <= size:
            yield kind, length
    raise RequestError(f"{path} is truncated: its {size} bytes end before the picture does. Copy it again.")


def _checked(path: Path, file: BinaryIO, kind: bytes, length: int) -> bytes:
    body = file.read(length)
    (stored,) = struct.unpack(">I", file.read(4))
    actual = zlib.crc32(kind + body)
    if actual != stored:
        raise RequestError(f"{path} is damaged: a text's checksum is {actual:08x}, {stored:08x} was written.")
    return body


def _comment(body: bytes) -> str | None:
    """The text of an iTXt body as `_text` makes it, if its keyword is the comment's."""
    start = COMMENT.encode("latin-1") + b"\0\0\0\0\0"
    return body[len(start) :].decode("utf-8", "replace") if body.startswith(start) else None
