"""Rates: how they depend on tokens, what a block costs by them, the file they are kept in, and the table of cards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO, LatentShape
from hvlite.errors import ProfileError, RequestError
from hvlite.memory.rates import (
    CARDS,
    ELEMENTWISE_BYTES,
    BlockWork,
    Compute,
    Curve,
    Rates,
    block_seconds,
    card_rates,
    find_card,
    load_rates,
    save_rates,
)
from hvlite.model.dit import Activations, Dit
from tests.refusal import refusal

CURVE = Curve(((64, 10.0), (256, 30.0), (1024, 40.0)))
SLOW = Compute(matmul=Curve(((64, 1e9),)), attention=Curve(((64, 1e8),)), elementwise=Curve(((64, 1e7),)))
RATES = Rates(made_by="a test", compute={"bf16": SLOW}, dequantise={"int8": 1e6}, disk_read=2e9)
WORK = BlockWork(
    kind="single",
    hidden=128,
    mlp_ratio=4,
    video_tokens=960,
    text_tokens=64,
    chunk=512,
    dtype="bf16",
    weights="bf16",
)


@pytest.mark.parametrize(("tokens", "rate"), [(64, 10), (256, 30), (1024, 40), (128, 18), (512, 36), (9999, 40)])
def test_a_curve_goes_through_its_points(tokens: int, rate: float) -> None:
    assert CURVE.at(tokens) == pytest.approx(rate)


def test_below_the_first_point_the_time_stays_the_same() -> None:
    assert 32 / CURVE.at(32) == pytest.approx(64 / CURVE.at(64))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_more_tokens_never_take_less_time(first: int, second: int) -> None:
    few, many = sorted((first, second))
    assert few / CURVE.at(few) <= many / CURVE.at(many) * (1 + 1e-9)


def test_a_block_is_the_sum_of_its_parts() -> None:
    products = 2 * 12 * 128**2 * 1024 / 1e9
    attention = 4 * 1024**2 * 128 / 1e8
    elementwise = ELEMENTWISE_BYTES * 1024 * 128 / 1e7
    assert block_seconds(RATES, WORK) == pytest.approx(products + attention + elementwise)
    assert block_seconds(RATES, replace(WORK, kind="double")) == pytest.approx(products + attention + elementwise)


def test_a_quantised_weight_costs_once_for_every_chunk() -> None:
    plain, quantised = (block_seconds(RATES, replace(WORK, weights=weights)) for weights in ("bf16", "int8"))
    assert quantised - plain == pytest.approx(2 * 12 * 128**2 / 1e6)
    double = replace(WORK, kind="double", weights="int8")
    assert block_seconds(RATES, double) - plain == pytest.approx(3 * 12 * 128**2 / 1e6)  # two chunks and the text
    with pytest.raises(KeyError):
        block_seconds(RATES, replace(WORK, weights="nf4"))


def test_without_text_its_stream_costs_nothing() -> None:
    alone = replace(WORK, text_tokens=0)
    assert block_seconds(RATES, replace(alone, kind="double")) == pytest.approx(block_seconds(RATES, alone))


def test_integers_are_multiplied_at_their_own_rate() -> None:
    faster = replace(RATES, int8_matmul=Curve(((64, 4e9),)))
    dynamic = replace(WORK, weights="int8-dynamic")
    assert block_seconds(RATES, dynamic) == pytest.approx(block_seconds(RATES, WORK))
    saved = block_seconds(RATES, dynamic) - block_seconds(faster, dynamic)
    assert saved == pytest.approx(0.75 * 2 * 12 * 128**2 * 1024 / 1e9)


class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation but products, attention and views reads and writes."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        returns = func._schema.returns  # type: ignore[attr-defined]
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not is_view and not any(word in name for word in ("mm", "attention", "empty")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            # the target of a copy is written, not read
            self.nbytes += sum(tensor.nbytes for tensor in tensors[1 if "copy_" in name and "_to" not in name else 0 :])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_traffic_is_that_of_the_blocks_themselves(dtype: torch.dtype) -> None:
    dims = replace(HUNYUANVIDEO.dit, double_blocks=1, single_blocks=1, refiner_blocks=0)
    shape = LatentShape(3, 24, 42)
    with torch.device("meta"):
        dit = Dit(dims).to(dtype)
        work = dit.make_workspace(shape, 64, Activations(), dtype)
        x = torch.empty(shape.tokens + 64, dims.hidden, dtype=dtype)
        vectors = (torch.empty(2, 6, dims.hidden, dtype=dtype), torch.empty(3, dims.hidden, dtype=dtype))
        with torch.no_grad(), Traffic() as traffic:  # type: ignore[no-untyped-call]
            for index, each in enumerate(vectors):
                dit.run_block(index, x, each, work)
    counted = traffic.nbytes / len(vectors) / x.numel()
    assert counted == pytest.approx(ELEMENTWISE_BYTES, rel=0.1)


# The file.


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "home" / "rates.json"
    assert load_rates(file) is None
    save_rates(RATES, file)
    save_rates(replace(RATES, disk_read=1.5e9), file)
    assert load_rates(file) == replace(RATES, disk_read=1.5e9)
    assert paths.rates_file().name == "rates.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-9],
        lambda text: text.replace(b'"format": 1', b'"format": 2'),
        lambda text: text.replace(b"1000000000.0", b"0.0"),
        lambda text: text.replace(b"64", b'"64"'),
        lambda _: b"\xff",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "rates.json"
    save_rates(RATES, file)
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    refusal(lambda: load_rates(file), str(file), "doctor --measure", kind=ProfileError)


# Known cards.


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("rtx-a6000", "RTX A6000"),
        ("a100-80gb", "A100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
    ],
)
def test_a_card_is_found_as_people_write_it(name: str, found: str) -> None:
    assert find_card(name).name == found


def test_an_unknown_card_lists_the_known_ones() -> None:
    refusal(lambda: find_card("RTX 4099"), "did you mean 'RTX 4090'?", "L40S", kind=RequestError)


def test_public_figures_hang_together() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        # dense int8 is twice dense half precision, four times on GeForce, which halves half precision
        assert card.int8_tops / card.half_tflops == pytest.approx(2, rel=0.05) or card.int8_tops == pytest.approx(
            4 * card.half_tflops, rel=0.05
        )
        rates = card_rates(card)
        for compute in rates.compute.values():
            assert compute.matmul.at(4096) <= card.half_tflops * 1e12
            assert compute.matmul.at(1) == pytest.approx(card.memory_gbs * 1e9)  # one token reads two bytes for 2 FLOP
        assert rates.host_to_device == pytest.approx(0.8e9 * card.pcie_gbs)


def test_the_published_step_comes_out_as_reported() -> None:
    """720x1280x129: 56 s a step on an A100, 38 on an H800 (alike an H100), as their makers and users report."""
    seconds = {}
    for name in ("A100 80GB", "H100"):
        rates = card_rates(find_card(name))
        work = replace(WORK, hidden=3072, video_tokens=118_800, text_tokens=256, chunk=4096)
        seconds[name] = 20 * block_seconds(rates, replace(work, kind="double")) + 40 * block_seconds(rates, work)
    assert seconds["A100 80GB"] == pytest.approx(56, rel=0.15)
    assert seconds["H100"] == pytest.approx(38, rel=0.15)
