"""How fast this machine is at what a render does: products and attention at the published widths, elementwise work,
dequantising, copies, the disk.

The operations are the transformer's own. Each figure is the median of several rounds, a while apart, since a step takes
longer than any burst of speed; a busy machine is measured too low.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO
from hvlite.disk import measure_disk
from hvlite.memory.device import device_name, give_back, wait_for
from hvlite.memory.rates import ELEMENTWISE_BYTES, Compute, Curve, Rates
from hvlite.model.ops import RmsNorm, attention, choose_attention, gelu_tanh_, modulate, rotate_into
from hvlite.quant.linear import QuantisedLinear
from hvlite.quant.swap import FORMATS
from hvlite.telemetry import cpu_name, cpu_seconds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD_DIM = HUNYUANVIDEO.dit.head_dim
MLP_RATIO = HUNYUANVIDEO.dit.mlp_ratio
DYNAMIC = "int8-dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured: tokens of products, of attention (and with how many heads), of elementwise work."""

    matmul_tokens: tuple[int, ...]
    attention_tokens: tuple[tuple[int, int], ...]
    elementwise_tokens: tuple[int, ...]
    hidden: int = HUNYUANVIDEO.dit.hidden
    seconds_each: float = 0.2
    rounds: int = 3
    disk_bytes: int = 512 << 20
    copy_bytes: int = 256 << 20


# A minute or two on two cores. The longest sequence attends with fewer heads, to save time.
ON_CPU = Effort(
    matmul_tokens=(1, 16, 64, 256, 1024, 2048),
    attention_tokens=((64, 24), (256, 24), (1024, 24), (4096, 4)),
    elementwise_tokens=(64, 256, 1024, 2048),
)
ON_CUDA = Effort(
    matmul_tokens=(1, 64, 256, 1024, 4096),
    attention_tokens=((256, 24), (1024, 24), (4096, 24), (16384, 24)),
    elementwise_tokens=(64, 1024, 4096),
)


@torch.no_grad()
def measure_rates(device: torch.device, folder: Path, effort: Effort, tell: Callable[[str], None]) -> Rates:
    """Everything; `tell` hears what is measured next. `folder` is where models lie. Raises what `measure_disk` does."""
    compute = {}
    began, busy_before = time.perf_counter(), _others_seconds()
    for name, dtype in DTYPES.items():
        tell(f"computing in {name}")
        rounds = range(effort.rounds)
        compute[name] = Compute(
            matmul=_median([_products(device, dtype, effort) for _ in rounds]),
            attention=_median([_attention(device, dtype, effort) for _ in rounds]),
            elementwise=_median([_elementwise(device, dtype, effort) for _ in rounds]),
        )
    tell("quantised weights")
    dequantise = {name: _dequantised(device, name, effort) for name in FORMATS if name != DYNAMIC}
    int8_matmul = _int8_products(device, effort)
    others = (_others_seconds() - busy_before) / (time.perf_counter() - began)
    give_back(device)
    tell("memory and disk")
    disks = [measure_disk(folder, effort.disk_bytes) for _ in range(effort.rounds)]
    cold = [each for each in disks if each.is_cold]
    return Rates(
        made_by=made_by(device),
        compute=compute,
        dequantise=dequantise,
        int8_matmul=int8_matmul,
        host_to_device=_upload(device, effort) if device.type == "cuda" else None,
        disk_read=statistics.median(each.bytes_per_second for each in cold) if cold else None,
        disk_cpu=statistics.median(each.cpu_seconds / each.read_bytes for each in cold or disks),
        others_cores=max(0.0, others),
    )


def made_by(device: torch.device) -> str:
    """What measured figures hold for: another device, number of threads or torch has others."""
    what = f"{cpu_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)
    return f"{what}, torch {torch.__version__}"


def _others_seconds() -> float:
    """Seconds of all cores that went to other processes, up to now."""
    return cpu_seconds() - time.process_time()


def _median(curves: list[Curve]) -> Curve:
    """The middle rate of each point."""
    rounds = zip(*(each.points for each in curves), strict=True)
    return Curve(tuple((points[0][0], statistics.median(rate for _, rate in points)) for points in rounds))


def _products(device: torch.device, dtype: torch.dtype, effort: Effort) -> Curve:
    """FLOP/s of all matrices of a single block in turn, so that none is in a cache since its last use."""
    hidden, inner = effort.hidden, MLP_RATIO * effort.hidden
    weights = [_random(device, dtype, hidden, hidden) for _ in range(4)]
    up, down = _random(device, dtype, inner, hidden), _random(device, dtype, hidden, inner)

    def multiply(x: Tensor) -> None:
        for weight in weights:
            F.linear(x, weight)
        F.linear(F.linear(x, up), down)

    flops = 2 * (4 + 2 * MLP_RATIO) * hidden**2
    points = []
    for tokens in effort.matmul_tokens:
        x = _random(device, dtype, tokens, hidden)
        points.append((tokens, flops * tokens / _seconds(partial(multiply, x), device, effort)))
    return Curve(tuple(points))


def _attention(device: torch.device, dtype: torch.dtype, effort: Effort) -> Curve:
    """FLOP/s of the back end that a render would use, with what it copies; the heads are some of those side by side."""
    backend = choose_attention(device.type, None, dtype)
    points = []
    for tokens, heads in effort.attention_tokens:
        every = (_random(device, dtype, tokens, effort.hidden // HEAD_DIM, HEAD_DIM) for _ in range(3))
        q, k, v = (each[:, :heads] for each in every)
        seconds = _seconds(partial(attention, q, k, v, backend), device, effort)
        points.append((tokens, 4 * tokens**2 * heads * HEAD_DIM / seconds))
    return Curve(tuple(points))


def _elementwise(device: torch.device, dtype: torch.dtype, effort: Effort) -> Curve:
    """Bytes/s of what a single block does between its products, by the count of bytes that plans use."""
    points = []
    for tokens in effort.elementwise_tokens:
        work = _Elementwise(device, dtype, tokens, effort.hidden)
        seconds = _seconds(work.run, device, effort)
        points.append((tokens, ELEMENTWISE_BYTES * tokens * effort.hidden / seconds))
    return Curve(tuple(points))


class _Elementwise:
    """One chunk of tokens in a single block, with the products already there."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tokens: int, hidden: int) -> None:
        heads = hidden // HEAD_DIM
        self.x = _random(device, dtype, tokens, hidden)
        self.shift, self.scale, self.gate = _random(device, dtype, 3, hidden).unbind()
        self.q, self.k, self.v = _random(device, dtype, 3, tokens, heads, HEAD_DIM).unbind()
        self.norm = RmsNorm(HEAD_DIM).to(device, dtype)
        self.norm.weight.fill_(1.0)
        self.cos, self.sin = _random(device, torch.float32, 2, tokens, HEAD_DIM // 2).unbind()
        self.rotated = torch.empty_like(self.q)
        self.inner = _random(device, dtype, tokens, MLP_RATIO * hidden)
        self.out = _random(device, dtype, tokens, hidden)

    def run(self) -> None:
        modulate(self.x, self.shift, self.scale)
        for part in (self.q, self.k):
            rotate_into(self.rotated, self.norm(part), self.cos, self.sin)
        self.rotated.copy_(self.v)
        modulate(self.x, self.shift, self.scale)
        gelu_tanh_(self.inner)
        self.x += self.out.mul_(self.gate)


def _dequantised(device: torch.device, weights: str, effort: Effort) -> float:
    """Weights/s that come out of a format."""
    linear = _quantised_linear(device, weights, effort.hidden)
    return linear.in_features * linear.out_features / _seconds(linear.dequantise, device, effort)


def _int8_products(device: torch.device, effort: Effort) -> Curve:
    """FLOP/s of products of 8-bit integers, activations quantised on the way in."""
    linear = _quantised_linear(device, DYNAMIC, effort.hidden)
    points = []
    for tokens in effort.matmul_tokens[-2:]:
        x = _random(device, torch.bfloat16, tokens, effort.hidden)
        seconds = _seconds(partial(linear, x), device, effort)
        points.append((tokens, 2 * tokens * linear.in_features * linear.out_features / seconds))
    return Curve(tuple(points))


def _quantised_linear(device: torch.device, weights: str, hidden: int) -> QuantisedLinear:
    """A Linear of random content: of what it holds, only the form counts here."""
    with device:
        linear = FORMATS[weights].linear(hidden, hidden, bias=False, dtype=torch.bfloat16)
    for tensor in linear.parameters():
        filled = torch.rand(tensor.shape) if tensor.dtype.is_floating_point else torch.randint(0, 127, tensor.shape)
        tensor.copy_(filled)
    return linear


def _upload(device: torch.device, effort: Effort) -> float:
    """Bytes/s from pinned memory to the card."""
    source = torch.empty(effort.copy_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return effort.copy_bytes / _seconds(partial(target.copy_, source), device, effort)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _seconds(act: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """The median of some calls, but for the first one, which may wait for imports."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < effort.seconds_each:
        began = time.perf_counter()
        act()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
