"""Prompt files of every format and with every kind of mistake; one fault, and nothing is used."""

import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvlite.errors import ExitCode, RequestError
from hvlite.jobs import batch as batches
from hvlite.jobs.batch import Batch, parse_seeds, read_batch
from hvlite.jobs.prompt_files import BatchError, Format
from hvlite.request import MAX_SEED, Request
from tests.refusal import refusal

PROMPTS = Path(__file__).parent / "data" / "prompts.txt"


def read(text: str | bytes, name: str = "-", **options: Any) -> Batch:
    raw = text if isinstance(text, bytes) else text.encode()
    return read_batch(raw, name=name, **{"defaults": {}, "draw": lambda: 77, **options})


def requests(text: str | bytes, name: str = "-", **options: Any) -> list[Request]:
    return [entry.request for entry in read(text, name, **options).entries]


def faults(text: str | bytes, name: str = "-", **options: Any) -> list[str]:
    with pytest.raises(BatchError) as caught:
        read(text, name, **options)
    assert caught.value.exit_code is ExitCode.USAGE
    assert "\n" not in str(caught.value)
    return [str(fault) for fault in caught.value.faults]


def test_a_paragraph_is_a_prompt() -> None:
    text = "\n\n  A cat walks\r\non the grass.  \r\n\r\n \t\r\nA dog.\n\n\n"
    entries = read(text, "x.txt").entries
    found = [(entry.line, entry.request.prompt) for entry in entries]
    assert found == [(3, "A cat walks on the grass."), (7, "A dog.")]


def test_a_file_of_lines_is_not_taken_for_one_prompt_in_silence() -> None:
    one = read("a cat\na dog\n", "x.txt")
    assert len(one.entries) == 1
    assert "2 lines" in one.notes[0]
    assert "--format lines" in one.notes[0]
    several = read("a cat\n\n a dog \n", "x.txt", form="lines")
    assert [(entry.line, entry.request.prompt) for entry in several.entries] == [(1, "a cat"), (3, "a dog")]
    assert list(several.notes) == []


def test_a_csv_header_names_the_fields() -> None:
    text = (
        "prompt,size,frames,Infer-Steps,embedded_cfg_scale,flow_reverse,neg-prompt,seed,template\n"
        '"a ""red"" circle, moving",64x96,17,8,5.5,no,blue,9223372036854775807,video\n'
        "plain,,,,,,,,\n"
        "\n"
        '"two\nlines",720 1280,,,,yes,,0,\n'
    )
    first, second, third = requests(text, "x.csv")
    assert first == Request(
        'a "red" circle, moving',
        *((64, 96), 17, 8, 5.5),
        flow_reverse=False,
        negative_prompt="blue",
        seed=MAX_SEED,
        template="video",
    )
    assert second == Request("plain")
    assert third == Request("two\nlines", (720, 1280))
    assert [entry.line for entry in read(text, "x.csv").entries] == [2, 3, 5]


@pytest.mark.parametrize(
    "text", ["prompt;steps\na, b;3\n", "prompt\tsteps\na, b\t3\n", "\ufeffprompt;steps\r\na, b;3\r\n"]
)
def test_spreadsheets_of_all_countries_are_read(text: str) -> None:
    assert requests(text, "x.csv") == [Request("a, b", steps=3)]
    assert requests(text, "-") == [Request("a, b", steps=3)]


def test_json_lines_are_objects_or_prompts() -> None:
    text = '{"prompt": "a", "size": [64, 96], "guidance": 5, "seed": null}\n\n"b"\n{"prompt": "c", "size": "64x96"}\n'
    assert requests(text, "x.jsonl") == [Request("a", (64, 96), guidance=5.0), Request("b"), Request("c", (64, 96))]


def test_toml_has_settings_for_all_and_a_table_each() -> None:
    text = 'steps = 8\nsize = [64, 96]\n[[job]]\nprompt = "a"\n\n[[ job ]] # second\nprompt = """\nb"""\nsteps = 9\n'
    entries = read(text, "x.toml").entries
    assert [entry.request for entry in entries] == [Request("a", (64, 96), steps=8), Request("b", (64, 96), steps=9)]
    assert [entry.line for entry in entries] == [3, 6]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"prompt": "a"}\n', "jsonl"),
        ('{"not json}\n', "txt"),
        ("prompt,steps\na,3\n", "csv"),
        ("prompt, a word, and another\n", "txt"),
        ('[[job]]\nprompt = "a"\n', "toml"),
        ("[[job]] carved into a door\n", "txt"),
        ("a cat\n", "txt"),
    ],
)
def test_the_format_is_guessed_from_what_comes_in(text: str, form: Format) -> None:
    assert read(text).format == form


def test_what_a_file_does_not_say_comes_from_the_flags() -> None:
    text = "prompt,steps,seed\na,3,\nb,,5\n"
    defaults = {"steps": 8, "frames": 17, "seed": 2}
    assert requests(text, "x.csv", defaults=defaults) == [
        Request("a", frames=17, steps=3, seed=2),
        Request("b", frames=17, steps=8, seed=5),
    ]


def test_drafts_are_a_column_too() -> None:
    text = "prompt,steps,Stop-After-Step\na,8,3\nb,8,\n"
    assert [entry.stop_after for entry in read(text, "x.csv").entries] == [3, None]
    by_flag = read('{"prompt": "a", "stop_after_step": 2}\n"b"\n', "x.jsonl", defaults={"stop_after_step": 5})
    assert [entry.stop_after for entry in by_flag.entries] == [2, 5]


def test_seeds_multiply_the_entries_that_have_none() -> None:
    text = 'prompt,seed,seeds\na,,\nb,5,\nc,,"7,9"\nd,-1,\n'
    found = [(request.prompt, request.seed) for request in requests(text, "x.csv", seeds=[0, 1])]
    assert found == [("a", 0), ("a", 1), ("b", 5), ("c", 7), ("c", 9), ("d", 77)]
    assert [each.seed for each in requests('{"prompt": "a", "seeds": [3, 4]}', "x.jsonl")] == [3, 4]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("4", [4]),
        ("0,1,5-9", [0, 1, 5, 6, 7, 8, 9]),
        (" 3 - 4 , 3", [3, 4]),
        ("3x", [10, 11, 12]),
        ("x2", [10, 11]),
    ],
)
def test_seeds_are_listed_or_counted(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text, 10) == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no seeds"),
        ("-1", "no seeds"),
        ("1,,2", "no seeds"),
        ("5-3", "0 seeds"),
        ("0x", "0 seeds"),
        ("0-99999", "100,000 seeds; 1 to 10,000"),
        ("9" * 19, "seed must be 0 to"),
        ("9" * 30, "no seeds"),
    ],
)
def test_other_seeds_are_refused(text: str, words: str) -> None:
    refusal(lambda: parse_seeds(text), words, kind=RequestError)


def test_every_fault_is_told_with_line_and_field() -> None:
    text = (
        "prompt,stepz,frames,size,seed\n"
        "a,1,18,64x65,x\n"  # 2
        ",2,17,64x64,1\n"  # 3
        "b,3,17\n"  # 4
        "c,4,17,tall,\n"  # 5
    )
    assert faults(text, "x.csv") == [
        "line 2, stepz: no such column; did you mean steps?",
        "line 2, frames: frames must be 4k+1 (1, 5, 9, ... 129); got 18. Nearest: 17.",
        "line 2, size: width must be a multiple of 16; got 65. Nearest: 64.",
        "line 2, seed: Expected `int`, got `str`",
        "line 3, stepz: no such column; did you mean steps?",
        "line 3, prompt: there is none",
        "line 4: 3 cells under 5 columns: is a quote missing?",
        "line 5, stepz: no such column; did you mean steps?",
        "line 5, size: 'tall' is no size: write height x width, as in 720x1280",
    ]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("x.txt", "", "line 1: there is no prompt in it"),
        ("x.txt", "good\n\nbad \xff".encode("latin-1"), "line 3: byte 0xff is no UTF-8 text"),
        ("x.txt", "a\0b", "line 1, prompt: a prompt has at most 100,000 characters and no NUL; got 3"),
        ("x.txt", "x" * 100_001, "line 1, prompt: a prompt has at most 100,000 characters and no NUL; got 100,001"),
        ("x.csv", "text,steps\na,3\n", "line 1: no column is named prompt: text, steps"),
        ("x.csv", "prompt,prompt\na,b\n", "line 1, prompt: this column comes twice"),
        ("x.csv", 'prompt\n"a\n', "line 2: not valid CSV: unexpected end of data"),
        ("x.csv", "prompt,flow_reverse\na,maybe\n", "line 2, flow_reverse: 'maybe' is neither true nor false"),
        ("x.csv", "prompt,guidance\na,nan\n", "line 2, guidance: guidance must be 0 to 100; got nan"),
        ("x.csv", "prompt,seed,seeds\na,1,2\n", "line 2, seeds: seed and seeds are both given"),
        ("x.csv", "prompt,output,seeds\na,a.mp4,2x\n", "line 2, output: one file name for 2 seeds"),
        ("x.csv", "prompt,output\na,a.mp4\nb,a.mp4\n", "line 3, output: a.mp4 is line 2's file"),
        (
            "x.csv",
            "prompt,steps,stop_after_step\na,4,4\n",
            "line 2, stop_after_step: must be below the steps (4); got 4",
        ),
        ("x.csv", "prompt,stop_after_step\na,0\n", "line 2, stop_after_step: Expected `int` >= 1"),
        ("x.csv", "prompt,output\na,../a.mp4\n", "line 2, output: '../a.mp4' must be a file name without a folder"),
        ("x.csv", "prompt,output\na,a.webm\n", "line 2, output: 'a.webm' must end in .mp4"),
        ("x.jsonl", '{"prompt": "a"', "line 1: not valid JSON"),
        ("x.jsonl", '\n{"prompt": "a", "prompt": "b"}', "line 2: not valid JSON: prompt is given twice"),
        ("x.jsonl", "[1]", "line 1: a line is an object or a prompt in quotes, not [1]"),
        ("x.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("x.jsonl", '{"prompt": 5}', "line 1, prompt: Expected `str`, got `int`"),
        ("x.jsonl", '{"prompt": "a", "steps": "5"}', "line 1, steps: Expected `int | null`, got `str`"),
        ("x.jsonl", '{"prompt": "a", "steps": true}', "line 1, steps: Expected `int | null`, got `bool`"),
        ("x.jsonl", '{"prompt": "a\\ud800"}', "line 1, prompt: a prompt is Unicode text; character 2 is half of one"),
        ("x.jsonl", '{"prompt": "a", "template": "poem"}', "line 1, template: template must be video or image"),
        ("x.toml", 'stepz = 3\n[[job]]\nprompt = "a"\n', "line 1, stepz: no such column; did you mean steps?"),
        ("x.toml", "a = 1\n\n= 3", "line 3: not valid TOML"),
        ("x.toml", 'job = "a"', "line 1, job: the clips are tables, each headed by [[job]]"),
        ("x.toml", 'steps = 1\n[[job]]\nprompt = "a"\n[[job]]\nsteps = 2\n', "line 4, prompt: there is none"),
    ],
)
def test_a_faulty_file_is_refused_as_a_whole(name: str, text: str | bytes, fault: str) -> None:
    found = faults(text, name)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_too_many_clips_are_refused_before_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_JOBS", 10)
    assert faults("a\n\nb\n\nc\n", "x.txt", seeds=range(6)) == ["line 3: more than 10 clips; split the file"]


def test_utf_16_as_windows_writes_it_is_read() -> None:
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE}\r\n\r\nb\r\n"
    assert [request.prompt for request in requests(text.encode("utf-16"), "x.txt")] == [
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
        "b",
    ]


def written(prompts: Sequence[str], form: Format) -> str:
    """The prompts as a file of another format, made by the libraries that people use."""
    if form == "jsonl":
        return "".join(json.dumps({"prompt": prompt, "seed": 3}, ensure_ascii=False) + "\n" for prompt in prompts)
    if form == "toml":  # JSON's strings are TOML's, but for the delete character
        texts = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
        return "seed = 3\n" + "".join(f"[[job]]\nprompt = {text}\n" for text in texts)
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["prompt", "seed"])
    writer.writerows([prompt, 3] for prompt in prompts)
    return out.getvalue()


def test_a_real_file_goes_through_every_format() -> None:
    raw = PROMPTS.read_bytes()
    found = [request.prompt for request in requests(raw, "prompts.txt")]
    assert len(found) == 415
    scripts = {unicodedata.name(char).split()[0] for prompt in found for char in prompt if char.isalpha()}
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HANGUL", "THAI"} <= scripts
    assert max(len(prompt) for prompt in found) > 5000
    assert any("\N{CAT FACE}" in prompt for prompt in found)
    assert any('"' in prompt and "," in prompt for prompt in found)
    for ending in ("\r\n", "\r"):
        again = b"\xef\xbb\xbf" + raw.replace(b"\n", ending.encode())
        assert [request.prompt for request in requests(again, "prompts.txt")] == found
    for form in ("csv", "jsonl", "toml"):
        assert requests(written(found, form), f"x.{form}") == [Request(prompt, seed=3) for prompt in found]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1), min_size=1))
def test_any_prompt_survives_csv_and_json(prompts: list[str]) -> None:
    if not all(prompt.strip() for prompt in prompts):
        prompts = [prompt + "." for prompt in prompts]
    for form in ("csv", "jsonl"):
        found = requests(written(prompts, form), f"x.{form}")
        assert [request.prompt for request in found] == prompts


@given(st.binary(max_size=300), st.sampled_from(["x.txt", "x.csv", "x.jsonl", "x.toml", "-"]))
def test_no_bytes_whatever_end_in_another_error(raw: bytes, name: str) -> None:
    with suppress(BatchError):
        assert read(raw, name).entries
