"""What is the same on every screen: settings, keys, themes, palette, help; troubles with the queue; no torch."""

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from textual.command import CommandPalette
from textual.events import Key
from textual.widgets import TextArea

from hvlite import paths
from hvlite.errors import Busy, ProfileError, RequestError
from hvlite.jobs.store import open_store
from hvlite.tui import workers
from hvlite.tui.actions import ACTIONS, NAMES, actions_of, keymap
from hvlite.tui.app import THEMES, HvliteApp, tui
from hvlite.tui.desk import Wanted, look
from hvlite.tui.dialogs import Reading
from hvlite.tui.ends import farewell
from hvlite.tui.job_table import JobTable
from hvlite.tui.settings import Memory, TuiSettings, read_memory, read_settings, write_memory
from tests.queue_hands import new_job
from tests.refusal import refusal
from tests.tui_hands import NOW, added, end, jobs, opened, prompts, queue, run_next, store_of

ROOT = Path(__file__).resolve().parent.parent

# Starts the UI on the queue of HVLITE_HOME, goes through its screens, and says what was imported.
DRIVE = """
import asyncio, json, sys
from hvlite.tui.app import HvliteApp

async def main():
    app = HvliteApp()
    async with app.run_test() as pilot:
        for key in "231":
            await pilot.press(*(["escape"] if app.current_mode == "compose" else []), key)
            await pilot.pause(0.3)
    print(json.dumps([name for name in ("torch", "transformers", "diffusers") if name in sys.modules]))

asyncio.run(main())
"""


def test_no_torch_in_its_process() -> None:
    queue("apple")
    shown = subprocess.run([sys.executable, "-c", DRIVE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == []


def test_every_action_has_a_name_of_its_own_words_and_no_key_twice_on_a_screen() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for parts in (("queue", "table", "app"), ("gallery", "table", "app"), ("compose",)):
        keys = [key for action in actions_of(*parts) for key in action.keys.split(",")]
        assert sorted(set(keys)) == sorted(keys)
    assert not [
        key for action in ACTIONS for key in action.keys.split(",") if key in {"ctrl+h", "ctrl+i", "ctrl+j", "ctrl+m"}
    ]
    assert all(action.help for action in ACTIONS)


def test_settings_are_read_and_refused_in_one_line() -> None:
    file = paths.tui_settings_file()
    assert read_settings() == TuiSettings()
    file.write_text('theme = "ansi-light"\nplayer = "mpv"\n[keys]\n"queue.cancel" = "ctrl+x"\n')
    assert read_settings() == TuiSettings(theme="ansi-light", player="mpv", keys={"queue.cancel": "ctrl+x"})
    for text, word in (
        ("theme = 3", "theme"),
        ("colour = 3", "unknown key 'colour'"),
        ('keys = "x"', "[keys]"),
        ('[keys]\n"queue.cancle" = "x"', "did you mean 'queue.cancel'?"),
        ('[keys]\n"queue.cancel" = 3', "must be keys"),
        ('[keys]\n"queue.cancel" = "a"\n"table.mark" = "b,a"', "gives 'a' to both"),
        ("theme = ", "cannot be read"),
        ('theme = "ansi-lihgt"', "did you mean 'ansi-light'?"),
        ("player = 'mpv \"'", "is no command: no closing quotation"),
        ('player = " "', "names no program"),
        ('[keys]\n"queue.cancel" = "ctlr+x"', "'ctlr+x' is no key"),
        ('[keys]\n"queue.cancel" = "x,pagedwn"', "'pagedwn' is no key"),
    ):
        file.write_text(text)
        refusal(read_settings, str(file), word, kind=ProfileError)
    assert keymap({}, "here") == {}
    assert keymap({"queue.cancel": "a", "gallery.remove": "a"}, "here") == {"queue.cancel": "a", "gallery.remove": "a"}


def test_memory_outlives_a_broken_file_and_keeps_each_prompt_once() -> None:
    memory = Memory().with_prompts(["one", "two"]).with_prompts(["one"])
    assert memory.prompts == ("one", "two")
    assert write_memory(memory) is None
    assert read_memory() == memory
    paths.tui_state_file().write_text("{broken")
    assert read_memory() == Memory()
    paths.tui_state_file().unlink()
    paths.tui_state_file().mkdir()
    assert "cannot be written" in str(write_memory(memory))


@pytest.mark.asyncio
async def test_keys_are_the_users() -> None:
    queue("apple", "banana")
    keys = keymap({"queue.move_bottom": "ctrl+b"}, "here")
    async with opened(size=(140, 90), settings=TuiSettings(keys=keys)) as hands:
        await hands.press("B")
        assert prompts("queued") == ["apple", "banana"]
        await hands.press("ctrl+b")
        assert prompts("queued") == ["banana", "apple"]
        await hands.press("question_mark")
        lines = hands.screen_text().splitlines()
        assert "ctrl+b" in next(line for line in lines if "queue.move_bottom" in line)
        assert "ctrl+b" not in next(line for line in lines if "table.page_up" in line)


@pytest.mark.asyncio
async def test_themes_go_round_and_the_last_one_is_remembered() -> None:
    async with opened(settings=TuiSettings(theme=THEMES[1])) as hands:
        assert hands.app.theme == THEMES[1]
        await hands.press("t")
        assert hands.app.theme == THEMES[2]
    async with opened(memory=read_memory()) as hands:
        assert hands.app.theme == THEMES[2]


def test_every_key_of_ours_and_every_sign_is_a_key() -> None:
    for action in ACTIONS:
        assert keymap({action.name: action.keys}, "here")
    for key in ("/", "?", "+", "f5", "alt+enter", "ctrl+shift+left", "slash"):
        assert keymap({"queue.cancel": key}, "here")["queue.cancel"] == key


@pytest.mark.asyncio
async def test_the_theme_of_the_settings_counts_at_every_start() -> None:
    async with opened(settings=TuiSettings(theme="nord"), memory=Memory(theme=THEMES[0])) as hands:
        assert hands.app.theme == "nord"
        await hands.press("t")
        assert "the next window has tui.toml's nord again" in hands.told()


@pytest.mark.asyncio
@pytest.mark.parametrize("theme", ["ansi-dark", "ansi-light"])
async def test_in_the_terminals_own_colours_the_cursor_is_a_row_in_reverse(theme: str) -> None:
    queue("apple", "banana")
    run_next()
    async with opened(memory=Memory(theme=theme)) as hands:
        table = hands.app.front.query_one(JobTable)
        at_cursor, below = table.render_line(1), table.render_line(2)
        assert all(segment.style and segment.style.reverse for segment in at_cursor)
        assert not any(segment.style and segment.style.reverse for segment in below)


@pytest.mark.asyncio
@pytest.mark.parametrize("screen", ["1", "2", "3"])
async def test_help_tells_every_key_of_the_screen(screen: str) -> None:
    async with opened(size=(140, 90)) as hands:
        await hands.press("2", "escape") if screen == "2" else await hands.press(screen)
        if screen == "2":
            hands.app.go("compose")
            await hands.settle()
            hands.app.action_help()
            await hands.settle()
        else:
            await hands.press("question_mark")
        assert isinstance(hands.app.screen, Reading)
        parts = {"1": ("queue", "table", "app"), "2": ("compose", "app"), "3": ("gallery", "table", "app")}[screen]
        for action in actions_of(*parts):
            assert action.name in hands.screen_text()
        await hands.press("escape")
        assert not isinstance(hands.app.screen, Reading)


@pytest.mark.asyncio
async def test_the_palette_shows_the_command_beside_the_action_and_does_it() -> None:
    queue("apple", "banana")
    async with opened() as hands:
        await hands.press("j", "colon")
        assert isinstance(hands.app.screen, CommandPalette)
        await hands.type("next in line")
        await hands.until_shown("hvlite queue mv 2 --top")
        await hands.press("down", "enter")
        await hands.settle()
        assert prompts("queued") == ["banana", "apple"]


@pytest.mark.asyncio
async def test_the_palette_shows_the_keys_that_the_user_has_set() -> None:
    queue("apple")
    keys = keymap({"queue.move_top": "ctrl+y", "queue.clear": "B"}, "here")
    async with opened(settings=TuiSettings(keys=keys)) as hands:
        found = {command.title: command.help for command in hands.app.get_system_commands(hands.app.screen)}
        assert found["Next in line"] == "ctrl+y  hvlite queue mv 1 --top"
        assert found["Last in line"] == "hvlite queue mv 1 --bottom"


@pytest.mark.asyncio
async def test_ctrl_q_closes_the_window_and_ctrl_c_says_how() -> None:
    async with opened() as hands:
        await hands.press("ctrl+c")
        assert "q closes this window" in hands.told()
        await hands.pilot.press("ctrl+q")
        assert hands.app._exit


@pytest.mark.asyncio
@pytest.mark.filterwarnings("error")
async def test_what_was_asked_for_is_done_before_the_window_closes() -> None:
    queue("apple")
    async with opened() as hands:
        for key in "ddqd":  # in one burst, as over a slow connection
            hands.app.post_message(Key(key, None))
        for _ in range(1000):
            if hands.app._exit:
                break
            await asyncio.sleep(0.002)
        assert hands.app._exit
    assert prompts("queued") == ["apple"] * 3


def test_a_crash_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(app: HvliteApp) -> None:
        raise ValueError("a bug")

    run = HvliteApp.run
    monkeypatch.setattr(HvliteApp, "on_mount", broken)
    monkeypatch.setattr(HvliteApp, "run", lambda app: run(app, headless=True))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert tui() == 1


def test_what_goes_on_when_the_window_is_closed_is_known() -> None:
    queue("apple", "banana")
    with open_store() as store:
        view = look(store, Wanted(), NOW)
        store.pause()
        paused = look(store, Wanted(), NOW)
        store.clear()
        empty = look(store, Wanted(), NOW)
    assert farewell(view, {4711}) == (
        "the worker (process 4711) goes on; hvlite tui looks again, hvlite queue ls --watch too"
    )
    assert farewell(view, []) == "2 jobs wait and no worker runs: hvlite work"
    assert farewell(paused, []) == "2 jobs wait and the queue is paused: hvlite queue resume, then hvlite work"
    assert farewell(paused, {4711}) == (
        "the worker (process 4711) has nothing to do; 2 jobs wait and the queue is paused: hvlite queue resume"
    )
    assert farewell(empty, []) is None
    assert farewell(None, []) is None


def test_the_farewell_knows_which_workers_were_asked_to_end() -> None:
    queue("apple", "banana")
    run_next()
    with open_store() as store:
        view = look(store, Wanted(), NOW)
        store.pause()
        pausing = look(store, Wanted(), NOW)
    assert farewell(view, {4711}, {4711}) == (
        "the worker (process 4711) saves its clip and ends; 1 job waits and no worker runs then: hvlite work"
    )
    assert farewell(view, {4711, 4712}, {4711}) == (
        "the worker (process 4711) saves its clip and ends; "
        "the worker (process 4712) goes on; hvlite tui looks again, hvlite queue ls --watch too"
    )
    assert farewell(view, [], {4711}) == "1 job waits and no worker runs: hvlite work"
    assert farewell(pausing, {4711}) == (
        "the worker (process 4711) ends the running job; 1 job waits and the queue is paused: hvlite queue resume"
    )


def test_the_farewell_comes_when_the_screen_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue("apple")

    def shown(app: HvliteApp) -> None:
        with open_store() as store:
            app.view = look(store, Wanted(), NOW)
        sys.stdout.write("the screen\n")

    monkeypatch.setattr(HvliteApp, "run", shown)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert tui() == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("the screen\n", "1 job waits and no worker runs: hvlite work\n")
    monkeypatch.setattr(workers, "held_locks", lambda: {"cpu": 4711})
    assert tui() == 0
    assert capsys.readouterr().err.startswith("the worker (process 4711) goes on;")

    def paused(app: HvliteApp) -> None:
        shown(app)
        with open_store() as store:
            store.pause()

    monkeypatch.setattr(HvliteApp, "run", paused)
    assert tui() == 0
    assert capsys.readouterr().err.endswith("1 job waits and the queue is paused: hvlite queue resume\n")


@pytest.mark.asyncio
async def test_tabs_can_be_clicked() -> None:
    async with opened() as hands:
        await hands.pilot.click("#tab-gallery")
        await hands.settle()
        assert hands.app.current_mode == "gallery"


@pytest.mark.asyncio
async def test_a_queue_that_is_busy_is_said_to_be_and_comes_back() -> None:
    queue("apple")
    async with opened() as hands:
        store = store_of(hands.app)
        version = store.data_version

        def busy() -> int:
            raise Busy("queue.db was busy for 10 seconds")

        store.data_version = busy  # type: ignore[method-assign]
        await hands.settle()
        assert "the queue cannot be read: queue.db was busy" in hands.screen_text()
        assert "apple" in hands.screen_text()
        store.data_version = version  # type: ignore[method-assign]
        await hands.settle()
        assert "cannot be read" not in hands.screen_text()


@pytest.mark.asyncio
@pytest.mark.parametrize("screen", ["1", "2", "3"])
async def test_no_screen_dies_of_a_queue_that_cannot_be_read(screen: str) -> None:
    (job,) = queue("apple")
    run_next()
    async with opened() as hands:
        await hands.press(screen)
        store = store_of(hands.app)
        page, one = store.page, store.job

        def busy(*args: object, **named: object) -> Any:
            raise Busy("queue.db was busy for 10 seconds")

        store.page = store.job = busy  # type: ignore[method-assign]
        end(job)  # what has ended is to be told
        if screen == "2":
            hands.app.front.query_one("#prompt", TextArea).text = "an apple"
        await hands.settle()
        assert "the queue cannot be read: queue.db was busy" in hands.screen_text()
        if screen == "2":
            assert "when it would be ready is not known: queue.db was busy" in hands.screen_text()
        store.page, store.job = page, one  # type: ignore[method-assign]
        await hands.settle()
        assert "queue.db was busy" not in hands.screen_text()
        assert "job 1 is done" in hands.told()


@pytest.mark.asyncio
@pytest.mark.parametrize("screen", ["1", "2", "3"])
async def test_a_queue_of_a_newer_hvlite_is_refused_on_every_screen(screen: str) -> None:
    queue("apple")
    database = paths.tui_state_file().parent / "queue.db"
    with closing(sqlite3.connect(database)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("PRAGMA user_version = 99")
    async with opened() as hands:
        await hands.press(screen)
        if screen == "2":
            hands.app.front.query_one("#prompt", TextArea).text = "an apple"
        await hands.settle()
        assert "the queue cannot be read" in hands.screen_text()
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
        await hands.settle()
        assert "cannot be read" not in hands.screen_text()


@pytest.mark.asyncio
async def test_a_write_that_others_hold_up_freezes_nothing() -> None:
    queue("apple", "banana")
    async with opened() as hands:
        with open_store() as other, other.database.writing():
            await hands.pilot.press("T")
            await hands.pilot.press("j")
            await hands.pilot.pause()
            assert hands.app.undone_work == 1
            assert "banana" in hands.screen_text()
        await hands.settle()
        assert hands.app.undone_work == 0


@pytest.mark.asyncio
async def test_a_worker_that_is_gone_or_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    queue("apple")
    run_next()
    paths.lock_file("cpu").parent.mkdir()
    async with opened() as hands:
        await hands.until_shown("the worker of job 1 is gone: nothing is lost, W starts a new one")
    now = [0.0]
    monkeypatch.setattr(workers, "held_locks", lambda: {"cpu": 4711})
    async with opened(steady=lambda: now[0]) as hands:
        await hands.until_shown("worker on")
        now[0] = 61.0
        await hands.until_shown("no sign of life from its worker for 61 s")
        with open_store() as store:
            store.claims("somebody's worker", "cpu", {None}).report(1)
        await hands.settle()
        assert "no sign of life" not in hands.screen_text()


@pytest.mark.asyncio
async def test_a_jump_leaves_what_stands_beside_the_list_until_its_row_is_read() -> None:
    added([new_job(f"number {index}", seed=index) for index in range(400)])
    async with opened() as hands:
        table = hands.app.front.query_one(JobTable)
        with mock.patch.object(table, "post_message", wraps=table.post_message) as posted:
            await hands.press("G")
        told = [call.args[0] for call in posted.call_args_list]
        assert {each.job and each.job.prompt for each in told if isinstance(each, JobTable.Chosen)} == {"number 399"}


@pytest.mark.asyncio
async def test_ten_thousand_jobs_are_as_quick_as_ten() -> None:
    added([new_job(f"number {index}", seed=index) for index in range(10_000)])
    async with opened() as hands:
        assert "10000 queued" in hands.screen_text()
        await hands.press("G")
        await hands.until_shown("number 9999")
        await hands.press("T")
        assert jobs("queued")[0].prompt == "number 9999"
        await hands.until_shown("number 9999")
        assert len(hands.app.front.query_one(JobTable)._rows) <= 200


def test_a_look_reads_a_page_and_finds_the_followed_job_wherever_it_is() -> None:
    ids = added([new_job(f"{'odd' if index % 2 else 'even'} number") for index in range(400)])
    with open_store() as store:
        view = look(store, Wanted(start=0, follow=ids[350]), NOW)
        assert (len(view.jobs), view.total, view.followed) == (150, 400, 350)
        found = look(store, Wanted(words="number odd", follow=ids[41]), NOW)
        assert (len(found.jobs), found.total, found.followed) == (150, 200, 20)
        assert found.jobs == [store.job(job) for job in ids[1:301:2]]


def test_moving_about_reads_rows_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    added([new_job(f"number {index}") for index in range(400)])
    with open_store() as store:
        first = look(store, Wanted(), NOW)
        monkeypatch.setattr(store, "counts", None)
        with mock.patch.object(store, "page", wraps=store.page) as page:
            last = look(store, Wanted(start=250), NOW, first)
        assert [call.kwargs for call in page.call_args_list] == [{"limit": 150, "offset": 250}]
        assert [job.prompt for job in last.jobs] == [f"number {index}" for index in range(250, 400)]
        assert (last.counts, last.ends, last.running) == (first.counts, first.ends, first.running)


def test_the_kernels_list_of_locks_is_read(tmp_path: Path) -> None:
    held, free = tmp_path / "cpu.lock", tmp_path / "GPU-1.lock"
    held.touch()
    free.touch()
    listed = tmp_path / "locks"
    listed.write_text(
        f"1: FLOCK  ADVISORY  WRITE 4711 08:01:{held.stat().st_ino} 0 EOF\n"
        f"1: -> FLOCK  ADVISORY  WRITE 4712 08:01:{free.stat().st_ino} 0 EOF\n"
        "2: POSIX  ADVISORY  READ 1 08:01:99 0 EOF\n"
    )
    assert workers.held_locks(tmp_path, listed) == {"cpu": 4711}
    assert workers.held_locks(tmp_path / "none", listed) == {}
    assert workers.held_locks(tmp_path, tmp_path / "none") == {}


def test_without_a_terminal_it_says_what_there_is_for_scripts() -> None:
    refusal(tui, "needs a terminal", "hvlite queue ls --json", kind=RequestError)
