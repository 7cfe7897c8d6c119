"""The page of a report: whatever a prompt, a path or a log holds, it works from disk and stays text."""

import base64
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvlite.errors import OutputError
from hvlite.report.entries import Entry
from hvlite.report.markup import clean, link_to
from hvlite.report.page import Report, write_report
from hvlite.report.pictures import WIDTH, shrunk
from tests.refusal import refusal
from tests.report_pages import EVIL, clip_at, write


def test_whatever_is_said_it_stays_text(tmp_path: Path) -> None:
    entry = Entry(
        name=EVIL,
        state="failed",
        prompt=EVIL,
        kind=EVIL,
        settings={EVIL: EVIL},
        timings={EVIL: 1.0},
        reason=EVIL,
        error=EVIL,
        command=EVIL,
        log=tmp_path / "log.txt",
    )
    assert entry.log is not None
    entry.log.write_text(EVIL)
    page = write(tmp_path / "report.html", [entry, replace(entry, state="done", clip=tmp_path / EVIL[:8])], remark=EVIL)
    assert page.text.count(EVIL) >= 16


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(codec=None, exclude_categories=())))
def test_any_prompt_comes_out_as_it_was_typed(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = write(
        tmp_path_factory.mktemp("any") / "report.html", [Entry(name="one", state="done", prompt=text, kind=text)]
    )
    assert clean(text) in page.text


def test_a_prompt_of_hundreds_of_lines_keeps_them() -> None:
    assert clean("one\r\ntwo\n\tthree\x1b[31m\0") == "one\ntwo\n\tthree\ufffd[31m\ufffd"


def test_the_page_needs_nothing_and_allows_nothing(tmp_path: Path) -> None:
    clip = clip_at(tmp_path / "clip.mp4")
    page = write(tmp_path / "report.html", [Entry(name="one", state="done", prompt="x", kind="y", clip=clip)])
    (policy,) = [value for value in page.values("content", "meta") if "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; " in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy
    assert not re.search(r"url\(|@import|//", page.style)
    assert "width=device-width" in " ".join(page.values("content", "meta"))
    assert "prefers-color-scheme: dark" in page.style


def test_a_clip_is_shown_by_its_frames_and_can_be_played(tmp_path: Path) -> None:
    clip = clip_at(tmp_path / "clip.mp4")
    page = write(tmp_path / "report.html", [Entry(name="one", state="done", prompt="x", kind="y", clip=clip)])
    pictures = page.values("src", "img")
    assert len(pictures) == 4
    for picture in (*pictures, *page.values("poster")):
        assert base64.b64decode(picture.removeprefix("data:image/jpeg;base64,")).startswith(b"\xff\xd8")
    assert page.values("src", "video") == ["clip.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_a_file_that_cannot_be_shown_is_told(tmp_path: Path, suffix: str) -> None:
    gone = Entry(name="gone", state="done", prompt="x", kind="y", clip=tmp_path / f"gone{suffix}")
    assert "is no longer there" in write(tmp_path / "gone.html", [gone]).text
    if suffix == ".mp4":
        clip = clip_at(tmp_path / "cut.mp4")
        clip.write_bytes(clip.read_bytes()[:-40])
        cut = replace(gone, clip=clip)
        assert "is truncated" in write(tmp_path / "cut.html", [cut]).text


@pytest.mark.parametrize("name", ["a b", "50%", "it's #1?", "a:b", "&lt;b", "\u732b \U0001f431", '"', "\\"])
def test_links_lead_to_the_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = folder / f"{name}.mp4"
    below, elsewhere = link_to(file, tmp_path), link_to(file, tmp_path / "other")
    assert urlsplit(below).path == below, "nothing of it is a scheme, a query or a fragment"
    assert tmp_path / unquote(below) == file
    assert elsewhere.startswith("file:///")
    assert Path(unquote(urlsplit(elsewhere).path)) == file
    clip_at(file)
    page = write(tmp_path / "report.html", [Entry(name="one", state="done", prompt="x", kind="y", clip=file)])
    assert page.values("src", "video") == [below]


def test_a_name_that_is_no_text_is_linked_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"\xff.png")
    file.touch()
    entry = Entry(name=file.name, state="done", prompt="x", kind="y", clip=file)
    assert write(tmp_path / "report.html", [entry]).values("src", "img") == ["%FF.png"]


def test_the_summary_counts_and_compares(tmp_path: Path) -> None:
    steps = (2.0, 4.0, 30.0)
    entries = [
        Entry(name=f"job {n}", state="done", prompt="x", kind="k", timings={"denoise": 60.0 * n}, seconds_per_step=each)
        for n, each in enumerate(steps, 1)
    ]
    entries.append(Entry(name="job 4", state="failed", prompt="x", kind="k", reason="out of memory in decode"))
    entries.append(Entry(name="job 5", state="parked", prompt="x", kind="k"))
    page = write(tmp_path / "report.html", entries, waiting=7)
    for words in ("3 done", "1 failed", "1 parked", "7 still to be done", "6 min 00 s of rendering"):
        assert words in page.text
    assert "k34 s2 min 00 s" in page.text, "medians of the clips of one kind"
    assert "out of memory in decode: job 4" in page.text
    assert "#clip-4" in page.values("href")
    assert "clip-4" in page.values("id")


def test_nothing_is_a_report_too(tmp_path: Path) -> None:
    assert "Nothing ended in this time." in write(tmp_path / "report.html", []).text


def test_large_frames_are_shrunk_and_none_vanishes() -> None:
    for height, width in ((720, 1280), (1280, 720), (64, 64), (1, 5000), (33, 401)):
        small = shrunk(np.full((height, width, 3), 200, np.uint8))
        assert 1 <= small.shape[1] <= max(WIDTH, width // height)
        assert (small == 200).all()


def test_a_report_that_is_broken_off_leaves_the_older_one(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    entries = [Entry(name=str(number), state="done", prompt="x", kind="y") for number in range(3)]
    write(page, entries)
    before = page.read_bytes()
    writing = write_report(page, Report(title="new", entries=entries))
    next(writing)
    writing.close()  # type: ignore[attr-defined]
    assert page.read_bytes() == before
    assert list(tmp_path.iterdir()) == [page]


def test_a_missing_folder_for_the_page_is_told_first(tmp_path: Path) -> None:
    refusal(
        lambda: next(write_report(tmp_path / "no" / "r.html", Report(title="", entries=[]))), "no", kind=OutputError
    )
