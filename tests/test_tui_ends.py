"""What is told when jobs end while the window is open; pictures of the terminal's own; screens without colour."""

import sys
from types import ModuleType

import pytest
from textual.widget import Widget
from textual.widgets import Static

from hvlite import paths
from hvlite.errors import ProfileError
from hvlite.tui.ends import desktop_note
from hvlite.tui.graphics import beside, widget_for
from hvlite.tui.job_table import JobTable
from hvlite.tui.pictures import UPPER_HALF
from hvlite.tui.settings import TuiSettings
from hvlite.video.png import png_bytes
from tests.refusal import refusal
from tests.test_tui_gallery import GREEN, RED, plain
from tests.tui_hands import Hands, done, end, opened, queue, run_next


def alarms(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Bells and notes to the desktop from now on."""
    found: list[str] = []
    monkeypatch.setattr(hands.app, "bell", lambda: found.append("bell"))
    monkeypatch.setattr(hands.app, "write_to_terminal", found.append)
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize("notify", ["bell", "desktop", "off"])
async def test_the_end_of_a_job_and_of_the_queue_are_told(notify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = queue("apple", "banana")
    run_next()
    async with opened(settings=TuiSettings(notify=notify)) as hands:  # type: ignore[arg-type]
        found = alarms(hands, monkeypatch)
        end(first)
        run_next()
        await hands.settle()
        assert "job 1 is done" in hands.told()
        assert "the queue is done" not in hands.told()
        assert found == []
        end(second, "failed", reason="out of memory", error="12 GiB needed; 8 free")
        await hands.settle()
        assert "job 2 has failed: 12 GiB needed; 8 free" in hands.told()
        assert "the queue is done: 1 clip, 1 failed" in hands.told()
        note = desktop_note("job 2 has failed: out of memory")
        assert found == {"bell": ["bell"], "desktop": ["bell", note], "off": []}[notify]


@pytest.mark.asyncio
async def test_drafts_and_cancelled_jobs_are_told_without_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, other = queue("apple", "banana", stop_after=2)
    run_next()
    async with opened() as hands:
        found = alarms(hands, monkeypatch)
        end(draft, "parked")
        run_next()
        await hands.settle()
        end(other, "cancelled")
        await hands.settle()
        assert "the draft of job 1 is ready" in hands.told()
        assert "job 2 has stopped" in hands.told()
        assert found == []


def test_a_prompt_or_an_error_cannot_steer_the_terminal_by_a_note() -> None:
    note = desktop_note("bad\x1b]0;title\x07;1")
    assert note.count("\x1b") == 4
    assert "\x07" not in note


class Graphic(Static):
    """Stands for a widget of textual-image."""

    image: object = None


@pytest.mark.asyncio
async def test_pictures_are_the_terminals_own_where_that_is_asked_for() -> None:
    (job,) = queue("a sketch", stop_after=2)
    run_next()
    end(job, "parked")
    paths.previews_folder().mkdir()
    paths.preview_file(job).write_bytes(png_bytes(plain(GREEN), {}))
    async with opened(graphic=Graphic) as hands:
        await hands.press("3")
        image = hands.app.screen.query_one(Graphic).image
        assert image is not None
        assert image.size == (48, 32)  # type: ignore[attr-defined]
        assert UPPER_HALF not in hands.screen_text()


def test_frames_of_several_heights_stand_beside_each_other() -> None:
    assert beside([plain(RED), plain(GREEN, 16, 16)]).size == (48 + 4 + 16, 32)


def test_pictures_want_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert widget_for("blocks") is None
    monkeypatch.setitem(sys.modules, "textual_image.widget", None)
    refusal(lambda: widget_for("kitty"), "kitty", "hvlite[images]", kind=ProfileError)
    stand_in = ModuleType("textual_image.widget")
    stand_in.TGPImage, stand_in.SixelImage = Widget, Static  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "textual_image", ModuleType("textual_image"))
    monkeypatch.setitem(sys.modules, "textual_image.widget", stand_in)
    assert (widget_for("kitty"), widget_for("sixel")) == (Widget, Static)


@pytest.mark.asyncio
async def test_without_colour_states_and_the_cursor_are_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    done("apple")
    queue("banana")
    async with opened() as hands:
        lines = hands.app.screen._compositor.render_strips()
        table = hands.app.front.query_one(JobTable)
        at_cursor, below = table.render_line(1), table.render_line(2)
        assert all(segment.style and segment.style.reverse for segment in at_cursor)
        assert not any(segment.style and segment.style.reverse for segment in below)
        for line in lines:
            for segment in line:
                for colour in (segment.style.color, segment.style.bgcolor) if segment.style else ():
                    assert colour is None or len(set(colour.get_truecolor())) == 1, segment
