"""Frames -> mp4, one at a time, and mp4 -> frames; a frame -> JPEG. The only module that knows PyAV.

A file holds H.264 in yuv420p with the index in front (faststart), BT.709 in limited range and tagged so, the
prompt as `title` and a JSON text as `comment`. Equal frames and texts give equal bytes, however many cores a
machine has: that is what THREADS, X264, MUXER and the BITEXACT flags are for. No torch at run time.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Final

import av
import av.error
import numpy as np
from av.codec.codec import UnknownCodecError
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from hvlite.atomic import explained, new_file
from hvlite.errors import OutputError, RequestError
from hvlite.video.frames import Frame, FrameLike, as_frame
from hvlite.video.png import SIGNATURE as PNG_SIGNATURE
from hvlite.video.png import read_png_comment

CODEC: Final = "libx264"
FPS = 24
# Visually lossless for most eyes; x264's own default is 23.
CRF = 17
# x264 gives other packets for another number of threads, and its own choice is the number of cores.
THREADS = 1
# mbtree can give other packets from run to run; cpu-independent: no choice of methods by the processor.
X264 = "mbtree=0:cpu-independent=1"
# bitexact leaves the muxer's version out, so that a file depends on its frames and texts alone.
MUXER = {"movflags": "faststart", "fflags": "bitexact"}
# FFmpeg's own scale for JPEG, 2 (best) to 31.
JPEG_QUALITY = {"qmin": "4", "qmax": "4"}
# Chroma is the mean of 2x2 pixels: longer kernels ring at the hard edges of flat shapes.
TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.BITEXACT
TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


def write_mp4(
    path: Path,
    frames: Iterable[FrameLike],
    *,
    metadata: str,
    title: str,
    fps: int = FPS,
    crf: float = CRF,
) -> int:
    """Encode `frames` as they come into the new file `path`; returns how many. All else is `open_mp4`'s."""
    count = 0
    with open_mp4(path, metadata=metadata, title=title, fps=fps, crf=crf) as add:
        for frame in frames:
            add(frame)
            count += 1
    return count


@contextmanager
def open_mp4(
    path: Path, *, metadata: str | Callable[[], str], title: str, fps: int = FPS, crf: float = CRF
) -> Iterator[Callable[[FrameLike], None]]:
    """Yield the function that appends a frame; when the block ends, the whole file has its name.

    For callers that do other things between frames. At least one frame is needed, and one size for all, in
    multiples of 16. `metadata` is a JSON text, or gives one, and is then asked again when the last frame is there.
    An existing `path`, a full disk or a missing folder raise OutputError; no exception leaves anything behind.
    """

    def texts() -> dict[str, str]:
        return {"comment": metadata if isinstance(metadata, str) else metadata(), "title": title}

    with new_file(path) as temporary:
        first = texts()
        with _encoding(path):
            encoder = _Encoder(temporary, first, fps, crf)

        def add(frame: FrameLike) -> None:
            with _encoding(path):
                encoder.add(as_frame(frame))

        try:
            yield add
            with _encoding(path):
                encoder.finish()
                if (last := texts()) != first:
                    _rewrite(temporary, last)
        finally:
            encoder.release()


def _rewrite(file: Path, texts: dict[str, str]) -> None:
    """Other texts in a whole file, whose packets stay as they are: a muxer takes texts only before the first frame."""
    written = io.BytesIO(file.read_bytes())
    with (
        av.open(written, "r", format="mp4") as before,
        av.open(str(file.absolute()), "w", format="mp4", options=MUXER) as after,
    ):
        _set_texts(after, texts)
        stream = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.dts is not None:  # the last one is empty
                packet.stream = stream
                after.mux(packet)


def _set_texts(container: av.container.OutputContainer, texts: dict[str, str]) -> None:
    for key, text in texts.items():
        container.metadata[key] = _storable(text)


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of an mp4, one at a time. A file that is missing, truncated or none raises RequestError."""
    reformatter = VideoReformatter()
    with _opened(path) as container:
        for frame in container.decode(video=0):
            yield _as_rgb(frame, reformatter)


def read_some(path: Path, count: int) -> list[Frame]:
    """Up to `count` frames from the first to the last; the rest is decoded, not converted. Else as `read_frames`."""
    reformatter = VideoReformatter()
    with _opened(path) as container:
        last = container.streams.video[0].frames - 1
        picked = set(np.linspace(0, last, count).round().astype(int).tolist())
        return [_as_rgb(each, reformatter) for index, each in enumerate(container.decode(video=0)) if index in picked]


def jpeg_bytes(frame: FrameLike) -> bytes:
    """`frame`, of any size, as a whole JPEG file."""
    pixels = as_frame(frame)
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.color_range, encoder.time_base = "yuv420p", ColorRange.JPEG, Fraction(1, FPS)
    encoder.options = JPEG_QUALITY
    encoder.thread_count = THREADS
    picture = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(pixels, format="rgb24"),
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG,
        interpolation=TO_YUV,
        threads=1,
    )
    picture.pts = 0
    return b"".join(bytes(packet) for part in (picture, None) for packet in encoder.encode(part))


def read_metadata(path: Path) -> str:
    """The JSON text that an mp4 or PNG was written with.

    A file that is missing, truncated, neither of the two, or carries no JSON object raises RequestError.
    """
    with _readable(path):
        with path.open("rb") as file:
            is_png = file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
        text = read_png_comment(path) if is_png else _mp4_comment(path)
    if text is None or not _is_json_object(text):
        raise RequestError(f"{path} holds no request: hvlite did not write it, or another program changed it.")
    return text


class _Encoder:
    """Owns an mp4 that is being written: its container and, from the first frame on, its stream."""

    def __init__(self, path: Path, texts: dict[str, str], fps: int, crf: float) -> None:
        # Absolute, since FFmpeg takes a folder "a:b" for the protocol "a".
        self._container = av.open(str(path.absolute()), "w", format="mp4", options=MUXER)
        _set_texts(self._container, texts)
        self._stream = self._container.add_stream(
            CODEC, rate=fps, options={"preset": "medium", "crf": str(crf), "x264-params": X264}
        )
        self._reformatter = VideoReformatter()
        self._count = 0

    def add(self, frame: Frame) -> None:
        height, width = frame.shape[:2]
        if self._count == 0:
            self._set_format(height, width)
        expected = (self._stream.height, self._stream.width)
        assert (height, width) == expected, f"frames of {expected}, then one of {(height, width)}"
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(frame, format="rgb24"),
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=TO_YUV,
            threads=1,
        )
        picture.pts = self._count
        self._container.mux(self._stream.encode(picture))
        self._count += 1

    def finish(self) -> None:
        """Flush the encoder and complete the file."""
        assert self._count, "a video has at least one frame"
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def release(self) -> None:
        """Let go of the file, also after a failure; after `finish` this does nothing."""
        with suppress(OSError, av.error.FFmpegError):
            self._container.close()

    def _set_format(self, height: int, width: int) -> None:
        assert height % 16 == 0, f"height must be a multiple of 16, got {height}"
        assert width % 16 == 0, f"width must be a multiple of 16, got {width}"
        codec = self._stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.thread_count = THREADS
        codec.color_range = ColorRange.MPEG
        codec.colorspace = Colorspace.ITU709
        codec.color_primaries = ColorPrimaries.BT709
        codec.color_trc = ColorTrc.BT709


def _as_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> Frame:
    rgb = reformatter.reformat(frame, format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=TO_RGB, threads=1)
    return np.asarray(rgb.to_ndarray(), np.uint8)


def _storable(text: str) -> str:
    """`text` as a C string in UTF-8 can hold it: a stray surrogate or NUL must not cost a finished clip."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ")


@contextmanager
def _encoding(path: Path) -> Iterator[None]:
    """Turn the errors of FFmpeg and of the disk into OutputError."""
    with explained(path):
        try:
            yield
        except OSError:
            raise
        except UnknownCodecError as error:
            raise OutputError(
                f"{path} cannot be encoded: this PyAV {av.__version__} has no {CODEC}. "
                "Install the one that brings it: pip install --force-reinstall --only-binary av av"
            ) from error
        except av.error.FFmpegError as error:
            raise OutputError(f"{path} cannot be encoded: FFmpeg says {error}.") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of FFmpeg and of the disk into RequestError."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    except av.error.FFmpegError as error:
        raise RequestError(f"{path} cannot be read as a video: {error.strerror or error}.") from error


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    # Neither a name nor a free choice of format: some names are protocols, some formats open further files.
    with _readable(path), path.open("rb") as file:
        _check_whole(path, file)
        with av.open(file, "r", format="mp4", metadata_errors="replace") as container:
            if not container.streams.video:
                raise RequestError(f"{path} holds no video, only {len(container.streams)} other streams.")
            yield container


def _mp4_comment(path: Path) -> str | None:
    with _opened(path) as container:
        return container.metadata.get("comment")


def _check_whole(path: Path, file: BinaryIO) -> None:
    """Refuse an mp4 without its end: the index is in front, so FFmpeg would give what is left, silently."""
    size = path.stat().st_size
    boxes: dict[bytes, int] = {}
    for kind, end in _boxes(file, size):
        if not boxes and kind != b"ftyp":
            break
        boxes[kind] = end
    if not boxes:
        raise RequestError(f"{path} is neither an mp4 nor a PNG file.")
    end = max(boxes.values())
    if end > size:
        raise RequestError(f"{path} is truncated: {size} of {end} bytes are there. Copy or render it again.")
    if not boxes.keys() >= {b"moov", b"mdat"}:
        raise RequestError(f"{path} is truncated: {size} bytes hold no video. Copy or render it again.")
    file.seek(0)


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """The kind of each outermost box of an mp4 and where it ends, which may be beyond the file's `size`."""
    end = 0
    while end < size:
        start = end
        file.seek(start)
        header = file.read(16)
        length = int.from_bytes(header[:4])
        # 1: the length is in the next 8 bytes; 0: the box goes on to the end of the file.
        length = {0: size - start, 1: int.from_bytes(header[8:])}.get(length, length)
        end = start + max(length, 8)
        yield header[4:8], end


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
