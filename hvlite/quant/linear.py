"""What the quantised Linears share: row slices, the product, and the scratch that a weight is dequantised into.

Each stands wherever `hvlite.model.ops.Linear` or `torch.nn.Linear` does. It holds plain tensors as parameters, so that
a slab's bytes are its parameters as they lie; a format adds nothing but how rows of W come out of them.

Never call `.to(dtype)` on one: it would change the stored tensors. The dtype of the product is a constructor argument.
"""

import math
import threading
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvlite.errors import WeightsError

# On a CPU an operation on two dtypes makes a temporary of its inputs' size, so it gets this many weights at a time.
CHUNK_WEIGHTS = 1 << 20

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Scratch:
    """The memory that dequantised weights lie in: a buffer per thread, device and dtype, grown to the largest need.

    Shared by the Linears that it was given to, and freed with the last of them. On CUDA, reuse is ordered by the stream
    that dequantises and multiplies; a thread that computes on several streams needs a Scratch for each.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for [rows,columns], of any content; this thread's next call reuses it."""
        key = threading.get_ident(), device, dtype
        needed = rows * columns
        if key not in self._buffers or self._buffers[key].numel() < needed:
            self._buffers.pop(key, None)  # freed before the larger one is made
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                self._buffers[key] = torch.empty(needed, dtype=dtype, device=device)
        return self._buffers[key][:needed].view(rows, columns)

    @property
    def nbytes(self) -> int:
        """What all buffers take now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def release(self) -> None:
        """Give all memory back; the next use takes it anew."""
        self._buffers.clear()


class QuantisedLinear(nn.Module, ABC):
    """y = x W^T + b with W [out,in] in another form than the product's; `rows`: only those output features."""

    bias: nn.Parameter | None

    @staticmethod
    @abstractmethod
    def layout(in_features: int, out_features: int) -> Layout:
        """The tensors that hold W."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.scratch = Scratch() if scratch is None else scratch
        for name, tensor in empty_tensors(self.layout(in_features, out_features)).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @abstractmethod
    def write_rows(self, out: Tensor, start: int, stop: int) -> None:
        """Dequantise rows [start, stop) of W into out [stop-start,in], of the product's dtype."""

    def dequantise(self, rows: tuple[int, int] | None = None) -> Tensor:
        """Those rows of W in scratch: good until the next weight is dequantised in this thread."""
        start, stop = self._bounds(rows)
        out = self.scratch.take(stop - start, self.in_features, self.dtype, next(self.parameters()).device)
        self.write_rows(out, start, stop)
        return out

    def forward(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """x [..., in] of any float dtype -> [..., out or stop-start] in the product's dtype."""
        return F.linear(x.to(self.dtype), self.dequantise(rows), self.bias_rows(rows))

    def add_to(self, x: Tensor, out: Tensor) -> Tensor:
        """out [M,out] += x W^T, in place and without bias: one GEMM that accumulates, x [M,in]."""
        return out.addmm_(x.to(self.dtype), self.dequantise().t())

    def bias_rows(self, rows: tuple[int, int] | None) -> Tensor | None:
        """The bias of those output features, in the product's dtype, whichever it is stored in."""
        if self.bias is None:
            return None
        return (self.bias if rows is None else self.bias[slice(*rows)]).to(self.dtype)

    def _bounds(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        start, stop = (0, self.out_features) if rows is None else rows
        assert 0 <= start < stop <= self.out_features, f"rows [{start}, {stop}) of {self.out_features}"
        return start, stop

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, dtype={self.dtype}"


def empty_tensors(layout: Layout, device: torch.device | None = None) -> dict[str, Tensor]:
    """Memory for all of them; None: on the device that new tensors come on."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in layout.items()}


def row_chunks(start: int, stop: int, columns: int, device: torch.device) -> list[slice]:
    """Slices that cover rows [start, stop): one, but on a CPU of at most CHUNK_WEIGHTS weights each."""
    step = max(1, CHUNK_WEIGHTS // columns) if device.type == "cpu" else stop - start
    return [slice(begin, min(begin + step, stop)) for begin in range(start, stop, step)]


def largest_magnitude(weight: Tensor) -> float:
    """Of all values; WeightsError if one is not finite, since it would spoil its neighbours unseen."""
    low, high = (float(value) for value in weight.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise WeightsError(
            f"a weight of shape {list(weight.shape)} holds values from {low} to {high}: it cannot be quantised. "
            "The checkpoint is damaged: get it again."
        )
    return max(-low, high)
