"""Train the DiT of `shapes` together with its two text encoders, on latents of the trained VAE.

    python tools/shapes/train_dit.py --out tools/shapes/work [--steps N]

Flow matching as the published model does it: x = (1-sigma) data + sigma noise, target noise - data,
timestep 1000 sigma. All captions of one batch have one form and so one length: no padding and no mask.
Killed, it goes on.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import Average, Clock, load_state, save_state
from data import Scene, caption_form, draw_clips, split_scenes
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from tokenizers_of_shapes import clip_tokenizer, llama_tokenizer
from torch import Tensor, nn
from train_vae import build_vae, encode_moments, speed_up
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from hvlite.model.text import TEMPLATES

STEPS = 6500
BATCH = 32
PEAK_RATE = 1e-3
SEED = 11
GUIDANCE = 6000.0
# Shift of the noise levels: first composition (colour, place, motion), from DETAIL_STEP on the outline.
COMPOSITION_SHIFT = 5.0
DETAIL_SHIFT = 3.0
DETAIL_STEP = 2800
# (frames, height, width): clips a trained scene, batch size, share of the steps
SETS: dict[tuple[int, int, int], tuple[int, int, float]] = {
    (17, 64, 64): (15, 32, 0.84),
    (17, 64, 96): (2, 16, 0.05),
    (17, 96, 64): (2, 16, 0.05),
    (33, 64, 64): (1, 16, 0.03),
    (1, 64, 64): (4, 64, 0.03),
}


@dataclass(frozen=True, slots=True)
class ClipSet:
    """Encoded clips of one size: means and deviations [n,16,T,H,W] and the scene of each."""

    mean: Tensor
    deviation: Tensor
    scenes: list[Scene]


class ShapesModel(nn.Module):
    """DiT, Llama and CLIP: what one optimiser trains together."""

    def __init__(self) -> None:
        super().__init__()
        self.words = llama_tokenizer()
        self.clip_words = clip_tokenizer()
        self.llama = LlamaModel(
            LlamaConfig(
                vocab_size=len(self.words),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                rms_norm_eps=1e-5,
                max_position_embeddings=512,
                bos_token_id=self.words.bos_token_id,
                eos_token_id=self.words.eos_token_id,
                pad_token_id=self.words.pad_token_id,
            )
        )
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_words),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                projection_dim=64,
                bos_token_id=self.clip_words.bos_token_id,
                eos_token_id=self.clip_words.eos_token_id,
                pad_token_id=self.clip_words.pad_token_id,
            )
        )
        self.dit = HunyuanVideoTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=2,
            num_single_layers=4,
            num_refiner_layers=2,
            text_embed_dim=64,
            pooled_projection_dim=64,
            rope_axes_dim=(8, 12, 12),
        )
        self._start_as_zero()

    @torch.no_grad()
    def _start_as_zero(self) -> None:
        """Zero modulation and final Linear: every block begins as the identity."""
        zero = [self.dit.norm_out.linear, self.dit.proj_out]
        for block in self.dit.transformer_blocks:
            zero += [block.norm1.linear, block.norm1_context.linear]
        zero += [block.norm.linear for block in self.dit.single_transformer_blocks]
        for linear in zero:
            linear.weight.zero_()
            linear.bias.zero_()

    def encode(self, captions: list[str], template: str) -> tuple[Tensor, Tensor]:
        """Captions of one token length -> text states [B,l,64], pooled [B,64]."""
        around = TEMPLATES[template]
        crop = len(self.words(around.prefix)["input_ids"])
        texts = [around.prefix + caption + around.suffix for caption in captions]
        ids = torch.tensor(self.words(texts)["input_ids"])
        x = self.llama.embed_tokens(ids)
        rotary = self.llama.rotary_emb(x, torch.arange(ids.shape[1])[None])
        for layer in self.llama.layers[:-2]:  # the state that is used is the one before the last two
            x = layer(x, position_embeddings=rotary)
        states = x[:, crop:]
        clip_ids = torch.tensor(self.clip_words(captions)["input_ids"])
        return states, self.clip(clip_ids).pooler_output

    def velocity(self, latents: Tensor, timestep: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """The DiT's forward without any mask."""
        dit = self.dit
        guidance = torch.full_like(timestep, GUIDANCE)
        rope = dit.rope(latents)
        vector, _ = dit.time_text_embed(timestep, pooled, guidance)
        img = dit.x_embedder(latents)
        txt = dit.context_embedder(states, timestep, None)
        for block in [*dit.transformer_blocks, *dit.single_transformer_blocks]:
            img, txt = block(img, txt, vector, None, rope)
        out = dit.proj_out(dit.norm_out(img, vector))
        frames, height, width = latents.shape[2:]
        out = out.reshape(len(latents), frames, height // 2, width // 2, 16, 2, 2)
        clips: Tensor = out.permute(0, 4, 1, 2, 5, 3, 6).reshape(latents.shape)
        return clips


@torch.no_grad()
def encode_sets(folder: Path) -> dict[tuple[int, int, int], ClipSet]:
    """Encode all training clips once, kept in `latents.pt`. Phase 2 of the VAE changes its decoder alone."""
    path = folder / "latents.pt"
    scenes = split_scenes()[0]
    owners = {size: scenes * count for size, (count, _, _) in SETS.items()}
    if (state := load_state(path)) is None:
        speed_up()
        vae = build_vae()
        vae.load_state_dict(torch.load(folder / "vae_phase1.pt", weights_only=True))
        vae = vae.to(memory_format=torch.channels_last_3d)
        state = {}
        for number, (size, clips) in enumerate(owners.items()):
            state[str(size)] = _encode_clips(vae, clips, size, seed=1000 + number)
            print(f"encoded {len(clips)} clips of {size}", flush=True)
        save_state(path, state)
    sets = {}
    for size in SETS:
        mean, deviation = state[str(size)].float().chunk(2, dim=1)
        sets[size] = ClipSet(mean, deviation, owners[size])
    return sets


def _encode_clips(vae: AutoencoderKLHunyuanVideo, scenes: list[Scene], size: tuple[int, int, int], seed: int) -> Tensor:
    """-> mean and deviation of each clip, stacked on channels, fp16 [n,32,T,H,W]."""
    generator = torch.Generator().manual_seed(seed)
    moments = []
    for begin in range(0, len(scenes), 4):
        group = scenes[begin : begin + 4]
        mean, log_variance = encode_moments(vae, draw_clips(group, *size, generator))
        moments.append(torch.cat([mean, (0.5 * log_variance).exp()], dim=1).half())
    return torch.cat(moments)


def normalise(
    sets: dict[tuple[int, int, int], ClipSet],
) -> tuple[dict[tuple[int, int, int], ClipSet], dict[str, Tensor]]:
    """Per channel to mean 0 and deviation about 1 (quiet channels are not blown up), then one global scale."""
    main = sets[17, 64, 64].mean
    mean = main.mean(dim=(0, 2, 3, 4))
    deviation = main.std(dim=(0, 2, 3, 4))
    deviation = deviation.clamp_min(0.15 * deviation.max().item())
    shape = (1, -1, 1, 1, 1)
    scale = 1 / ((main - mean.view(shape)) / deviation.view(shape)).std()
    numbers = {"mean": mean, "deviation": deviation, "scaling_factor": scale}
    scaled = {
        size: ClipSet(
            (clips.mean - mean.view(shape)) / deviation.view(shape) * scale,
            clips.deviation / deviation.view(shape) * scale,
            clips.scenes,
        )
        for size, clips in sets.items()
    }
    return scaled, numbers


def batch_for(step: int, sets: dict[tuple[int, int, int], ClipSet]) -> tuple[Tensor, list[str], str]:
    """Latents, captions and template of one step: a pure function of the step's number."""
    rng = random.Random(SEED * 1_000_003 + step)
    size = rng.choices(list(SETS), weights=[share for _, _, share in SETS.values()])[0]
    clips = sets[size]
    picked = [rng.randrange(len(clips.scenes)) for _ in range(SETS[size][1])]
    form = caption_form(rng)
    captions = [form(clips.scenes[index]) for index in picked]
    noise = torch.randn(clips.mean[picked].shape, generator=torch.Generator().manual_seed(step))
    return (
        clips.mean[picked] + clips.deviation[picked] * noise,
        captions,
        "image" if size[0] == 1 else "video",
    )


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Logit-normal (deviation 1.2) with 15 % uniform, then the schedule's shift."""
    base = torch.sigmoid(1.2 * torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    base = torch.where(torch.rand(count, generator=generator) < 0.15, uniform, base)
    return shift * base / (1 + (shift - 1) * base)


def loss_of(model: ShapesModel, step: int, sets: dict[tuple[int, int, int], ClipSet]) -> Tensor:
    latents, captions, template = batch_for(step, sets)
    generator = torch.Generator().manual_seed(step + 10**7)
    shift = COMPOSITION_SHIFT if step < DETAIL_STEP else DETAIL_SHIFT
    sigmas = draw_sigmas(len(latents), shift, generator)
    noise = torch.randn(latents.shape, generator=generator)
    mix = sigmas.view(-1, 1, 1, 1, 1)
    states, pooled = model.encode(captions, template)
    velocity = model.velocity((1 - mix) * latents + mix * noise, 1000 * sigmas, states, pooled)
    return F.mse_loss(velocity, noise - latents)


def steps_from(first: int, steps: int, optimiser: torch.optim.Optimizer) -> Iterator[int]:
    """Step numbers; sets each step's learning rate (warm-up 100, cosine)."""
    for step in range(first, steps):
        rate = PEAK_RATE * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate + 1e-6
        yield step


def train(folder: Path, steps: int) -> None:
    """From the last checkpoint if there is one; leaves `dit.pt` (averaged weights and latent statistics)."""
    torch.manual_seed(SEED)
    model = ShapesModel()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    sets, numbers = normalise(encode_sets(folder))
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(model, 0.998)
    first = 0
    running = folder / "dit.running.pt"
    if (state := load_state(running)) is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.shadow = state["average"]
        first = state["step"]
    clock, began, recent = Clock(), time.monotonic(), 0.0
    for step in steps_from(first, steps, optimiser):
        loss = loss_of(model, step, sets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(model, step)
        recent += loss.item()
        if step % 100 == 99:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            print(f"dit: step {step + 1}/{steps} loss {recent / 100:.4f} {seconds:.3f} s/step", flush=True)
            recent = 0.0
        if clock.due():
            save_state(
                running,
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average.shadow,
                    "step": step + 1,
                },
            )
    save_state(folder / "dit.pt", {"model": average.shadow, **numbers})
    running.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tools/shapes/work"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
