"""nf4 against bitsandbytes and its error bounds, and what its import may not do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvlite.quant.nf4 import load_bitsandbytes
from hvlite.quant.swap import FORMATS
from tests.quantised import DTYPES, quantised, random_weight

NF4, DOUBLE = FORMATS["nf4"], FORMATS["nf4-double"]
# Half of the widest gap in the table, between -1 and -0.6962, of a group's absmax.
WORST = 0.1520
shapes = st.tuples(st.integers(1, 50), st.integers(1, 7).map(lambda groups: 64 * groups))

# Prints what a user would see, and what a package `kernels` was asked for.
IMPORT_QUIETLY = """
import logging
logging.basicConfig()
import torch
from hvlite.quant.int8 import quantise_int8
from hvlite.quant.nf4 import load_bitsandbytes
quantise_int8(torch.ones(2, 8))  # optimum-quanto brings diffusers, which brings bitsandbytes
load_bitsandbytes()
import kernels
print(kernels.asked)
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("other")
"""


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 99))
def test_a_weight_is_off_by_half_a_gap_of_its_group_at_most(shape: tuple[int, int], seed: int) -> None:
    weight = random_weight(*shape, seed)
    layer = quantised(NF4, weight)
    errors = (layer.dequantise() - weight).view(-1, 64).abs()
    assert (errors <= WORST * weight.view(-1, 64).abs().amax(1, keepdim=True)).all()
    assert torch.equal(layer.get_parameter("absmax").flatten(), weight.view(-1, 64).abs().amax(1))


@pytest.mark.parametrize("weights", ["nf4", "nf4-double"])
def test_normal_weights_lose_a_tenth_at_most(weights: str) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    dequantised = quantised(FORMATS[weights], weight).dequantise()
    assert 0.08 < (dequantised - weight).norm() / weight.norm() < 0.1


@settings(deadline=None, max_examples=40)
@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), double=st.booleans())
def test_the_numbers_are_those_of_bitsandbytes(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, double: bool
) -> None:
    functional = load_bitsandbytes()
    weight = random_weight(*shape, seed, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    layer = quantised(DOUBLE if double else NF4, weight, dtype=dtype)
    assert torch.equal(layer.get_parameter("qweight").flatten(), packed.flatten())
    theirs = functional.dequantize_4bit(packed.view(-1, 1), state).view(shape)
    assert torch.equal(layer.dequantise(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_representable_weights_come_back_exactly(dtype: torch.dtype) -> None:
    table = load_bitsandbytes().get_4bit_type("nf4", device="cpu")
    scale = torch.tensor([[2.0**-7], [1.0], [2.0**9]])
    weight = table.repeat(4).expand(3, -1) * scale
    assert torch.equal(quantised(NF4, weight, dtype=dtype).dequantise(), weight.to(dtype))


@pytest.mark.parametrize("weights", ["nf4", "nf4-double"])
def test_input_features_outside_of_groups_are_refused(weights: str) -> None:
    with pytest.raises(AssertionError, match="groups of 64, got 96"):
        FORMATS[weights].quantise(random_weight(4, 96))
    with pytest.raises(AssertionError, match="groups of 64, got 96"):
        FORMATS[weights].linear(96, 4, bias=False, dtype=torch.float32)


@pytest.mark.parametrize(("kind", "name"), [("nf4", "qweight"), ("nf4", "absmax"), ("nf4-double", "absmax")])
def test_strided_tensors_are_refused(kind: str, name: str) -> None:
    """bitsandbytes would read them as if they lay in order."""
    layer = quantised(FORMATS[kind], random_weight(4, 256))
    tensor = layer.get_parameter(name)
    strided = torch.stack([tensor, tensor], dim=-1)[..., 0]
    layer.register_parameter(name, nn.Parameter(strided, requires_grad=False))
    with pytest.raises(AssertionError, match=f"{name} must be contiguous"):
        layer.dequantise()


def test_double_quantisation_saves_most_of_what_absmax_takes() -> None:
    def bits(weights: str) -> float:
        layout = FORMATS[weights].linear.layout(3072, 3072)
        return 8 * sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values()) / 3072**2

    assert bits("nf4") == 4.5
    assert 4.12 < bits("nf4-double") < 4.13


def test_the_imports_are_silent_and_fetch_no_kernel(tmp_path: Path) -> None:
    stub = "asked = []\ndef get_kernel(name, **_): asked.append(name)\n"
    (tmp_path / "kernels.py").write_text(stub, encoding="utf-8")
    root = Path(__file__).resolve().parent.parent

    done = subprocess.run(
        [sys.executable, "-c", IMPORT_QUIETLY],
        cwd=root,
        env={"PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert done.stderr == "WARNING:bitsandbytes.backends.cpu.ops:other\n"
