"""A HunyuanVideo of a few thousand parameters, written by diffusers and transformers themselves."""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from hvlite.model.text import load_tokenizer
from tests.tokenizers_for_tests import write_clip_tokenizer, write_llama_tokenizer

Module = TypeVar("Module", bound=nn.Module)
DEFAULTS = {"size": [32, 32], "frames": 5, "steps": 2, "guidance": 6.0, "flow_shift": 7.0}


def tiny_transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    """Random weights with norms and modulation away from their defaults, so that nothing is the identity."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }
    model = HunyuanVideoTransformer3DModel(**{**config, **changes})
    return randomise(model, 0.15)


def tiny_vae() -> AutoencoderKLHunyuanVideo:
    """Four levels of a few channels each."""
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=16
    )
    return randomise(vae, 0.1)


def randomise(module: Module, spread: float) -> Module:
    """Shake every parameter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module.eval()


def tiny_llama(vocabulary: int) -> LlamaModel:
    """Four layers, of which two are used."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return randomise(LlamaModel(config), 0.1)


def tiny_clip(vocabulary: int, eos: int) -> CLIPTextModel:
    """Two layers; the pooled output is at the token `eos`."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=eos,
    )
    return randomise(CLIPTextModel(config), 0.1)


def write_tiny_model(folder: Path) -> None:
    """All five parts in the diffusers layout, with a scheduler, and this model's own defaults."""
    write_llama_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2")
    llama_tokenizer = load_tokenizer(folder / "tokenizer")
    clip_tokenizer = load_tokenizer(folder / "tokenizer_2")
    tiny_transformer().save_pretrained(folder / "transformer")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_llama(len(llama_tokenizer)).save_pretrained(folder / "text_encoder")
    eos = clip_tokenizer.eos_token_id
    assert isinstance(eos, int)
    tiny_clip(len(clip_tokenizer), eos).save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    settings = {"name": "tiny", "defaults": DEFAULTS}
    (folder / "hvlite.json").write_text(json.dumps(settings), encoding="utf-8")
