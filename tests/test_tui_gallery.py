"""The gallery: finished clips with frames, and what is done with them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest

from hvlite import paths
from hvlite.jobs.store import open_store
from hvlite.tui.compose_screen import ComposeScreen
from hvlite.tui.gallery_screen import KEPT, GalleryScreen
from hvlite.tui.pictures import UPPER_HALF, Pictures, half_blocks, read_moments
from hvlite.video.frames import Frame
from hvlite.video.mp4 import write_mp4
from hvlite.video.png import png_bytes
from tests.tui_hands import done, end, jobs, opened, prompts, queue, run_next

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def plain(colour: tuple[int, int, int], height: int = 32, width: int = 48) -> Frame:
    return np.full((height, width, 3), colour, np.uint8)


def clip_of(path: Path) -> Path:
    write_mp4(path, [plain(RED), plain(RED), plain(GREEN), plain(BLUE), plain(BLUE)], metadata="{}", title="colours")
    return path


def test_the_first_middle_and_last_frame_are_read(tmp_path: Path) -> None:
    found = read_moments(clip_of(tmp_path / "clip.mp4"))
    assert [frame.mean(axis=(0, 1)).argmax() for frame in found] == [0, 1, 2]


def test_half_blocks_hold_two_pixels_in_each_cell_and_keep_proportions() -> None:
    frame = plain(RED, 32, 64)
    frame[16:] = BLUE
    lines = half_blocks([frame], 16, 40)
    assert len(lines) == 4
    assert {line.cell_length for line in lines} == {16}
    top, bottom = lines[0], lines[-1]
    assert [segment.text for segment in top] == [UPPER_HALF * 16]
    style = next(iter(top)).style
    assert style is not None
    assert style.color is not None
    assert style.color.triplet == RED
    low = next(iter(bottom)).style
    assert low is not None
    assert low.bgcolor is not None
    assert low.bgcolor.triplet == BLUE


@pytest.mark.parametrize(("width", "height"), [(1, 1), (0, 5), (5, 0), (200, 60), (7, 3)])
def test_any_place_is_large_enough(width: int, height: int) -> None:
    for line in half_blocks([plain(RED), plain(GREEN), plain(BLUE)], width, height):
        assert line.cell_length <= width


def test_no_frames_take_no_place() -> None:
    assert half_blocks([], 80, 24) == []


def test_readers_of_frames_may_meet_and_a_file_may_go(tmp_path: Path) -> None:
    for index in range(KEPT + 8):
        (tmp_path / f"{index}.png").write_bytes(png_bytes(plain(RED), {}))
    found = [done("apple", output=tmp_path / f"{index}.png") for index in range(KEPT + 8)]
    with open_store() as store:
        clips = [store.job(job) for job in found]
    screen = GalleryScreen(id="gallery")
    with ThreadPoolExecutor(4) as pool:
        assert all(len(frames) == 1 for frames in pool.map(screen._frames_of, clips * 3))
    assert len(screen._seen) == KEPT
    assert screen._frames_of(replace(clips[0], output=tmp_path / "gone.png")) == []


class Meeting(dict[tuple[Path, float], list[Frame]]):
    """Knows whether two threads have looked for the oldest frames at the same time."""

    met = False
    barrier = Barrier(2)

    def __iter__(self) -> Iterator[tuple[Path, float]]:
        with suppress(BrokenBarrierError):  # nobody came: it stays broken
            self.barrier.wait(0.2)
            self.met = True
        return super().__iter__()


def test_two_readers_drop_the_oldest_frames_one_after_the_other(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png_bytes(plain(RED), {}))
    found = [done("apple", output=tmp_path / name) for name in ("a.png", "b.png")]
    with open_store() as store:
        clips = [store.job(job) for job in found]
    screen = GalleryScreen(id="gallery")
    kept = Meeting({(tmp_path / f"{index}.png", 0.0): [plain(BLUE)] for index in range(KEPT)})
    screen._seen = kept
    with ThreadPoolExecutor(2) as pool:
        assert [len(frames) for frames in pool.map(screen._frames_of, clips)] == [1, 1]
    assert (kept.met, len(kept)) == (False, KEPT)


@pytest.mark.asyncio
async def test_an_empty_gallery_teaches() -> None:
    async with opened() as hands:
        await hands.press("3")
        assert "No clip is finished yet." in hands.screen_text()


@pytest.mark.asyncio
async def test_a_clip_is_shown_reused_removed_and_brought_back(tmp_path: Path) -> None:
    done("some colours", output=clip_of(tmp_path / "clip.mp4"))
    queue("waiting")
    async with opened() as hands:
        await hands.press("3")
        assert "some colours" in hands.screen_text()
        assert "waiting" not in hands.screen_text()
        assert len(hands.app.screen.query_one(Pictures).frames) == 3
        assert UPPER_HALF in hands.screen_text()
        await hands.press("x")
        assert prompts("done") == []
        await hands.press("u")
        assert prompts("done") == ["some colours"]
        await hands.press("s", "e")
        assert prompts("queued") == ["waiting", "some colours"]
        screen = hands.app.front
        assert isinstance(screen, ComposeScreen)
        assert screen.prompt.text == "some colours"
        assert screen.editing is None


@pytest.mark.asyncio
async def test_a_draft_is_shown_as_far_as_it_is_and_finished() -> None:
    (job,) = queue("a sketch", stop_after=2)
    run_next()
    end(job, "parked")
    paths.previews_folder().mkdir()
    paths.preview_file(job).write_bytes(png_bytes(plain(GREEN), {}))
    async with opened() as hands:
        await hands.press("3")
        assert len(hands.app.screen.query_one(Pictures).frames) == 1
        await hands.press("f")
        assert [each.stop_after for each in jobs("queued")] == [None]


@pytest.mark.asyncio
async def test_a_clip_that_is_gone_or_broken_is_said_to_be(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    done("a broken one", output=broken)
    done("a lost one", output=tmp_path / "lost.mp4")
    async with opened() as hands:
        await hands.press("3")
        assert "the file is gone" in hands.screen_text()
        await hands.press("o", "j")
        assert "neither an mp4 nor a PNG" in hands.screen_text()


@pytest.mark.asyncio
async def test_filter_marks_and_the_way_back(tmp_path: Path) -> None:
    done("a red circle")
    done("a blue square")
    async with opened() as hands:
        await hands.press("3", "slash")
        await hands.type("blue")
        await hands.press("enter")
        assert "a red circle" not in hands.screen_text()
        await hands.press("ctrl+a", "escape", "escape", "enter")
        assert "--seed 0" in hands.screen_text()
        await hands.press("escape", "escape")
        assert hands.app.current_mode == "queue"
