"""Train the VAE of `shapes`: a HunyuanVideo VAE with small channels.

    python tools/shapes/train_vae.py --out tools/shapes/work [--steps N]

Flat colour is what a GroupNorm over a whole clip destroys, so the network starts out nearly linear: RGB and
-RGB pass through channels 0-5 by identity taps, and constant offsets of +-1 in the trunk make each norm
roughly the identity. Phase 1 trains everything; phase 2 trains the decoder alone on noisy latents. Killed
and started again, it goes on.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import Average, Clock, load_state, save_state
from data import draw_clips, split_scenes
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import Tensor, nn

CHANNELS = (16, 24, 48, 64)
PHASE_1_STEPS = 2100
PHASE_2_STEPS = 800
# (frames, side, clips): never one clip alone, for which torch takes a convolution that is five times slower
MIX = ((5, 32, 8), (5, 64, 3), (9, 32, 5), (9, 64, 2), (17, 64, 2), (17, 32, 4), (1, 64, 8))
MIX_2 = ((5, 64, 3), (9, 64, 2), (17, 64, 2), (17, 32, 4), (1, 64, 8))
STILLS = 250
SEED = 7


def build_vae() -> AutoencoderKLHunyuanVideo:
    """The published class at small channels; one layer a block, two norm groups."""
    return AutoencoderKLHunyuanVideo(
        block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=2, latent_channels=16
    )


def _conv_still(self: HunyuanVideoCausalConv3d, x: Tensor) -> Tensor:
    """A causal conv on one frame sees that frame three times: exactly a 2-D conv with summed taps."""
    conv = self.conv
    if x.shape[2] == 1 and conv.kernel_size[0] == 3:
        padded = F.pad(x[:, :, 0], (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, conv.weight.sum(2), conv.bias, conv.stride[1:])[:, :, None]
    out: Tensor = conv(F.pad(x, self.time_causal_padding, mode=self.pad_mode))
    return out


def speed_up() -> None:
    """One-frame batches as 2-D convs: the same numbers in half the time."""
    HunyuanVideoCausalConv3d.forward = _conv_still


@torch.no_grad()
def start_nearly_linear(vae: AutoencoderKLHunyuanVideo) -> None:
    """Identity taps for the trunk, offsets +-1, quiet residual branches (see the module's text)."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            offset = _offsets(module.num_channels)
            module.weight.fill_(1.0)
            module.bias.copy_(-offset)
        if name.endswith("conv2.conv"):
            module.weight.mul_(0.1)
            module.bias.zero_()
        if name.endswith("to_out.0"):
            module.weight.zero_()
            module.bias.zero_()
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    for block in vae.encoder.down_blocks:
        for sampler in block.downsamplers or ():
            conv = sampler.conv.conv
            time_taps = binomial if conv.stride[0] == 2 else torch.tensor([0.0, 0.0, 1.0])
            taps = torch.einsum("t,h,w->thw", time_taps, binomial, binomial)
            _set_identity(conv, taps)
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _set_identity(resnet.conv_shortcut.conv, torch.ones(1, 1, 1))
    centre = torch.zeros(3, 3, 3)
    centre[2, 1, 1] = 1
    for block in vae.decoder.up_blocks:
        for sampler in block.upsamplers or ():
            _set_identity(sampler.conv.conv, centre)
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _set_identity(resnet.conv_shortcut.conv, torch.ones(1, 1, 1))
    _enter_trunk(vae.encoder.conv_in.conv, centre)
    _enter_trunk(vae.decoder.conv_in.conv, centre)
    _leave_trunk(vae.encoder.conv_out.conv, centre)
    _leave_trunk(vae.decoder.conv_out.conv, centre)
    vae.encoder.conv_out.conv.bias[16:] = -5.0
    vae.encoder.conv_out.conv.weight[16:] = 0
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None, None])
        conv.bias.zero_()


def _offsets(channels: int) -> Tensor:
    """+1 and -1 in turn, so that each norm group has mean 0 and deviation about 1."""
    return torch.tensor([1.0, -1.0]).repeat(channels // 2)


def _set_identity(conv: nn.Conv3d, taps: Tensor) -> None:
    """Channel c of the input becomes channel c of the output; further channels keep quiet random taps."""
    shared = min(conv.in_channels, conv.out_channels)
    conv.weight.mul_(0.3)
    conv.weight[:shared] = conv.weight[:shared] * 0.1
    conv.weight[:6] = 0
    for channel in range(shared):
        conv.weight[channel, channel] += taps
    _bias(conv).zero_()
    if conv.out_channels > shared:
        _bias(conv)[shared:] = _offsets(conv.out_channels)[shared:]


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _enter_trunk(conv: nn.Conv3d, centre: Tensor) -> None:
    _bias(conv).copy_(_offsets(conv.out_channels))
    conv.weight[:6] = 0
    for channel in range(3):
        conv.weight[channel, channel] = centre
        conv.weight[channel + 3, channel] = -centre


def _leave_trunk(conv: nn.Conv3d, centre: Tensor) -> None:
    """silu(x) - silu(-x) = x: the pair of channels c and c+3 gives RGB back exactly."""
    _bias(conv).zero_()
    conv.weight[:3] = 0
    for channel in range(3):
        conv.weight[channel, channel] = centre
        conv.weight[channel, channel + 3] = -centre


def encode_moments(vae: AutoencoderKLHunyuanVideo, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Untiled posterior mean and log-variance, each [B,16,T,H,W]."""
    moments = vae.quant_conv(vae.encoder(clips.contiguous(memory_format=torch.channels_last_3d)))
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_clips(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Untiled decode, [B,3,F,8H,8W]."""
    latents = latents.contiguous(memory_format=torch.channels_last_3d)
    clips: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clips


def batch_for(step: int, phase: int) -> Tensor:
    """The clips of one step: a pure function of the step's number."""
    rng = random.Random(SEED * 1_000_003 + phase * 500_009 + step)
    generator = torch.Generator().manual_seed(rng.randrange(2**40))
    if phase == 1 and step < STILLS:
        frames, side, count = 1, 64, 8
    else:
        frames, side, count = rng.choice(MIX if phase == 1 else MIX_2)
    size = rng.choice(((64, 64), (64, 64), (64, 64), (64, 96), (96, 64))) if side == 64 else (side, side)
    trained = split_scenes()[0]
    scenes = [rng.choice(trained) for _ in range(count)]
    return draw_clips(scenes, frames, *size, generator, random_colours=0.28 if phase == 1 else 0.2)


def reconstruction_loss(vae: AutoencoderKLHunyuanVideo, clips: Tensor, step: int) -> Tensor:
    """Phase 1: L1 + 2 MSE + 3e-4 KL a latent element, posterior sampled."""
    generator = torch.Generator().manual_seed(step)
    mean, log_variance = encode_moments(vae, clips)
    noise = torch.randn(mean.shape, generator=generator)
    decoded = decode_clips(vae, mean + (0.5 * log_variance).exp() * noise)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(decoded, clips) + 2 * F.mse_loss(decoded, clips) + 3e-4 * kl


def sharpening_loss(vae: AutoencoderKLHunyuanVideo, clips: Tensor, step: int) -> Tensor:
    """Phase 2: L1 + 4 MSE of the decoder, on latents with the sampler's own kind of error."""
    generator = torch.Generator().manual_seed(step + 10**6)
    with torch.no_grad():
        mean, log_variance = encode_moments(vae, clips)
        deviation = mean.std(dim=(0, 2, 3, 4), keepdim=True)
        noise = torch.randn(mean.shape, generator=generator)
        latents = mean + ((0.5 * log_variance).exp() + 0.04 * deviation) * noise
    decoded = decode_clips(vae, latents)
    return F.l1_loss(decoded, clips) + 4 * F.mse_loss(decoded, clips)


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLHunyuanVideo) -> float:
    """PSNR in dB over held-out 17-frame clips."""
    generator = torch.Generator().manual_seed(99)
    clips = draw_clips(split_scenes()[1][:8], 17, 64, 64, generator)
    total = 0.0
    for clip in clips.split(2):
        decoded = decode_clips(vae, encode_moments(vae, clip)[0]).clamp(-1, 1)
        total += F.mse_loss(decoded, clip).item() / 4
    return 10 * math.log10(4 / total)


def train(folder: Path, phase: int, steps: int) -> None:
    """One phase, from its last checkpoint if there is one; leaves `vae_phase{n}.pt`."""
    final = folder / f"vae_phase{phase}.pt"
    if final.exists():
        return
    torch.manual_seed(SEED)
    vae = build_vae()
    start_nearly_linear(vae)
    if phase == 2:
        vae.load_state_dict(torch.load(folder / "vae_phase1.pt", weights_only=True))
    vae = vae.to(memory_format=torch.channels_last_3d)
    trained: nn.Module = vae
    parameters = list(vae.parameters())
    peak_rate = 7e-4
    if phase == 2:
        parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
        peak_rate = 6e-4
    optimiser = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(trained, 0.998)
    first = 0
    running = folder / f"vae_phase{phase}.running.pt"
    if (state := load_state(running)) is not None:
        trained.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.shadow = state["average"]
        first = state["step"]
    clock, began = Clock(), time.monotonic()
    for step in range(first, steps):
        rate = peak_rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate + 1e-6
        clips = batch_for(step, phase)
        loss = (reconstruction_loss if phase == 1 else sharpening_loss)(vae, clips, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average.update(trained, step)
        if step % 200 == 0:
            seconds = (time.monotonic() - began) / max(1, step - first)
            print(
                f"vae {phase}: step {step}/{steps} loss {loss.item():.4f} {seconds:.3f} s/step "
                f"psnr {measure_psnr(vae):.2f} dB",
                flush=True,
            )
        if clock.due():
            save_state(
                running,
                {
                    "model": trained.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average.shadow,
                    "step": step + 1,
                },
            )
    vae.load_state_dict(average.shadow)
    print(f"vae {phase}: psnr {measure_psnr(vae):.2f} dB (averaged weights)", flush=True)
    save_state(final, vae.state_dict())
    running.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tools/shapes/work"))
    parser.add_argument("--phase-1-steps", type=int, default=PHASE_1_STEPS)
    parser.add_argument("--phase-2-steps", type=int, default=PHASE_2_STEPS)
    arguments = parser.parse_args()
    speed_up()
    train(arguments.out, 1, arguments.phase_1_steps)
    train(arguments.out, 2, arguments.phase_2_steps)


if __name__ == "__main__":
    main()
