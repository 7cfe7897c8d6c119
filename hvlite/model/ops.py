"""The operations that the transformer is made of: a Linear that can apply some of its rows, norms, RoPE,
attention.

Rounding follows the reference implementation (spec 1.14): fp32 through LayerNorm, modulation, RMSNorm and
RoPE, rounded to the weights' dtype at the next Linear. Attention is one custom op, so that a run on meta
tensors allocates what a real one does and nothing of size tokens x tokens; its back end is chosen once, by
name.
"""

# S tokens (video first, text after)  H heads  K head dim  D hidden
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvlite.errors import DeviceError

ATTENTION_BACKENDS = ("sdpa", "flash", "sage")
_FUSED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
NORM_EPS = 1e-6


class Linear(nn.Module):
    """y = x W^T + b with W [out,in]; `rows` applies only the output features [start, stop)."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """x [..., in] of any float dtype -> [..., out or stop-start] in the weights' dtype."""
        x = x.to(self.weight.dtype)
        if rows is None:
            return F.linear(x, self.weight, self.bias)
        part = slice(*rows)
        return F.linear(x, self.weight[part], None if self.bias is None else self.bias[part])

    def add_to(self, x: Tensor, out: Tensor) -> Tensor:
        """out += x W^T, in place: one GEMM that accumulates in fp32 onto `out`, without a tensor for the product."""
        return out.addmm_(x.to(self.weight.dtype), self.weight.t())


class RmsNorm(nn.Module):
    """RMSNorm over the head dim; fp32 inside, rounded to x's dtype before the learned scale (spec 1.9)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
        return normed.to(x.dtype).mul_(self.weight)


class AffineLayerNorm(nn.Module):
    """LayerNorm with weight and bias, computed and returned in fp32 (token refiner, spec 1.6)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift; x [S,D], shift and scale [D]; fp32 inside, returned in x's dtype."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return normed.mul_(1 + scale).add_(shift).to(x.dtype)


def make_rope(
    grid: tuple[int, int, int],
    text_tokens: int,
    axes: tuple[int, int, int],
    theta: float,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [t*h*w + text_tokens, K/2] fp32 (spec 1.7), one column for each pair of channels.

    Text tokens get the identity rotation, so that the whole joint sequence is rotated by one rule.
    """
    columns = []
    for axis, (length, width) in enumerate(zip(grid, axes, strict=True)):
        frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        columns.append(angles.view(shape).expand(*grid, width // 2))
    table = torch.cat(columns, dim=-1).flatten(0, 2)
    table = torch.cat([table, torch.zeros(text_tokens, table.shape[1])])
    return table.cos().to(device), table.sin().to(device)


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """out = RoPE(x): channel pairs (2i, 2i+1), fp32, rounded on the store; x, out [S,H,K]; cos, sin [S,K/2]."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    pairs = out.unflatten(-1, (-1, 2))
    pairs[..., 0] = first * cos - second * sin
    pairs[..., 1] = second * cos + first * sin


def sinusoid(position: Tensor, width: int = 256, max_period: float = 10000.0) -> Tensor:
    """position [n] fp32 -> [n,width] fp32, cosines first, then sines (spec 1.3)."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=position.device) / half
    angles = position.float()[:, None] * torch.exp(-torch.log(torch.tensor(max_period)) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def gelu_tanh_(x: Tensor) -> Tensor:
    """GELU by the tanh approximation, in place."""
    return torch.ops.aten.gelu_(x, approximate="tanh")  # type: ignore[no-any-return]


def token_chunks(tokens: int, chunk: int) -> list[slice]:
    """Slices that cover `tokens`, each `chunk` long (a multiple of 64); a tail under 64 joins the last one.

    With such lengths every row of an fp32 CPU product is summed in one order: chunked equals whole bit for
    bit.
    """
    assert chunk % 64 == 0, f"token chunk must be a multiple of 64, got {chunk}"
    starts = list(range(0, max(tokens, 1), chunk))
    if len(starts) > 1 and tokens - starts[-1] < 64:
        starts.pop()
    return [slice(begin, end) for begin, end in zip(starts, [*starts[1:], tokens], strict=True)]


def chunks_of(x: Tensor, chunk: int) -> list[slice]:
    """The `token_chunks` of x [S,...]; on meta the longest alone, since what it takes all others fit into."""
    chunks = token_chunks(len(x), chunk)
    return [max(chunks, key=lambda part: part.stop - part.start)] if x.is_meta else chunks


def choose_attention(device_type: str, asked: str | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """The back end: `asked`, else flash-attn where it is installed on CUDA and takes `dtype`, else SDPA."""
    if asked is not None and asked not in ATTENTION_BACKENDS:
        raise DeviceError(f"unknown attention back end {asked!r}; known: {', '.join(ATTENTION_BACKENDS)}")
    package = {"flash": "flash_attn", "sage": "sageattention"}
    is_half = dtype in (torch.bfloat16, torch.float16)
    if asked in package:
        if device_type == "cpu" or importlib.util.find_spec(package[asked]) is None:
            raise DeviceError(
                f"attention back end {asked!r} needs a CUDA device and the package {package[asked]}; "
                f"device is {device_type}. Install the extra (see README), or use --attention sdpa."
            )
        if not is_half:
            raise DeviceError(f"attention back end {asked!r} takes bf16 and fp16, not {dtype}; use --attention sdpa")
        return asked
    if asked is None and device_type == "cuda" and is_half and importlib.util.find_spec("flash_attn") is not None:
        return "flash"
    return "sdpa"


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Full attention, scale 1/sqrt(K), no mask; q, k, v [S,H,K] -> [S,H,K]."""
    if backend == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q[None], k[None], v[None])[0]  # type: ignore[no-any-return]
    if backend == "sage":
        from sageattention import sageattn

        return sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]  # type: ignore[no-any-return]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.device.type == "cuda":
        # the math kernel would hold S x S: an error is better than that
        with sdpa_kernel(_FUSED_KERNELS):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out[0].transpose(0, 1).contiguous()


attention = torch.library.custom_op("hvlite::attention", _attention, mutates_args=())


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
