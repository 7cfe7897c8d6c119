"""The command line as a user meets it: exit codes, stdout and stderr apart, one line for every error."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hvlite.errors import ExitCode
from hvlite.video.mp4 import read_metadata
from tests.command_line import call

CLIP = ("--frames", "5", "--steps", "1", "--size", "32", "32")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> tuple[str, ...]:
    """Flags for the tiny model and a folder for its clips."""
    return ("--model", str(tiny_model), "--device", "cpu", "--save-path", str(tmp_path / "out"))


def test_gen_prints_the_file_and_nothing_else_on_stdout(
    capsys: pytest.CaptureFixture[str], model: Sequence[str]
) -> None:
    code, out, err = call(capsys, "gen", "a red circle", *CLIP, *model)
    assert code == ExitCode.DONE, err
    path = Path(out.removesuffix("\n"))
    assert path.is_file()
    assert "seed 0" in err
    assert "denoise" in err


def test_every_published_flag_is_accepted_with_its_name(
    capsys: pytest.CaptureFixture[str], model: Sequence[str]
) -> None:
    published = (
        *("--prompt", "a red circle", "--video-size", "32", "48", "--video-length", "5", "--infer-steps", "1"),
        *("--embedded-cfg-scale", "5", "--flow-shift", "6", "--flow-reverse", "--neg-prompt", "blue"),
        *("--cfg-scale", "2", "--seed", "3", "--use-cpu-offload", "--use-fp8", "--num-videos", "2"),
    )
    code, out, err = call(capsys, "gen", *published, *model)
    assert code == ExitCode.DONE, err
    requests = [json.loads(read_metadata(Path(line)))["request"] for line in out.splitlines()]
    assert [request["seed"] for request in requests] == [3, 4]
    expected = {"size": [32, 48], "frames": 5, "steps": 1, "guidance": 5.0, "flow_shift": 6.0, "cfg_scale": 2.0}
    assert expected.items() <= requests[0].items()
    assert requests[0]["negative_prompt"] == "blue"


def test_like_takes_every_setting_and_flags_win(capsys: pytest.CaptureFixture[str], model: Sequence[str]) -> None:
    _, first, _ = call(capsys, "gen", "a red circle", *CLIP, "--seed", "5", *model)
    code, second, err = call(capsys, "gen", "--like", first.strip(), "--guidance", "3", *model)
    assert code == ExitCode.DONE, err
    old, new = (json.loads(read_metadata(Path(name.strip())))["request"] for name in (first, second))
    assert new == {**old, "guidance": 3.0}
    assert "not the weights" not in err
    code, _, err = call(capsys, "gen", "--like", first.strip())
    assert code == ExitCode.USAGE
    assert "a model named 'tiny'" in err


def test_info_shows_the_request(capsys: pytest.CaptureFixture[str], model: Sequence[str]) -> None:
    _, path, _ = call(capsys, "gen", "a red circle", *CLIP, *model)
    code, text, _ = call(capsys, "info", path.strip())
    assert code == ExitCode.DONE
    assert "a red circle" in text
    assert "32x32" in text
    code, text, _ = call(capsys, "info", path.strip(), "--json")
    assert json.loads(text)["request"]["prompt"] == "a red circle"


def test_json_is_one_event_a_line(capsys: pytest.CaptureFixture[str], model: Sequence[str]) -> None:
    code, out, _ = call(capsys, "gen", "a red circle", *CLIP, "--json", "--quiet", *model)
    assert code == ExitCode.DONE
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["event"] == "Finished"
    assert Path(events[-1]["path"]).is_file()
    assert {"Stage", "BlockDone", "StepDone", "TileDone", "Saved"} <= {event["event"] for event in events}


def test_seed_minus_one_draws_and_prints_a_seed(capsys: pytest.CaptureFixture[str], model: Sequence[str]) -> None:
    seeds = set()
    for _ in range(2):
        _, out, err = call(capsys, "gen", "a", *CLIP, "--seed", "-1", *model)
        seed = json.loads(read_metadata(Path(out.strip())))["request"]["seed"]
        assert str(seed) in err
        seeds.add(seed)
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("gen",), ExitCode.USAGE, "a prompt is missing"),
        (("gen", "a", "--frames", "6"), ExitCode.USAGE, "Nearest: 5"),
        (("gen", "a", "--stepz", "6"), ExitCode.USAGE, "--steps"),
        (("gen", "a", "--steps", "many"), ExitCode.USAGE, "--steps"),
        (("gen", "a", "--num-videos", "0"), ExitCode.USAGE, "at least 1"),
        (("gen", "a", "--num-videos", "2", "-o", "x.mp4"), ExitCode.USAGE, "--save-path"),
        (("gen", "a", "-o", "clip.webm"), ExitCode.USAGE, "must end in .mp4"),
        (("gen", "a", "--num-videos", "2", "--seed", str(2**63 - 1)), ExitCode.USAGE, "seed must be"),
        (("gen", "a", "--model", "/nowhere"), ExitCode.WEIGHTS, "/nowhere"),
        (("gen", "a", "--model", "hunyuanvideo"), ExitCode.WEIGHTS, "not on this machine"),
        (("gen", "a", "--device", "tpu"), ExitCode.USAGE, "use cpu, cuda, cuda:N or meta"),
        (("gen", "a", "--profile", "24gb"), ExitCode.USAGE, "did you mean '24g'?"),
        (("gen", "a", "--attention", "flash", "--device", "cpu"), ExitCode.USAGE, "needs a CUDA device"),
        (("gen", "--like", "/nowhere.mp4"), ExitCode.USAGE, "/nowhere.mp4"),
        (("info", "/nowhere.mp4"), ExitCode.USAGE, "/nowhere.mp4"),
        (("nonsense",), ExitCode.USAGE, "nonsense"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], code: ExitCode, words: str
) -> None:
    found, out, err = call(capsys, *arguments)
    assert found == code
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("hvlite: error: ")
    assert words in last
    assert "Traceback" not in err


def test_decode_finishes_kept_latents(capsys: pytest.CaptureFixture[str], model: Sequence[str], tmp_path: Path) -> None:
    kept = str(tmp_path / "kept.safetensors")
    call(capsys, "gen", "a red circle", *CLIP, "--save-latents", kept, *model)
    code, out, err = call(capsys, "decode", kept, "--save-path", str(tmp_path), "--device", "cpu")
    assert code == ExitCode.DONE, err
    assert Path(out.strip()).is_file()
    assert "a red circle" in call(capsys, "info", kept)[1]
    assert call(capsys, "decode", kept, "--save-latents", "x.safetensors")[0] == ExitCode.USAGE
    code, out, err = call(capsys, "decode", "/nowhere.safetensors", *model)
    assert (code, out) == (ExitCode.USAGE, "")
    assert "/nowhere.safetensors" in err


def test_several_clips_are_checked_before_the_first_is_rendered(
    capsys: pytest.CaptureFixture[str], model: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / "k-1.safetensors").write_bytes(b"from last night")
    flags = ("--num-videos", "2", "--save-latents", str(tmp_path / "k.safetensors"))
    code, out, err = call(capsys, "gen", "a", *CLIP, *flags, *model)
    assert (code, out) == (ExitCode.FAILED, "")
    assert "k-1.safetensors" in err
    assert not (tmp_path / "k-0.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
def test_a_first_signal_stops_at_a_block(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, code: ExitCode
) -> None:
    command = [sys.executable, "-m", "hvlite.cli", "gen", "a red circle", "--model", str(tiny_model)]
    command += ["--device", "cpu", "--save-path", str(tmp_path), "--steps", "1000", "--json"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "BlockDone":
                process.send_signal(number)
                break
        rest = [json.loads(line)["event"] for line in process.stdout]
        error = process.stderr.read()
    assert process.returncode == code, error
    assert "stopping at the next block" in error
    assert "Finished" not in rest
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == ExitCode.DONE
    for command in ("gen", "info", "decode", "models", "profiles", "doctor"):
        assert command in out
