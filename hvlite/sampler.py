"""Flow-match Euler: noise, noise levels, one step, guidance. Pure functions of their arguments (spec 5)."""

import torch
from torch import Tensor

from hvlite.dims import LatentShape


def make_noise(shape: LatentShape, channels: int, seed: int, device: str = "cpu") -> Tensor:
    """Initial latents [1,C,T,H,W] fp32, drawn on the CPU so that a seed means one clip on every machine.

    On `meta` nothing is drawn.
    """
    size = (1, channels, shape.frames, shape.height, shape.width)
    if device == "meta":
        return torch.empty(size, device=device)
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed))


def make_sigmas(steps: int, flow_shift: float, flow_reverse: bool = True) -> Tensor:
    """steps + 1 noise levels, fp32: 1 (noise) to 0 (data); without `flow_reverse` from 0 to 1 (spec 5.1)."""
    uniform = torch.linspace(1, 0, steps + 1)
    sigmas = flow_shift * uniform / (1 + (flow_shift - 1) * uniform)
    return sigmas if flow_reverse else 1 - sigmas


def make_timesteps(sigmas: Tensor) -> Tensor:
    """What the model is told at each step: 1000 sigma, [steps] fp32."""
    return 1000 * sigmas[:-1]


def euler_step(latents: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Tensor:
    """latents + velocity (sigma_next - sigma), in fp32."""
    return latents.float() + velocity.float() * (sigmas[step + 1] - sigmas[step])


def predict_end(latents: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Tensor:
    """The data that noise level `step` is thought to come from: the straight line of `velocity` to its end, in fp32.

    Latents at level sigma are (1 - sigma) data + sigma noise, and velocity is noise - data.
    """
    return latents.float() - velocity.float() * (sigmas[step] - sigmas[-1])


def guide(negative: Tensor, positive: Tensor, cfg_scale: float) -> Tensor:
    """True classifier-free guidance in the model's dtype (spec 5.2)."""
    return negative + cfg_scale * (positive - negative)
