"""The composer: from typing to jobs in the queue."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import pytest
from textual.widgets import Input, TextArea

from hvlite import paths
from hvlite.errors import QueueError
from hvlite.jobs.job import How, NewJob
from hvlite.jobs.store import open_store
from hvlite.tui.compose_screen import ComposeScreen
from hvlite.tui.desk import FORECAST
from hvlite.tui.dialogs import Reading
from hvlite.tui.settings import Memory, read_memory, write_memory
from tests.tui_hands import NOW, Hands, end, jobs, opened, prompts, queue, run_next, store_of

pytestmark = pytest.mark.asyncio


def screen_of(hands: Hands) -> ComposeScreen:
    screen = hands.app.front
    assert isinstance(screen, ComposeScreen)
    return screen


async def put(hands: Hands, **values: str) -> None:
    """As if typed, but at once."""
    for name, text in values.items():
        box = screen_of(hands).query_one(f"#{name}")
        if isinstance(box, TextArea):
            box.text = text
        else:
            assert isinstance(box, Input)
            box.value = text
    await hands.settle()


async def test_a_prompt_is_typed_and_queued() -> None:
    queue("banana")
    async with opened() as hands:
        await hands.press("n")
        await hands.type("an apple")
        await hands.press("tab")
        await hands.type("64x96")
        await hands.press("ctrl+s")
        assert "queued job 2" in hands.told()
        assert prompts("queued") == ["banana", "an apple"]
        request = jobs()[1].request
        assert request is not None
        assert request.size == (64, 96)
        assert hands.app.current_mode == "queue"


async def test_the_same_key_twice_queues_once() -> None:
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple")
        store, go_on = store_of(hands.app), Event()
        add = store.add

        def slow(*args: Any, **kwargs: Any) -> list[int]:
            assert go_on.wait(60)
            return add(*args, **kwargs)

        with mock.patch.object(store, "add", side_effect=slow) as asked:
            await hands.pilot.press("ctrl+s")
            while not asked.called:
                await asyncio.sleep(0.002)
            await hands.pilot.press("ctrl+s")
            assert "still writing what was asked before" in hands.told()
            go_on.set()
            await hands.settle()
        screen = hands.app._screen_stacks["compose"][0]
        assert isinstance(screen, ComposeScreen)
        screen.prompt.text = "half written"
        screen.action_add()
        await hands.settle()
        assert prompts() == ["an apple"]


async def test_next_in_line_and_several_at_once() -> None:
    queue("banana")
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple\n\na car", seeds="1,2")
        assert "4 clips" in hands.screen_text()
        await hands.press("ctrl+n")
        assert prompts("queued") == ["an apple", "an apple", "a car", "a car", "banana"]


async def test_faults_are_shown_while_typing_and_nothing_is_queued() -> None:
    async with opened(size=(80, 24)) as hands:
        await hands.press("2")
        assert "a prompt is missing" in hands.screen_text()
        await put(hands, prompt="an apple", frames="16")
        assert "frames must be 4k+1" in hands.screen_text()
        assert screen_of(hands).query_one("#field-frames").has_class("-wrong")
        await hands.press("ctrl+s")
        assert "frames must be 4k+1" in hands.told()
        assert jobs() == []


async def test_the_plan_follows_what_is_typed() -> None:
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple", model="hunyuanvideo", profile="24g")
        assert "fits: " in hands.screen_text()
        assert "1 clip; how long it takes is known once" in hands.screen_text()
        await put(hands, size="2560x2560", frames="513", profile="6g")
        assert "DOES NOT FIT" in hands.screen_text()


async def test_the_time_is_told_from_what_was_done_and_goes_on_with_the_clock() -> None:
    small = {"size": (64, 64), "frames": 17, "steps": 16}
    (job,) = queue("apple", **small)
    run_next()
    end(job, seconds_per_step=3.0, timings={"denoise": 48.0, "decode": 12.0})
    queue("banana", **small)
    now = [NOW]
    async with opened(clock=lambda: now[0]) as hands:
        assert "all done 16:01" in hands.screen_text()
        now[0] += 600
        await hands.settle()
        assert "all done 16:11" in hands.screen_text()
        await hands.press("2")
        await put(hands, prompt="an apple", model="shapes", size="64x64", frames="17", steps="16", seeds="1,2")
        assert "2 clips, 2 min 00 s, 1 min 00 s each; at the end of the line ready 16:13" in hands.screen_text()
        now[0] += 600
        await hands.settle()
        assert "ready 16:23" in hands.screen_text()


async def test_the_time_is_a_bound_behind_a_long_line_and_no_time_of_day_for_a_job_in_it() -> None:
    small = {"size": (64, 64), "frames": 17, "steps": 16}
    (job,) = queue("apple", **small)
    run_next()
    end(job, seconds_per_step=3.0, timings={"denoise": 48.0, "decode": 12.0})
    queue(*["banana"] * FORECAST, **small)
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple", model="shapes", size="64x64", frames="17", steps="16")
        assert "1 clip, 1 min 00 s; at the end of the line ready 21:01" in hands.screen_text()
        queue("banana", **small)
        await put(hands, seeds="5")
        assert "at the end of the line ready after 21:01" in hands.screen_text()
        await hands.press("escape", "e")
        assert "change job 2" in hands.screen_text()
        assert "1 clip, 1 min 00 s" in hands.screen_text()
        assert "ready" not in hands.screen_text()


@pytest.mark.parametrize("draft", ["0", "-1", "5"])
async def test_a_draft_that_contradicts_is_told_at_its_field_while_the_prompt_is_missing(draft: str) -> None:
    async with opened() as hands:
        await hands.press("2")
        await put(hands, steps="5", stop_after=draft)
        assert "--stop-after-step must be" in hands.screen_text()
        await put(hands, prompt="an apple")
        assert "--stop-after-step must be" in hands.screen_text()
        assert screen_of(hands).query_one("#field-stop_after").has_class("-wrong")


async def test_what_cannot_run_is_refused_and_what_does_not_fit_is_asked_for_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple", model="hunyuanvideo", profile="6g")
        await hands.press("ctrl+s")
        assert "is not on this machine" in hands.told()
        (paths.models_folder() / "hunyuanvideo").mkdir(parents=True)
        await put(hands, size="2560x2560", frames="513")
        await hands.press("ctrl+s")
        assert "DOES NOT FIT" in hands.told()
        await put(hands, size="2560x1280")
        await hands.press("ctrl+s")
        assert jobs() == []
        await hands.press("ctrl+s")
        (job,) = jobs()
        assert (job.how.model, job.how.profile) == ("hunyuanvideo", "6g") if job.how is not None else False


async def test_a_changed_job_that_has_failed_is_said_to_need_a_retry() -> None:
    (job,) = queue("apple", seed=3)
    run_next()
    end(job, "failed")
    async with opened() as hands:
        await hands.press("e")
        await put(hands, prompt="an apricot")
        await hands.press("ctrl+s")
        assert prompts("failed") == ["an apricot"]
        assert "changed job 1; it will run again only by r (retry); u: undo" in hands.told()


async def test_a_waiting_job_is_changed_in_place() -> None:
    queue("apple", "banana", seed=3)
    async with opened() as hands:
        await hands.press("e")
        assert "change job 1" in hands.screen_text()
        await put(hands, prompt="an apricot", steps="8", seeds="5")
        await hands.press("ctrl+s")
        assert prompts("queued") == ["an apricot", "banana"]
        request = jobs()[0].request
        assert request is not None
        assert (request.steps, request.seed) == (8, 5)
        await hands.press("u")
        assert prompts("queued") == ["apple", "banana"]


async def test_a_change_is_of_one_clip_and_can_be_left() -> None:
    queue("apple")
    async with opened() as hands:
        await hands.press("e")
        await put(hands, seeds="1-4")
        await hands.press("ctrl+s")
        assert "this form asks for 4 prompts and seeds" in hands.told()
        await hands.press("escape", "2")
        assert screen_of(hands).editing is None
        assert screen_of(hands).prompt.text == ""
        assert prompts("queued") == ["apple"]


async def test_a_change_of_folder_takes_the_place_of_a_named_file(tmp_path: Path) -> None:
    queue("apple", output=tmp_path / "a.mp4")
    async with opened() as hands:
        await hands.press("e")
        await put(hands, steps="8")
        await hands.press("ctrl+s")
        assert jobs()[0].output == tmp_path / "a.mp4"
        await hands.press("e")
        await put(hands, folder="/elsewhere")
        await hands.press("ctrl+s")
        assert (jobs()[0].folder, jobs()[0].output) == (Path("/elsewhere"), None)


@pytest.mark.parametrize(
    "change",
    [
        lambda job: replace(job, request=replace(job.request, steps=12)),
        lambda job: replace(job, how=replace(job.how, profile="6g")),
        lambda job: replace(job, folder=Path("/elsewhere")),
        lambda job: replace(job, stop_after=2),
    ],
    ids=["request", "how", "folder", "draft"],
)
async def test_a_change_that_another_window_made_meanwhile_is_not_undone(change: Callable[[NewJob], NewJob]) -> None:
    queue("apple")
    async with opened() as hands:
        await hands.press("e")
        await put(hands, prompt="an apricot")
        with open_store() as store:
            store.edit([1], change)
        (there,) = jobs()
        await hands.press("ctrl+s")
        assert "job 1 was changed elsewhere since it was opened here; nothing was written" in hands.told()
        assert jobs() == [there]
        assert screen_of(hands).prompt.text == "an apricot"
        await hands.press("escape", "e")
        await put(hands, prompt="an apricot")
        await hands.press("ctrl+s")
        (job,) = jobs()
        assert job.prompt == "an apricot"
        assert (job.how, job.folder, job.stop_after) == (there.how, there.folder, there.stop_after)


async def test_n_after_a_look_at_the_queue_begins_a_new_job() -> None:
    queue("apple")
    async with opened() as hands:
        await hands.press("e")
        await hands.pilot.click("#tab-queue")
        await hands.settle()
        await hands.press("n")
        assert "job 1 stays as it is" in hands.told()
        await put(hands, prompt="new one")
        await hands.press("ctrl+s")
        assert prompts() == ["apple", "new one"]


@pytest.mark.parametrize("last", ["escape", "ctrl+s"])
async def test_what_was_half_written_comes_back_after_a_change(last: str) -> None:
    queue("apple")
    async with opened() as hands:
        await hands.press("n")
        await put(hands, prompt="half written", steps="9")
        await hands.press("escape", "e")
        assert screen_of(hands).prompt.text == "apple"
        await hands.press(last, "n")
        assert (screen_of(hands).prompt.text, screen_of(hands).form()) == ("half written", {"steps": "9"})


async def test_a_clip_is_made_again_with_all_that_it_was_made_with(tmp_path: Path) -> None:
    how = How(model="shapes", dit=Path("/w/dit.safetensors"), attention="sage")
    (job,) = queue("apple", how=how)
    run_next()
    end(job)
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="half written")
        await hands.press("escape", "3", "e")
        assert "new job like job 1, attention sage, dit /w/dit.safetensors" in hands.screen_text()
        await hands.press("ctrl+s")
        (again,) = jobs("queued")
        assert again.how == how
        await hands.press("3", "e", "ctrl+r")
        assert screen_of(hands).prompt.text == "half written"
        await hands.press("ctrl+r", "f1")
        assert screen_of(hands).prompt.text == ""
        assert isinstance(hands.app.screen, Reading)


async def test_prompts_come_back_across_sessions() -> None:
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="first")
        await hands.press("ctrl+s", "2")
        await put(hands, prompt="second")
        await hands.press("ctrl+s")
    assert read_memory().prompts == ("second", "first")
    async with opened(memory=read_memory()) as hands:
        await hands.press("2", "ctrl+up")
        assert screen_of(hands).prompt.text == "second"
        await hands.press("ctrl+up", "ctrl+up")
        assert screen_of(hands).prompt.text == "first"
        await hands.press("ctrl+down")
        assert screen_of(hands).prompt.text == "second"


async def test_the_next_prompt_is_another_one_with_the_same_settings() -> None:
    async with opened() as hands:
        await hands.press("n")
        await hands.type("gap 0")
        await put(hands, steps="8")
        await hands.press("tab", "ctrl+s", "n")
        await hands.type("gap 1")
        await hands.press("ctrl+s")
        assert prompts("queued") == ["gap 0", "gap 1"]
        assert [job.request.steps for job in jobs("queued") if job.request is not None] == [8, 8]
        await hands.press("n", "ctrl+up")
        assert screen_of(hands).prompt.text == "gap 1"


async def test_what_is_half_written_is_the_entry_after_the_newest_prompt() -> None:
    async with opened(memory=Memory(prompts=("second", "first"), templates={"quick": {"steps": "8"}})) as hands:
        await hands.press("2", "ctrl+down")
        await hands.type("half")
        await hands.press("ctrl+up", "ctrl+up", "ctrl+up")
        assert screen_of(hands).prompt.text == "first"
        await hands.type("x")
        await hands.press("ctrl+down", "ctrl+t", "enter")
        assert (screen_of(hands).prompt.text, screen_of(hands).form()) == ("second", {"steps": "8"})
        await hands.press("ctrl+down", "ctrl+down")
        assert screen_of(hands).prompt.text == "half"
        await hands.press("ctrl+up", "ctrl+up")
        assert screen_of(hands).prompt.text == "xfirst"


async def test_settings_are_kept_under_a_name_taken_and_dropped() -> None:
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple", steps="8", size="64x64")
        await hands.press("ctrl+t")
        await hands.type("quick")
        await hands.press("enter")
        assert read_memory().templates == {"quick": {"size": "64x64", "steps": "8"}}
        await hands.press("ctrl+r")
        assert screen_of(hands).form() == {}
        await hands.press("ctrl+t", "enter")
        assert screen_of(hands).form() == {"size": "64x64", "steps": "8"}
        await hands.press("ctrl+t", "delete")
        assert read_memory().templates == {}


async def test_two_windows_keep_what_each_of_them_remembers() -> None:
    both = {"dropped": {"steps": "3"}, "shared": {"steps": "4"}}
    assert write_memory(Memory(prompts=("old",), templates=both)) is None
    async with opened(memory=read_memory()) as hands:
        here, there = {"steps": "8"}, {"steps": "9"}
        await hands.press("2")
        await put(hands, prompt="here", steps="8")
        other = read_memory().with_prompts(["there"]).with_template("theirs", there).with_template("shared", None)
        assert write_memory(other) is None
        await hands.press("ctrl+t", "delete", "ctrl+t", "shift+tab")
        await hands.type("ours")
        await hands.press("enter", "ctrl+s", "t")
    found = read_memory()
    assert found.prompts == ("here", "there", "old")
    assert found.templates == {"theirs": there, "ours": here}
    assert found.theme is not None


async def test_what_cannot_be_kept_is_remembered_as_long_as_the_window_is_open() -> None:
    paths.tui_state_file().mkdir(parents=True)
    async with opened() as hands:
        for prompt in ("first", "second"):
            await hands.press("n")
            await put(hands, prompt=prompt)
            await hands.press("ctrl+s")
        assert "cannot be written" in hands.told()
        assert hands.app.memory.prompts == ("second", "first")


async def test_a_damaged_queue_takes_nothing_away_from_what_was_written() -> None:
    queue("banana")
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple", steps="8")
        store = store_of(hands.app)
        with mock.patch.object(store, "add", side_effect=QueueError("queue.db is damaged: stop the worker")):
            await hands.press("ctrl+s")
        assert "queue.db is damaged" in hands.told()
        assert hands.app.current_mode == "compose"
        assert (screen_of(hands).prompt.text, screen_of(hands).form()) == ("an apple", {"steps": "8"})
        assert read_memory().prompts == ()
        await hands.press("ctrl+s")
        assert prompts("queued") == ["banana", "an apple"]


async def test_what_is_written_stays_while_one_looks_at_the_queue() -> None:
    async with opened(memory=Memory(prompts=("old",))) as hands:
        await hands.press("2")
        await hands.type("an apple 1")
        await hands.press("escape")
        assert hands.app.current_mode == "queue"
        await hands.press("2")
        assert screen_of(hands).prompt.text == "an apple 1"
