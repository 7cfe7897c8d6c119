"""The main flow, with a real worker that renders the embedded model: from a prompt to its clip, and on from there."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from textual.widgets import Input

from hvlite.tui import workers
from hvlite.tui.compose_screen import ComposeScreen
from hvlite.tui.pictures import Pictures
from tests.tui_hands import Hands, jobs, opened

# A worker loads torch first.
PATIENCE = 120


@pytest.fixture(autouse=True)
def worker_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that saves every step, on the CPU; none is left behind."""
    started: list[subprocess.Popen[bytes]] = []
    start = workers.start_worker

    def kept() -> "subprocess.Popen[bytes]":
        started.append(start())
        return started[-1]

    monkeypatch.setattr(workers, "COMMAND", (*workers.COMMAND, "--device", "cpu", "--save-every", "0"))
    monkeypatch.setattr(workers, "start_worker", kept)
    yield
    kill(family())
    for process in started:
        process.kill()
        process.wait()


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family() -> list[int]:
    """The supervisor and its worker."""
    found = []
    for pid in workers.held_locks().values():
        with suppress(psutil.NoSuchProcess):
            found += [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return found


async def seen_steps(hands: Hands, at_least: int) -> set[str]:
    """What the details say of the running job's progress, until that many different things were seen."""
    found: set[str] = set()
    ends = time.monotonic() + PATIENCE
    while len(found) < at_least:
        assert time.monotonic() < ends, hands.screen_text()
        found |= {word for word in hands.screen_text().split() if word.endswith("/100") and word != "0/100"}
        await hands.settle()
    return found


@pytest.mark.asyncio
async def test_from_a_prompt_to_its_clip_over_the_death_of_a_worker(tmp_path: Path) -> None:
    async with opened(clock=time.time, steady=time.monotonic, typing_seconds=0.01) as hands:
        await hands.press("n")
        await hands.type("a red circle moving left on a black background")
        for name, text in {"frames": "33", "steps": "100", "folder": str(tmp_path), "model": "shapes"}.items():
            hands.app.screen.query_one(f"#{name}", Input).value = text
        await hands.press("ctrl+s")
        await hands.until_shown("no worker is running: W starts one")
        await hands.press("W")
        await hands.until_shown("worker on", PATIENCE)
        assert len(await seen_steps(hands, 2)) >= 2
        assert hands.app.screen.query_one(Pictures).frames

        kill(family())
        await hands.until_shown("the worker of job 1 is gone: nothing is lost, W starts a new one", PATIENCE)
        await hands.press("W")
        await seen_steps(hands, 1)
        await hands.until_shown("job 1 is done", PATIENCE)
        assert "the queue is done: 1 clip" in hands.told()
        (job,) = jobs("done")
        assert job.attempts == 2
        assert job.output is not None
        assert job.output.parent == tmp_path

        await hands.press("3")
        assert len(hands.app.screen.query_one(Pictures).frames) == 3
        await hands.press("e")
        screen = hands.app.front
        assert isinstance(screen, ComposeScreen)
        assert screen.prompt.text == "a red circle moving left on a black background"
        assert screen.form()["steps"] == "100"
        await hands.press("ctrl+s")
        assert len(jobs("queued", "running", "done")) == 2

        await hands.press("W", "y")
        await hands.until_shown("no worker", PATIENCE)
        assert not family()
