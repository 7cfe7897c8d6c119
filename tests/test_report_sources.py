"""What a report is made of: jobs of the queue, clips in a folder, and the command that asks for it."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from hvlite import paths
from hvlite.cli_report import since_of
from hvlite.errors import ExitCode, RequestError
from hvlite.events import Note
from hvlite.jobs.job import How, NewJob, Outcome
from hvlite.jobs.store import open_store
from hvlite.metadata import MemoryUsed
from hvlite.report.entries import Entry, entries_of_folder, entries_of_jobs, entry_of_job
from hvlite.report.page import LOG_LINES
from hvlite.request import Request
from hvlite.video.png import write_png
from tests.command_line import call
from tests.refusal import refusal
from tests.report_pages import EVIL, a_job, clip_at, read, write


def test_a_done_job(tmp_path: Path) -> None:
    clip = clip_at(tmp_path / "clip.mp4")
    resolved = {"prompt": "a red circle", "size": [720, 1280], "frames": 129, "steps": 50, "negative_prompt": ""}
    job = a_job(
        output=clip,
        resolved=resolved,
        timings={"text": 12.0, "denoise": 5000.0},
        seconds_per_step=100.0,
        predicted_bytes=20 * 2**30,
        peak_bytes=19 * 2**30,
        attempts=2,
    )
    entry = entry_of_job(job)
    assert (entry.name, entry.kind) == ("job 41", "shapes, 720x1280, 129 frames")
    assert entry.settings["size"] == "720x1280"
    assert entry.settings["profile"] == "8g"
    assert entry.settings["attempts"] == "2"
    assert not {"prompt", "negative_prompt", "crashes"} & set(entry.settings)
    page = write(tmp_path / "report.html", [entry])
    assert "predicted 20.00 GiB, peak 19.00 GiB (-5.0%)" in page.text
    assert "1 h 24 min (text 12.0 s, denoise 1 h 23 min)" in page.text
    assert page.values("src", "video") == ["clip.mp4"]


def test_a_failed_job_says_why_and_shows_the_end_of_its_log_and_its_preview(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_bytes(b"\n".join(b"line %d \xff" % number for number in range(5000)) + b"\n")
    paths.previews_folder().mkdir(parents=True)
    write_png(paths.preview_file(41), np.zeros((8, 8, 3), np.uint8), metadata="{}", title="")
    job = a_job(state="failed", reason="out of memory in decode", error="out of memory: 2 GiB", log=log)
    page = write(tmp_path / "report.html", [entry_of_job(job)])
    for words in ("out of memory: 2 GiB", "line 4999", f"line {5000 - LOG_LINES} ", "hvlite queue retry 41"):
        assert words in page.text
    assert f"line {5000 - LOG_LINES - 1} " not in page.text
    assert [url[:22] for url in page.values("src", "img")] == ["data:image/png;base64,"]


def test_a_preview_or_log_that_is_none_is_left_out(tmp_path: Path) -> None:
    paths.previews_folder().mkdir(parents=True)
    paths.preview_file(41).write_text(EVIL)
    job = a_job(state="failed", reason="quarantined", log=tmp_path)
    page = write(tmp_path / "report.html", [entry_of_job(job)])
    assert page.values("src", "img") == []
    assert "quarantined" in page.text


def test_drafts_and_unreadable_rows(tmp_path: Path) -> None:
    raw = '{"wobble": 1}'
    jobs = [
        a_job(id=1, state="parked"),
        a_job(
            id=2, state="failed", request=None, how=None, raw=raw, reason="unreadable", error="wobble", finished=None
        ),
        a_job(id=3, state="cancelled", reason="cancelled by user"),
    ]
    page = write(tmp_path / "report.html", entries_of_jobs(jobs, None))
    assert "hvlite queue finish 1" in page.text
    assert raw in page.text
    assert "hvlite queue retry 2" not in page.text
    assert "hvlite queue retry 3" in page.text


def test_jobs_that_ended_earlier_are_left_out() -> None:
    jobs = [a_job(id=number, finished=float(number)) for number in (30, 10, 20)]
    jobs.append(a_job(id=1, state="failed", finished=None))
    assert [entry.name for entry in entries_of_jobs(jobs, 20.0)] == ["job 1", "job 20", "job 30"]


def test_a_folder_is_read_by_its_metadata(tmp_path: Path) -> None:
    clip_at(tmp_path / "b.mp4", "second", "2026-11-25T23:00:00+01:00")
    clip_at(tmp_path / "a.mp4", "third", "2026-11-26T01:00:00+01:00", timings={"decode": 3.0, "denoise": 1.0})
    clip_at(tmp_path / "c.png", "first", "2026-11-25T22:00:00+01:00")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    (tmp_path / "sub.mp4").mkdir()
    found = list(entries_of_folder(tmp_path, None))
    entries = [each for each in found if isinstance(each, Entry)]
    assert [entry.prompt for entry in entries] == ["first", "second", "third"]
    assert [each.text for each in found if isinstance(each, Note)] == [
        f"left out: {tmp_path}/broken.mp4 is neither an mp4 nor a PNG file."
    ]
    assert entries[1].kind == "shapes, 32x48, 5 frames"
    assert entries[1].seconds_per_step == 2.0
    assert entries[2].seconds_per_step is None, "a clip that was resumed: its time is not that of all steps"
    since = datetime(2026, 11, 25, 21, 30, tzinfo=UTC).timestamp()
    assert [each.prompt for each in entries_of_folder(tmp_path, since) if isinstance(each, Entry)] == [
        "second",
        "third",
    ]


def test_a_clip_says_what_memory_it_took_before_its_decode(tmp_path: Path) -> None:
    memory = MemoryUsed(budget_bytes=2**33, predicted_bytes=2**31, actual_bytes=2**30, descents=("2 head groups",))
    clip_at(tmp_path / "a.mp4", memory=memory)
    (entry,) = entries_of_folder(tmp_path, None)
    assert isinstance(entry, Entry)
    page = write(tmp_path / "report.html", [entry])
    assert "predicted 2.00 GiB, peak 1.00 GiB before the decode" in page.text
    assert "9.0 s before the decode (schedule 1.0 s, denoise 8.0 s)" in page.text
    assert "2 head groups" in page.text


def test_a_clip_without_a_date_has_that_of_its_file(tmp_path: Path) -> None:
    clip = clip_at(tmp_path / "a.mp4", created="yesterday")
    (entry,) = entries_of_folder(tmp_path, None)
    assert isinstance(entry, Entry)
    assert entry.ended == clip.stat().st_mtime


NOW = datetime(2026, 11, 26, 7, 30, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("24h", "2026-11-25T07:30+01:00"),
        ("90m", "2026-11-26T06:00+01:00"),
        ("2w", "2026-11-12T07:30+01:00"),
        ("22:00", "2026-11-25T22:00+01:00"),
        ("7:00", "2026-11-26T07:00+01:00"),
        ("2026-11-25T23:15+02:00", "2026-11-25T23:15+02:00"),
    ],
)
def test_since_is_a_moment(text: str, moment: str) -> None:
    assert since_of(text, NOW) == datetime.fromisoformat(moment)


def test_since_a_date_is_its_midnight_here() -> None:
    assert since_of("2026-11-25", NOW) == datetime(2026, 11, 25).astimezone()
    assert since_of("all", NOW) is None


@pytest.mark.parametrize("text", ["", "yesterday", "24", "25:00", "2026-13-01", "999999w", "-3h"])
def test_since_nothing_known_is_refused(text: str) -> None:
    refusal(lambda: since_of(text, NOW), "--since", "24h", kind=RequestError)


def test_the_command_writes_a_page_beside_the_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip_at(tmp_path / "a.mp4")
    code, out, err = call(capsys, "report", "--folder", str(tmp_path))
    page = Path(out.strip())
    assert (code, page.parent, page.suffix) == (ExitCode.DONE, tmp_path, ".html")
    assert "a.mp4" in err
    assert read(page).values("src", "video") == ["a.mp4"]


def test_an_older_report_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip_at(tmp_path / "a.mp4")
    page = tmp_path / "report.html"
    arguments = ("report", "--folder", str(tmp_path), "-o", str(page))
    assert call(capsys, *arguments)[0] == ExitCode.DONE
    clip_at(tmp_path / "b.mp4", "another cat")
    assert call(capsys, *arguments)[0] == ExitCode.DONE
    assert "another cat" in read(page).text
    page.write_text("<!doctype html>\nmine")
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (ExitCode.FAILED, "")
    assert "it exists, and nothing is ever overwritten" in err
    assert page.read_text() == "<!doctype html>\nmine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "report.html"]


@pytest.mark.parametrize("folder", ["", "none"])
def test_a_folder_without_clips_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    code, out, err = call(capsys, "report", "--folder", str(tmp_path / folder), "-o", str(tmp_path / "r.html"))
    assert (code, out) == (ExitCode.USAGE, "")
    assert str(tmp_path / folder) in err
    assert list(tmp_path.iterdir()) == []


def test_the_queue_of_last_night(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("a white square", size=(32, 48), frames=5)
    now = datetime.now().timestamp()
    times = {"now": now - 100_000}
    with open_store(clock=lambda: times["now"]) as store:
        store.add([NewJob(request=replace(request, seed=seed), how=How(), folder=tmp_path) for seed in range(4)])
        claims = store.claims("a test", "a lock", {None})
        for outcome in (
            Outcome(state="done", timings={"denoise": 8.0}, seconds_per_step=2.0, peak_bytes=2**30),
            Outcome(state="failed", reason="disk full", error="disk full, 0.0 MiB free"),
            Outcome(state="parked"),
        ):
            job = claims.claim()
            assert job is not None
            if outcome.state == "done":
                clip_at(claims.reserve_output(job.id, ".mp4"), "a white square")
            claims.end(job.id, outcome)
            times["now"] = now  # the first one ended long ago
    page = tmp_path / "report.html"
    code, out, _ = call(capsys, "report", "-o", str(page))
    assert (code, out.strip()) == (ExitCode.DONE, str(page))
    recent = read(page).text
    for words in ("1 failed", "1 parked", "1 still to be done", "disk full, 0.0 MiB free", "hvlite queue finish 3"):
        assert words in recent
    assert "job 1" not in recent
    assert call(capsys, "report", "--since", "3d", "-o", str(page))[0] == ExitCode.DONE
    whole = read(page)
    assert "job 1" in whole.text
    assert "peak 1.00 GiB" in whole.text
    assert len(whole.values("src", "video")) == 1


def test_no_queue_is_told_and_none_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "report", "-o", str(tmp_path / "r.html"))
    assert (code, out) == (ExitCode.USAGE, "")
    assert "--folder" in err
    assert not paths.queue_file().exists()
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    clip_at(tmp_path / "a.mp4")
    script = (
        "import json, sys\nfrom hvlite.cli_report import report\nfrom pathlib import Path\n"
        "report(folder=Path(sys.argv[1]))\n"
        "print(json.dumps([name in sys.modules for name in ('torch', 'hvlite.report.page')]))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [False, True]
