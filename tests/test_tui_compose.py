"""The composer: from typing to jobs in the queue."""

import pytest
from textual.widgets import Input, TextArea

from hvlite.tui.compose_screen import ComposeScreen
from hvlite.tui.settings import Memory, read_memory
from tests.tui_hands import Hands, done, jobs, opened, prompts, queue

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


async def test_the_time_is_told_from_what_was_done() -> None:
    done("apple", seconds_per_step=3.0, timings={"denoise": 48.0, "decode": 12.0})
    async with opened() as hands:
        await hands.press("2")
        await put(hands, prompt="an apple", model="shapes", size="64x64", frames="17", steps="16")
        assert "1 clip" in hands.screen_text()


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


async def test_what_is_written_stays_while_one_looks_at_the_queue() -> None:
    async with opened(memory=Memory(prompts=("old",))) as hands:
        await hands.press("2")
        await hands.type("an apple 1")
        await hands.press("escape")
        assert hands.app.current_mode == "queue"
        await hands.press("2")
        assert screen_of(hands).prompt.text == "an apple 1"
