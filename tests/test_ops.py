"""The transformer's operations against the spec's golden values and plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hvlite.errors import DeviceError
from hvlite.model.ops import (
    Linear,
    RmsNorm,
    attention,
    choose_attention,
    chunks_of,
    make_rope,
    modulate,
    rotate_into,
    sinusoid,
    token_chunks,
)


def test_golden_sinusoid() -> None:
    emb = sinusoid(torch.tensor([1000.0, 6016.0]))
    assert emb.shape == (2, 256)
    first = torch.tensor([0.562379, 0.789627, 0.439928, -0.023645])
    torch.testing.assert_close(emb[0, :4], first, atol=2e-4, rtol=0)
    torch.testing.assert_close(emb[0, [127, 255]], torch.tensor([0.994232, 0.107254]), atol=1e-5, rtol=0)
    sines = torch.tensor([0.826880, 0.613588, -0.898033, 0.999720])
    torch.testing.assert_close(emb[0, 128:132], sines, atol=2e-4, rtol=0)
    second = torch.tensor([-0.988781, 0.999995, 0.636771, -0.892100])
    torch.testing.assert_close(emb[1, :4], second, atol=1e-3, rtol=0)


def test_golden_rope() -> None:
    cos, sin = make_rope((33, 45, 80), 2, (16, 56, 56), 256.0)
    assert cos.shape == (33 * 45 * 80 + 2, 64)
    row = 18571  # token (5, 7, 11)
    channels = [0, 2, 15, 16, 18, 71, 72, 74, 127]
    pairs = [channel // 2 for channel in channels]
    golden_cos = [0.283662, -0.801144, 0.999237, 0.753902, 0.857278, 0.999445, 0.004426, -0.920636, 0.998628]
    golden_sin = [-0.958924, 0.598472, 0.039053, 0.656987, -0.514855, 0.033326, -0.999990, 0.390422, 0.052356]
    torch.testing.assert_close(cos[row, pairs], torch.tensor(golden_cos), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[row, pairs], torch.tensor(golden_sin), atol=1e-5, rtol=0)


def test_text_rows_of_rope_change_no_bit() -> None:
    cos, sin = make_rope((1, 2, 2), 3, (4, 6, 6), 256.0)
    x = torch.randn(7, 2, 16)
    out = torch.empty_like(x)
    rotate_into(out, x, cos, sin)
    assert torch.equal(out[4:], x[4:])
    assert not torch.equal(out[1:4], x[1:4])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_row_slices_of_a_linear_are_slices_of_the_whole() -> None:
    layer = Linear(24, 40)
    torch.nn.init.normal_(layer.weight)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(70, 24)
    torch.testing.assert_close(layer(x, (8, 24)), layer(x)[:, 8:24], atol=1e-5, rtol=1e-5)


def test_modulation_is_fp32_inside_and_the_streams_dtype_outside() -> None:
    x, shift, scale = torch.randn(5, 32), torch.randn(32), torch.randn(32)
    expected = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulate(x, shift, scale), expected)
    half = modulate(x.bfloat16(), shift.bfloat16(), scale.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.05)


def test_rms_norm_rounds_before_the_weight() -> None:
    norm = RmsNorm(16).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(3, 2, 16).bfloat16()
    wide = x.float()
    rounded = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm(x), rounded * norm.weight)


def test_attention_equals_the_formula_and_has_a_meta_kernel() -> None:
    q, k, v = torch.randn(3, 9, 2, 8)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, "sdpa"), expected)
    big = torch.empty(200_000, 24, 128, device="meta", dtype=torch.bfloat16)
    assert attention(big, big, big, "sdpa").shape == big.shape


@given(tokens=st.integers(0, 2000), chunk=st.integers(1, 10).map(lambda n: 64 * n))
def test_token_chunks_cover_every_token_once(tokens: int, chunk: int) -> None:
    chunks = token_chunks(tokens, chunk)
    assert [index for part in chunks for index in range(tokens)[part]] == list(range(tokens))
    for part in chunks[:-1]:
        assert part.stop - part.start == chunk
    last = chunks[-1].stop - chunks[-1].start
    assert len(chunks) == 1 or 64 <= last < chunk + 64


@given(tokens=st.integers(0, 2000), chunk=st.integers(1, 10).map(lambda n: 64 * n))
def test_on_meta_the_longest_chunk_stands_for_all(tokens: int, chunk: int) -> None:
    every = token_chunks(tokens, chunk)
    assert chunks_of(torch.empty(tokens, 1), chunk) == every
    (walked,) = chunks_of(torch.empty(tokens, 1, device="meta"), chunk)
    assert walked in every
    assert walked.stop - walked.start == max(part.stop - part.start for part in every)


def test_flash_attention_is_taken_where_it_works_and_never_for_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert choose_attention("cuda") == "flash"
    assert choose_attention("cuda", "flash") == "flash"
    assert choose_attention("cuda", None, torch.float32) == "sdpa"
    with pytest.raises(DeviceError, match=r"takes bf16 and fp16, not torch\.float32"):
        choose_attention("cuda", "flash", torch.float32)


def test_an_attention_back_end_that_is_not_there_is_refused() -> None:
    assert choose_attention("cpu") == "sdpa"
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        choose_attention("cpu", "flash")
    with pytest.raises(DeviceError, match="unknown attention back end 'xformers'"):
        choose_attention("cpu", "xformers")
