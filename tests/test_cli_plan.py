"""`hvlite plan`: its advice can be followed, and it speaks of what it was asked about."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hvlite import Outputs, Request, generate, open_model, paths
from hvlite.events import Parked
from hvlite.memory.rates import card_rates, find_card, save_rates
from hvlite.profile import load_profile
from hvlite.telemetry import cpu_name
from tests.command_line import call

TIGHT = ("plan", "--profile", "6g")
# What does not fit, and words of the advice: knobs that were asked for, and formats that take more than they need.
TOO_LARGE = [
    (("--memory", "4.4", "--head-groups", "1"), "--head-groups auto"),
    (("--memory", "4.4", "--head-groups", "1", "--token-chunk", "2048"), "--head-groups auto"),
    (("--memory", "3.6", "--weights", "bf16"), "--weights int8"),
]


@pytest.mark.parametrize(("flags", "expected"), TOO_LARGE)
def test_advice_can_be_followed(flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *TIGHT, *flags)
    assert code == 3
    advice = out.rpartition("to make it fit: ")[2].strip().split(" or ")
    assert len(advice) == 3
    assert expected in advice
    assert not any(one != other and one in other for one in advice for other in advice)
    for change in advice:
        changed = {**values(" ".join(flags)), **values(change)}
        words = [word for flag, value in changed.items() for word in (f"--{flag}", *value)]
        code, _, err = call(capsys, *TIGHT, *words)
        assert (code, err) == (0, ""), change


def values(flags: str) -> dict[str, list[str]]:
    """What stands behind each flag."""
    return {flag: rest for flag, *rest in (each.split() for each in f" {flags}".split(" --")[1:])}


def test_a_card_chooses_its_profile(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "--card", "3060")
    assert code == 0
    assert "profile 12g" in out
    assert "predicted, by the public figures of the RTX 3060" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--card", "3060", "--profile", "60g"), "the RTX 3060 has 12 GiB, profile 60g wants 60: .*try --profile 12g"),
        (("--card", "3060", "--profile", "cpu"), "--card 3060 is no CPU"),
        (("--verify", "--profile", "cpu"), "a CPU has no memory apart"),
        (("--verify", "--here"), "leave --here away"),
    ],
)
def test_what_cannot_be_told_is_refused(flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "plan", *flags)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(words, err)


def test_rates_of_another_device_predict_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where its dtypes would do: a CPU is not told the seconds of the card that was measured here."""
    rates = card_rates(find_card("4090"), disk_read=1e9)
    ask = ("plan", "--profile", "cpu", "--dtype", "bf16", "--size", "256", "256", "--frames", "1")
    save_rates(rates, paths.rates_file())
    assert "predicted" not in call(capsys, *ask)[1]
    save_rates(replace(rates, made_by=f"{cpu_name()}, 2 threads, torch 2"), paths.rates_file())
    assert "predicted" in call(capsys, *ask)[1]


def test_a_draft_is_planned_for_with_its_share_of_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = card_rates(find_card("4090"), disk_read=1e9)
    save_rates(replace(rates, made_by=f"{cpu_name()}, 2 threads, torch 2"), paths.rates_file())
    (tmp_path / "one.txt").write_text("a")
    ask = ("batch", str(tmp_path / "one.txt"), "--dry-run", "--json", "--device", "cpu", "--dtype", "bf16")
    whole, draft = (
        json.loads(call(capsys, *ask, "--steps", "8", *more)[1])["seconds"] for more in ((), ("--stop-after-step", "4"))
    )
    assert draft == pytest.approx(whole / 2)


def test_a_profile_is_of_what_its_base_is_of(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "cpu"\nmemory_gib = 12\n')
    assert load_profile(file).kind == load_profile("cpu").kind == "cpu"
    file.write_text('base = "24g"\nmemory_gib = 12\n')
    assert load_profile(file).kind == load_profile("24g").kind == "cuda"


def test_what_the_disk_costs_is_told_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("plan", "--profile", "6g", "--weights", "bf16", "--host", "8")
    assert re.search(r"[0-9.]+ GiB of them from disk \([0-9.]+ s at 3\.5 GB/s", call(capsys, *ask)[1])
    save_rates(card_rates(find_card("4090"), disk_read=1e9), paths.rates_file())
    assert re.search(r"[0-9.]+ GiB of them from disk \([0-9.]+ s at 1\.0 GB/s", call(capsys, *ask)[1])


def test_what_is_left_of_a_clip_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = card_rates(find_card("4090"), disk_read=1e9)
    rates = replace(rates, made_by=f"{cpu_name()}, 2 threads, torch 2", compute={"fp32": rates.compute["bf16"]})
    save_rates(rates, paths.rates_file())
    file = tmp_path / "left.safetensors"
    with open_model("shapes") as model:
        run = generate(Request("a red circle", steps=8, frames=5), model, outputs=Outputs(latents=file, stop_after=2))
        assert isinstance(list(run)[-1], Parked)
    ask = ("gen", "--resume", str(file), "--model", "shapes", "--device", "cpu", "--dry-run")
    code, out, _ = call(capsys, *ask)
    assert code == 0
    assert "text 0.0 s, schedule 0.0 s, 6 steps" in out
    assert "may differ" not in out
    code, out, _ = call(capsys, *ask, "--token-chunk", "512")
    assert code == 0
    assert "1 group of heads, 512 tokens a chunk" in out
    assert "(token_chunk 2048 -> 512): its last bits may differ" in out
    code, _, err = call(capsys, *ask, "--dtype", "bf16")
    assert code == 2
    assert "begun in fp32, now bf16" in err
