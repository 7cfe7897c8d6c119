"""int8: a weight as 8-bit integers with one scale for each output channel, symmetric. The numbers are optimum-quanto's.

`Int8Linear` dequantises and multiplies in the compute dtype. `DynamicInt8Linear` holds the same tensors and multiplies
integers: activations get a scale per token on the way in. That is faster where the card has fast integer units and
changes numbers, so it is never chosen unasked.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvlite.quant.linear import Layout, QuantisedLinear, empty_tensors, largest_magnitude, row_chunks
from hvlite.quant.nf4 import without_cpu_gemm

# Below the smallest normal number a scale loses its digits; a row of zeros gets it too, instead of a division by zero.
TINY = torch.finfo(torch.float32).tiny
LARGEST = 127
# CUDA's kernel wants more than 16 rows, and so few are no faster as integers.
MIN_TOKENS = 32
# Products of so many tokens are scaled at a time: the int32 and fp32 copies stay below a dequantised weight's size.
TOKEN_CHUNK = 512


def quantise_int8(weight: Tensor) -> dict[str, Tensor]:
    """weight [out,in] of any float dtype -> qweight int8 [out,in], scales fp32 [out]; off by at most scale / 2."""
    out_features, in_features = weight.shape
    tensors = empty_tensors(Int8Linear.layout(in_features, out_features), weight.device)
    if weight.is_meta:
        return tensors
    largest_magnitude(weight)
    # Brings transformers and, where they are there, diffusers and bitsandbytes: only whoever quantises waits for it.
    with without_cpu_gemm():
        from optimum.quanto import absmax_scale, qint8

    for rows in row_chunks(0, out_features, in_features, weight.device):
        part = weight[rows].float()
        scale = absmax_scale(part, qint8, axis=0).clamp_min_(TINY)
        # quanto refuses an axis of length one
        axis, shape = (0, scale.shape) if len(part) > 1 else (None, torch.Size())
        tensors["qweight"][rows] = torch.ops.quanto.quantize_symmetric(part, torch.int8, axis, scale.reshape(shape))
        tensors["scales"][rows] = scale.flatten()
    return tensors


class Int8Linear(QuantisedLinear):
    """A Linear that holds qweight int8 [out,in] and scales fp32 [out]; W = qweight scales, rounded once."""

    qweight: nn.Parameter
    scales: nn.Parameter

    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        return {
            "qweight": (torch.int8, (out_features, in_features)),
            "scales": (torch.float32, (out_features,)),
        }

    def write_rows(self, out: Tensor, start: int, stop: int) -> None:
        assert self.scales.dtype == torch.float32, f"scales became {self.scales.dtype}; was .to(dtype) called?"
        for rows in row_chunks(start, stop, self.in_features, out.device):
            target = out[rows.start - start : rows.stop - start]
            torch.mul(self.qweight[rows], self.scales[rows, None], out=target)


class DynamicInt8Linear(Int8Linear):
    """The same tensors, multiplied as integers: x is quantised per token, products are summed in int32.

    Fewer than MIN_TOKENS tokens, and slices that CUDA's kernel would refuse, take the way of `Int8Linear`.
    """

    def forward(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        start, stop = self._bounds(rows)
        tokens = x.reshape(-1, self.in_features)
        if not self._takes_integers(len(tokens), stop - start):
            return super().forward(x, rows)
        out = torch.empty(len(tokens), stop - start, dtype=self.dtype, device=x.device)
        bias = self.bias_rows(rows)
        for part, product in self._products(tokens, start, stop):
            out[part] = product if bias is None else product.add_(bias)
        return out.view(*x.shape[:-1], -1)

    def add_to(self, x: Tensor, out: Tensor) -> Tensor:
        if not self._takes_integers(len(x), self.out_features):
            return super().add_to(x, out)
        for part, product in self._products(x, 0, self.out_features):
            out[part].add_(product)
        return out

    def _takes_integers(self, tokens: int, out_features: int) -> bool:
        return tokens >= MIN_TOKENS and self.in_features % 8 == 0 and out_features % 8 == 0

    def _products(self, x: Tensor, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of x W^T in fp32, for rows [start, stop) of W, each with its tokens."""
        weight, scales = self.qweight[start:stop].t(), self.scales[start:stop]
        for part in token_slices(len(x)):
            tokens, token_scales = quantise_tokens(x[part])
            yield part, (int_matmul(tokens, weight) * token_scales).mul_(scales)


def token_slices(tokens: int) -> list[slice]:
    """Slices that cover `tokens`, TOKEN_CHUNK each; a tail too short for the kernel joins the last."""
    starts = list(range(0, tokens, TOKEN_CHUNK))
    if len(starts) > 1 and tokens - starts[-1] < MIN_TOKENS:
        starts.pop()
    return [slice(begin, end) for begin, end in zip(starts, [*starts[1:], tokens], strict=True)]


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M,in] -> int8 [M,in] and one fp32 scale a token [M,1]; the error is at most scale / 2."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scales = largest.div_(LARGEST).clamp_min_(TINY)
    return torch.div(x, scales).round_().to(torch.int8), scales


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M,K] b [K,N] int8 -> int32, held on every device to what CUDA's kernel asks (ATen, _int_mm_out_cuda)."""
    (tokens, inner), outer = a.shape, b.shape[1]
    assert tokens > 16, f"the integer product needs more than 16 tokens, got {tokens}"
    assert inner % 8 == 0, f"the integer product needs input features in multiples of 8, got {inner}"
    assert outer % 8 == 0, f"the integer product needs output features in multiples of 8, got {outer}"
    return torch._int_mm(a, b)
