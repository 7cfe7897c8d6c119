"""The causal 3D VAE: frames to moments, latents to frames, for a whole clip or one tile of it (spec 3).

Parameters carry the published names, so a published state dict loads as it is. Tiling lives in `memory.tiles`,
the scaling factor with the caller. Two things surprise: every tensor in here lies [B,T,H,W,C], which oneDNN and
cuDNN prefer and in which norms and 1x1x1 convolutions need no copy; and no padded, normalised or enlarged copy of
a whole tensor is made: a convolution reads a `Source` a few frames at a time, through one padded buffer.

    B batch   T frames   H, W height and width   C channels   G norm groups
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvlite.dims import VaeDims

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)

# Elements handled at once. On a CPU a convolution's buffer should stay in the last cache, an element-wise block
# in L2; elsewhere a launch must be worth its while, and the buffers must stay small beside the activations.
CONV_ELEMENTS_CPU, CONV_ELEMENTS = 2**21, 2**26
BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS = 2**18, 2**24

Stride = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """Frames as a convolution reads them: `write(start, stop, into)` puts them into `into` [B,t,H,W,C]."""

    shape: tuple[int, int, int, int, int]
    write: Callable[[int, int, Tensor], None]


def plain(x_BTHWC: Tensor) -> Source:
    """The frames as they are, in the reader's dtype."""

    def write(start: int, stop: int, into: Tensor) -> None:
        into.copy_(x_BTHWC[:, start:stop])

    return Source(_shape(x_BTHWC), write)


def normalised(x_BTHWC: Tensor, norm: nn.GroupNorm, *, silu: bool = True) -> Source:
    """GroupNorm over the whole clip, then SiLU, both in fp32 (spec 3.5), rounded to the reader's dtype."""
    scale, shift = (_line(values, x_BTHWC.shape[3])[:, None] for values in _scale_and_shift(x_BTHWC, norm))

    def write(start: int, stop: int, into: Tensor) -> None:
        source, target = _lines(x_BTHWC[:, start:stop]), _lines(into)
        for block in _blocks(source):
            _apply_lines(source[block], scale, shift, target[block], silu)

    return Source(_shape(x_BTHWC), write)


def upsampled(x_BTHWC: Tensor, *, doubles_time: bool) -> Source:
    """Nearest neighbour, twice as high and wide; in time all frames but the first double too: T -> 2T-1."""
    batch, frames, height, width, channels = x_BTHWC.shape

    def write(start: int, stop: int, into: Tensor) -> None:
        cells = into.view(*into.shape[:2], height, 2, width, 2, channels)
        for frame in range(start, stop):
            small = x_BTHWC[:, (frame + 1) // 2 if doubles_time else frame]
            cells[:, frame - start].copy_(small[:, :, None, :, None])

    return Source((batch, 2 * frames - 1 if doubles_time else frames, 2 * height, 2 * width, channels), write)


def _shape(x_BTHWC: Tensor) -> tuple[int, int, int, int, int]:
    batch, frames, height, width, channels = x_BTHWC.shape
    return batch, frames, height, width, channels


def _lines(x_BTHWC: Tensor) -> Tensor:
    """The view [B,T,H,W*C]: rows long enough for vector instructions whatever the channel count."""
    return x_BTHWC.view(*x_BTHWC.shape[:3], -1)


def _blocks(lines: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts of [B,T,H,W*C] along T, or along H too where one frame is large."""
    limit = BLOCK_ELEMENTS_CPU if lines.device.type == "cpu" else BLOCK_ELEMENTS
    batch, frames, height, line = lines.shape
    rows = max(1, min(height, limit // (batch * line)))
    step = max(1, limit // (batch * line * height))
    for frame in range(0, frames, step):
        for row in range(0, height, rows):
            yield slice(None), slice(frame, frame + step), slice(row, row + rows)


def _apply_lines(x: Tensor, scale: Tensor, shift: Tensor, into: Tensor, silu: bool) -> None:
    if into.dtype == torch.float32 == x.dtype:
        torch.addcmul(shift, x, scale, out=into)
        if silu:
            F.silu(into, inplace=True)
        return
    values = torch.addcmul(shift, x.float(), scale)
    into.copy_(F.silu(values, inplace=True) if silu else values)


def _line(values_BC: Tensor, width: int) -> Tensor:
    """What `_lines` are combined with: the values for every pixel of a row, [B,1,W*C] in fp32."""
    return values_BC.float()[:, None].expand(-1, width, -1).flatten(1)[:, None]


def _scale_and_shift(x_BTHWC: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Per-channel scale and shift [B,C], fp64, that are this GroupNorm on this clip."""
    mean, variance = group_moments(x_BTHWC, norm.num_groups)
    per_group = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, 1) * norm.weight.double()
    return scale, norm.bias.double() - mean.repeat_interleave(per_group, 1) * scale


def group_moments(x_BTHWC: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B,G], fp64, over all frames, pixels and the channels of a group.

    Sums are taken about each channel's mean in the first frame, block by block in fp32 and together in fp64: right
    also where the mean is a thousand times the deviation.
    """
    batch, frames, height, width, channels = x_BTHWC.shape
    pivot_BC = x_BTHWC[:, 0].float().mean((1, 2))
    pivot_line = _line(pivot_BC, width)
    lines = _lines(x_BTHWC)
    total, squares = pivot_BC.new_zeros((2, batch, channels), dtype=torch.float64)
    for block in _blocks(lines):
        deviations = lines[block].flatten(1, 2).float() - pivot_line
        total += deviations.sum(1).view(batch, width, channels).sum(1, dtype=torch.float64)
        squares += deviations.square_().sum(1).view(batch, width, channels).sum(1, dtype=torch.float64)
    count = frames * height * width
    mean = (pivot_BC + total / count).unflatten(1, (groups, -1))
    variance = (squares / count - (total / count).square()).unflatten(1, (groups, -1))
    group_mean = mean.mean(-1)
    return group_mean, (variance + (mean - group_mean[..., None]).square()).mean(-1)


def causal_conv(conv: nn.Conv3d, source: Source, add_to: Tensor | None = None) -> Tensor:
    """Replicate-padded convolution, two frames of padding in front (spec 3.2) -> [B,T',H',W',C'].

    With `add_to` the result is added there in place. A clip of one frame is convolved in 2-D with the weight
    summed over time: the same numbers up to fp32 rounding, a third of the work.
    """
    weight, frames, step = conv.weight, source.shape[1], conv.stride[0]
    front = weight.shape[2] - 1
    if frames == 1 and may_sum(weight):
        weight, front = weight.sum(2, keepdim=True), 0
    out = add_to
    for start, stop, padded in _read_padded(source, weight, front, step):
        chunk = _convolve(padded, weight, conv.bias, conv.stride)
        if out is None and stop == frames:
            return chunk
        if out is None:
            out = chunk.new_empty(chunk.shape[0], (frames - 1) // step + 1, *chunk.shape[2:])
        target = out[:, start // step : start // step + chunk.shape[1]]
        if add_to is None:
            target.copy_(chunk)
        else:
            target.add_(chunk)
    assert out is not None
    return out


def may_sum(weight: Tensor) -> bool:
    """Taps are summed in fp32 only: elsewhere a sum would be rounded to another weight than the model's."""
    return weight.dtype == torch.float32


def upsample_conv(conv: nn.Conv3d, x_BTHWC: Tensor, *, doubles_time: bool) -> Tensor:
    """Nearest upsampling and the causal convolution after it (spec 3.3) -> [B,T',2H,2W,C']."""
    if may_sum(conv.weight):
        return _upsample_folded(conv, x_BTHWC, doubles_time and x_BTHWC.shape[1] > 1)
    return causal_conv(conv, upsampled(x_BTHWC, doubles_time=doubles_time))


def _upsample_folded(conv: nn.Conv3d, x_BTHWC: Tensor, doubles_time: bool) -> Tensor:
    """Convolve the small frames, not the enlarged ones: 8 taps an output (12 without time) instead of 27.

    Along a doubled axis the three taps of an output meet only two different inputs, and which two taps share one
    depends on whether the output's index is even or odd: a small kernel for every combination of parities.
    """
    batch, frames, height, width, _ = x_BTHWC.shape
    weight_OTHWI = conv.weight.permute(0, 2, 3, 4, 1)
    if frames == 1:
        weight_OTHWI = weight_OTHWI.sum(1, keepdim=True)
    kernels = list(_folded_kernels(weight_OTHWI, doubles_time))
    front = kernels[0][1].shape[2] - 1
    out_frames = 2 * frames - 1 if doubles_time else frames
    out = x_BTHWC.new_empty(batch, out_frames, 2 * height, 2 * width, conv.out_channels)
    cells = out.view(batch, out_frames, height, 2, width, 2, conv.out_channels)
    for start, stop, padded in _read_padded(plain(x_BTHWC), conv.weight, front, 1):
        for (t, y, x), kernel in kernels:
            inputs = padded[:, :, y : y + height + 1, x : x + width + 1]
            if doubles_time:
                # The frame between 0 and the padding in front of it does not exist.
                first = max(start, 1) if t else start
                inputs, outputs = inputs[:, first - start :], slice(2 * first - t, 2 * stop - 1, 2)
            else:
                outputs = slice(start, stop)
            if inputs.shape[1] > front:
                cells[:, outputs, :, y, :, x].copy_(_convolve(inputs, kernel, conv.bias, (1, 1, 1)))
    return out


def _folded_kernels(weight_OTHWI: Tensor, time: bool) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """The parities (t, y, x) of an output, and its kernel [O,I,t,2,2]; t is 1 for the frames in between."""
    for t in (0, 1) if time else (0,):
        along_t = _fold(weight_OTHWI, 1, t) if time else weight_OTHWI
        for y in (0, 1):
            along_y = _fold(along_t, 2, y)
            for x in (0, 1):
                yield (t, y, x), _fold(along_y, 3, x).permute(0, 4, 1, 2, 3)


def _fold(weight: Tensor, axis: int, parity: int) -> Tensor:
    """Three taps on a doubled axis as two on the axis itself."""
    before, centre, after = weight.unbind(axis)
    return torch.stack((before + centre, after) if parity else (before, centre + after), axis)


def _read_padded(source: Source, weight: Tensor, front: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, frames start-front..stop with one replicated pixel around), the buffer being reused.

    Chunks are whole multiples of the time stride `step`, so that cutting changes no output frame.
    """
    batch, frames, height, width, channels = source.shape
    limit = CONV_ELEMENTS_CPU if weight.device.type == "cpu" else CONV_ELEMENTS
    chunk = max(1, limit // (batch * height * width * channels) // step) * step
    chunk = min(chunk, frames)
    shape = (batch, front + chunk, height + 2, width + 2, channels)
    buffer = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    for start in range(0, frames, chunk):
        stop = min(start + chunk, frames)
        if start > 0 and front > 0:
            buffer[:, :front] = buffer[:, chunk:].clone()
        fresh = buffer[:, front : front + stop - start]
        source.write(start, stop, fresh[:, :, 1:-1, 1:-1])
        _replicate_edges(fresh)
        if start == 0:
            buffer[:, :front] = fresh[:, :1]
        yield start, stop, buffer[:, : front + stop - start]


def _replicate_edges(padded_BTHWC: Tensor) -> None:
    """Rows first, then columns: so the corners get theirs."""
    padded_BTHWC[:, :, 0] = padded_BTHWC[:, :, 1]
    padded_BTHWC[:, :, -1] = padded_BTHWC[:, :, -2]
    padded_BTHWC[:, :, :, 0] = padded_BTHWC[:, :, :, 1]
    padded_BTHWC[:, :, :, -1] = padded_BTHWC[:, :, :, -2]


def _convolve(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    """An unpadded convolution of frames that lie [B,T,H,W,C].

    torch sends small fp32 convolutions with a batch of one to a kernel five times slower than oneDNN: oneDNN is
    asked directly wherever it can do the job.
    """
    x = x_BTHWC.permute(0, 4, 1, 2, 3)
    if _onednn_takes(x):
        out = torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    else:
        out = F.conv3d(x, weight, bias, stride)
    return out.permute(0, 2, 3, 4, 1).contiguous()


def _onednn_takes(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() is True
    return x.dtype == torch.float32


def pointwise(conv: nn.Conv3d, x_BTHWC: Tensor) -> Tensor:
    """A 1x1x1 convolution, which is a Linear over the channels."""
    return F.linear(x_BTHWC, conv.weight.flatten(1), conv.bias)


class CausalConv(nn.Module):
    """Holds a convolution under its published name; `causal_conv` runs it."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: Stride = (1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, kernel, stride)


class Resnet(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, NORM_EPS)
        self.conv1 = CausalConv(channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, NORM_EPS)
        self.conv2 = CausalConv(out_channels, out_channels)
        self.conv_shortcut = None
        if channels != out_channels:
            self.conv_shortcut = CausalConv(channels, out_channels, kernel=1)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """Consumes its input: the sum is made in place."""
        hidden = causal_conv(self.conv1.conv, normalised(x_BTHWC, self.norm1))
        if self.conv_shortcut is not None:
            x_BTHWC = pointwise(self.conv_shortcut.conv, x_BTHWC)
        return causal_conv(self.conv2.conv, normalised(hidden, self.norm2), add_to=x_BTHWC)


class FrameAttention(nn.Module):
    """Single-head attention of the middle block: a pixel of frame f sees all of frames 0..f (spec 3.3)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """Consumes its input. One frame's queries at a time against the keys so far need no mask."""
        frames, pixels = x_BTHWC.shape[1], x_BTHWC.shape[2] * x_BTHWC.shape[3]
        normed = torch.empty_like(x_BTHWC)
        normalised(x_BTHWC, self.group_norm, silu=False).write(0, frames, normed)
        tokens_BNC = normed.flatten(1, 3)
        q, k, v = (linear(tokens_BNC)[:, None] for linear in (self.to_q, self.to_k, self.to_v))
        for frame in range(frames):
            now, seen = slice(frame * pixels, (frame + 1) * pixels), slice(0, (frame + 1) * pixels)
            attended = F.scaled_dot_product_attention(q[:, :, now], k[:, :, seen], v[:, :, seen])
            tokens_BNC[:, now] = attended[:, 0]  # the normed tokens are used up: their place holds the result
        return x_BTHWC.add_(self.to_out[0](tokens_BNC).view_as(x_BTHWC))


class MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        x_BTHWC = self.attentions[0](self.resnets[0](x_BTHWC))
        x_BTHWC = self.resnets[1](x_BTHWC)
        return x_BTHWC


class Level(nn.Module):
    """The resnets of one resolution."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int):
        super().__init__()
        inputs = [channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList([Resnet(width, out_channels, groups) for width in inputs])

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        for resnet in self.resnets:
            x_BTHWC = resnet(x_BTHWC)
        return x_BTHWC


class Downsample(nn.Module):
    """A causal convolution with stride: T -> (T-1)/2+1 where time is halved."""

    def __init__(self, channels: int, time_ratio: int, space_ratio: int):
        super().__init__()
        self.conv = CausalConv(channels, channels, stride=(time_ratio, space_ratio, space_ratio))

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return causal_conv(self.conv.conv, plain(x_BTHWC))


class Upsample(nn.Module):
    """Nearest upsampling, then a causal convolution: T -> 2T-1 where time is doubled."""

    def __init__(self, channels: int, time_ratio: int):
        super().__init__()
        self.doubles_time = time_ratio == 2
        self.conv = CausalConv(channels, channels)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return upsample_conv(self.conv.conv, x_BTHWC, doubles_time=self.doubles_time)


class DownBlock(Level):
    """Resnets, then a step down unless this is the last level."""

    def __init__(self, channels: int, out_channels: int, dims: VaeDims, ratios: tuple[int, int]):
        super().__init__(channels, out_channels, dims.layers_per_block, dims.norm_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, *ratios)] if max(ratios) > 1 else [])

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        x_BTHWC = super().forward(x_BTHWC)
        for downsample in self.downsamplers:
            x_BTHWC = downsample(x_BTHWC)
        return x_BTHWC


class UpBlock(Level):
    """One resnet more than its counterpart in the encoder, then a step up unless this is the last level."""

    def __init__(self, channels: int, out_channels: int, dims: VaeDims, ratios: tuple[int, int]):
        super().__init__(channels, out_channels, dims.layers_per_block + 1, dims.norm_groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels, ratios[0])] if max(ratios) > 1 else [])

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        x_BTHWC = super().forward(x_BTHWC)
        for upsample in self.upsamplers:
            x_BTHWC = upsample(x_BTHWC)
        return x_BTHWC


class Encoder(nn.Module):
    """Frames -> moments, before `quant_conv`."""

    def __init__(self, dims: VaeDims):
        super().__init__()
        outputs = dims.channels
        levels = zip((outputs[0], *outputs[:-1]), outputs, dims.level_ratios, strict=True)
        self.conv_in = CausalConv(3, outputs[0])
        self.down_blocks = nn.ModuleList([DownBlock(ins, outs, dims, ratios) for ins, outs, ratios in levels])
        self.mid_block = MidBlock(outputs[-1], dims.norm_groups)
        self.conv_norm_out = nn.GroupNorm(dims.norm_groups, outputs[-1], NORM_EPS)
        self.conv_out = CausalConv(outputs[-1], 2 * dims.latent_channels)

    def forward(self, frames_BTHWC: Tensor) -> Tensor:
        x_BTHWC = causal_conv(self.conv_in.conv, plain(frames_BTHWC))
        for block in self.down_blocks:
            x_BTHWC = block(x_BTHWC)
        x_BTHWC = self.mid_block(x_BTHWC)
        return causal_conv(self.conv_out.conv, normalised(x_BTHWC, self.conv_norm_out))


class Decoder(nn.Module):
    """Latents -> frames, after `post_quant_conv`."""

    def __init__(self, dims: VaeDims):
        super().__init__()
        outputs = dims.channels[::-1]
        levels = zip((outputs[0], *outputs[:-1]), outputs, dims.level_ratios, strict=True)
        self.conv_in = CausalConv(dims.latent_channels, outputs[0])
        self.mid_block = MidBlock(outputs[0], dims.norm_groups)
        self.up_blocks = nn.ModuleList([UpBlock(ins, outs, dims, ratios) for ins, outs, ratios in levels])
        self.conv_norm_out = nn.GroupNorm(dims.norm_groups, outputs[-1], NORM_EPS)
        self.conv_out = CausalConv(outputs[-1], 3)

    def forward(self, latents_BTHWC: Tensor) -> Tensor:
        x_BTHWC = self.mid_block(causal_conv(self.conv_in.conv, plain(latents_BTHWC)))
        for block in self.up_blocks:
            x_BTHWC = block(x_BTHWC)
        return causal_conv(self.conv_out.conv, normalised(x_BTHWC, self.conv_norm_out))


class Vae(nn.Module):
    """Encoder and decoder with the published parameter names (248 tensors at the published sizes, spec 3.4).

    Convolution weights are kept channels-last, also by `load_state_dict`. Who assigns parameters by other means
    calls `lay_channels_last` afterwards, or pays for a copy of the weight at each use.
    """

    def __init__(self, dims: VaeDims):
        super().__init__()
        self.dims = dims
        self.encoder = Encoder(dims)
        self.decoder = Decoder(dims)
        self.quant_conv = nn.Conv3d(2 * dims.latent_channels, 2 * dims.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(dims.latent_channels, dims.latent_channels, 1)
        self.lay_channels_last()
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda vae, _: vae.lay_channels_last()
        )

    def lay_channels_last(self) -> None:
        """Give every convolution weight the layout that its convolution reads."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Pixels in [-1,1] -> moments [B,2*16,T,H/8,W/8]: mean, then log-variance (`split_moments`)."""
        moments_BTHWC = self.encoder(frames_BCTHW.permute(0, 2, 3, 4, 1))
        return pointwise(self.quant_conv, moments_BTHWC).permute(0, 4, 1, 2, 3)

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents, already divided by the scaling factor -> pixels [B,3,4T-3,8H,8W] around [-1,1]."""
        latents_BTHWC = latents_BCTHW.to(self.post_quant_conv.weight.dtype).permute(0, 2, 3, 4, 1)
        frames_BTHWC: Tensor = self.decoder(pointwise(self.post_quant_conv, latents_BTHWC))
        return frames_BTHWC.permute(0, 4, 1, 2, 3)


def split_moments(moments_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, the latter clamped to [-30,20] (spec 3.1)."""
    mean, log_variance = moments_BCTHW.chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def posterior_mode(moments_BCTHW: Tensor) -> Tensor:
    """The most likely latents, before the scaling factor."""
    return split_moments(moments_BCTHW)[0]


def posterior_sample(moments_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Latents drawn with the given standard normal noise, before the scaling factor."""
    mean, log_variance = split_moments(moments_BCTHW)
    return mean + (0.5 * log_variance).exp() * noise_BCTHW
