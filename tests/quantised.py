"""Quantised Linears made from random weights, as a loader makes them."""

import torch
from torch import Tensor, nn

from hvlite.quant.linear import QuantisedLinear, Scratch
from hvlite.quant.swap import Format

DTYPES = (torch.float32, torch.bfloat16)


def random_weight(out_features: int, in_features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, each row with a spread of its own over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (torch.rand(out_features, 1, generator=generator) * 3 - 2)
    return (torch.randn(out_features, in_features, generator=generator) * spread).to(dtype)


def put(linear: QuantisedLinear, tensors: dict[str, Tensor]) -> QuantisedLinear:
    """The Linear, holding these tensors, each of which must have the place's shape and dtype."""
    for name, tensor in tensors.items():
        place = linear.get_parameter(name)
        assert (tensor.shape, tensor.dtype) == (place.shape, place.dtype), name
        linear.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return linear


def quantised(
    kind: Format,
    weight: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
) -> QuantisedLinear:
    """A Linear of this format that holds `weight`."""
    out_features, in_features = weight.shape
    linear = kind.linear(in_features, out_features, bias=bias is not None, dtype=dtype, scratch=scratch)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return put(linear, kind.quantise(weight))
