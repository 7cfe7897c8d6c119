"""`hvlite profiles` and `hvlite doctor` as a user meets them."""

import json
from pathlib import Path

import pytest
import torch

from hvlite import cli_machine, measure, paths
from hvlite.cli_machine import rates_lines
from hvlite.disk import DiskRate
from hvlite.errors import ExitCode
from hvlite.memory.rates import Compute, Curve, Rates, load_rates
from tests.command_line import call

CURVE = Curve(((64, 1e9), (1024, 2.5e9)))
RATES = Rates(
    made_by="a test",
    compute={"fp32": Compute(matmul=CURVE, attention=CURVE, elementwise=CURVE)},
    dequantise={"int8": 3e9},
    disk_read=2e9,
)

needs_no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is chosen without a card")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = DiskRate(what="a temporary file", read_bytes=10**9, seconds=0.5, cpu_seconds=0.1, device_bytes=10**9)
    monkeypatch.setattr("hvlite.doctor.measure_disk", lambda *_: rate)


def test_ls_has_a_line_for_each(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    (own_home / "profiles").mkdir()
    (own_home / "profiles" / "mine.toml").write_text('base = "8g"\nhost_gib = 4\n')
    code, out, err = call(capsys, "profiles", "ls")
    assert (code, err) == (ExitCode.DONE, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["6g", "8g", "12g", "16g", "24g", "45g", "60g", "cpu", "mine"]
    assert lines[-1].split()[1:7] == ["8", "GiB", "1", "GiB", "4", "GiB"]
    code, out, _ = call(capsys, "profiles", "ls", "--json")
    assert [each["name"] for each in json.loads(out)["profiles"]][-1] == "mine"


def test_show_says_where_each_value_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "profiles", "show", "24g", "--memory", "10", "--weights", "bf16")
    assert code == ExitCode.DONE
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["memory_gib"] == ["10.0", "--memory"]
    assert rows["weights"] == ["bf16", "--weights"]
    assert rows["reserve_gib"][1].endswith("24g.toml")
    assert rows["token_chunk"][0] == "auto"
    code, out, _ = call(capsys, "profiles", "show", "24g", "--memory", "10", "--json")
    shown = json.loads(out)
    assert (shown["settings"]["memory_gib"], shown["sources"]["memory_gib"]) == (10.0, "--memory")


def test_check_reads_one_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "24g"\nhead_groups = 4\n')
    code, out, err = call(capsys, "profiles", "check", str(file))
    assert code == ExitCode.DONE
    assert "head_groups    4" in out
    assert "is a valid profile" in err
    file.write_text('base = "24g"\nhead_group = 4\n')
    code, out, err = call(capsys, "profiles", "check", str(file))
    assert (code, out) == (ExitCode.USAGE, "")
    assert "did you mean 'head_groups'?" in err
    assert call(capsys, "profiles", "check", str(tmp_path / "none.toml"))[0] == ExitCode.USAGE


@needs_no_card
def test_detect_says_what_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "profiles", "detect")
    assert code == ExitCode.DONE
    assert out.splitlines()[0].startswith("device   cpu")
    assert out.splitlines()[1].startswith("auto     cpu")
    code, out, _ = call(capsys, "profiles", "detect", "--json")
    assert json.loads(out)["name"] == "cpu"
    assert call(capsys, "profiles", "detect", "--device", "tpu")[0] == ExitCode.USAGE


def test_gen_takes_a_file_and_flags(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "cpu"\ntoken_chunk = 64\n')
    clip = ("--frames", "1", "--steps", "1", "--size", "32", "32", "--save-path", str(tmp_path), "--device", "cpu")
    flags = ("--model", str(tiny_model), "--profile", str(file), "--memory", "8", "--head-groups", "2")
    code, out, err = call(capsys, "gen", "a", *clip, *flags)
    assert code == ExitCode.DONE, err
    assert json.loads(call(capsys, "info", out.strip(), "--json")[1])["profile"] == "mine"
    code, _, err = call(capsys, "gen", "a", *clip, *flags, "--token-chunk", "65")
    assert code == ExitCode.USAGE
    assert "--token-chunk must be a multiple of 64" in err
    assert call(capsys, "gen", "a", *clip, "--model", str(tiny_model), "--profile", "auto")[0] == ExitCode.DONE


def test_doctor_is_aligned_text_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (ExitCode.DONE, "")
    lines = out.splitlines()
    assert lines[0].startswith("hvlite     0.")
    assert all(line[10] == " " and line[11] != "\t" for line in lines)
    for word in ("torch", "driver", "memory", "disk", "attention", "models", "profile", "pinning"):
        assert any(line.startswith(word) for line in lines)
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == ExitCode.DONE
    values = json.loads(out)
    assert values["disk"]["bytes_per_second"] == 2e9
    assert values["memory"]["total_bytes"] > 0


@pytest.mark.parametrize("others", [0.0, 1.5])
def test_measure_keeps_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, others: float
) -> None:
    found = Rates(**{**{name: getattr(RATES, name) for name in RATES.__slots__}, "others_cores": others})
    monkeypatch.setattr(measure, "measure_rates", lambda *_: found)
    code, out, err = call(capsys, "doctor", "--measure")
    assert code == ExitCode.DONE, err
    assert load_rates(paths.rates_file()) == found
    assert "measured 0 days ago on a test" in out
    assert ("other processes took 1.5 cores" in err) is (others > cli_machine.BUSY_CORES)


def test_rates_are_a_table() -> None:
    assert rates_lines(RATES) == [
        "rates of a test",
        "fp32  matmul       GFLOP/s  by tokens 64: 1, 1024: 2.5",
        "fp32  attention    GFLOP/s  by tokens 64: 1, 1024: 2.5",
        "fp32  elementwise  GB/s     by tokens 64: 1, 1024: 2.5",
        "int8         dequantised at 3 G weights/s",
        "disk           2.00 GB/s",
    ]
