"""What holds for the Linears of every format: interface, row slices, scratch, meta, refusals."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hvlite.quant.linear as quant_linear
from hvlite.errors import WeightsError
from hvlite.quant.linear import Scratch, row_chunks
from hvlite.quant.swap import FORMATS
from tests.quantised import DTYPES, quantised, random_weight

# Few tokens: `int8-dynamic` then does what `int8` does; its own way is tested in test_int8.py.
TOKENS = 7
every_format = pytest.mark.parametrize("weights", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_format
def test_a_quantiser_makes_what_the_linear_holds(weights: str) -> None:
    kind = FORMATS[weights]
    layout = kind.linear.layout(128, 6)
    for device in ("cpu", "meta"):
        made = kind.quantise(random_weight(6, 128).to(device))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()} == layout
        assert {tensor.device.type for tensor in made.values()} == {device}
    held = dict(kind.linear(128, 6, bias=True, dtype=torch.bfloat16).named_parameters())
    assert set(held) == {*layout, "bias"}
    assert not any(parameter.requires_grad for parameter in held.values())


@every_format
@every_dtype
def test_forward_is_a_product_with_the_dequantised_weight(weights: str, dtype: torch.dtype) -> None:
    weight, bias, x = random_weight(12, 64), torch.randn(12), torch.randn(2, TOKENS, 64)
    layer = quantised(FORMATS[weights], weight, bias, dtype)
    whole, part = layer.dequantise().clone(), layer.dequantise((4, 9)).clone()

    assert torch.equal(layer(x), F.linear(x.to(dtype), whole, bias.to(dtype)))
    assert torch.equal(layer(x[0]), F.linear(x[0].to(dtype), whole, bias.to(dtype)))
    assert torch.equal(layer(x, (4, 9)), F.linear(x.to(dtype), part, bias[4:9].to(dtype)))
    assert layer(x).dtype == dtype
    assert layer(x[0, :0]).shape == (0, 12)


@every_format
@every_dtype
def test_add_to_accumulates_without_bias(weights: str, dtype: torch.dtype) -> None:
    x, before = torch.randn(TOKENS, 64), torch.randn(TOKENS, 12).to(dtype)
    layer = quantised(FORMATS[weights], random_weight(12, 64), torch.randn(12), dtype)
    expected = torch.addmm(before, x.to(dtype), layer.dequantise().clone().t())

    out = before.clone()

    assert layer.add_to(x, out) is out
    assert torch.equal(out, expected)


@every_format
@every_dtype
@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 6)),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    chunk=st.sampled_from([64, 1000, 1 << 20]),
)
def test_row_slices_are_slices_of_the_whole_bit_for_bit(
    weights: str, dtype: torch.dtype, shape: tuple[int, int], cut: tuple[float, float], chunk: int
) -> None:
    """Also where a run of 256 groups begins inside a row, and whichever way a CPU cuts the work."""
    out_features, in_features = shape[0], 64 * shape[1]
    start = int(min(cut) * (out_features - 1))
    stop = start + 1 + int(max(cut) * (out_features - 1 - start))
    layer = quantised(FORMATS[weights], random_weight(out_features, in_features), dtype=dtype)
    whole = layer.dequantise().clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_linear, "CHUNK_WEIGHTS", chunk)
        again = FORMATS[weights].quantise(random_weight(out_features, in_features))
        part = layer.dequantise((start, stop))

    assert torch.equal(part, whole[start:stop])
    for name, tensor in again.items():
        assert torch.equal(tensor.view(torch.uint8), layer.get_parameter(name).view(torch.uint8)), name


@every_format
@every_dtype
def test_on_meta_nothing_is_computed_and_the_scratch_is_counted(weights: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        layer = FORMATS[weights].linear(3072, 12288, bias=True, dtype=dtype)
        x, out = torch.empty(4, 2048, 3072), torch.empty(2048, 12288, dtype=dtype)

    y = layer(x, (128, 3200))

    assert (y.shape, y.dtype, y.device.type) == ((4, 2048, 3072), dtype, "meta")
    assert layer.add_to(x[0], out).shape == out.shape
    layer(x[0, :1])
    assert layer.scratch.nbytes == 12288 * 3072 * dtype.itemsize


@every_format
def test_rows_outside_the_weight_are_refused(weights: str) -> None:
    layer = quantised(FORMATS[weights], random_weight(8, 64))
    for rows in ((0, 9), (-1, 4), (4, 4)):
        with pytest.raises(AssertionError, match="of 8"):
            layer.dequantise(rows)


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weights: str, value: float) -> None:
    weight = random_weight(8, 64)
    weight[3, 5] = value
    with pytest.raises(WeightsError, match=r"shape \[8, 64\] holds values from .*: it cannot be quantised"):
        FORMATS[weights].quantise(weight)


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_quantised_from_their_exact_values(weights: str, dtype: torch.dtype) -> None:
    weight = random_weight(8, 64, dtype=dtype)
    narrow, wide = FORMATS[weights].quantise(weight), FORMATS[weights].quantise(weight.float())
    for name, tensor in wide.items():
        assert torch.equal(narrow[name].view(torch.uint8), tensor.view(torch.uint8)), name


@every_format
def test_a_weight_of_zeros_stays_zeros(weights: str) -> None:
    assert torch.equal(quantised(FORMATS[weights], torch.zeros(8, 64)).dequantise(), torch.zeros(8, 64))


@every_format
def test_casting_the_stored_tensors_does_not_pass_unseen(weights: str) -> None:
    layer = quantised(FORMATS[weights], random_weight(8, 64)).to(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"was \.to\(dtype\) called"):
        layer(torch.randn(3, 64))


def test_scratch_grows_to_the_largest_weight_and_is_given_back() -> None:
    scratch = Scratch()
    small, large = (quantised(FORMATS["int8"], random_weight(n, 64), scratch=scratch) for n in (4, 16))

    small.dequantise()
    assert scratch.nbytes == 4 * 64 * 4
    first = large.dequantise().data_ptr()
    assert small.dequantise().data_ptr() == first
    assert scratch.nbytes == 16 * 64 * 4
    scratch.release()
    assert scratch.nbytes == 0


def test_scratch_made_in_inference_mode_is_good_outside() -> None:
    layer = quantised(FORMATS["int8"], random_weight(4, 64))
    with torch.inference_mode():
        inside = layer(torch.ones(1, 64)).clone()
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 64)), inside)


def test_threads_do_not_share_scratch() -> None:
    scratch, places = Scratch(), []

    def take() -> None:
        places.append(scratch.take(4, 4, torch.float32, torch.device("cpu")).data_ptr())

    take()
    other = threading.Thread(target=take)
    other.start()
    other.join()
    take()
    assert places[0] == places[2] != places[1]


@given(start=st.integers(0, 50), length=st.integers(1, 50), columns=st.integers(1, 1 << 21))
def test_row_chunks_cover_every_row_once(start: int, length: int, columns: int) -> None:
    for device in ("cpu", "meta"):
        chunks = row_chunks(start, start + length, columns, torch.device(device))
        assert [row for part in chunks for row in range(part.start, part.stop)] == list(range(start, start + length))
        assert device == "cpu" or len(chunks) == 1
