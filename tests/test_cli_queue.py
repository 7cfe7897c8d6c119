"""`hvlite queue` and `hvlite batch` as a user meets them: what is printed where, exit codes, what is refused."""

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import ExitCode
from hvlite.jobs.asking import absolute
from hvlite.jobs.devices import take_lock
from hvlite.jobs.job import Outcome, Progress
from hvlite.jobs.store import open_store
from tests.command_line import call
from tests.test_batch import PROMPTS

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hvlite(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `hvlite ARGUMENTS` in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(capsys, *arguments)


def jobs(hvlite: Call, *flags: str) -> list[dict[str, Any]]:
    code, out, err = hvlite("queue", "ls", "--json", *flags)
    assert (code, err) == (ExitCode.DONE, "")
    found: list[dict[str, Any]] = json.loads(out)["jobs"]
    return found


def line(hvlite: Call) -> list[int]:
    return [job["id"] for job in jobs(hvlite)]


def run(state: str = "done", **outcome: Any) -> int:
    """Claim the first job and end it, as a worker does."""
    with open_store() as store:
        claims = store.claims("worker", "cpu", {None})
        job = claims.claim()
        assert job is not None
        claims.end(job.id, Outcome(state=state, **outcome))  # type: ignore[arg-type]  # tests name states as words
        return job.id


def test_an_empty_queue_teaches_the_first_step(hvlite: Call) -> None:
    code, out, err = hvlite("queue")
    assert (code, out) == (ExitCode.DONE, "")
    assert 'hvlite queue add "PROMPT"' in err


def test_add_prints_numbers_that_other_commands_take(hvlite: Call) -> None:
    code, out, err = hvlite("queue", "add", "a red circle", "--num-videos", "3", "--seed", "5")
    assert (code, out) == (ExitCode.DONE, "1-3\n")
    assert "using the embedded model `shapes`" in err
    assert hvlite("queue", "add", "first", "--next", "--quiet") == (ExitCode.DONE, "4\n", "")
    assert [job["request"]["seed"] for job in jobs(hvlite)] == [0, 5, 6, 7]
    assert hvlite("queue", "rm", "1-3")[0] == ExitCode.DONE
    assert line(hvlite) == [4]


def test_a_job_holds_everything_that_gen_takes(hvlite: Call, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "dit.safetensors").touch()
    flags = (
        *("--size", "32", "48", "--video-length", "5", "--infer-steps", "8", "--embedded-cfg-scale", "5"),
        *("--flow-shift", "6", "--no-flow-reverse", "--neg-prompt", "blue", "--cfg-scale", "2", "--seed", "3"),
        *("--template", "image", "--model", "model", "--dit", "dit.safetensors", "--profile", "24g", "--device", "cpu"),
        *("--dtype", "bf16", "--weights", "int8", "--text-weights", "nf4", "--attention", "sdpa", "--memory", "9"),
        *("--decode-tile", "65x256", "--save-path", "out", "--save-latents", "l.safetensors", "--stop-after-step", "4"),
    )
    code, _, err = hvlite("queue", "add", "--prompt", "a", *flags)
    assert code == ExitCode.DONE, err
    (job,) = jobs(hvlite)
    assert job["request"] == {
        **{"prompt": "a", "size": [32, 48], "frames": 5, "steps": 8, "guidance": 5.0, "flow_shift": 6.0},
        **{"flow_reverse": False, "negative_prompt": "blue", "cfg_scale": 2.0, "seed": 3, "template": "image"},
    }
    expected = {
        **{"model": str(tmp_path / "model"), "dit": str(tmp_path / "dit.safetensors"), "profile": "24g"},
        **{"device": "cpu", "dtype": "bf16", "weights": "int8", "text_weights": "nf4", "attention": "sdpa"},
        **{"memory": 9.0, "decode_tile": "65x256", "folder": str(tmp_path / "out"), "stop_after": 4},
        **{"latents": str(tmp_path / "l.safetensors"), "state": "queued", "position": 1, "attempts": 0},
    }
    assert expected.items() <= job.items()


def test_like_takes_the_settings_of_a_file(hvlite: Call, tmp_path: Path, tiny_model: Path) -> None:
    made = ("--frames", "5", "--steps", "1", "--size", "32", "32", "--model", str(tiny_model), "--device", "cpu")
    path = hvlite("gen", "a red circle", *made)[1].strip()
    code, out, err = hvlite("queue", "add", "--like", path, "--seed", "9", "--model", str(tiny_model))
    assert (code, out) == (ExitCode.DONE, "1\n"), err
    (job,) = jobs(hvlite)
    assert (job["request"]["prompt"], job["request"]["size"], job["request"]["seed"]) == ("a red circle", [32, 32], 9)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("add",), ExitCode.USAGE, "a prompt is missing"),
        (("add", "a", "--frames", "6"), ExitCode.USAGE, "Nearest: 5"),
        (("add", "a", "--device", "meta"), ExitCode.USAGE, "runs on cpu, cuda or cuda:N, not on 'meta'"),
        (("add", "a", "--profile", "24gb"), ExitCode.USAGE, "did you mean '24g'?"),
        (("add", "a", "--decode-tile", "tiny"), ExitCode.USAGE, "decode tile 'tiny'"),
        (("add", "a", "--model", "nowhere"), ExitCode.WEIGHTS, "there is no model folder"),
        (("add", "a", "--model", "hunyuanvideo"), ExitCode.WEIGHTS, "not on this machine"),
        (("add", "a", "--vae", "nowhere"), ExitCode.WEIGHTS, "--vae"),
        (("add", "a", "-o", "taken.mp4"), ExitCode.FAILED, "nothing is ever overwritten"),
        (("add", "a", "-o", "clip.png", "--frames", "5"), ExitCode.USAGE, "5 frame(s) make a .mp4 file"),
        (("add", "a", "-o", "clip.webm"), ExitCode.USAGE, "must end in .mp4"),
        (("add", "a", "-o", "taken.mp4/clip.mp4"), ExitCode.FAILED, "is not a folder"),
        (("add", "a", "-o", "c.mp4", "--num-videos", "2"), ExitCode.USAGE, "--save-path"),
        (("add", "a", "--stop-after-step", "9", "--steps", "9"), ExitCode.USAGE, "below --steps (9)"),
        (("add", "a\udcff"), ExitCode.USAGE, "character 2 is half of one"),
        (("rm", "1"), ExitCode.USAGE, "there is no job 1"),
        (("rm", "5-9"), ExitCode.USAGE, "there are no jobs 5 to 9"),
        (("rm", "x"), ExitCode.USAGE, "'x' is no job number"),
        (("mv", "1"), ExitCode.USAGE, "one of --top"),
        (("mv", "1", "--top", "--up"), ExitCode.USAGE, "one of --top"),
        (("edit", "1"), ExitCode.USAGE, "nothing to change"),
        (("edit", "1", "-o", "a.mp4", "--save-path", "b"), ExitCode.USAGE, "give one of them"),
        (("dup", "1", "--seed", "1", "--new-seed"), ExitCode.USAGE, "give one of them"),
        (("retry",), ExitCode.USAGE, "--failed"),
        (("retry", "--failed"), ExitCode.USAGE, "no job has failed"),
        (("undo",), ExitCode.USAGE, "nothing to undo"),
        (("ls", "--limit", "-1"), ExitCode.USAGE, "--limit must be 0 or more"),
        (("ls", "--state", "dnoe"), ExitCode.USAGE, '"done"'),
        (("resum",), ExitCode.USAGE, "did you mean resume?"),
        (("settings", "--lost-limit", "0"), ExitCode.USAGE, "lost_limit must be at least 1; got 0"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    hvlite: Call, tmp_path: Path, arguments: Sequence[str], code: ExitCode, words: str
) -> None:
    (tmp_path / "taken.mp4").touch()
    found, out, err = hvlite("queue", *arguments)
    assert (found, out) == (code, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("hvlite: error: ")
    assert words in last
    assert jobs(hvlite) == []


def test_the_line_is_reordered_and_the_way_back_is_told(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "--num-videos", "5")
    assert hvlite("queue", "mv", "4,5", "--top")[0] == ExitCode.DONE
    assert line(hvlite) == [4, 5, 1, 2, 3]
    hvlite("queue", "mv", "1", "--down")
    hvlite("queue", "mv", "3", "--before", "4")
    hvlite("queue", "mv", "4", "--after", "2")
    assert line(hvlite) == [3, 5, 2, 4, 1]
    for _ in range(4):
        code, _, err = hvlite("queue", "undo")
        assert code == ExitCode.DONE
        assert "is undone" in err
    assert line(hvlite) == [1, 2, 3, 4, 5]


def test_edit_changes_only_what_is_given(hvlite: Call, tmp_path: Path) -> None:
    hvlite("queue", "add", "a", "--steps", "8", "--weights", "int8", "--num-videos", "2")
    before = jobs(hvlite)
    code, _, err = hvlite("queue", "edit", "1", "--prompt", "b", "--frames", "5", "-o", "b.mp4")
    assert code == ExitCode.DONE, err
    first, second = jobs(hvlite)
    assert second == before[1]
    assert first["request"] == {**before[0]["request"], "prompt": "b", "frames": 5}
    assert (first["weights"], first["output"]) == ("int8", str(tmp_path / "b.mp4"))
    hvlite("queue", "edit", "1-2", "--save-path", "elsewhere")
    assert [(job["folder"], job["output"]) for job in jobs(hvlite)] == [(str(tmp_path / "elsewhere"), None)] * 2
    assert hvlite("queue", "edit", "1-2", "-o", "c.mp4")[0] == ExitCode.USAGE


def test_an_edit_does_not_leave_a_file_that_the_clip_cannot_become(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "-o", "a.mp4")
    code, _, err = hvlite("queue", "edit", "1", "--frames", "1")
    assert code == ExitCode.USAGE
    assert "1 frame(s) make a .png file; the output is named a.mp4" in err
    assert jobs(hvlite)[0]["request"]["frames"] is None
    assert hvlite("queue", "edit", "1", "--frames", "1", "-o", "a.png")[0] == ExitCode.DONE
    assert hvlite("queue", "edit", "1", "--frames", "5")[0] == ExitCode.USAGE
    assert hvlite("queue", "edit", "1", "--frames", "5", "--save-path", "clips")[0] == ExitCode.DONE


def test_a_duplicate_may_differ(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "--seed", "4")
    assert hvlite("queue", "dup", "1", "--steps", "3")[1] == "2\n"
    assert hvlite("queue", "dup", "1", "--new-seed", "--next")[1] == "3\n"
    third, first, second = jobs(hvlite)
    assert second["request"] == {**first["request"], "steps": 3}
    assert third["request"]["seed"] != 4


def test_the_seeds_of_new_jobs_are_told(hvlite: Call) -> None:
    assert "(model shapes, seeds 4, 5)" in hvlite("queue", "add", "a", "--seed", "4", "--num-videos", "2")[2]
    drawn = hvlite("queue", "dup", "1-2", "--new-seed")[2]
    assert f"seeds {', '.join(str(job['request']['seed']) for job in jobs(hvlite)[2:])})" in drawn
    assert "seeds 0, 1, 2, 3, 4, 5, 6, 7, ...)" in hvlite("queue", "add", "b", "--num-videos", "9")[2]


def test_clear_asks_somebody_or_needs_yes(hvlite: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    hvlite("queue", "add", "a", "--num-videos", "2")
    assert hvlite("queue", "clear")[0] == ExitCode.USAGE
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    code, _, err = hvlite("queue", "clear")
    assert code == ExitCode.USAGE
    assert "Remove 2 waiting jobs? [y/N]" in err
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert "removed 2 waiting jobs; undo: hvlite queue undo" in hvlite("queue", "clear")[2]
    assert hvlite("queue", "undo")[0] == ExitCode.DONE
    assert "removed 2 waiting jobs" in hvlite("queue", "clear", "--yes")[2]
    assert "removed 0 waiting jobs\n" in hvlite("queue", "clear")[2]


def test_an_undo_that_comes_too_late_says_so(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "--num-videos", "2")
    run()
    code, _, err = hvlite("queue", "undo")
    assert code == ExitCode.SOME_FAILED
    assert "`add` of job 2 is undone\nnot undone: job 1 is done now" in err
    hvlite("queue", "add", "b")
    run("failed", reason="disk full")
    code, _, err = hvlite("queue", "undo")
    assert code == ExitCode.FAILED
    assert "`add` cannot be undone: job 3 is failed now" in err


def test_the_morning_after(hvlite: Call) -> None:
    """Done, failed, parked and running jobs in one table, and what to do about each."""
    hvlite("queue", "add", "a", "--num-videos", "6", "--size", "64", "64", "--frames", "17", "--steps", "10")
    run(seconds_per_step=2.0, timings={"denoise": 20.0, "decode": 5.0})
    run("failed", reason="out of memory in decode", error="out of memory: 3.1 GiB needed, 2.9 free")
    run("parked")
    with open_store() as store:
        claims = store.claims("host 1", "cpu", {None})
        job = claims.claim()
        assert job is not None
        assert job.request is not None
        claims.record_plan(job.id, job.request.resolve(HUNYUANVIDEO), 3 << 30)
        claims.report(job.id, Progress(stage="denoise", step=4, steps=10, detail="block 3/8"))
    code, out, err = hvlite("queue")
    assert code == ExitCode.DONE
    rows = [row.split() for row in out.splitlines()]
    assert rows[0] == ["id", "state", "#", "prompt", "size", "frames", "steps", "seed", "model", "progress", "end"]
    assert [row[:2] for row in rows[1:]] == [["4", "running"], ["5", "queued"], ["6", "queued"], ["3", "parked"]]
    assert "denoise 4/10 block 3/8" in out
    assert "1 running, 2 queued, 1 parked; all done about " in err
    assert "(1 failed, 1 done: hvlite queue ls --all)" in err
    assert "hvlite queue finish ID" in err
    out = hvlite("queue", "ls", "--state", "failed", "--state", "done")[1]
    assert [row.split()[1] for row in out.splitlines()] == ["state", "failed", "done"]
    assert "out of memory in decode" in out
    out = hvlite("queue", "show", "2,4")[1]
    assert "error             out of memory: 3.1 GiB needed, 2.9 free" in out
    assert "memory            predicted 3.00 GiB" in out
    found = json.loads(hvlite("queue", "ls", "--json")[1])
    ends = [job["eta"] for job in found["jobs"]]
    assert ends[2] - ends[1] == pytest.approx(25.0)
    assert found["queue"]["eta"] == ends[2]
    assert found["queue"]["counts"]["failed"] == 1
    assert hvlite("queue", "finish", "3")[0] == ExitCode.DONE
    assert hvlite("queue", "retry", "--failed", "--next")[0] == ExitCode.DONE
    assert line(hvlite) == [4, 2, 5, 6, 3]


def test_cancel_and_pause_say_when_they_take_effect(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "--num-videos", "2")
    with open_store() as store:
        claims = store.claims("host 1", "cpu", {None})
        claims.claim()
    lock = take_lock("cpu")
    assert lock is not None
    code, _, err = hvlite("queue", "cancel", "1-2")
    lock.close()
    assert code == ExitCode.DONE
    assert "cancelled job 2; undo: hvlite queue undo" in err
    assert "job 1 will stop at the next block" in err
    assert "the worker of job 1 is gone" in hvlite("queue", "cancel", "1")[2]
    hvlite("queue", "edit", "2", "--steps", "3")
    assert "job 2 will run again only by: hvlite queue retry 2" in hvlite("queue", "edit", "2", "--steps", "4")[2]
    assert "cancelling" in hvlite("queue")[1]
    assert "the running job stops at its next block" in hvlite("queue", "pause", "--now")[2]
    assert "the queue is pausing" in hvlite("queue")[2]
    assert "the queue is active" in hvlite("queue", "resume")[2]


def test_who_queues_is_told_to_start_a_worker_where_none_runs(hvlite: Call) -> None:
    hint = "no worker runs; start one: hvlite work"
    assert hint in hvlite("queue", "add", "a", "--stop-after-step", "2")[2]
    assert hint in hvlite("queue")[2]
    hvlite("queue", "pause")
    assert hint not in hvlite("queue", "add", "b")[2]
    assert hint in hvlite("queue", "resume")[2]
    lock = take_lock("GPU-1")
    assert lock is not None
    for command in (("add", "c"), ("cancel", "1"), ("retry", "1"), ("resume",), ()):
        assert "no worker" not in hvlite("queue", *command)[2]
    lock.close()
    with open_store() as store:
        store.claims("gone", "GPU-1", {None}).claim()
    assert "the worker is gone; go on where it was: hvlite work" in hvlite("queue")[2]


def test_a_paused_queue_takes_jobs_and_says_that_it_is(hvlite: Call) -> None:
    assert "the queue is paused;" in hvlite("queue", "pause")[2]
    assert "the queue is paused" in hvlite("queue", "add", "a")[2]
    assert json.loads(hvlite("queue", "ls", "--json")[1])["queue"]["state"] == "paused"


def test_only_an_active_queue_says_when_it_is_done(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "--num-videos", "2", "--size", "64", "64", "--frames", "17", "--steps", "10")
    run(seconds_per_step=2.0, timings={"denoise": 20.0, "decode": 5.0})
    assert "all done about" in hvlite("queue")[2]
    hvlite("queue", "pause")
    assert "all done about" not in hvlite("queue")[2]


def test_settings_are_shown_and_changed(hvlite: Call) -> None:
    hvlite("queue", "settings", "--crash-limit", "3", "--on-done", "shutdown -h now")
    found = json.loads(hvlite("queue", "settings", "--json")[1])
    assert (found["crash_limit"], found["lost_limit"], found["on_done"]) == (3, 8, "shutdown -h now")
    assert "on_done        -" in hvlite("queue", "settings", "--on-done", "")[1]


def test_long_lists_are_cut_unless_asked_for(hvlite: Call) -> None:
    hvlite("queue", "add", "a", "--num-videos", "105")
    out, err = hvlite("queue")[1:]
    assert len(out.splitlines()) == 101
    assert "and 5 more: --limit 0" in err
    assert len(hvlite("queue", "ls", "--limit", "0")[1].splitlines()) == 106
    assert len(jobs(hvlite)) == 105


def test_a_prompt_does_not_drive_the_terminal(hvlite: Call) -> None:
    hvlite("queue", "add", "a\n\x1b[2Jb\tc")
    out = hvlite("queue")[1] + hvlite("queue", "show", "1")[1]
    assert "\x1b" not in out
    assert "a \\x1b[2Jb c" in out


def test_a_newer_database_is_refused_by_every_command(hvlite: Call) -> None:
    hvlite("queue", "add", "a")
    with sqlite3.connect(paths.queue_file()) as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    for arguments in (("queue",), ("queue", "add", "b"), ("batch", str(PROMPTS))):
        code, out, err = hvlite(*arguments)
        assert (code, out) == (ExitCode.FAILED, "")
        assert "newer hvlite" in err


def test_a_repair_is_told_even_to_the_quiet(hvlite: Call) -> None:
    hvlite("queue", "add", "a")
    paths.queue_file().write_bytes(b"not a database at all" * 100)
    code, out, err = hvlite("queue", "add", "b", "--quiet")
    assert (code, out) == (ExitCode.DONE, "1\n")
    assert "set aside as" in err


def test_watch_shows_every_change_until_it_is_stopped(hvlite: Call) -> None:
    hvlite("queue", "add", "a")
    command = [sys.executable, "-m", "hvlite.cli", "queue", "ls", "--watch", "--json"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert len(json.loads(process.stdout.readline())["jobs"]) == 1
        hvlite("queue", "add", "b")
        assert len(json.loads(process.stdout.readline())["jobs"]) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == ExitCode.DONE


def test_batch_queues_a_whole_file(hvlite: Call) -> None:
    code, out, err = hvlite("batch", str(PROMPTS), "--steps", "1", "--save-path", "clips")
    assert (code, out) == (ExitCode.DONE, "1-415\n")
    assert "415 prompts, 415 clips" in err
    assert {job["request"]["steps"] for job in jobs(hvlite)} == {1}
    assert "`batch` of jobs 1-415 is undone" in hvlite("queue", "undo")[2]


def test_batch_makes_drafts_which_may_be_made_whole_before_they_run(hvlite: Call, tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("prompt,stop_after_step\na,\nb,2\n")
    code, _, err = hvlite("batch", "two.csv", "--stop-after-step", "4", "--steps", "8")
    assert code == ExitCode.DONE, err
    hvlite("queue", "add", "whole")
    assert [job["stop_after"] for job in jobs(hvlite)] == [4, 2, None]
    code, _, err = hvlite("queue", "finish", "1-2")
    assert code == ExitCode.DONE
    assert "jobs 1-2 will be rendered to the end" in err
    assert [(job["id"], job["stop_after"]) for job in jobs(hvlite)] == [(1, None), (2, None), (3, None)]
    hvlite("queue", "undo")
    hvlite("queue", "finish", "2", "--next")
    assert [(job["id"], job["stop_after"]) for job in jobs(hvlite)] == [(2, None), (1, 4), (3, None)]
    assert "waiting already, and no draft" in hvlite("queue", "finish", "3")[2]


def test_a_dry_run_queues_nothing_and_makes_no_queue(hvlite: Call) -> None:
    code, out, err = hvlite("batch", str(PROMPTS), "--dry-run", "--seeds", "2x")
    assert code == ExitCode.DONE
    assert len(out.splitlines()) == 101
    assert "and 730 more" in err
    assert "64x64x17, 16 steps: fits, " in err
    assert "(830 clips)" in err
    assert "830 jobs, time unknown" in err
    assert not paths.queue_file().exists()
    found = json.loads(hvlite("batch", str(PROMPTS), "--dry-run", "--json")[1])
    assert (len(found["jobs"]), found["seconds"]) == (415, None)
    assert (found["jobs"][0]["line"], found["jobs"][0]["fits"]) == (1, True)


def test_a_dry_run_says_what_will_not_fit(hvlite: Call, tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("prompt,size\na,64x64\nb,4096x4096\n")
    code, _, err = hvlite("batch", "two.csv", "--dry-run", "--memory", "3", "--device", "cpu")
    assert code == ExitCode.DOES_NOT_FIT
    assert "64x64x17, 16 steps: fits" in err
    assert "4096x4096x17, 16 steps: DOES NOT FIT" in err


def test_a_dry_run_knows_what_like_clips_took(hvlite: Call, tmp_path: Path) -> None:
    shape = ("--size", "64", "64", "--frames", "17", "--steps", "10")
    hvlite("queue", "add", "a", *shape)
    run(seconds_per_step=2.0, timings={"denoise": 20.0, "decode": 5.0})
    (tmp_path / "two.txt").write_text("b\n\nc\n")
    assert "2 jobs, about 50.0 s. Nothing was queued" in hvlite("batch", "two.txt", "--dry-run", *shape)[2]


def test_a_faulty_file_queues_nothing_and_tells_every_fault(hvlite: Call, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("prompt,stepz\na,1\n,2\n")
    code, out, err = hvlite("batch", "bad.csv")
    assert (code, out) == (ExitCode.USAGE, "")
    assert err.splitlines() == [
        "bad.csv, line 2, stepz: no such column; did you mean steps?",
        "bad.csv, line 3, stepz: no such column; did you mean steps?",
        "bad.csv, line 3, prompt: there is none",
        "hvlite: error: bad.csv: 3 faults. Nothing was queued",
    ]
    assert jobs(hvlite) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.txt",), "nowhere.txt cannot be read: No such file"),
        (("one.csv", "-o", "a.mp4"), "use --save-path FOLDER"),
        (("one.csv", "--seeds", "3-1"), "'3-1' would be 0 seeds"),
        (("one.csv", "--frames", "6"), "Nearest: 5"),
        (("one.csv", "--stop-after-step", "0"), "--stop-after-step must be at least 1; got 0"),
        (("one.csv", "--format", "xml"), "--format"),
        (("one.csv", "--stepz", "3"), "--steps"),
        (("taken.csv",), "nothing is ever overwritten"),
        (("empty.txt",), "empty.txt, line 1: there is no prompt in it. Nothing was queued"),
    ],
)
def test_what_batch_cannot_take_is_one_line(hvlite: Call, tmp_path: Path, arguments: Sequence[str], words: str) -> None:
    (tmp_path / "one.csv").write_text("prompt\na\n")
    (tmp_path / "taken.csv").write_text("prompt,output\na,a.mp4\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.mp4").touch()
    (tmp_path / "empty.txt").touch()
    code, out, err = hvlite("batch", *arguments)
    assert code in (ExitCode.USAGE, ExitCode.FAILED)
    assert out == ""
    assert words in err.splitlines()[-1]


def test_batch_reads_stdin(hvlite: Call) -> None:
    command = [sys.executable, "-m", "hvlite.cli", "batch", "-", "--quiet", "--seeds", "7,9"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        input="a cat\n\na dog\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1-4\n", "")
    assert [(job["request"]["prompt"], job["request"]["seed"]) for job in jobs(hvlite)] == [
        *(("a cat", 7), ("a cat", 9), ("a dog", 7), ("a dog", 9)),
    ]


def test_help_names_every_command(hvlite: Call) -> None:
    code, out, _ = hvlite("queue", "--help")
    assert code == ExitCode.DONE
    commands = "add cancel clear dup edit finish ls mv pause resume retry rm settings show undo"
    assert {row.split()[1] for row in out.splitlines() if row.startswith("\N{BOX DRAWINGS LIGHT VERTICAL} ")} >= set(
        commands.split()
    )
    assert "queue" in hvlite("--help")[1]
    assert "batch" in hvlite("--help")[1]


def test_names_are_absolute_and_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(Path("a/../b")) == tmp_path / "b"
