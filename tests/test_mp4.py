"""Videos: what goes in comes out, equal frames give equal packets, and nothing half-made is ever left."""

import gc
import io
import json
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hvlite.errors import OutputError, RequestError
from hvlite.video import mp4
from hvlite.video.frames import Frame
from hvlite.video.mp4 import jpeg_bytes, open_mp4, read_frames, read_metadata, read_some, write_mp4

METADATA = '{"seed": 1}'
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)

COLOURS = (
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)),
    *((255, 255, 255), (0, 0, 0), (128, 128, 128), (230, 26, 26), (26, 191, 51), (38, 64, 242)),
    *((242, 217, 26), (153, 38, 204), (10, 10, 10), (250, 5, 128)),
)


def noise(count: int, height: int = 64, width: int = 64) -> Frame:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def waves(count: int, height: int = 64, width: int = 96) -> Frame:
    """A smooth moving pattern in colour: what a codec should keep nearly as it is."""
    time, row, column, channel = np.ogrid[:count, :height, :width, :3]
    pattern = 128 + 70 * np.sin(column / 17 + time / 4 + channel) + 40 * np.cos(row / 13 - time / 5)
    frames: Frame = pattern.astype(np.uint8)
    return frames


def patches(side: int = 16) -> Frame:
    """All COLOURS as flat squares, four a row."""
    squares: Frame = np.asarray(COLOURS, np.uint8).reshape(4, 4, 3)
    return squares.repeat(side, 0).repeat(side, 1)


def psnr(first: Frame, second: Frame) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2)))


def write(path: Path, frames: Frame, metadata: str = METADATA, title: str = "a cat") -> Path:
    path.unlink(missing_ok=True)
    assert write_mp4(path, frames, metadata=metadata, title=title) == len(frames)
    return path


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0)]


def times(path: Path) -> list[tuple[int | None, int | None]]:
    with av.open(str(path)) as container:
        return [(packet.pts, packet.dts) for packet in container.demux(video=0)]


def top_boxes(content: bytes) -> list[bytes]:
    """The outermost boxes of an mp4, in order; an independent reading of the format."""
    boxes, position = [], 0
    while position < len(content):
        boxes.append(content[position + 4 : position + 8])
        position += int.from_bytes(content[position : position + 4], "big")
    return boxes


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write(tmp_path / "clip.mp4", waves(9))


@pytest.mark.parametrize("count", [1, 2, 17])
def test_frames_come_back_in_order_and_nearly_as_they_were(tmp_path: Path, count: int) -> None:
    frames = waves(count)
    decoded = list(read_frames(write(tmp_path / "clip.mp4", frames)))
    assert [(frame.shape, frame.dtype) for frame in decoded] == [((64, 96, 3), np.dtype(np.uint8))] * count
    assert psnr(np.stack(decoded), frames) > 42
    assert min(psnr(out, frame) for out, frame in zip(decoded, frames, strict=True)) > 40


def test_flat_colours_survive_within_two_levels(tmp_path: Path) -> None:
    sent = patches()
    for decoded in read_frames(write(tmp_path / "clip.mp4", np.stack([sent] * 5))):
        off = np.abs(decoded.astype(int) - sent).reshape(4, 16, 4, 16, 3)[:, 4:12, :, 4:12]
        assert off.max() <= 2


def test_other_players_see_the_same_colours(tmp_path: Path) -> None:
    """PyAV's plain conversion knows only what the file says of itself."""
    sent = patches()
    with av.open(str(write(tmp_path / "clip.mp4", np.stack([sent] * 3)))) as container:
        for frame in container.decode(video=0):
            off = np.abs(frame.to_ndarray(format="rgb24").astype(int) - sent).reshape(4, 16, 4, 16, 3)
            assert off[:, 4:12, :, 4:12].max() <= 4


def test_the_format_is_what_players_expect(video: Path) -> None:
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.height, stream.codec_context.width) == (64, 96)
        assert stream.average_rate == 24
        assert stream.frames == 9
        assert (stream.color_range, stream.colorspace) == (ColorRange.MPEG, Colorspace.ITU709)
        assert (stream.color_primaries, stream.color_trc) == (ColorPrimaries.BT709, ColorTrc.BT709)
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([number / 24 for number in range(9)])
    assert top_boxes(video.read_bytes()) == [b"ftyp", b"moov", b"free", b"mdat"]


@pytest.mark.parametrize(("count", "picked"), [(1, [0]), (2, [0, 1]), (5, [0, 1, 3, 4]), (9, [0, 3, 5, 8])])
def test_some_frames_are_the_same_as_those_of_all(tmp_path: Path, count: int, picked: list[int]) -> None:
    path = write(tmp_path / "clip.mp4", waves(count))
    every = list(read_frames(path))
    assert np.array_equal(read_some(path, 4), [every[index] for index in picked])


@pytest.mark.parametrize("shape", [(64, 96), (31, 45), (1, 1)])
def test_pillow_reads_a_jpeg_of_any_size(shape: tuple[int, int]) -> None:
    (frame,) = waves(1, *shape)
    content = jpeg_bytes(frame)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        assert psnr(frame, np.asarray(image.convert("RGB"))) > 30
    assert jpeg_bytes(frame) == content


def test_the_frame_rate_can_be_named(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", waves(3), metadata=METADATA, title="", fps=30)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 30


def test_crf_trades_size_for_quality(tmp_path: Path) -> None:
    for crf in (12, 30):
        write_mp4(tmp_path / f"{crf}.mp4", noise(3), metadata=METADATA, title="", crf=crf)
    assert (tmp_path / "12.mp4").stat().st_size > 2 * (tmp_path / "30.mp4").stat().st_size


def test_one_noisy_clip_gives_one_set_of_packets(tmp_path: Path) -> None:
    frames = noise(33)
    first = write(tmp_path / "first.mp4", frames)
    expected, expected_bytes = packets(first), first.read_bytes()
    assert len(expected) >= len(frames)
    for _ in range(19):
        again = write(tmp_path / "again.mp4", frames)
        assert packets(again) == expected
        assert again.read_bytes() == expected_bytes


def test_the_encoder_took_the_settings_that_make_it_deterministic(video: Path) -> None:
    written = b"".join(packets(video))
    settings_text = written[written.index(b"x264 - core") :].split(b"\0")[0]
    for setting in (b" threads=1 ", b" sliced_threads=0 ", b" mbtree=0 ", b" crf=17.0 "):
        assert setting in settings_text


def test_tensors_and_arrays_give_the_same_file(tmp_path: Path) -> None:
    frames = noise(3)
    arrays = write(tmp_path / "arrays.mp4", frames).read_bytes()
    write_mp4(tmp_path / "tensors.mp4", torch.from_numpy(frames), metadata=METADATA, title="a cat")
    assert (tmp_path / "tensors.mp4").read_bytes() == arrays


def test_only_one_frame_is_held_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Frame]] = []

    def frames() -> Iterator[Frame]:
        for _ in range(60):
            frame = noise(1)[0].copy()
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            gc.collect(0)
            assert sum(reference() is not None for reference in alive) <= 1

    assert write_mp4(tmp_path / "clip.mp4", frames(), metadata=METADATA, title="") == 60


def test_long_prompts_emoji_and_large_seeds_come_back(tmp_path: Path) -> None:
    prompt = 'a cat \U0001f408\u200d\u2b1b, \u732b, \u0642\u0637\u0629; a=b\\ "quoted"\n\ttwo lines\r\n' * 120
    assert len(prompt) > 5000
    metadata = json.dumps({"prompt": prompt, "seed": 2**62}, ensure_ascii=False)
    path = write(tmp_path / "clip.mp4", waves(1), metadata, prompt)
    assert read_metadata(path) == metadata
    assert json.loads(read_metadata(path))["seed"] == 2**62
    with av.open(str(path)) as container:
        assert container.metadata["title"] == prompt


@SHARED_FOLDER
@given(text=st.text())
def test_any_text_can_be_title_and_metadata(tmp_path: Path, text: str) -> None:
    metadata = json.dumps({"prompt": text})
    path = write(tmp_path / "clip.mp4", np.zeros((1, 16, 16, 3), np.uint8), metadata, text)
    assert read_metadata(path) == metadata
    as_is = json.dumps({"prompt": text}, ensure_ascii=False)
    read_back = read_metadata(write(path, np.zeros((1, 16, 16, 3), np.uint8), as_is, text))
    assert read_back == as_is.encode("utf-8", "replace").decode()


def test_unusual_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file:a.mp4", "concat:b|c.mp4", "%03d.mp4", "-y", "na\u00efve \U0001f408.mp4", "\udc80.mp4"):
        path = Path(name)
        write(path, waves(1))
        assert read_metadata(path) == METADATA
        assert len(list(read_frames(path))) == 1
        assert os.listdir() == [name]
        path.unlink()
    Path("concat:a").mkdir()
    assert read_metadata(write(Path("concat:a", "clip.mp4"), waves(1))) == METADATA


@pytest.mark.parametrize("error", [ValueError("decoder"), OSError("weights"), KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.parametrize("after", [0, 1, 12])
def test_an_exception_half_way_passes_and_leaves_nothing(tmp_path: Path, error: BaseException, after: int) -> None:
    def frames() -> Iterator[Frame]:
        yield from waves(after)
        raise error

    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(type(error)) as caught:
        write_mp4(tmp_path / "clip.mp4", frames(), metadata=METADATA, title="")
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_an_abandoned_generator_leaves_nothing(tmp_path: Path) -> None:
    def render() -> Generator[int, None, None]:
        with open_mp4(tmp_path / "clip.mp4", metadata=METADATA, title="") as add:
            for number, frame in enumerate(waves(9)):
                add(frame)
                yield number

    rendering = render()
    assert [next(rendering), next(rendering)] == [0, 1]
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / "clip.mp4").exists()
    rendering.close()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"yesterday's")

    frames = iter(waves(1))
    with pytest.raises(OutputError, match=r"clip\.mp4 cannot be written: it exists"):
        write_mp4(path, frames, metadata=METADATA, title="")
    assert len(list(frames)) == 1
    assert path.read_bytes() == b"yesterday's"


def test_a_file_that_appears_meanwhile_costs_neither(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"

    def frames() -> Iterator[Frame]:
        yield from waves(3)
        path.write_bytes(b"somebody else's")

    with pytest.raises(OutputError, match=r"kept as .*clip-2\.mp4"):
        write_mp4(path, frames(), metadata=METADATA, title="")
    assert path.read_bytes() == b"somebody else's"
    assert len(list(read_frames(tmp_path / "clip-2.mp4"))) == 3


def test_a_missing_folder_is_told_before_the_first_frame(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*nowhere"):
        write_mp4(tmp_path / "nowhere" / "clip.mp4", iter(()), metadata=METADATA, title="")


@pytest.mark.parametrize("missing_bytes", [1, 300, 20000, 10**6])
def test_a_file_that_cannot_grow_is_told_and_removed(tmp_path: Path, missing_bytes: int) -> None:
    """The kernel itself refuses to write: in the packets, in the index, at the very end."""
    frames = noise(9)
    size = write(tmp_path / "clip.mp4", frames).stat().st_size
    (tmp_path / "clip.mp4").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size - missing_bytes, 0), limits[1]))
    try:
        with pytest.raises(OutputError, match=r"clip\.mp4 cannot be written: .*ulimit -f"):
            write_mp4(tmp_path / "clip.mp4", frames, metadata=METADATA, title="a cat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["mux", "close"])
def test_a_full_disk_is_told_and_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    class FullDisk:
        def __init__(self, container: av.container.InputContainer | av.container.OutputContainer) -> None:
            self.container = container

        def __getattr__(self, name: str) -> object:
            return self.full if name == call else getattr(self.container, name)

        def full(self, *_: object) -> None:
            raise av.error.OSError(28, "No space left on device", "clip.mp4")

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: FullDisk(opened(*args, **kwargs)))
    with pytest.raises(OutputError, match=r"No space left on device, .* MiB free\. Make room"):
        write_mp4(tmp_path / "clip.mp4", waves(9), metadata=METADATA, title="")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"clip\.mp4 cannot be encoded: "):
        write_mp4(tmp_path / "clip.mp4", waves(1), metadata=METADATA, title="", crf=float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_pyav_without_the_codec_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4, "CODEC", "libx000")
    with pytest.raises(OutputError, match=r"has no libx000\. Install the one that brings it"):
        write_mp4(tmp_path / "clip.mp4", waves(1), metadata=METADATA, title="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(1, 24, 64, 3), (1, 64, 40, 3)])
def test_sizes_that_are_no_multiple_of_16_are_a_mistake(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="multiple of 16"):
        write_mp4(tmp_path / "clip.mp4", np.zeros(shape, np.uint8), metadata=METADATA, title="")
    assert list(tmp_path.iterdir()) == []


def test_a_frame_of_another_size_and_no_frame_at_all_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"frames of \(64, 96\), then one of \(32, 32\)"):
        write_mp4(tmp_path / "clip.mp4", [waves(1)[0], noise(1, 32, 32)[0]], metadata=METADATA, title="")
    with pytest.raises(AssertionError, match="at least one frame"):
        write_mp4(tmp_path / "clip.mp4", [], metadata=METADATA, title="")
    assert list(tmp_path.iterdir()) == []


def test_every_truncation_is_told(video: Path) -> None:
    whole = video.read_bytes()
    cut = video.with_name("cut.mp4")
    for length in [*range(8, len(whole), 61), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(RequestError, match=r"cut\.mp4 is truncated"):
            read_metadata(cut)
        with pytest.raises(RequestError, match=r"cut\.mp4 is truncated"):
            next(read_frames(cut))


@SHARED_FOLDER
@given(damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damage_is_never_a_traceback(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    path = tmp_path / "broken.mp4"
    content = bytearray(write(path, np.zeros((2, 16, 16, 3), np.uint8)).read_bytes())
    for position, value in damage:
        content[position % len(content)] = value
    path.write_bytes(content)
    told = ""
    try:
        assert isinstance(json.loads(read_metadata(path)), dict)
        assert all(frame.dtype == np.uint8 for frame in read_frames(path))
    except RequestError as error:
        told = str(error)
    assert not told or str(path) in told


def write_plain(path: Path, container_format: str, comment: str | None) -> Path:
    """A video as another program would write it."""
    with av.open(str(path), "w", format=container_format) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("comment", [None, "", "https://example.org", "[1]", "1", "{", "[" * 100000])
def test_videos_of_other_programs_hold_no_request(tmp_path: Path, comment: str | None) -> None:
    path = write_plain(tmp_path / "other.mp4", "mp4", comment)
    with pytest.raises(RequestError, match=r"other\.mp4 holds no request"):
        read_metadata(path)
    assert len(list(read_frames(path))) == 1


def test_files_that_are_no_mp4_are_told(tmp_path: Path) -> None:
    files = [write_plain(tmp_path / "clip.mkv", "matroska", METADATA), tmp_path / "notes.txt", tmp_path / "empty"]
    files[1].write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    files[2].touch()
    for path in files:
        with pytest.raises(RequestError, match=f"{path.name} is neither an mp4 nor a PNG file"):
            read_metadata(path)


def test_an_mp4_with_sound_alone_is_told(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(RequestError, match=r"sound\.mp4 holds no video"):
        next(read_frames(path))


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.mp4 cannot be read: No such file"):
        read_metadata(tmp_path / "nowhere.mp4")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_metadata(tmp_path)
    with pytest.raises(RequestError, match=r"nowhere\.mp4 cannot be read: No such file"):
        next(read_frames(tmp_path / "nowhere.mp4"))


def test_a_reader_that_stops_early_closes_the_file(video: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    reading = read_frames(video)
    next(reading)
    del reading
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_metadata_are_read_without_torch() -> None:
    code = "import sys, hvlite.video.mp4, hvlite.video.png; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_text_that_is_another_at_the_end_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """As where memory ran out in the middle: all packets stay as they are."""
    said = ['{"tiles": "large"}']
    with open_mp4(tmp_path / "late.mp4", metadata=lambda: said[-1], title="x") as add:
        for frame in waves(30):
            add(frame)
        said.append('{"tiles": "small", "why": "out of memory in decode: going on with 65x192x192 from frame 49"}')
    write_mp4(tmp_path / "known.mp4", waves(30), metadata=said[-1], title="x")
    assert read_metadata(tmp_path / "late.mp4") == said[-1]
    assert packets(tmp_path / "late.mp4") == packets(tmp_path / "known.mp4")
    assert times(tmp_path / "late.mp4") == times(tmp_path / "known.mp4")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["known.mp4", "late.mp4"]
    late, known = (list(read_frames(tmp_path / name)) for name in ("late.mp4", "known.mp4"))
    assert np.array_equal(late, known)
