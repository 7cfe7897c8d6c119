"""fp8: a weight as float8 e4m3 with one scale, as in the official fp8 release (spec 2.4), whose tensors fit unchanged.

Storage only: a weight is dequantised to bf16(qweight) x bf16(scale), rounded to bf16, in whatever dtype the product is,
so that the official pair gives the numbers that it gives everywhere.
"""

import torch
from torch import Tensor, nn

from hvlite.quant.linear import Layout, QuantisedLinear, empty_tensors, largest_magnitude, row_chunks

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
TINY = torch.finfo(torch.bfloat16).tiny


def adopt_fp8(weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """An e4m3 weight [out,in] as it is, with its scale (one number; 1 for a plain cast)."""
    assert weight.dtype == E4M3, f"an e4m3 weight can be adopted, this one is {weight.dtype}"
    given = scale.float().reshape(1)
    for rows in row_chunks(0, len(weight), weight.shape[1], weight.device):
        largest_magnitude(weight[rows].bfloat16().mul_(given.bfloat16()))  # for its refusal of what is not finite
    return {"qweight": weight.contiguous(), "scale": given}


def quantise_fp8(weight: Tensor) -> dict[str, Tensor]:
    """weight [out,in] of 16 bits or more -> qweight e4m3 [out,in], scale fp32 [1] = amax / 448."""
    assert weight.dtype.itemsize > 1, f"a weight of {weight.dtype} has a scale already: see adopt_fp8"
    out_features, in_features = weight.shape
    tensors = empty_tensors(Fp8Linear.layout(in_features, out_features), weight.device)
    if weight.is_meta:
        return tensors
    # rounded here as it will be in use: otherwise every weight would be off by the difference
    chosen = torch.tensor([max(largest_magnitude(weight) / LARGEST, TINY)]).bfloat16()
    tensors["scale"].copy_(chosen)
    for rows in row_chunks(0, out_features, in_features, weight.device):
        # a scale that was rounded down leaves up to 448.9, still 448 in e4m3: NaN begins at 464
        tensors["qweight"][rows] = (weight[rows].float() / tensors["scale"]).to(E4M3)
    return tensors


class Fp8Linear(QuantisedLinear):
    """A Linear that holds qweight e4m3 [out,in] and scale fp32 [1]."""

    qweight: nn.Parameter
    scale: nn.Parameter

    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        return {"qweight": (E4M3, (out_features, in_features)), "scale": (torch.float32, (1,))}

    def write_rows(self, out: Tensor, start: int, stop: int) -> None:
        assert self.qweight.dtype == E4M3, f"qweight became {self.qweight.dtype}; was .to(dtype) called?"
        scale = self.scale.bfloat16()
        for rows in row_chunks(start, stop, self.in_features, out.device):
            target = out[rows.start - start : rows.stop - start]
            if out.dtype == torch.bfloat16:
                target.copy_(self.qweight[rows]).mul_(scale)
            else:
                target.copy_(self.qweight[rows].bfloat16().mul_(scale))
