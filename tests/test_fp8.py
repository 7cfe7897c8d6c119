"""fp8: error bounds, and the official pair read as the loader reads it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hvlite.quant.fp8 import E4M3, adopt_fp8, quantise_fp8
from hvlite.quant.swap import FORMATS
from hvlite.weights.checkpoint import open_checkpoint
from hvlite.weights.parts import Opened
from tests.quantised import DTYPES, put, quantised, random_weight

FP8 = FORMATS["fp8"]
shapes = st.tuples(st.integers(1, 40), st.integers(1, 300))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_weight_is_off_by_a_sixteenth_at_most(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    """Half a unit in the last of four bits; below the smallest normal number half a step; then bf16's rounding."""
    weight = random_weight(*shape, seed, dtype).float()
    layer = quantised(FP8, weight)
    scale = layer.get_parameter("scale")
    errors = (layer.dequantise() - weight).abs()
    assert (errors <= torch.maximum(weight.abs() * 2**-4, scale * 2**-10) + weight.abs() * 2**-8).all()


@settings(deadline=None, max_examples=200)
@given(largest=st.floats(2.0**-99, 2.0**99, width=32))
def test_the_scale_is_a_448th_of_the_largest_and_nothing_overflows(largest: float) -> None:
    weight = torch.tensor([[largest, -largest, largest / 3, 0.0]])
    made = quantise_fp8(weight)
    torch.testing.assert_close(made["scale"], torch.tensor([largest / 448]), rtol=2**-8, atol=0)
    assert made["qweight"].float().tolist()[0][:2] == [448, -448]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-20, 0, 9])
def test_representable_weights_come_back_exactly(dtype: torch.dtype, power: int) -> None:
    every = torch.arange(256).to(torch.uint8).view(E4M3).float()
    weight = every[every.isfinite()].view(2, 127) * 2.0**power
    assert torch.equal(quantised(FP8, weight, dtype=dtype).dequantise(), weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_official_pair_is_taken_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    """The loader's dequantised tensor and this Linear's weight are the same bits."""
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": random_weight(6, 40).to(E4M3), "a.scale_weight": torch.tensor([0.00140380859])}, file)
    catalog = open_checkpoint(file)
    opened = Opened(
        file=file,
        layout="A",
        tensors={"a.weight": catalog["a.weight"]},
        scales={"a.weight": catalog["a.scale_weight"]},
        is_scaled=True,
    )
    weight, scale = opened.tensors["a.weight"].read(), opened.scales["a.weight"].read()

    made = adopt_fp8(weight, scale)

    assert made["qweight"] is weight
    assert torch.equal(made["scale"], scale)
    layer = put(FP8.linear(40, 6, bias=False, dtype=dtype), made)
    assert torch.equal(layer.dequantise(), opened.read("a.weight").to(dtype))


def test_a_plain_cast_has_scale_one() -> None:
    weight = random_weight(6, 40).to(E4M3)
    layer = put(FP8.linear(40, 6, bias=False, dtype=torch.bfloat16), adopt_fp8(weight, None))
    assert torch.equal(layer.dequantise(), weight.bfloat16())


def test_columns_of_an_fp8_weight_are_adopted_in_order() -> None:
    """A published linear2 is two Linears here, with one scale."""
    weight = random_weight(6, 40).to(E4M3)
    made = adopt_fp8(weight[:, 16:], torch.tensor(0.25))
    layer = put(FP8.linear(24, 6, bias=False, dtype=torch.bfloat16), made)
    assert made["qweight"].is_contiguous()
    assert torch.equal(layer.dequantise(), weight[:, 16:].bfloat16() / 4)


def test_quantising_and_adopting_are_not_mixed_up() -> None:
    """A scale that got lost makes weights 500 times too large."""
    with pytest.raises(AssertionError, match="see adopt_fp8"):
        quantise_fp8(random_weight(6, 40).to(E4M3))
    with pytest.raises(AssertionError, match=r"this one is torch\.float32"):
        adopt_fp8(random_weight(6, 40), torch.ones(1))
