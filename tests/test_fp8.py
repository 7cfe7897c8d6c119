"""fp8: error bounds, and the official pair read as the loader reads it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hvlite.errors import WeightsError
from hvlite.quant.fp8 import E4M3, adopt_fp8, quantise_fp8
from hvlite.quant.swap import FORMATS
from hvlite.weights.checkpoint import open_checkpoint
from hvlite.weights.parts import Fp8Weight, Opened
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
@pytest.mark.parametrize("is_scaled", [True, False])
def test_an_fp8_weight_of_a_file_is_taken_as_it_is(tmp_path: Path, dtype: torch.dtype, is_scaled: bool) -> None:
    """The loader's dequantised tensor and this Linear's weight are the same bits; a plain cast has scale 1."""
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": random_weight(6, 40).to(E4M3), "a.scale_weight": torch.tensor([0.00140380859])}, file)
    catalog = open_checkpoint(file)
    opened = Opened(
        file=file,
        layout="A",
        tensors={"a.weight": catalog["a.weight"]},
        scales={"a.weight": catalog["a.scale_weight"]} if is_scaled else {},
        is_scaled=is_scaled,
    )
    published = opened.read("a.weight")
    assert isinstance(published, Fp8Weight)

    made = adopt_fp8(published.weight, published.scale)

    assert made["qweight"] is published.weight
    assert made["scale"].tolist() == [torch.tensor(0.00140380859).item() if is_scaled else 1.0]
    layer = put(FP8.linear(40, 6, bias=False, dtype=dtype), made)
    assert torch.equal(layer.dequantise(), published.dequantised().to(dtype))


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


@pytest.mark.parametrize(("value", "scale"), [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_what_is_not_finite_is_not_adopted(value: float, scale: float) -> None:
    weight = torch.ones(6, 40)
    weight[4, 7] = value
    with pytest.raises(WeightsError, match="cannot be quantised"):
        adopt_fp8(weight.to(E4M3), torch.tensor([scale]))
