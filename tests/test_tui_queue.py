"""The queue screen: every key against a real queue, as another process sees it afterwards."""

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import pytest

from hvlite import paths
from hvlite.jobs.job import ENDED, Progress
from hvlite.jobs.store import open_store
from hvlite.tui import workers
from hvlite.tui.dialogs import Question, Reading
from hvlite.tui.job_table import JobTable
from hvlite.tui.outside import play
from hvlite.tui.words import named
from tests.queue_hands import new_job
from tests.tui_hands import NOW, added, done, end, jobs, opened, prompts, queue, run_next

pytestmark = pytest.mark.asyncio

FRUIT = ("apple", "banana", "cherry", "date")
# What is pressed while the cursor is on the second job, and the line afterwards.
LINES: list[tuple[tuple[str, ...], list[str]]] = [
    (("K",), ["banana", "apple", "cherry", "date"]),
    (("J",), ["apple", "cherry", "banana", "date"]),
    (("shift+down", "shift+down"), ["apple", "cherry", "date", "banana"]),
    (("T",), ["banana", "apple", "cherry", "date"]),
    (("B",), ["apple", "cherry", "date", "banana"]),
    (("space", "space", "T"), ["banana", "cherry", "apple", "date"]),
    (("space", "down", "space", "K"), ["banana", "date", "apple", "cherry"]),
    (("d",), ["apple", "banana", "cherry", "date", "banana"]),
    (("x",), ["apple", "cherry", "date"]),
    (("x", "u"), ["apple", "banana", "cherry", "date"]),
    (("ctrl+a", "x"), []),
    (("ctrl+a", "escape", "x"), ["apple", "cherry", "date"]),
    (("C", "y"), []),
    (("C", "n"), ["apple", "banana", "cherry", "date"]),
    (("C", "enter"), ["apple", "banana", "cherry", "date"]),
    (("C", "y", "u"), ["apple", "banana", "cherry", "date"]),
    (("G", "T"), ["date", "apple", "banana", "cherry"]),
    (("G", "g", "B"), ["banana", "cherry", "date", "apple"]),
    (("k", "x"), ["banana", "cherry", "date"]),
    (("pagedown", "x"), ["apple", "banana", "cherry"]),
    (("pagedown", "pageup", "x"), ["banana", "cherry", "date"]),
    (("ctrl+f", "x"), ["apple", "banana", "cherry"]),
    (("end", "ctrl+b", "x"), ["banana", "cherry", "date"]),
    (("end", "x"), ["apple", "banana", "cherry"]),
    (("end", "home", "x"), ["banana", "cherry", "date"]),
    (("shift+up",), ["banana", "apple", "cherry", "date"]),
]


async def test_an_empty_queue_teaches_the_first_step() -> None:
    async with opened() as hands:
        assert "The queue is empty." in hands.screen_text()
        assert "hvlite queue add" in hands.screen_text()


async def test_jobs_are_shown_with_state_and_words_and_what_other_processes_do_is_seen() -> None:
    queue("apple", size=(64, 96), frames=17, seed=5)
    async with opened() as hands:
        assert "queued" in hands.screen_text()
        assert "64x96" in hands.screen_text()
        queue("banana")
        await hands.settle()
        assert "banana" in hands.screen_text()
        run_next(Progress(stage="denoise", step=4, steps=16, detail="block 34/60", eta=NOW + 600))
        await hands.settle()
        assert "denoise 4/16" in hands.screen_text()
        assert "denoise 4/16, block 34/60" in hands.screen_text()
        assert ", in 10 min 00 s" in hands.screen_text()


async def test_keys_change_the_line() -> None:
    async with opened(size=(80, 24)) as hands:
        for keys, expected in LINES:
            with open_store() as store:
                store.clear()
                if ended := store.page(ENDED):
                    store.remove([job.id for job in ended])
            queue(*FRUIT)
            await hands.settle()
            await hands.press("g", "j", *keys)
            assert prompts("queued") == expected, keys
            await hands.press("escape")


async def test_the_cursor_stays_on_its_job_when_that_moves() -> None:
    queue(*FRUIT)
    async with opened() as hands:
        await hands.press("G", "K", "K")
        assert hands.app.front.query_one(JobTable).job.prompt == "date"  # type: ignore[union-attr]
        assert prompts("queued") == ["apple", "date", "banana", "cherry"]


async def test_a_key_counts_more_than_a_look_that_was_under_way() -> None:
    queue(*FRUIT)
    async with opened() as hands:
        table = hands.app.front.query_one(JobTable)
        under_way = table.view
        assert under_way is not None
        await hands.press("j", "j")
        table.show(replace(under_way, followed=0))
        assert table.job is not None
        assert table.job.prompt == "cherry"


async def test_a_new_seed_makes_another_clip_of_the_same_prompt() -> None:
    queue("apple", seed=1)
    async with opened() as hands:
        await hands.press("s")
        assert [(job.prompt, job.request and job.request.seed) for job in jobs()] == [("apple", 1), ("apple", 4711)]
        assert "queued as job 2" in hands.told()


async def test_what_has_failed_is_tried_again_with_its_reason_shown_until_then() -> None:
    (job,) = queue("apple")
    run_next()
    end(job, "failed", reason="out of memory in decode", error="12.1 GiB needed, 10.8 free")
    async with opened() as hands:
        assert "12.1 GiB needed, 10.8 free" in hands.screen_text()
        await hands.press("r")
        assert prompts("queued") == ["apple"]


async def test_a_draft_is_finished() -> None:
    (job,) = queue("apple", stop_after=4)
    run_next()
    end(job, "parked")
    async with opened() as hands:
        assert "stops after step 4" in hands.screen_text()
        await hands.press("f")
        assert [each.stop_after for each in jobs("queued")] == [None]


async def test_only_the_running_job_is_asked_for_before_it_is_cancelled() -> None:
    queue("apple", "banana")
    run_next(Progress(stage="denoise", step=4, steps=16))
    async with opened() as hands:
        await hands.press("x")
        assert isinstance(hands.app.screen, Question)
        assert "step 4 of 16" in hands.screen_text()
        await hands.press("n")
        assert jobs("running")[0].asked is None
        await hands.press("x", "y")
        assert jobs("running")[0].asked == "cancel"
        assert "stopping ..." in hands.screen_text()
        await hands.press("j", "x")
        assert prompts("cancelled") == ["banana"]


async def test_a_worker_that_is_gone_is_not_said_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "held_is_known", lambda: True)
    queue("apple", "banana")
    run_next()
    async with opened() as hands:
        await hands.until_shown("the worker of job 1 is gone: nothing is lost, W starts a new one, which goes on")
        await hands.press("P")
        assert "the queue is paused; the worker of job 1 is gone: W starts a new one" in hands.told()
        await hands.press("P", "x")
        assert "whose worker is gone" in hands.screen_text()
        await hands.press("y")
        assert "the worker of job 1 is gone; the next one cancels what it left: W" in hands.told()
        assert "asked the worker" not in hands.told()
        await hands.until_shown("W starts a new one, which cancels it")


async def test_an_ended_job_is_taken_off_the_list_and_brought_back() -> None:
    done("apple")
    async with opened() as hands:
        await hands.press("x")
        assert jobs() == []
        await hands.press("u")
        assert prompts() == ["apple"]


async def test_pausing_and_going_on() -> None:
    queue("apple", "banana")
    run_next()
    async with opened() as hands:
        await hands.press("p")
        assert "pauses after the running job" in hands.screen_text()
        await hands.press("P")
        assert jobs("running")[0].asked == "pause"
        await hands.press("P")
        with open_store() as store:
            assert store.settings().queue == "active"
        assert jobs("running")[0].asked is None
        await hands.press("p", "p")
        with open_store() as store:
            assert store.settings().queue == "active"


async def test_what_the_queue_refuses_is_told() -> None:
    done("apple")
    queue("banana")
    async with opened() as hands:
        await hands.press("ctrl+a", "r")
        assert "`retry` takes failed and cancelled jobs" in hands.told()
        assert prompts("queued") == ["banana"]


async def test_nothing_to_undo_is_told() -> None:
    async with opened() as hands:
        await hands.press("u", "C")
        assert "there is nothing to undo" in hands.told()
        assert "no job is waiting" in hands.told()


async def test_an_undo_that_brings_nothing_back_is_an_error() -> None:
    queue("apple", "banana")
    run_next()
    async with opened() as hands:
        await hands.press("x", "y", "u")
        (note,) = [note for note in hands.app._notifications if "undone" in note.message]
        assert note.severity == "error"
        assert note.message.startswith("`cancel` cannot be undone: job 1 was running")
        await hands.press("ctrl+a", "x", "y", "u")
        assert "`cancel` of job 2 is undone; not undone: job 1 was running" in hands.told()


async def test_filtering_by_words_and_back() -> None:
    queue("a red apple", "a green apple", "a red car", seed=3)
    async with opened() as hands:
        await hands.press("slash")
        await hands.type("apple red")
        assert "a red apple" in hands.screen_text()
        assert "a red car" not in hands.screen_text()
        await hands.press("enter", "x")
        assert prompts("queued") == ["a green apple", "a red car"]
        await hands.press("escape")
        assert "a red car" in hands.screen_text()


async def test_marks_that_the_filter_hides_are_counted_and_what_is_cancelled_is_named() -> None:
    queue("apple", "banana", "cherry", "date")
    async with opened(size=(80, 24)) as hands:
        await hands.press("space", "space")
        assert "2 marked" in hands.screen_text().splitlines()[0]
        await hands.press("slash")
        await hands.type("date")
        await hands.press("enter")
        assert "2 marked" in hands.screen_text().splitlines()[0]
        assert "apple" not in hands.screen_text()
        await hands.press("x")
        assert "cancelled jobs 1 and 2; u: undo" in hands.told()
        assert prompts("queued") == ["cherry", "date"]
        assert "marked" not in hands.screen_text().splitlines()[0]


async def test_a_few_jobs_are_named_and_many_are_counted() -> None:
    assert [named(ids) for ids in ([3], [4, 3], [3, 5, 4], [2, 9, 4], [1, 3, 5, 7, 9, 11, 13, 15])] == [
        "job 3",
        "jobs 3 and 4",
        "jobs 3 to 5",
        "jobs 2, 4 and 9",
        "jobs 1, 3, 5, 7, 9, 11 and 2 more",
    ]


async def test_without_its_filter_the_list_stays_on_the_chosen_job() -> None:
    added([new_job(f"number {index}") for index in range(1, 401)])
    async with opened() as hands:
        table = hands.app.front.query_one(JobTable)
        for words, keys in (("398", ("enter", "escape")), ("number 2", ("enter", "j", "j", "j", "escape"))):
            await hands.press("slash")
            await hands.type(words)
            await hands.press(*keys[:-1])
            assert table.job is not None
            chosen = table.job.prompt
            assert words in chosen
            await hands.press(keys[-1])
            assert table.job.prompt == chosen
            at = 1 + table.cursor - round(table.scroll_offset.y)
            assert chosen in hands.screen_text().splitlines()[table.region.y + at]
            assert "e edit" in hands.screen_text()


async def test_the_footer_has_the_keys_of_the_moment() -> None:
    (job,) = queue("apple")
    async with opened() as hands:
        assert "e edit" in hands.screen_text()
        assert "r retry" not in hands.screen_text()
        run_next()
        end(job, "failed")
        await hands.until_shown("r retry")


async def test_a_narrow_footer_has_the_worker_the_pause_and_the_help_at_any_moment() -> None:
    queue("apple", "banana")
    run_next()
    async with opened((80, 24)) as hands:
        for key in ("up", "j", "space", "3"):
            await hands.press(key)
            footer = hands.screen_text().splitlines()[-1]
            assert [word for word in ("p pause", "W worker", "? help") if word not in footer] == []


async def test_a_player_that_ends_leaves_no_zombie(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"frames")
    ran = tmp_path / "ran"
    before = psutil.Process().children()
    assert play(clip, f"touch {ran}") is None
    for thread in threading.enumerate():
        if thread.name.startswith("reap-"):
            thread.join()
    assert psutil.Process().children() == before
    assert ran.exists()


async def test_details_log_and_the_commands_that_do_the_same() -> None:
    queue("it's an apple", size=(64, 64), seed=7)
    paths.logs_folder().mkdir()
    paths.job_log(1).write_text("loading the model\n" + "a long line " * 40 + "\n")
    async with opened() as hands:
        assert "loading the model" in hands.screen_text()
        await hands.press("l")
        assert isinstance(hands.app.screen, Reading)
        await hands.press("w", "w", "G", "k", "j", "g", "pagedown", "pageup", "escape", "enter")
        assert """'it'"'"'s an apple' --size 64 64 --seed 7""" in hands.screen_text()
        await hands.press("escape", "Y")
        assert hands.app.clipboard == """hvlite gen 'it'"'"'s an apple' --size 64 64 --seed 7 --model shapes"""


async def test_a_file_is_copied_and_opened_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"frames")
    queue("banana")
    done("apple", output=clip)
    played: list[list[str]] = []

    def start(command: list[str], **_: object) -> mock.Mock:
        played.append(command)
        return mock.Mock()

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.delenv("DISPLAY", raising=False)
    async with opened() as hands:
        await hands.press("y")
        assert "job 1 has no file yet" in hands.told()
        await hands.press("G", "y", "o")
        assert hands.app.clipboard == str(clip)
        assert "no desktop here" in hands.told()
        monkeypatch.setattr(hands.app.settings.__class__, "player", "mpv --loop")
        await hands.press("o")
        assert played == [["mpv", "--loop", str(clip)]]


async def test_a_worker_is_started_detached_and_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    queue("apple")
    started: list[dict[str, object]] = []

    def start(command: object, **how: object) -> mock.Mock:
        started.append({"command": command, **how})
        return mock.Mock(poll=lambda: None)

    monkeypatch.setattr("subprocess.Popen", start)
    async with opened() as hands:
        assert "no worker is running: W starts one" in hands.screen_text()
        await hands.press("W")
        assert started[0]["command"] == workers.COMMAND
        assert started[0]["start_new_session"] is True
        monkeypatch.setattr(workers, "held_locks", lambda: {"cpu": 1234})
        stopped: list[tuple[int, int]] = []
        monkeypatch.setattr("os.kill", lambda pid, sign: stopped.append((pid, sign)))
        await hands.until_shown("worker on")
        run_next()
        await hands.press("W", "n")
        assert stopped == []
        await hands.press("W", "y")
        assert stopped == [(1234, signal.SIGTERM)]
        assert "asked worker 1234 to save its clip" in hands.told()
        assert hands.app.ending == {1234}


async def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    queue("apple")
    script = "print('no such card'); raise SystemExit(1)"
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", script))
    async with opened() as hands:
        await hands.press("W")
        await hands.until_shown("the worker has ended (exit code 1): no such card")


async def test_a_worker_that_is_not_ours_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int, sign: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.kill", refused)
    assert workers.stop_workers([1234]) == ("worker 1234 cannot be stopped: Operation not permitted", set())
    assert "not to be seen from here" in workers.stop_workers([0])[0]


async def test_a_marked_job_that_another_window_removed_blocks_nothing() -> None:
    first, *_ = queue("apple", "banana", "cherry")
    async with opened() as hands:
        await hands.press("space", "space")
        with open_store() as store:
            store.cancel([first])
            store.remove([first])
        await hands.settle()
        await hands.press("d")
        assert prompts("queued") == ["banana", "cherry", "banana"]
        await hands.press("space")
        with open_store() as store:
            store.clear()
        await hands.settle()
        assert hands.app.front.query_one(JobTable).marked == {}


async def test_a_job_that_cannot_be_edited_is_said_to_be_copied_instead() -> None:
    queue("apple")
    run_next()
    async with opened() as hands:
        await hands.press("e")
        assert "job 1 is running: `edit` takes" in hands.told()
        assert "change a copy: hvlite queue dup 1; here: d, then e" in hands.told()
        assert hands.app.current_mode == "queue"


async def test_a_running_job_is_not_edited_whatever_is_marked() -> None:
    queue("apple", "banana")
    run_next()
    async with opened() as hands:
        await hands.press("j", "space", "k", "e")
        assert "job 1 is running: `edit` takes" in hands.told()
        assert hands.app.current_mode == "queue"


async def test_a_log_is_read_again_as_it_is_shown() -> None:
    queue("apple")
    async with opened() as hands:
        await hands.press("l")
        reading = hands.app.screen
        assert isinstance(reading, Reading)
        reading._renew()
        await hands.settle()
        assert "no log yet" in hands.screen_text()
        await hands.press("w")
        paths.logs_folder().mkdir()
        paths.job_log(1).write_text("x" * 300 + "\n")
        reading._renew()
        await hands.settle()
        assert sum("xxx" in line for line in hands.screen_text().splitlines()) == 1
        await hands.press("w")
        assert sum("xxx" in line for line in hands.screen_text().splitlines()) == 3


async def test_a_worker_lifts_a_pause_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    queue("apple")
    with open_store() as store:
        store.pause(reason="3 failures in a row")
    monkeypatch.setattr(workers, "start_worker", lambda: mock.Mock(poll=lambda: 0))
    async with opened() as hands:
        await hands.press("W")
        assert "; the queue was paused (3 failures in a row) and goes on" in hands.told()
        with open_store() as store:
            assert store.settings().queue == "active"


async def test_double_click_opens_and_a_click_chooses() -> None:
    queue(*FRUIT)
    async with opened() as hands:
        await hands.pilot.click("JobTable", offset=(20, 3))
        await hands.settle()
        assert hands.app.front.query_one(JobTable).job.prompt == "cherry"  # type: ignore[union-attr]
        await hands.pilot.click("JobTable", offset=(20, 3), times=2)
        await hands.settle()
        assert isinstance(hands.app.screen, Reading)


async def test_control_c_cancels_nothing_and_quitting_leaves_the_job_running() -> None:
    queue("apple")
    run_next()
    async with opened() as hands:
        await hands.press("ctrl+c")
        assert "the worker goes on" in hands.told()
        await hands.pilot.press("q")
    assert jobs("running")[0].asked is None


async def test_a_prompt_cannot_steer_the_terminal() -> None:
    queue("an \x1b[31mapple\nwith a [bold]stalk[/]")
    async with opened() as hands:
        assert "an  [31mapple with a" in hands.screen_text()
        await hands.press("enter")
        assert "an  [31mapple with a [bold]stalk[/]" in hands.screen_text()
        assert r"hvlite gen $'an \x1b[31mapple\nwith a [bold]stalk[/]'" in hands.screen_text()
        assert "\x1b" not in hands.screen_text()
