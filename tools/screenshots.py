"""Pictures of the terminal UI for the README: the real app over a queue made for them, with a fixed clock.

python tools/screenshots.py [--png]     # docs/tui-*.svg; --png needs resvg_py: /tmp/tui-*.png
"""

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.jobs.job import How, NewJob, Outcome, Progress
from hvlite.jobs.store import open_store
from hvlite.request import Request
from hvlite.telemetry import Card, Driver, Holder, Host
from hvlite.tui import workers
from hvlite.tui.app import HvliteApp
from hvlite.tui.device_strip import Machine
from hvlite.tui.settings import Memory
from hvlite.tui.surroundings import Surroundings
from hvlite.video.mp4 import write_mp4
from hvlite.video.png import png_bytes

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOW = 1795383840.0
GIB = 1 << 30
WORKER = 4711
PROMPTS = (
    "A lighthouse on a cliff at dusk, waves below, the beam turning slowly through thin fog",
    "A cat walks on grass, realistic style",
    "Macro shot of a dandelion, seeds leave one by one in a light wind",
    "A paper boat drifts down a rain-filled gutter, seen from the side",
    "Time lapse of clouds over a mountain lake, mirrored in the water",
    "A red fox crosses a snowy field and looks into the camera",
)
CARD = Card(
    index=0,
    uuid="GPU-1",
    name="NVIDIA GeForce RTX 4070",
    total_bytes=12 * GIB,
    free_bytes=round(1.5 * GIB),
    holders=(Holder(pid=WORKER, name="hvlite", held_bytes=round(9.8 * GIB)),),
    utilisation=98,
    temperature_c=71,
    power_w=196.0,
    driver="580.65",
    capability=(8, 9),
    pcie_gen=4,
    pcie_width=16,
)
HOST = Host(
    total_bytes=32 * GIB, available_bytes=14 * GIB, cgroup_limit=None, process_rss=GIB // 16, process_peak=GIB // 16
)
MACHINE = Machine(driver=Driver(version="580.65", cards=(CARD,)), host=HOST, ours=frozenset({WORKER}))
MEMORY = {"tensor_bytes": round(9.1 * GIB), "torch_bytes": round(9.6 * GIB)}
SHOTS = (
    ("queue-dark", (140, 40), "textual-dark", "1"),
    ("queue-light", (140, 40), "textual-light", "1"),
    ("queue-80x24", (80, 24), "textual-dark", "1"),
    ("compose-dark", (140, 40), "textual-dark", "2"),
    ("compose-80x24", (80, 24), "textual-light", "2"),
    ("gallery-dark", (140, 40), "textual-dark", "3"),
    ("gallery-light", (140, 40), "textual-light", "3"),
    ("help", (140, 50), "textual-dark", "question_mark"),
    ("palette", (110, 32), "textual-dark", "colon"),
)


def moving_disc(frames: int, height: int = 96, width: int = 160) -> list["np.typing.NDArray[np.uint8]"]:
    """A clip of our own: the sun goes over a hill."""
    rows, columns = np.mgrid[0:height, 0:width]
    found = []
    for index in range(frames):
        at = index / max(1, frames - 1)
        sky = np.stack([90 + 120 * at - rows * 0.5, 130 - rows * 0.3, 200 - rows * 0.9], axis=-1)
        across, up = width * (0.15 + 0.7 * at), height * (0.6 - 0.9 * at * (1 - at))
        disc = (columns - across) ** 2 + (rows - up) ** 2 < 160
        sky[disc] = (255, 220, 120)
        hill = rows > height * 0.72 + 8 * np.sin(columns / 23)
        sky[hill] = (30, 70, 40)
        found.append(np.clip(sky, 0, 255).astype(np.uint8))
    return found


def fill_queue() -> None:
    """Two done, one failed, one running, four waiting, one draft."""
    how = How(model="hunyuanvideo", profile="12g")
    folder = Path("/home/you/results")
    clock = [NOW - 9000]
    with open_store(clock=lambda: clock[0]) as store:
        claims = store.claims("worker", "GPU-1", {None})

        def add(prompt: str, seed: int, output: Path | None = None, stop_after: int | None = None) -> int:
            request = Request(prompt, size=(544, 960), frames=129, steps=50, seed=seed)
            new = NewJob(request=request, how=how, folder=folder, output=output, stop_after=stop_after)
            return store.add([new])[0]

        for seed, prompt in enumerate(PROMPTS[4:6]):
            clip = paths.home() / f"20261122-000{seed + 1}.mp4"
            write_mp4(clip, moving_disc(129 if seed else 65), metadata="{}", title=prompt)
            job = add(prompt, seed, clip)
            claims.claim()
            clock[0] += 1351
            timings = {"text": 9.0, "schedule": 4.0, "denoise": 1240.0, "decode": 98.0}
            claims.end(
                job,
                Outcome(state="done", timings=timings, seconds_per_step=24.8, peak_bytes=round(9.9 * GIB)),
            )
        failed = add("A very large clip", 3)
        claims.claim()
        claims.end(
            failed, Outcome(state="failed", reason="out of memory in decode", error="decode needs 11.2 GiB; 10.8 free")
        )
        draft = add("A draft of a dragon over the sea", 8, stop_after=12)
        claims.claim()
        claims.save_checkpoint(draft, paths.checkpoint_file(draft), 12)
        claims.end(draft, Outcome(state="parked"))
        running = add(PROMPTS[0], 42)
        claims.claim()
        clock[0] += 300
        claims.record_plan(running, Request("any").resolve(HUNYUANVIDEO), round(10.4 * GIB))
        progress = Progress(stage="denoise", step=17, steps=50, detail="block 34/60", eta=NOW + 912, **MEMORY)
        claims.report(running, progress)
        for seed, prompt in enumerate(PROMPTS[1:4]):
            add(prompt, 100 + seed)
        add(PROMPTS[1], 104)
    strip = np.concatenate(moving_disc(4), axis=1)
    paths.previews_folder().mkdir()
    paths.preview_file(running).write_bytes(png_bytes(strip, {}))
    paths.logs_folder().mkdir()
    paths.job_log(running).write_text(
        "store opened: 9.11 GB int8 weights\nplan: 60 of 60 blocks resident\nstep 17: 24.9 s\n"
    )


async def take(size: tuple[int, int], theme: str, key: str) -> str:
    """Start the app, press a key, and picture it."""
    surroundings = Surroundings(
        clock=lambda: NOW,
        steady=lambda: 0.0,
        probe=lambda ours: MACHINE,
        look_seconds=0.05,
        probe_seconds=0.05,
        typing_seconds=0.0,
    )
    app = HvliteApp(memory=Memory(theme=theme), surroundings=surroundings)
    async with app.run_test(size=size) as pilot:
        await pilot.pause(1.5)
        if key not in ("1", "2"):
            await pilot.press(key)
        if key == "2":
            await pilot.press("2")
            await pilot.pause(1.0)
            screen = app.front
            screen.query_one("#prompt").text = f"{PROMPTS[0]}\n\n{PROMPTS[2]}"  # type: ignore[attr-defined]
            for name, text in {"model": "hunyuanvideo", "profile": "12g", "size": "544x960", "seeds": "4x"}.items():
                screen.query_one(f"#{name}").value = text  # type: ignore[attr-defined]
        if key == "colon":
            await pilot.press(*"next")
        await pilot.pause(2.5)
        return app.export_screenshot(simplify=True)


def main() -> None:
    os.environ["TZ"] = "UTC"
    time.tzset()
    mock.patch.object(workers, "held_locks", return_value={"GPU-1": WORKER}).start()
    wanted = [name for name in sys.argv[1:] if not name.startswith("-")]
    with tempfile.TemporaryDirectory() as home:
        os.environ["HVLITE_HOME"] = home
        fill_queue()
        for name, size, theme, key in SHOTS:
            if wanted and name not in wanted:
                continue
            picture = asyncio.run(take(size, theme, key)).replace(home, "/home/you/hvlite")
            file = DOCS / f"tui-{name}.svg"
            file.write_text(picture, encoding="utf-8")
            print(file)
            if "--png" in sys.argv:
                from resvg_py import svg_to_bytes  # type: ignore[import-not-found]

                Path(f"/tmp/tui-{name}.png").write_bytes(svg_to_bytes(picture, monospace_family="DejaVu Sans Mono"))


if __name__ == "__main__":
    main()
