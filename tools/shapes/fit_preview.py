"""Fit the preview of the embedded model: latents -> the same clips at an eighth of the size, by least squares.

    python tools/shapes/fit_preview.py [--model hvlite/assets/shapes] [--to hvlite/assets/previews/shapes.json]

Latents are the encoder's means times the scaling factor, as the transformer makes them. The target of a latent frame
is the mean of the frames that it stands for: the first one alone, then four each. A third of the clips have random
colours. Prints the PSNR on clips that took no part.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Scene, draw_clips, split_scenes
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from train_vae import encode_moments

FRAMES, SIDE, BATCH = 17, 64, 8
RANDOM_COLOURS = 1 / 3
DIGITS = 5
SOURCE = "Fitted by tools/shapes/fit_preview.py to clips of tools/shapes/data.py."


def targets_of(clips: Tensor) -> Tensor:
    """[B,3,4T-3,8H,8W] -> [B,3,T,H,W]: means over what each latent stands for."""
    first, rest = clips[:, :, :1], clips[:, :, 1:]
    small = F.avg_pool3d(first, (1, 8, 8))
    return torch.cat([small, F.avg_pool3d(rest, (4, 8, 8))], dim=2) if rest.shape[2] else small


@torch.no_grad()
def pairs(
    vae: AutoencoderKLHunyuanVideo, scenes: list[Scene], seed: int, random_colours: float
) -> tuple[Tensor, Tensor]:
    """-> latents [N,C] in model space and pixels [N,3] in [-1,1], one row for each position."""
    generator = torch.Generator().manual_seed(seed)
    latents, pixels = [], []
    for start in range(0, len(scenes), BATCH):
        clips = draw_clips(scenes[start : start + BATCH], FRAMES, SIDE, SIDE, generator, random_colours)
        mean, _ = encode_moments(vae, clips)
        latents.append(mean * vae.config.scaling_factor)
        pixels.append(targets_of(clips))
    return rows_of(latents), rows_of(pixels)


def rows_of(parts: list[Tensor]) -> Tensor:
    """[B,C,T,H,W] each -> [N,C] of all."""
    return torch.cat(parts).movedim(1, -1).flatten(0, -2).double()


def fit(latents: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """-> factors [C,3] and bias [3] of the least squares fit."""
    ones = torch.ones(len(latents), 1, dtype=latents.dtype)
    solved = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), pixels).solution
    return solved[:-1], solved[-1]


def psnr(error: Tensor) -> float:
    """In dB, of values in [-1,1]."""
    return float(10 * torch.log10(4 / error.square().mean()))


def as_json(factors: Tensor, bias: Tensor) -> str:
    """The file's text, a channel to a line."""
    rows = ",\n".join(f"    {row}" for row in factors.tolist())
    return f'{{\n  "source": {json.dumps(SOURCE)},\n  "factors": [\n{rows}\n  ],\n  "bias": {bias.tolist()}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("hvlite/assets/shapes"))
    parser.add_argument("--to", type=Path, default=Path("hvlite/assets/previews/shapes.json"))
    arguments = parser.parse_args()
    vae = AutoencoderKLHunyuanVideo.from_pretrained(arguments.model / "vae", torch_dtype=torch.float32)
    trained, held_out = split_scenes()
    factors, bias = (part.round(decimals=DIGITS) for part in fit(*pairs(vae, trained, 1, RANDOM_COLOURS)))
    latents, pixels = pairs(vae, held_out, 2, 0.0)
    print(f"PSNR on {len(held_out)} held-out scenes: {psnr((latents @ factors + bias).clamp(-1, 1) - pixels):.1f} dB")
    arguments.to.write_text(as_json(factors, bias), encoding="utf-8")
    print(arguments.to)


if __name__ == "__main__":
    main()
