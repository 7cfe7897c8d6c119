"""nf4: a weight as 4-bit indices into bitsandbytes' NormalFloat table, with one absmax for each group of 64.

Groups run along a row and never across two, so a row slice is a slice of every tensor. With double quantisation the
absmax are 8-bit themselves (bitsandbytes' dynamic map, runs of 256 over the whole weight, around their mean): 4.13 bits
a weight instead of 4.5.

bitsandbytes is imported when the first weight is touched: that takes seconds, and this file must not.
"""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from hvlite.quant.linear import Layout, QuantisedLinear, empty_tensors, largest_magnitude, row_chunks

GROUP = 64
ABSMAX_RUN = 256
ABSMAX_CODES = 256


@functools.cache
def load_bitsandbytes() -> ModuleType:
    """`bitsandbytes.functional`, with its operations registered in torch."""
    with without_cpu_gemm():
        import bitsandbytes.functional
    return bitsandbytes.functional


@contextmanager
def without_cpu_gemm() -> Iterator[None]:
    """Keep the import from fetching a compiled CPU kernel off the network, which hvlite never calls.

    bitsandbytes does so where the package `kernels` is installed, and warns where it is not.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hidden = sys.modules.get("kernels")
    logger.addFilter(is_other)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python is told that there is none
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
        logger.removeFilter(is_other)


def quantise_nf4(weight: Tensor) -> dict[str, Tensor]:
    """weight [out,in] of any float dtype, in a multiple of 64 -> qweight uint8 [out,in/2], absmax fp32 [out,in/64]."""
    out_features, in_features = weight.shape
    tensors = empty_tensors(Nf4Linear.layout(in_features, out_features), weight.device)
    if weight.is_meta:
        return tensors
    largest_magnitude(weight)
    functional = load_bitsandbytes()
    for rows in row_chunks(0, out_features, in_features, weight.device):
        packed, state = functional.quantize_4bit(weight[rows].float().contiguous(), blocksize=GROUP, quant_type="nf4")
        tensors["qweight"][rows] = packed.view(-1, in_features // 2)
        tensors["absmax"][rows] = state.absmax.view(-1, in_features // GROUP)
    return tensors


def quantise_nf4_double(weight: Tensor) -> dict[str, Tensor]:
    """As `quantise_nf4`, but absmax uint8; absmax_scales [runs], absmax_offset [1] and absmax_code [256] read it."""
    out_features, in_features = weight.shape
    if weight.is_meta:
        return empty_tensors(DoubleNf4Linear.layout(in_features, out_features), weight.device)
    single = quantise_nf4(weight)
    absmax = single["absmax"]
    offset = absmax.mean()
    quantised, state = load_bitsandbytes().quantize_blockwise(absmax.flatten() - offset, blocksize=ABSMAX_RUN)
    return {
        "qweight": single["qweight"],
        "absmax": quantised.view_as(absmax),
        "absmax_scales": state.absmax,
        "absmax_offset": offset.reshape(1),
        "absmax_code": state.code,
    }


class Nf4Linear(QuantisedLinear):
    """A Linear that holds qweight uint8 [out,in/2], two weights a byte, and absmax fp32 [out,in/64]."""

    qweight: nn.Parameter
    absmax: nn.Parameter

    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        assert in_features % GROUP == 0, f"nf4 needs input features in groups of {GROUP}, got {in_features}"
        return {
            "qweight": (torch.uint8, (out_features, in_features // 2)),
            "absmax": (torch.float32, (out_features, in_features // GROUP)),
        }

    def group_absmax(self, rows: slice) -> Tensor:
        """The absmax of those rows' groups, fp32, in order."""
        assert self.absmax.dtype == torch.float32, f"absmax became {self.absmax.dtype}; was .to(dtype) called?"
        return self.absmax[rows]

    def write_rows(self, out: Tensor, start: int, stop: int) -> None:
        load_bitsandbytes()
        dequantise = torch.ops.bitsandbytes.dequantize_4bit
        for rows in row_chunks(start, stop, self.in_features, out.device):
            target = out[rows.start - start : rows.stop - start]
            qweight, absmax = self.qweight[rows], self.group_absmax(rows)
            # the kernels read from the first byte on, whatever the strides say
            assert qweight.is_contiguous(), "qweight must be contiguous"
            assert absmax.is_contiguous(), "absmax must be contiguous"
            layout = GROUP, "nf4", target.shape, target.dtype
            if target.device.type == "cpu":  # where the operation has no `out`
                target.copy_(dequantise.default(qweight, absmax, *layout))
            elif not target.is_meta:
                dequantise.out(qweight, absmax, *layout, out=target)


class DoubleNf4Linear(Nf4Linear):
    """An Nf4Linear whose absmax are uint8 [out,in/64] in runs of 256 with a scale each, around one offset."""

    absmax_scales: nn.Parameter
    absmax_offset: nn.Parameter
    absmax_code: nn.Parameter

    @staticmethod
    def layout(in_features: int, out_features: int) -> Layout:
        groups = out_features * (in_features // GROUP)
        return {
            **Nf4Linear.layout(in_features, out_features),
            "absmax": (torch.uint8, (out_features, in_features // GROUP)),
            "absmax_scales": (torch.float32, (-(-groups // ABSMAX_RUN),)),
            "absmax_offset": (torch.float32, (1,)),
            "absmax_code": (torch.float32, (ABSMAX_CODES,)),
        }

    def group_absmax(self, rows: slice) -> Tensor:
        """Dequantises the runs of 256 that these rows' groups lie in, and cuts the rows out."""
        assert self.absmax_scales.dtype == torch.float32, "absmax_scales changed dtype; was .to(dtype) called?"
        assert self.absmax.is_contiguous(), "absmax must be contiguous"
        groups = self.in_features // GROUP
        first, last = rows.start * groups, rows.stop * groups
        runs = slice(first // ABSMAX_RUN, -(-last // ABSMAX_RUN))
        begin = runs.start * ABSMAX_RUN
        values = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax.view(-1)[begin : runs.stop * ABSMAX_RUN],
            self.absmax_scales[runs],
            self.absmax_code,
            ABSMAX_RUN,
            torch.float32,
        )
        wanted: Tensor = values.add_(self.absmax_offset)[first - begin : last - begin]
        return wanted.view(-1, groups)
