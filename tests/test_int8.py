"""int8 against optimum-quanto and its error bounds, and the integer product against CUDA's rules."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvlite.quant import int8
from hvlite.quant.int8 import MIN_TOKENS, TOKEN_CHUNK, int_matmul, quantise_int8, quantise_tokens, token_slices
from hvlite.quant.linear import QuantisedLinear
from hvlite.quant.swap import FORMATS
from tests.quantised import DTYPES, quantised, random_weight

INT8, DYNAMIC = FORMATS["int8"], FORMATS["int8-dynamic"]
shapes = st.tuples(st.integers(1, 40), st.integers(1, 300))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_weight_is_off_by_half_a_scale_at_most(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    weight = random_weight(*shape, seed, dtype)
    layer = quantised(INT8, weight)
    scales = layer.get_parameter("scales")[:, None]
    assert ((layer.dequantise() - weight).abs() <= scales * 0.50001).all()
    # no scale is larger than it must be
    assert torch.equal(layer.get_parameter("qweight").abs().amax(1), torch.full(shape[:1], 127, dtype=torch.int8))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 99))
def test_the_numbers_are_those_of_quanto(shape: tuple[int, int], seed: int) -> None:
    from optimum.quanto import absmax_scale, qint8, quantize_weight

    weight = random_weight(shape[0] + 1, shape[1], seed)
    theirs = quantize_weight(weight, qint8, axis=0, scale=absmax_scale(weight, qint8, axis=0))
    ours = quantise_int8(weight)
    assert torch.equal(ours["qweight"], theirs._data)
    assert torch.equal(ours["scales"], theirs._scale.flatten())
    assert torch.equal(quantised(INT8, weight).dequantise(), theirs.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_representable_weights_come_back_exactly(dtype: torch.dtype) -> None:
    weight = torch.arange(-127.0, 128).expand(3, -1) * torch.tensor([[2.0**-9], [1.0], [2.0**5]])
    assert torch.equal(quantised(INT8, weight, dtype=dtype).dequantise(), weight.to(dtype))


def test_a_weight_is_rounded_once_to_the_compute_dtype() -> None:
    weight = random_weight(9, 70)
    exact = quantised(INT8, weight, dtype=torch.float32).dequantise()
    assert torch.equal(quantised(INT8, weight, dtype=torch.bfloat16).dequantise(), exact.bfloat16())


def test_a_row_of_zeros_beside_others_stays_zero() -> None:
    weight = random_weight(3, 16)
    weight[1] = 0
    weight[2] = 1e-42  # a scale of 1e-44 would have lost its digits
    layer = quantised(INT8, weight)
    dequantised = layer.dequantise()
    assert (layer.get_parameter("scales") >= torch.finfo(torch.float32).tiny).all()
    assert not dequantised[1].any()
    assert (dequantised[2] - weight[2]).abs().max() < torch.finfo(torch.float32).tiny


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 60), width=st.integers(1, 100), seed=st.integers(0, 99))
def test_a_token_is_off_by_half_its_scale_at_most(tokens: int, width: int, seed: int) -> None:
    x = random_weight(tokens, width, seed)
    quantised_x, scales = quantise_tokens(x)
    assert ((quantised_x * scales - x).abs() <= scales * 0.50001).all()


def dynamic_pair(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[QuantisedLinear, Tensor, Tensor]:
    """A dynamic Linear, its dequantised weight (fp32), its bias."""
    weight, bias = random_weight(out_features, in_features), torch.randn(out_features)
    layer = quantised(DYNAMIC, weight, bias, dtype)
    return layer, quantised(INT8, weight).dequantise(), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [MIN_TOKENS, TOKEN_CHUNK + MIN_TOKENS - 1, 2 * TOKEN_CHUNK + MIN_TOKENS])
def test_the_integer_product_stays_within_its_bound(dtype: torch.dtype, tokens: int) -> None:
    """Half a token's scale times the weights' magnitudes: the activations' rounding, and nothing else."""
    layer, weight, bias = dynamic_pair(24, 80, dtype)
    x = random_weight(tokens, 80, seed=1)
    bound = 0.5 * quantise_tokens(x)[1] * weight.abs().sum(1)
    exact = F.linear(x, weight)
    rounding = torch.finfo(dtype).eps * (exact.abs() + bias.float().abs() + bound)

    y = layer(x)

    assert y.dtype == dtype
    assert ((y.float() - exact - bias.float()).abs() <= bound + rounding).all()
    out = torch.ones(tokens, 24, dtype=dtype)
    assert ((layer.add_to(x, out).float() - exact - 1).abs() <= bound + rounding + 2 * torch.finfo(dtype).eps).all()


def test_the_integer_product_is_that_of_the_rounded_activations() -> None:
    layer, weight, bias = dynamic_pair(24, 80, torch.float32)
    x = random_weight(TOKEN_CHUNK + 100, 80, seed=1)
    tokens, scales = quantise_tokens(x)
    expected = F.linear(tokens.double() * scales, weight.double(), bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_integer_product_has_the_same_bits_however_it_is_cut(dtype: torch.dtype) -> None:
    layer, _, _ = dynamic_pair(24, 80, dtype)
    x = random_weight(2 * TOKEN_CHUNK + 100, 80, seed=1)
    whole = layer(x)
    assert torch.equal(layer(x[300:400]), whole[300:400])
    assert torch.equal(layer(x, (8, 16)), whole[:, 8:16])
    assert torch.equal(layer(x[:1000].view(4, 250, 80)), whole[:1000].view(4, 250, 24))


@pytest.mark.parametrize(
    ("tokens", "rows", "taken"),
    [
        (32, None, True),
        (31, None, False),
        (1, None, False),
        (32, (8, 16), True),
        (32, (3, 15), False),
    ],
)
def test_few_tokens_and_odd_slices_take_the_dequantised_weight(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows: tuple[int, int] | None, taken: bool
) -> None:
    weight, x = random_weight(24, 80), torch.randn(tokens, 80)
    calls: list[tuple[int, ...]] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append((*a.shape, *b.shape))
        return int_matmul(a, b)

    monkeypatch.setattr(int8, "int_matmul", counted)
    y, plain = quantised(DYNAMIC, weight)(x, rows), quantised(INT8, weight)(x, rows)
    assert bool(calls) is taken
    assert torch.equal(y, plain) is not taken


def test_input_features_that_the_kernel_refuses_take_the_dequantised_weight() -> None:
    weight, x, out = random_weight(24, 84), torch.randn(40, 84), torch.zeros(40, 24)
    dynamic, plain = quantised(DYNAMIC, weight), quantised(INT8, weight)
    assert torch.equal(dynamic(x), plain(x))
    assert torch.equal(dynamic.add_to(x, out.clone()), plain.add_to(x, out.clone()))


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(16, 8, 8), (17, 12, 8), (17, 8, 12)])
def test_what_cuda_would_refuse_is_refused_here(tokens: int, inner: int, outer: int) -> None:
    ones = torch.ones(tokens, inner, dtype=torch.int8), torch.ones(outer, inner, dtype=torch.int8).t()
    with pytest.raises(AssertionError, match="the integer product needs"):
        int_matmul(*ones)
    assert int_matmul(torch.ones(17, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8).t()).unique() == 8


def test_a_token_that_is_not_finite_spoils_its_own_row_only() -> None:
    layer, _, _ = dynamic_pair(24, 80, torch.float32)
    x = torch.randn(40, 80)
    x[7, 3] = float("nan")
    y = layer(x)
    assert y[7].isnan().all()
    assert y[[6, 8]].isfinite().all()


@given(tokens=st.integers(MIN_TOKENS, 5000))
def test_token_slices_cover_every_token_and_none_is_too_short(tokens: int) -> None:
    parts = token_slices(tokens)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(tokens))
    assert all(MIN_TOKENS <= part.stop - part.start < TOKEN_CHUNK + MIN_TOKENS for part in parts)
