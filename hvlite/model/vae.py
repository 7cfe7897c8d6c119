"""The causal 3D VAE: frames to moments, latents to frames, for a whole clip or one tile of it (spec 3).

Parameters carry the published names, so a published state dict loads as it is. Tiling lives in `memory.tiles`, the
scaling factor with the caller, the arithmetic of a few frames at a time in `model.causal`. Every tensor in here lies
[B,T,H,W,C].

    B batch   T frames   H, W height and width   C channels   N = T*H*W
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvlite.dims import VaeDims
from hvlite.model.causal import (
    Chunks,
    Source,
    causal_conv,
    clip_of,
    normed,
    plain,
    pointwise,
    pointwise_over,
    upsample_conv,
)

NORM_EPS = 1e-6
USED_BY_DECODE = ("decoder.", "post_quant_conv.")
"""What the names of the weights begin with that decoding needs."""

Stride = tuple[int, int, int]


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
        hidden = causal_conv(self.conv1.conv, normed(x_BTHWC, self.norm1))
        if self.conv_shortcut is not None:
            x_BTHWC = pointwise_over(self.conv_shortcut.conv, x_BTHWC)
        return causal_conv(self.conv2.conv, normed(hidden, self.norm2), add_to=x_BTHWC)


def attend(q_BNC: Tensor, k_BNC: Tensor, v_BNC: Tensor) -> Tensor:
    """Attention with one head and no mask, by a kernel that does not hold the weights of every pair."""
    q, k, v = q_BNC[:, None], k_BNC[:, None], v_BNC[:, None]
    if q.device.type == "meta":
        return torch.empty_like(q_BNC)
    if q.device.type == "cuda":
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v)[:, 0]
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


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
        """Consumes its input: a frame is read before the sum takes its place."""
        for frame, attended in self.attended(normed(x_BTHWC, self.group_norm, silu=False)):
            x_BTHWC[:, frame : frame + 1].add_(attended)
        return x_BTHWC

    def attended(self, source: Source) -> Chunks:
        """One frame's queries at a time against the keys so far: that needs no mask."""
        batch, frames, height, width, channels = source.shape
        pixels, weight = height * width, self.to_q.weight
        k_BNC, v_BNC = (weight.new_empty(batch, frames * pixels, channels) for _ in range(2))
        for frame in range(frames):
            now, seen = slice(frame * pixels, (frame + 1) * pixels), slice(0, (frame + 1) * pixels)
            tokens_BTHWC = weight.new_empty(batch, 1, height, width, channels)
            source.write(frame, frame + 1, tokens_BTHWC)
            tokens_BNC = tokens_BTHWC.flatten(1, 3)
            k_BNC[:, now] = self.to_k(tokens_BNC)
            v_BNC[:, now] = self.to_v(tokens_BNC)
            attended_BNC = attend(self.to_q(tokens_BNC), k_BNC[:, seen], v_BNC[:, seen])
            yield frame, self.to_out[0](attended_BNC).view(tokens_BTHWC.shape)


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
        return causal_conv(self.conv.conv, plain(clip_of(x_BTHWC)))


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
        x_BTHWC = causal_conv(self.conv_in.conv, plain(clip_of(frames_BTHWC)))
        for block in self.down_blocks:
            x_BTHWC = block(x_BTHWC)
        x_BTHWC = self.mid_block(x_BTHWC)
        return causal_conv(self.conv_out.conv, normed(x_BTHWC, self.conv_norm_out))


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
        x_BTHWC = self.mid_block(causal_conv(self.conv_in.conv, plain(clip_of(latents_BTHWC))))
        for block in self.up_blocks:
            x_BTHWC = block(x_BTHWC)
        return causal_conv(self.conv_out.conv, normed(x_BTHWC, self.conv_norm_out))


class Vae(nn.Module):
    """Encoder and decoder with the published parameter names (248 tensors at the published sizes, spec 3.4).

    Without `encodes` it has the decoder alone (`USED_BY_DECODE`). Convolution weights are kept channels-last, also by
    `load_state_dict`. Who assigns parameters by other means calls `lay_channels_last` afterwards, or pays for a copy of
    the weight at each use.
    """

    def __init__(self, dims: VaeDims, *, encodes: bool = True):
        super().__init__()
        self.dims = dims
        if encodes:
            self.encoder = Encoder(dims)
            self.quant_conv = nn.Conv3d(2 * dims.latent_channels, 2 * dims.latent_channels, 1)
        self.decoder = Decoder(dims)
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
        """Pixels in [-1,1] -> moments [B,2*16,T,H/8,W/8]: mean, then log-variance."""
        moments_BTHWC = self.encoder(frames_BCTHW.permute(0, 2, 3, 4, 1))
        return pointwise(self.quant_conv, moments_BTHWC).permute(0, 4, 1, 2, 3)

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents, already divided by the scaling factor -> pixels [B,3,4T-3,8H,8W] around [-1,1]."""
        latents_BTHWC = latents_BCTHW.to(self.post_quant_conv.weight.dtype).permute(0, 2, 3, 4, 1)
        frames_BTHWC: Tensor = self.decoder(pointwise(self.post_quant_conv, latents_BTHWC))
        return frames_BTHWC.permute(0, 4, 1, 2, 3)


def posterior_mode(moments_BCTHW: Tensor) -> Tensor:
    """The most likely latents, before the scaling factor."""
    return moments_BCTHW.chunk(2, dim=1)[0]
