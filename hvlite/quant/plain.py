"""Weights stored in one float dtype and multiplied in another: cast row by row, when they are used.

So a bf16 store is computed in fp32 on a CPU, block by block, without an fp32 copy of any block.
"""

import torch
from torch import Tensor, nn

from hvlite.quant.linear import Layout, QuantisedLinear


class _PlainLinear(QuantisedLinear):
    """A Linear that holds weight [out,in] in a float dtype of its own."""

    weight: nn.Parameter

    def write_rows(self, out: Tensor, start: int, stop: int) -> None:
        out.copy_(self.weight[start:stop])


class Bf16Linear(_PlainLinear):
    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        return {"weight": (torch.bfloat16, (out_features, in_features))}


class Fp16Linear(_PlainLinear):
    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        return {"weight": (torch.float16, (out_features, in_features))}


class Fp32Linear(_PlainLinear):
    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        return {"weight": (torch.float32, (out_features, in_features))}
