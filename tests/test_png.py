"""PNG files that any program reads, with the request in them."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from hvlite.errors import OutputError, RequestError
from hvlite.video.frames import Frame
from hvlite.video.mp4 import read_metadata
from hvlite.video.png import read_png_comment, write_png

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, frame: Frame, metadata: str = "{}", title: str = "a cat") -> Path:
    path.unlink(missing_ok=True)
    write_png(path, frame, metadata=metadata, title=title)
    return path


@pytest.fixture
def frame() -> Frame:
    return np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@SHARED_FOLDER
@given(frame=hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
def test_pillow_reads_the_same_pixels(tmp_path: Path, frame: Frame) -> None:
    with Image.open(write(tmp_path / "one.png", frame)) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), frame)


def test_pillow_reads_the_texts(tmp_path: Path, frame: Frame) -> None:
    metadata = json.dumps({"prompt": "ein L\u00f6we \U0001f981", "seed": 2**62}, ensure_ascii=False)
    with Image.open(write(tmp_path / "one.png", frame, metadata, "ein L\u00f6we \U0001f981")) as image:
        image.load()
        assert image.info["comment"] == metadata
        assert image.info["title"] == "ein L\u00f6we \U0001f981"


@SHARED_FOLDER
@given(text=st.text())
def test_metadata_come_back(tmp_path: Path, text: str) -> None:
    metadata = json.dumps({"prompt": text}, ensure_ascii=True)
    path = write(tmp_path / "one.png", np.zeros((1, 1, 3), np.uint8), metadata, text)
    assert read_png_comment(path) == metadata
    assert read_metadata(path) == metadata


def test_equal_frames_give_equal_bytes(tmp_path: Path, frame: Frame) -> None:
    assert write(tmp_path / "a.png", frame).read_bytes() == write(tmp_path / "b.png", frame).read_bytes()


def test_an_existing_file_is_kept(tmp_path: Path, frame: Frame) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError):
        write_png(path, frame, metadata="{}", title="")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_every_truncation_is_told(tmp_path: Path, frame: Frame) -> None:
    whole = write(tmp_path / "one.png", frame[:4, :4], '{"seed": 1}').read_bytes()
    cut = tmp_path / "cut.png"
    for length in range(8, len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(RequestError, match=rf"cut\.png is truncated: its {length} bytes"):
            read_metadata(cut)


def test_a_changed_text_is_told(tmp_path: Path, frame: Frame) -> None:
    path = write(tmp_path / "one.png", frame, '{"seed": 1}')
    path.write_bytes(path.read_bytes().replace(b'"seed": 1', b'"seed": 2'))
    with pytest.raises(RequestError, match="is damaged"):
        read_metadata(path)


@SHARED_FOLDER
@given(data=st.data())
def test_damage_is_never_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(write(tmp_path / "one.png", np.zeros((2, 2, 3), np.uint8), '{"seed": 1}').read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "broken.png"
    path.write_bytes(whole)
    told = ""
    try:
        assert read_metadata(path) == '{"seed": 1}'
    except RequestError as error:
        told = str(error)
    assert not told or str(path) in told


def test_a_png_of_another_program_holds_no_request(tmp_path: Path, frame: Frame) -> None:
    path = tmp_path / "other.png"
    Image.fromarray(frame).save(path)
    assert read_png_comment(path) is None
    with pytest.raises(RequestError, match=r"other\.png holds no request"):
        read_metadata(path)


def test_no_png_at_all(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(zlib.compress(b"notes"))
    with pytest.raises(RequestError, match="is no PNG file"):
        read_png_comment(path)
