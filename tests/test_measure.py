"""Measuring: every figure is there and has the right unit; how large it is depends on the machine."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hvlite import measure
from hvlite.measure import ON_CPU, ON_CUDA, Effort, made_by, measure_rates
from hvlite.memory.rates import BlockWork, Curve, Rates, block_seconds, load_rates, save_rates

TINY = Effort(
    matmul_tokens=(1, 64),
    attention_tokens=((64, 1),),
    elementwise_tokens=(64,),
    hidden=256,
    seconds_each=0.0,
    disk_bytes=1 << 20,
    copy_bytes=1 << 20,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Rates:
    said: list[str] = []
    found = measure_rates(CPU, tmp_path_factory.mktemp("models"), TINY, said.append)
    assert said == ["computing in fp32", "computing in bf16", "quantised weights", "memory and disk"]
    return found


def test_every_figure_is_measured(rates: Rates) -> None:
    assert set(rates.compute) == {"fp32", "bf16"}
    for compute in rates.compute.values():
        assert [tokens for tokens, _ in compute.matmul.points] == [1, 64]
        curves = (compute.matmul, compute.attention, compute.elementwise)
        assert all(rate > 0 for curve in curves for _, rate in curve.points)
    assert set(rates.dequantise) == {"int8", "nf4", "nf4-double", "fp8"}
    assert rates.int8_matmul is not None
    assert rates.host_to_device is None
    assert rates.disk_cpu >= 0
    assert rates.others_cores >= 0
    assert rates.made_by == made_by(CPU)
    assert f"{torch.get_num_threads()} threads" in rates.made_by


def test_measured_rates_survive_their_file(rates: Rates, tmp_path: Path) -> None:
    save_rates(rates, tmp_path / "rates.json")
    assert load_rates(tmp_path / "rates.json") == rates


def test_a_block_can_be_priced_in_every_format(rates: Rates) -> None:
    work = BlockWork(
        kind="double",
        hidden=256,
        mlp_ratio=4,
        video_tokens=200,
        text_tokens=20,
        chunk=128,
        dtype="bf16",
        weights="bf16",
    )
    for weights in ("bf16", "int8", "int8-dynamic", "nf4", "nf4-double", "fp8"):
        assert block_seconds(rates, replace(work, weights=weights)) > 0


def test_the_middle_of_several_tries_counts_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 60.0, 62.0, 70.0, 73.0, 80.0, 89.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure._seconds(lambda: None, CPU, replace(TINY, seconds_each=56.0)) == 3.0


def test_the_middle_of_the_rounds_counts() -> None:
    rounds = [Curve(((1, rate), (64, 2 * rate))) for rate in (3.0, 9.0, 5.0)]
    assert measure._median(rounds) == Curve(((1, 5.0), (64, 10.0)))


def test_products_count_every_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that gives each try one second, the rate is the count itself."""
    monkeypatch.setattr(measure, "_seconds", lambda act, device, effort: 1.0)
    with torch.no_grad():
        (_, one), (_, many) = measure._products(CPU, torch.float32, TINY).points
        ((tokens, attention),) = measure._attention(CPU, torch.float32, TINY).points
    assert one == 2 * 12 * 256**2
    assert many == 64 * one
    assert (tokens, attention) == (64, 4 * 64**2 * 128)


def test_the_real_efforts_are_of_the_published_width() -> None:
    assert ON_CPU.hidden == ON_CUDA.hidden == 3072
