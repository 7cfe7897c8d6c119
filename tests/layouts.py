"""Writes small random checkpoints in every published layout and container: what the readers are tested against.

`random_*` make tensors in our names; `write_*` publish them. The values' way back (joining, splitting, swapping) is
written here anew; the names are the tables' own, which `test_keymap.py` holds against other sources.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hvlite.dims import ClipDims, DitDims, LlamaDims, VaeDims
from hvlite.weights.dit_layouts import dit_rules
from hvlite.weights.keymap import Change, Rule, clip_rules, llama_rules, vae_rules

State = dict[str, Tensor]

TINY_DIT = DitDims(
    hidden=32,
    heads=2,
    double_blocks=2,
    single_blocks=3,
    refiner_blocks=2,
    mlp_ratio=4,
    latent_channels=4,
    text_width=24,
    pooled_width=12,
    rope_axes=(4, 6, 6),
    rope_theta=256.0,
    has_guidance=True,
)
# Heads of the published size, so that the dims follow from the tensors' shapes alone.
WIDE_DIT = DitDims(
    hidden=128,
    heads=1,
    double_blocks=1,
    single_blocks=1,
    refiner_blocks=1,
    mlp_ratio=2,
    latent_channels=16,
    text_width=24,
    pooled_width=12,
    rope_axes=(16, 56, 56),
    rope_theta=256.0,
    has_guidance=False,
)
TINY_VAE = VaeDims(channels=(4, 6, 8, 8), layers_per_block=1, norm_groups=2, latent_channels=4, scaling_factor=0.5)
TINY_LLAMA = LlamaDims(
    vocabulary=40,
    hidden=24,
    mlp_hidden=32,
    layers=4,
    heads=4,
    kv_heads=2,
    rms_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)
TINY_CLIP = ClipDims(vocabulary=30, hidden=12, mlp_hidden=20, layers=2, heads=2, positions=16, eos_token=29)


def random_state(rules: Iterable[Rule], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> State:
    """A random tensor for every parameter of ours that `rules` fill."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for rule in rules for name, shape in rule.targets}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def random_dit(dims: DitDims = TINY_DIT, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> State:
    """The transformer in our names; layout A decides nothing here but which table is read."""
    return random_state(dit_rules(dims, "A"), dtype, seed)


def random_vae(dims: VaeDims = TINY_VAE, dtype: torch.dtype = torch.float32, seed: int = 1) -> State:
    """The VAE in our names."""
    return random_state(vae_rules(dims, "diffusers"), dtype, seed)


def random_llama(dims: LlamaDims = TINY_LLAMA, dtype: torch.dtype = torch.float16, seed: int = 2) -> State:
    """The layers of the language model that are used, in our names."""
    return random_state(llama_rules(dims), dtype, seed)


def random_clip(dims: ClipDims = TINY_CLIP, dtype: torch.dtype = torch.float16, seed: int = 3) -> State:
    """The text tower in our names."""
    return random_state(clip_rules(dims), dtype, seed)


def publish(ours: Mapping[str, Tensor], rules: Iterable[Rule]) -> State:
    """Our tensors under published names and in published shapes."""
    state: State = {}
    for rule in rules:
        tensors = [ours[name] for name, _ in rule.targets]
        whole = torch.cat(tensors, dim=1) if rule.change is Change.SPLIT_COLUMNS else tensors[0]
        if rule.change is Change.SWAP_HALVES:
            middle = whole.shape[0] // 2
            whole = torch.cat([whole[middle:], whole[:middle]])
        row = 0
        for name, shape in rule.sources:
            state[name] = whole[row : row + shape[0]].reshape(shape).clone()
            row += shape[0]
    return state


def publish_dit(ours: Mapping[str, Tensor], dims: DitDims, layout: str, *, scale_names: bool = True) -> State:
    """`scale_names`: QK norms of layout B as `.scale`, not as in newer files `.weight`."""
    state = publish(ours, dit_rules(dims, layout))
    if layout != "B" or not scale_names:
        return state
    return {
        name.removesuffix("weight") + "scale"
        if name.endswith(("query_norm.weight", "key_norm.weight"))
        else name: value
        for name, value in state.items()
    }


def publish_vae(ours: Mapping[str, Tensor], dims: VaeDims, layout: str) -> State:
    """`diffusers` or `ldm`."""
    return publish(ours, vae_rules(dims, layout))


def publish_llama(ours: Mapping[str, Tensor], dims: LlamaDims, layout: str) -> State:
    """`llava` (older or newer transformers), `causal`, `base` or `comfy` (spec 4.1), with all that is not used."""
    prefix, head = {
        "llava": ("language_model.model.", "language_model.lm_head.weight"),
        "llava5": ("model.language_model.", "lm_head.weight"),
        "causal": ("model.", "lm_head.weight"),
        "base": ("", None),
        "comfy": ("model.", "lm_head.weight"),
    }[layout]
    state = {prefix + name: tensor for name, tensor in ours.items()}
    for layer in range(dims.used_layers, dims.layers):
        for name, tensor in ours.items():
            if name.startswith("layers.0."):
                state[prefix + name.replace("layers.0.", f"layers.{layer}.")] = tensor * 2
    state[f"{prefix}norm.weight"] = torch.ones(dims.hidden)
    if head:
        state[head] = torch.ones(dims.vocabulary, dims.hidden)
    if layout.startswith("llava"):
        outer = "model." if layout == "llava5" else ""
        state[f"{outer}vision_tower.vision_model.embeddings.class_embedding"] = torch.ones(4)
        state[f"{outer}multi_modal_projector.linear_1.weight"] = torch.ones(4, 4)
    if layout == "comfy":
        state["tokenizer"] = torch.arange(9, dtype=torch.uint8)
    return state


def publish_clip(ours: Mapping[str, Tensor], layout: str) -> State:
    """`text` (196 tensors), `bare` (as newer transformers save it) or `whole` (with the image tower)."""
    state = {("" if layout == "bare" else "text_model.") + name: tensor for name, tensor in ours.items()}
    if layout == "whole":
        state["vision_model.embeddings.class_embedding"] = torch.ones(4)
        state["text_model.embeddings.position_ids"] = torch.arange(4)[None]
        for name in ("text_projection.weight", "visual_projection.weight"):
            state[name] = torch.ones(2, 2)
        state["logit_scale"] = torch.tensor(4.6)
    return state


def cast_fp8(state: Mapping[str, Tensor]) -> State:
    """Community fp8: plain casts of the weights in the blocks, scale 1 (spec 2.4)."""
    return {
        name: tensor.to(torch.float8_e4m3fn) if _is_block_weight(name, tensor) else tensor
        for name, tensor in state.items()
    }


def scale_fp8(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """The weights in the blocks as fp8 of full range, and the scale of each by its module's name."""
    weights, scales = dict(state), {}
    for name, tensor in state.items():
        if _is_block_weight(name, tensor):
            scale = (tensor.float().abs().max() / 448).reshape(1)
            weights[name] = (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            scales[name.removesuffix(".weight")] = scale
    return weights, scales


def comfy_fp8(state: Mapping[str, Tensor], suffix: str = "scale_weight") -> State:
    """ComfyUI's scaled fp8: a scalar beside each weight; the marker in the older form, hints in the newer."""
    weights, scales = scale_fp8(state)
    weights |= {f"{module}.{suffix}": scale.reshape(()) for module, scale in scales.items()}
    if suffix == "scale_weight":
        return weights | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    hint = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    weights |= {f"{module}.input_scale": torch.ones(()) for module in scales}
    return weights | {f"{module}.comfy_quant": hint.clone() for module in scales}


def dequantised(weight: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Spec 2.4: scale rounded to bf16, product rounded to bf16."""
    rounded = torch.as_tensor(scale, dtype=torch.float32).to(torch.bfloat16).float()
    return (weight.float() * rounded).to(torch.bfloat16)


def _is_block_weight(name: str, tensor: Tensor) -> bool:
    blocks = ("double_blocks.", "single_blocks.", "transformer_blocks.", "layers.")
    return tensor.ndim == 2 and any(word in name for word in blocks)


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The same under longer names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> Path:
    """One file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def write_shards(folder: Path, state: Mapping[str, Tensor], stem: str = "diffusion_pytorch_model") -> Path:
    """Three shards and their index, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    table: dict[str, str] = {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003.safetensors"
        part = {name: state[name] for name in names[number::3]}
        write_safetensors(folder / shard, part)
        table |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_pickle(path: Path, state: Mapping[str, Tensor], wrapper: str | None = "module") -> Path:
    """A torch pickle at `path`; DeepSpeed's form wraps the tensors in an entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(state)
    torch.save({wrapper: tensors, "global_steps": 7} if wrapper else tensors, path)
    return path


CONTAINERS: dict[str, Callable[[Path, Mapping[str, Tensor]], Path]] = {
    "safetensors": lambda folder, state: write_safetensors(folder / "model.safetensors", state),
    "shards": write_shards,
    "pickle": lambda folder, state: write_pickle(folder / "mp_rank_00_model_states.pt", state),
    "bare pickle": lambda folder, state: write_pickle(folder / "pytorch_model.pt", state, None),
}


def write_dit(
    folder: Path,
    ours: Mapping[str, Tensor],
    dims: DitDims = TINY_DIT,
    *,
    layout: str = "A",
    container: str = "safetensors",
    prefix: str = "",
) -> Path:
    """The transformer into `folder`, in layout A, B or C and one of `CONTAINERS`; returns what to read."""
    return CONTAINERS[container](folder, with_prefix(publish_dit(ours, dims, layout), prefix))


def dit_config(dims: DitDims) -> dict[str, object]:
    """What diffusers writes to transformer/config.json."""
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "attention_head_dim": dims.head_dim,
        "guidance_embeds": dims.has_guidance,
        "image_condition_type": None,
        "in_channels": dims.latent_channels,
        "mlp_ratio": float(dims.mlp_ratio),
        "num_attention_heads": dims.heads,
        "num_layers": dims.double_blocks,
        "num_refiner_layers": dims.refiner_blocks,
        "num_single_layers": dims.single_blocks,
        "out_channels": dims.latent_channels,
        "patch_size": dims.patch,
        "patch_size_t": 1,
        "pooled_projection_dim": dims.pooled_width,
        "qk_norm": "rms_norm",
        "rope_axes_dim": list(dims.rope_axes),
        "rope_theta": dims.rope_theta,
        "text_embed_dim": dims.text_width,
    }


def vae_config(dims: VaeDims, *, original: bool = False) -> dict[str, object]:
    """What diffusers writes to vae/config.json; `original`: the release's own file, with another word for time."""
    word = "time_compression_ratio" if original else "temporal_compression_ratio"
    return {
        "act_fn": "silu",
        "block_out_channels": list(dims.channels),
        "latent_channels": dims.latent_channels,
        "layers_per_block": dims.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": dims.norm_groups,
        "scaling_factor": dims.scaling_factor,
        "spatial_compression_ratio": dims.spatial_ratio,
        word: dims.temporal_ratio,
    }


def llama_config(dims: LlamaDims) -> dict[str, object]:
    """What transformers writes for a Llama."""
    return {
        "model_type": "llama",
        "hidden_size": dims.hidden,
        "intermediate_size": dims.mlp_hidden,
        "max_position_embeddings": dims.max_positions,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        "rms_norm_eps": dims.rms_eps,
        "rope_parameters": {"rope_theta": dims.rope_theta, "rope_type": "default"},
        "vocab_size": dims.vocabulary,
    }


def clip_config(dims: ClipDims) -> dict[str, object]:
    """What transformers writes for a CLIP text tower."""
    return {
        "model_type": "clip_text_model",
        "eos_token_id": dims.eos_token,
        "hidden_act": dims.activation,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.mlp_hidden,
        "layer_norm_eps": dims.layer_norm_eps,
        "max_position_embeddings": dims.positions,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "vocab_size": dims.vocabulary,
    }


def write_json(path: Path, value: object) -> Path:
    """`value` as JSON at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_diffusers_folder(folder: Path) -> Path:
    """All four parts in the diffusers layout with their configs, and empty tokenizer folders."""
    write_dit(folder / "transformer", random_dit(), layout="C", container="shards")
    write_json(folder / "transformer/config.json", dit_config(TINY_DIT))
    write_safetensors(folder / "vae/diffusion_pytorch_model.safetensors", random_vae())
    write_json(folder / "vae/config.json", vae_config(TINY_VAE))
    write_shards(folder / "text_encoder", publish_llama(random_llama(), TINY_LLAMA, "base"), "model")
    write_json(folder / "text_encoder/config.json", llama_config(TINY_LLAMA))
    write_safetensors(folder / "text_encoder_2/model.safetensors", publish_clip(random_clip(), "text"))
    write_json(folder / "text_encoder_2/config.json", clip_config(TINY_CLIP))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer_2").mkdir()
    return folder


def write_tencent_folder(folder: Path) -> Path:
    """The same four parts as Tencent's `ckpts/`; the transformer has no config there, so its heads are of 128."""
    release = folder / "hunyuan-video-t2v-720p"
    state = publish_dit(random_dit(WIDE_DIT), WIDE_DIT, "A")
    write_pickle(release / "transformers/mp_rank_00_model_states.pt", state)
    write_pickle(release / "vae/pytorch_model.pt", with_prefix(random_vae(), "vae."), "state_dict")
    write_json(release / "vae/config.json", vae_config(TINY_VAE, original=True))
    write_shards(folder / "text_encoder", publish_llama(random_llama(), TINY_LLAMA, "causal"), "model")
    write_json(folder / "text_encoder/config.json", llama_config(TINY_LLAMA))
    write_safetensors(folder / "text_encoder_2/model.safetensors", publish_clip(random_clip(), "whole"))
    write_json(folder / "text_encoder_2/config.json", {"text_config": clip_config(TINY_CLIP)})
    return folder
