"""How the screens look, as pictures that are kept: fixed jobs, clock, machine. `--snapshot-update` makes new ones."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.jobs.store import open_store
from hvlite.tui import workers
from hvlite.video.mp4 import write_mp4
from hvlite.video.png import png_bytes
from tests.test_tui_device import COUNTED, MACHINE
from tests.test_tui_gallery import BLUE, GREEN, RED, plain
from tests.tui_hands import GIB, NOW, Hands, done, end, opened, queue, run_next

WIDE, NARROW = (140, 45), (80, 24)


class Svg(SingleFileSnapshotExtension):
    """A file of its own for each picture, to be looked at in a browser."""

    _write_mode = WriteMode.TEXT
    file_extension = "svg"


@pytest.fixture
def pictures(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(Svg)


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(workers, "held_locks", lambda: {"GPU-1": 4711})
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def fill(folder: Path) -> None:
    """One job of every state."""
    clip = folder / "clip.mp4"
    write_mp4(clip, [plain(RED), plain(GREEN), plain(BLUE)], metadata="{}", title="colours")
    done("a parrot spreads its wings", output=clip, seconds_per_step=24.8, timings={"denoise": 1240.0, "decode": 98.0})
    (failed,) = queue("a very large clip", size=(1280, 720), frames=129)
    run_next()
    end(failed, "failed", reason="out of memory in decode", error="decode needs 11.2 GiB; 10.8 GiB are free")
    (draft,) = queue("a draft of a dragon", stop_after=12)
    run_next()
    end(draft, "parked")
    queue("a lighthouse at dusk, waves below", "a cat walks on grass", "a fox in the snow", size=(544, 960), frames=129)
    running = run_next(replace(COUNTED, step=17, steps=50, detail="block 34/60", eta=NOW + 912), lock="GPU-1")
    with open_store() as store:
        resolved = running.request.resolve(HUNYUANVIDEO) if running.request is not None else None
        assert resolved is not None
        store.claims("somebody's worker", "GPU-1", {None}).record_plan(running.id, resolved, 10 * GIB)
    paths.previews_folder().mkdir()
    paths.preview_file(running.id).write_bytes(png_bytes(plain(GREEN, 16, 64), {}))
    paths.logs_folder().mkdir()
    paths.job_log(running.id).write_text("plan: 60 of 60 blocks resident\nstep 17: 24.9 s\n")


async def picture(hands: Hands) -> str:
    hands.steady_cursor()
    if hands.app.screen.query("DeviceStrip"):
        await hands.until_shown("free ")
    await hands.pilot.hover(offset=(0, 0))
    await hands.settle()
    for strip in hands.app.front.query("#device-minute"):
        strip.display = False  # as many bars as probes so far
    await hands.settle()
    for _ in range(100):
        if any(screen._layout_required or screen._dirty_widgets for screen in hands.app.screen_stack):
            await asyncio.sleep(0.01)
    await hands.settle()
    return hands.app.export_screenshot(simplify=True)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("size", "keys"),
    [
        pytest.param(WIDE, (), id="queue-wide"),
        pytest.param(NARROW, (), id="queue-narrow"),
        pytest.param(WIDE, ("j", "j", "space", "t"), id="queue-light-marked"),
        pytest.param(NARROW, ("x",), id="question-narrow"),
        pytest.param(WIDE, ("3",), id="gallery-wide"),
        pytest.param(NARROW, ("3",), id="gallery-narrow"),
        pytest.param(WIDE, ("question_mark",), id="help-wide"),
    ],
)
async def test_a_full_queue(
    size: tuple[int, int], keys: tuple[str, ...], pictures: SnapshotAssertion, tmp_path: Path
) -> None:
    fill(tmp_path)
    async with opened(size, probe=lambda ours: MACHINE) as hands:
        await hands.press(*keys)
        hands.app.clear_notifications()
        assert await picture(hands) == pictures


@pytest.mark.asyncio
async def test_an_empty_queue(pictures: SnapshotAssertion) -> None:
    async with opened(NARROW) as hands:
        assert await picture(hands) == pictures


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
async def test_the_composer(size: tuple[int, int], pictures: SnapshotAssertion) -> None:
    async with opened(size, probe=lambda ours: MACHINE) as hands:
        await hands.press("2")
        await hands.type("a fox")
        await hands.press("tab")
        await hands.type("65x96")
        assert await picture(hands) == pictures
