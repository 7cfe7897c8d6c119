"""Where parts are found, what dims their configs and shapes give, and what the hash notices."""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hvlite.dims import HUNYUANVIDEO, HUNYUANVIDEO_DEFAULTS, RequestDefaults
from hvlite.errors import WeightsError
from hvlite.weights.configs import read_clip_dims, read_dit_dims, read_llama_dims, read_vae_dims
from hvlite.weights.dit_layouts import dit_rules
from hvlite.weights.keymap import Rule, clip_rules, llama_rules, vae_rules
from hvlite.weights.load import clip_tensors, dit_tensors, llama_tensors, vae_tensors
from hvlite.weights.sources import find_sources, fingerprint, read_dims, source_bytes
from tests.layouts import (
    TINY_CLIP,
    TINY_DIT,
    TINY_LLAMA,
    TINY_VAE,
    WIDE_DIT,
    clip_config,
    dit_config,
    llama_config,
    publish_dit,
    publish_vae,
    random_clip,
    random_dit,
    random_llama,
    random_vae,
    vae_config,
    write_diffusers_folder,
    write_dit,
    write_json,
    write_safetensors,
    write_tencent_folder,
)

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "defaults": {"size": [64, 96], "frames": 17, "steps": 16, "guidance": 6, "flow_shift": 7.5},
}


def write_outline(path: Path, rules: Iterable[Rule]) -> Path:
    """A whole bf16 safetensors file of the published size whose numbers are a hole in the file: takes no disk."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in (source for rule in rules for source in rule.sources):
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


def refusal(action: Any, *words: str) -> None:
    """`action` fails in one line with these words."""
    with pytest.raises(WeightsError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


# Folders.


def test_the_parts_of_a_diffusers_folder(tmp_path: Path) -> None:
    sources = find_sources(write_diffusers_folder(tmp_path))
    assert sources.dit == tmp_path / "transformer"
    assert sources.tokenizer_2 == tmp_path / "tokenizer_2"
    dims = read_dims(sources)
    assert (dims.dit, dims.vae, dims.llama, dims.clip) == (TINY_DIT, TINY_VAE, TINY_LLAMA, TINY_CLIP)
    assert (dims.name, dims.defaults) == (tmp_path.name, HUNYUANVIDEO_DEFAULTS)
    assert dict(dit_tensors(sources.dit, dims.dit)).keys() == random_dit().keys()


def test_the_parts_of_tencents_folder(tmp_path: Path) -> None:
    sources = find_sources(write_tencent_folder(tmp_path))
    assert sources.dit == tmp_path / "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
    assert sources.tokenizer == sources.text_encoder == tmp_path / "text_encoder"
    dims = read_dims(sources)
    assert (dims.dit, dims.vae, dims.llama, dims.clip) == (WIDE_DIT, TINY_VAE, TINY_LLAMA, TINY_CLIP)
    for tensors, ours in (
        (dit_tensors(sources.dit, dims.dit), random_dit(WIDE_DIT)),
        (vae_tensors(sources.vae, dims.vae), random_vae()),
        (llama_tensors(sources.text_encoder, dims.llama), random_llama()),
        (clip_tensors(sources.text_encoder_2, dims.clip), random_clip()),
    ):
        found = dict(tensors)
        assert found.keys() == ours.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in ours.items())


def test_the_fp8_file_is_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    write_tencent_folder(tmp_path)
    transformers = tmp_path / "hunyuan-video-t2v-720p/transformers"
    (transformers / "mp_rank_00_model_states.pt").rename(transformers / "mp_rank_00_model_states_fp8.pt")
    assert find_sources(tmp_path).dit.name == "mp_rank_00_model_states_fp8.pt"


def test_what_is_missing_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    refusal(lambda: find_sources(tmp_path / "absent"), "absent", "no such folder", "transformer/")
    refusal(lambda: find_sources(tmp_path), "transformer/", "hunyuan-video-t2v-720p/")
    write_diffusers_folder(tmp_path)
    (tmp_path / "tokenizer").rmdir()
    refusal(lambda: find_sources(tmp_path), "has no tokenizer", "looked for tokenizer")


def test_a_given_part_need_not_be_in_the_folder(tmp_path: Path) -> None:
    write_diffusers_folder(tmp_path)
    (tmp_path / "tokenizer").rmdir()
    elsewhere = tmp_path / "elsewhere"
    sources = find_sources(tmp_path, {"tokenizer": elsewhere})
    assert sources.tokenizer == elsewhere
    assert sources.vae == tmp_path / "vae"


# Dims.


def test_dims_of_the_published_model_follow_from_single_files(tmp_path: Path) -> None:
    """Comfy-Org's files have no config; their headers say enough, and nothing but headers is read."""
    parts = {
        "dit": write_outline(tmp_path / "dit.safetensors", dit_rules(HUNYUANVIDEO.dit, "B")),
        "vae": write_outline(tmp_path / "vae.safetensors", vae_rules(HUNYUANVIDEO.vae, "ldm")),
        "text_encoder": write_outline(tmp_path / "llava.safetensors", llama_rules(HUNYUANVIDEO.llama)),
        "text_encoder_2": write_outline(tmp_path / "clip_l.safetensors", clip_rules(HUNYUANVIDEO.clip)),
        "tokenizer": tmp_path,
        "tokenizer_2": tmp_path,
    }
    sources = find_sources(tmp_path, parts)
    assert read_dims(sources) == HUNYUANVIDEO
    assert source_bytes(sources) > 40e9


@pytest.mark.parametrize("layout", ["A", "B", "C"])
@pytest.mark.parametrize("has_guidance", [True, False])
def test_dims_of_a_transformer_follow_from_its_shapes(tmp_path: Path, layout: str, has_guidance: bool) -> None:
    dims = replace(WIDE_DIT, hidden=256, heads=2, double_blocks=2, single_blocks=3, has_guidance=has_guidance)
    path = write_outline(tmp_path / "dit.safetensors", dit_rules(dims, layout))
    assert read_dit_dims(path) == dims


def test_shapes_that_do_not_tell_the_rope_axes_need_a_config(tmp_path: Path) -> None:
    path = write_dit(tmp_path, random_dit())
    refusal(lambda: read_dit_dims(path), "16", "128", "config.json")
    write_json(tmp_path / "config.json", dit_config(TINY_DIT))
    assert read_dit_dims(path) == TINY_DIT


def test_an_image_to_video_transformer_is_refused(tmp_path: Path) -> None:
    state = publish_dit(random_dit(WIDE_DIT), WIDE_DIT, "A")
    state["img_in.proj.weight"] = torch.zeros(128, 33, 1, 2, 2)
    path = write_safetensors(tmp_path / "i2v.safetensors", state)
    refusal(lambda: read_dit_dims(path), "reads 33 channels and writes 16")


def test_a_stray_block_number_makes_no_room_for_a_million(tmp_path: Path) -> None:
    state = publish_dit(random_dit(WIDE_DIT), WIDE_DIT, "A")
    state["single_blocks.999999999.linear1.bias"] = torch.zeros(1)
    path = write_safetensors(tmp_path / "stray.safetensors", state)
    dims = read_dit_dims(path)
    refusal(lambda: dit_tensors(path, dims), "single_blocks.1.")


@pytest.mark.parametrize(
    "name", ["img_in.proj.weight", "double_blocks.0.img_mlp.fc1.weight", "txt_in.input_embedder.weight"]
)
@pytest.mark.parametrize("fault", ["missing", "scalar", "empty"])
def test_shapes_that_say_nothing_are_refused(tmp_path: Path, name: str, fault: str) -> None:
    state = publish_dit(random_dit(WIDE_DIT), WIDE_DIT, "A")
    shape = state.pop(name).shape
    if fault != "missing":
        state[name] = torch.zeros(()) if fault == "scalar" else torch.zeros((0, *shape[1:]))
    path = write_safetensors(tmp_path / "odd.safetensors", state)
    refusal(lambda: read_dit_dims(path), name)


def test_another_vae_needs_a_config(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "vae.safetensors", publish_vae(random_vae(), TINY_VAE, "ldm"))
    refusal(lambda: read_vae_dims(path), "config.json", "published [128, 3, 3, 3, 3]")
    for original in (True, False):
        write_json(tmp_path / "config.json", vae_config(TINY_VAE, original=original))
        assert read_vae_dims(path) == TINY_VAE


@pytest.mark.parametrize(("read", "state"), [(read_llama_dims, random_llama()), (read_clip_dims, random_clip())])
def test_other_text_encoders_need_a_config(tmp_path: Path, read: Any, state: Any) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", state)
    refusal(lambda: read(path), "config.json", "published")


def test_a_config_that_speaks_of_something_else_is_passed_over(tmp_path: Path) -> None:
    """Some repositories hold a config.json for the download counter only."""
    path = write_outline(tmp_path / "dit.safetensors", dit_rules(WIDE_DIT, "A"))
    write_json(tmp_path / "config.json", {"_class_name": "HunyuanVideoPipeline"})
    assert read_dit_dims(path) == WIDE_DIT


def test_llavas_config_holds_the_language_models(tmp_path: Path) -> None:
    """As published: nested, in the older words, and without what equals transformers' defaults."""
    nested = {
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "vocab_size": 128320,
    }
    write_json(tmp_path / "config.json", {"model_type": "llava", "text_config": nested, "vision_config": {}})
    assert read_llama_dims(tmp_path) == HUNYUANVIDEO.llama


def test_clips_published_config(tmp_path: Path) -> None:
    """The whole model's, with the text tower nested, and 2 as the end token, which stands for the highest one."""
    nested = clip_config(HUNYUANVIDEO.clip) | {"eos_token_id": 2, "projection_dim": 768}
    write_json(tmp_path / "config.json", {"projection_dim": 768, "text_config": nested, "vision_config": {}})
    assert read_clip_dims(tmp_path) == HUNYUANVIDEO.clip


BAD_CONFIGS = [
    ("dit", {"num_layers": "2"}, "$.num_layers"),
    ("dit", {"num_layers": 10**12}, "$.num_layers"),
    ("dit", {"num_layers": -1}, "$.num_layers"),
    ("dit", {"num_layers": True}, "$.num_layers"),
    ("dit", {"patch_size_t": 2}, "$.patch_size_t"),
    ("dit", {"qk_norm": "layer_norm"}, "$.qk_norm"),
    ("dit", {"image_condition_type": "latent_concat"}, "$.image_condition_type"),
    ("dit", {"in_channels": 33}, "reads 33 channels and writes 4"),
    ("dit", {"rope_axes_dim": [4, 6, 8]}, "attention_head_dim 16"),
    ("dit", {"rope_axes_dim": [5, 5, 6]}, "even"),
    ("dit", {"rope_axes_dim": [16, 0, 0]}, "$.rope_axes_dim"),
    ("dit", {"mlp_ratio": 2.5}, "2.5"),
    ("dit", {"rope_theta": float("nan")}, "config.json"),
    ("vae", {"block_out_channels": []}, "$.block_out_channels"),
    ("vae", {"spatial_compression_ratio": 6}, "powers of two"),
    ("vae", {"spatial_compression_ratio": 16}, "4 levels"),
    ("vae", {"norm_num_groups": 4}, "multiples of norm_num_groups 4"),
    ("vae", {"scaling_factor": 0}, "$.scaling_factor"),
    ("llama", {"num_attention_heads": 5}, "5 heads"),
    ("llama", {"num_key_value_heads": 3}, "3 key-value heads"),
    ("llama", {"head_dim": 7}, "divide"),
    ("llama", {"num_hidden_layers": 2}, "$.num_hidden_layers"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_type"),
    ("clip", {"num_attention_heads": 5}, "5 heads"),
    ("clip", {"hidden_act": "swish"}, "$.hidden_act"),
]
READERS: dict[str, tuple[Any, dict[str, object]]] = {
    "dit": (read_dit_dims, dit_config(TINY_DIT)),
    "vae": (read_vae_dims, vae_config(TINY_VAE)),
    "llama": (read_llama_dims, llama_config(TINY_LLAMA)),
    "clip": (read_clip_dims, clip_config(TINY_CLIP)),
}


@pytest.mark.parametrize(("part", "change", "word"), BAD_CONFIGS)
def test_a_bad_config_is_one_line(tmp_path: Path, part: str, change: dict[str, object], word: str) -> None:
    read, config = READERS[part]
    write_json(tmp_path / "config.json", config | change)
    refusal(lambda: read(tmp_path), "config.json", word)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"num_single_layers": 1}', '{"num_single_layers": null}'])
def test_a_broken_config_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    refusal(lambda: read_dit_dims(tmp_path), "config.json")


# hvlite.json.


def test_a_folders_settings_give_its_name_and_defaults(tmp_path: Path) -> None:
    write_json(write_diffusers_folder(tmp_path) / "hvlite.json", SETTINGS)
    dims = read_dims(find_sources(tmp_path))
    assert dims.name == "tiny"
    assert dims.defaults == RequestDefaults(size=(64, 96), frames=17, steps=16, guidance=6.0, flow_shift=7.5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": [64, 90]}, "multiples of 16"),
        ({"size": [64]}, "$.defaults.size"),
        ({"size": [64, "96"]}, "$.defaults.size"),
        ({"frames": 16}, "4k+1"),
        ({"steps": 0}, "$.defaults.steps"),
        ({"guidance": -1}, "$.defaults.guidance"),
        ({"flow_shift": 0}, "$.defaults.flow_shift"),
        ({"step": 3}, "`step`"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, change: dict[str, object], word: str) -> None:
    settings = {**SETTINGS, "defaults": SETTINGS["defaults"] | change}
    write_json(write_diffusers_folder(tmp_path) / "hvlite.json", settings)
    refusal(lambda: read_dims(find_sources(tmp_path)), "hvlite.json", word)


@pytest.mark.parametrize("change", [{"name": ""}, {"name": "../x"}, {"name": 3}, {"defaults": None}, {"more": 1}])
def test_settings_of_another_form_are_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    write_json(write_diffusers_folder(tmp_path) / "hvlite.json", SETTINGS | change)
    refusal(lambda: read_dims(find_sources(tmp_path)), "hvlite.json")


# The hash.


def test_the_hash_stays_when_the_model_moves(tmp_path: Path) -> None:
    write_diffusers_folder(tmp_path / "here")
    before = fingerprint(find_sources(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert fingerprint(find_sources(tmp_path / "there")) == before
    assert len(before) == 64


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model-00001-of-00003.safetensors",
        "text_encoder_2/model.safetensors",
    ],
)
def test_the_hash_notices_a_changed_byte(tmp_path: Path, name: str) -> None:
    sources = find_sources(write_diffusers_folder(tmp_path))
    before = fingerprint(sources)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert fingerprint(sources) != before


def test_the_hash_looks_at_both_ends_and_the_size_only(tmp_path: Path) -> None:
    """What its docstring says: a byte in the middle of a large file goes unnoticed."""
    write_diffusers_folder(tmp_path)
    path = write_outline(tmp_path / "large.safetensors", dit_rules(replace(WIDE_DIT, hidden=512, heads=4), "A"))
    sources = replace(find_sources(tmp_path), dit=path)
    size, seen = path.stat().st_size, []
    assert size > 4 * 2**20
    for position in (None, size // 2, size - 1, 8):
        if position is not None:
            with path.open("r+b") as file:
                file.seek(position)
                file.write(b"#")
        seen.append(fingerprint(sources))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    os.truncate(path, size - 1)
    assert fingerprint(sources) not in seen


def test_the_hash_notices_the_scales_of_fp8_weights(tmp_path: Path) -> None:
    write_tencent_folder(tmp_path)
    sources = find_sources(tmp_path)
    before = fingerprint(sources)
    torch.save({"x": torch.ones(1)}, sources.dit.with_name("mp_rank_00_model_states_map.pt"))
    assert fingerprint(sources) != before


def test_the_size_of_all_weights(tmp_path: Path) -> None:
    sources = find_sources(write_diffusers_folder(tmp_path))
    weights = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert source_bytes(sources) == weights
