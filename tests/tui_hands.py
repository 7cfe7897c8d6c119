"""The terminal UI without a terminal: a fixed clock, a fixed machine, and keys that are waited for."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from hvlite.jobs.job import Job, NewJob, Outcome, Progress, State
from hvlite.jobs.store import Store, open_store
from hvlite.telemetry import Driver, Host
from hvlite.tui.app import HvliteApp
from hvlite.tui.device_strip import Machine
from hvlite.tui.settings import Memory, TuiSettings
from hvlite.tui.surroundings import Surroundings
from tests.queue_hands import new_job

# A Sunday afternoon, in UTC.
NOW = 1795363200.0
GIB = 1 << 30
NO_CARD = Machine(
    driver=Driver(fault="no NVIDIA driver found (its library libnvidia-ml is missing)"),
    host=Host(
        total_bytes=24 * GIB,
        available_bytes=18 * GIB,
        cgroup_limit=None,
        process_rss=GIB // 16,
        process_peak=GIB // 16,
    ),
)
SURROUNDINGS = Surroundings(
    clock=lambda: NOW,
    steady=lambda: 0.0,
    probe=lambda ours: NO_CARD,
    draw_seed=lambda: 4711,
    look_seconds=0.03,
    probe_seconds=0.2,
    typing_seconds=0.0,
)


class Hands:
    """Presses keys, and waits until all that they set off has been done and is shown."""

    def __init__(self, pilot: Pilot[None], app: HvliteApp) -> None:
        self.pilot, self.app = pilot, app

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.pilot.press(key)
            await self.settle()

    async def type(self, text: str) -> None:
        """Into the field that has the focus."""
        await self.pilot.press(*(NAMES.get(sign, sign) for sign in text))
        await self.settle()

    async def settle(self) -> None:
        await self.pilot.pause()
        looks = self.app.looks
        for _ in range(5000):
            if self.app.looks >= looks + 2 and self.app.probes and not self._busy():
                await self.pilot.pause()  # what was seen may set off more
                if not self._busy():
                    return
            self.app.look_again()
            await asyncio.sleep(0.002)
        raise AssertionError(f"still busy after {self.app.looks - looks} looks: {self._busy()}")

    def _busy(self) -> list[str]:
        """What the app has begun and not done yet."""
        deeds = ["deeds"] * self.app.undone_work
        return [*deeds, *(work.group for work in self.app.workers if work.group in BACKGROUND and work.is_running)]

    async def until_shown(self, text: str, seconds: float = 10) -> None:
        """Wait for a text on the screen."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if text in self.screen_text():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{text!r} is not on the screen:\n{self.screen_text()}")

    def screen_text(self) -> str:
        """What a user reads, line by line."""
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in strips)

    def told(self) -> str:
        """The notes in the corner, the last one last."""
        return "\n".join(note.message for note in self.app._notifications)

    def steady_cursor(self) -> None:
        """For pictures: a cursor that blinks is on some of them."""
        for box in self.app.screen.query("Input, TextArea"):
            assert isinstance(box, Input | TextArea)
            box.cursor_blink = False


BACKGROUND = ("plan", "ask", "frames", "files")
NAMES = {" ": "space", ".": "full_stop", ",": "comma", "-": "minus", "/": "slash", "\n": "enter", ":": "colon"}


async def _no_idling(min_sleep: float = 0, max_sleep: float = 1) -> None:
    """In place of textual's own wait for an idle process, up to a second: `settle` knows what to wait for."""
    await asyncio.sleep(0)


@asynccontextmanager
async def opened(
    size: tuple[int, int] = (140, 45),
    settings: TuiSettings | None = None,
    memory: Memory | None = None,
    **surroundings: Any,
) -> AsyncIterator[Hands]:
    """The app over the queue of this test's HVLITE_HOME."""
    app = HvliteApp(settings, memory, replace(SURROUNDINGS, **surroundings))
    with mock.patch("textual.pilot.wait_for_idle", _no_idling), mock.patch("textual.app.wait_for_idle", _no_idling):
        async with app.run_test(size=size, notifications=True) as pilot:
            hands = Hands(pilot, app)
            await hands.settle()
            yield hands


def queue(*prompts: str, **fields: Any) -> list[int]:
    """Jobs in the queue, as another process adds them."""
    with open_store(clock=lambda: NOW - 60) as store:
        return store.add([new_job(prompt, **fields) for prompt in prompts])


def jobs(*states: State) -> list[Job]:
    """What is in the queue now."""
    with open_store() as store:
        return store.page(states) if states else store.page()


def prompts(*states: State) -> list[str]:
    return [job.prompt for job in jobs(*states)]


def run_next(progress: Progress | None = None, *, lock: str = "cpu") -> Job:
    """What a worker does: claim the first job in line and report."""
    with open_store(clock=lambda: NOW - 30) as store:
        claims = store.claims("somebody's worker", lock, {None, "cpu"})
        job = claims.claim()
        assert job is not None
        claims.report(job.id, progress)
        return job


def end(job: int, state: Any = "done", **outcome: Any) -> None:
    """A worker's last word on a running job."""
    with open_store(clock=lambda: NOW - 5) as store:
        store.claims("somebody's worker", "cpu", {None, "cpu"}).end(job, Outcome(state=state, **outcome))


def done(prompt: str, output: Path | None = None, **outcome: Any) -> int:
    """A finished job."""
    new = new_job(prompt)
    with open_store(clock=lambda: NOW - 600) as store:
        (job,) = store.add([replace(new, output=output)], first=True)
    assert run_next().id == job
    end(job, **outcome)
    return job


def store_of(app: HvliteApp) -> Store:
    """The app's own connection, for tests that break it."""
    assert app.desk._store is not None
    return app.desk._store


def added(new: Sequence[NewJob]) -> list[int]:
    with open_store(clock=lambda: NOW - 60) as store:
        return store.add(new)
