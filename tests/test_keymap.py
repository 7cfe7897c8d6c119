"""The naming tables against frozen names, the published counts, diffusers' and transformers' classes, and our own."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from hvlite.dims import HUNYUANVIDEO
from hvlite.model.dit import Dit
from hvlite.model.text import build_clip, build_llama
from hvlite.model.vae import Vae
from hvlite.weights.dit_layouts import DIT, dit_rules, published_name
from hvlite.weights.keymap import (
    CLIP,
    LLAMA,
    VAE,
    Found,
    Rule,
    clip_rules,
    llama_rules,
    unused_llama_names,
    vae_rules,
)
from tests.layouts import TINY_DIT, TINY_VAE, publish_dit, random_dit

Shapes = dict[str, tuple[int, ...]]

# Ours, then layouts A, B and C (spec 2.2 to 2.5). Frozen: published files do not change.
ANCHORS = """
img_in.weight | img_in.proj.weight | img_in.proj.weight | x_embedder.proj.weight
final_mod.bias | final_layer.adaLN_modulation.1.bias | final_layer.adaLN_modulation.1.bias | norm_out.linear.bias
final_linear.weight | final_layer.linear.weight | final_layer.linear.weight | proj_out.weight
time_in.linear_1.weight | time_in.mlp.0.weight | time_in.in_layer.weight \
| time_text_embed.timestep_embedder.linear_1.weight
guidance_in.linear_2.bias | guidance_in.mlp.2.bias | guidance_in.out_layer.bias \
| time_text_embed.guidance_embedder.linear_2.bias
vector_in.linear_2.weight | vector_in.out_layer.weight | vector_in.out_layer.weight \
| time_text_embed.text_embedder.linear_2.weight
txt_in.input_embedder.weight | txt_in.input_embedder.weight | txt_in.input_embedder.weight \
| context_embedder.proj_in.weight
txt_in.t_embedder.linear_1.weight | txt_in.t_embedder.mlp.0.weight | txt_in.t_embedder.in_layer.weight \
| context_embedder.time_text_embed.timestep_embedder.linear_1.weight
txt_in.c_embedder.linear_2.weight | txt_in.c_embedder.linear_2.weight | txt_in.c_embedder.out_layer.weight \
| context_embedder.time_text_embed.text_embedder.linear_2.weight
txt_in.blocks.1.attn_proj.weight | txt_in.individual_token_refiner.blocks.1.self_attn_proj.weight \
| txt_in.individual_token_refiner.blocks.1.self_attn.proj.weight \
| context_embedder.token_refiner.refiner_blocks.1.attn.to_out.0.weight
txt_in.blocks.0.mod.weight | txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight \
| txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.weight \
| context_embedder.token_refiner.refiner_blocks.0.norm_out.linear.weight
txt_in.blocks.0.fc2.bias | txt_in.individual_token_refiner.blocks.0.mlp.fc2.bias \
| txt_in.individual_token_refiner.blocks.0.mlp.2.bias \
| context_embedder.token_refiner.refiner_blocks.0.ff.net.2.bias
double_mods.19.txt.weight | double_blocks.19.txt_mod.linear.weight | double_blocks.19.txt_mod.lin.weight \
| transformer_blocks.19.norm1_context.linear.weight
double_blocks.3.img.q_norm.weight | double_blocks.3.img_attn_q_norm.weight \
| double_blocks.3.img_attn.norm.query_norm.weight | transformer_blocks.3.attn.norm_q.weight
double_blocks.3.txt.k_norm.weight | double_blocks.3.txt_attn_k_norm.weight \
| double_blocks.3.txt_attn.norm.key_norm.weight | transformer_blocks.3.attn.norm_added_k.weight
double_blocks.0.txt.attn_proj.bias | double_blocks.0.txt_attn_proj.bias | double_blocks.0.txt_attn.proj.bias \
| transformer_blocks.0.attn.to_add_out.bias
double_blocks.0.img.fc1.weight | double_blocks.0.img_mlp.fc1.weight | double_blocks.0.img_mlp.0.weight \
| transformer_blocks.0.ff.net.0.proj.weight
double_blocks.0.txt.fc2.weight | double_blocks.0.txt_mlp.fc2.weight | double_blocks.0.txt_mlp.2.weight \
| transformer_blocks.0.ff_context.net.2.weight
single_mods.39.weight | single_blocks.39.modulation.linear.weight | single_blocks.39.modulation.lin.weight \
| single_transformer_blocks.39.norm.linear.weight
single_blocks.0.linear2_attn.bias | single_blocks.0.linear2.bias | single_blocks.0.linear2.bias \
| single_transformer_blocks.0.proj_out.bias
single_blocks.0.k_norm.weight | single_blocks.0.k_norm.weight | single_blocks.0.norm.key_norm.weight \
| single_transformer_blocks.0.attn.norm_k.weight
"""


def sources(rules: Iterable[Rule]) -> Shapes:
    """What a file in this layout holds; every name once."""
    named = [source for rule in rules for source in rule.sources]
    assert len(dict(named)) == len(named)
    return dict(named)


def targets(rules: Iterable[Rule]) -> Shapes:
    """What comes out; every name once."""
    named = [target for rule in rules for target in rule.targets]
    assert len(dict(named)) == len(named)
    return dict(named)


def shapes_of(module: nn.Module) -> Shapes:
    """A module's own parameters."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def elements(shapes: Shapes) -> int:
    """How many numbers all of them hold."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("line", ANCHORS.strip().splitlines(), ids=lambda line: line.partition(" ")[0])
def test_published_names_are_frozen(line: str) -> None:
    ours, *published = line.split(" | ")
    for layout, name in zip("ABC", published, strict=True):
        found = [rule for rule in dit_rules(HUNYUANVIDEO.dit, layout) if name in dict(rule.sources)]
        assert [ours in dict(rule.targets) for rule in found] == [True]


@pytest.mark.parametrize(("layout", "count"), [("A", 856), ("B", 856), ("C", 1264)])
def test_transformer_has_the_published_tensors(layout: str, count: int) -> None:
    published = sources(dit_rules(HUNYUANVIDEO.dit, layout))
    assert len(published) == count
    assert elements(published) == 12_821_012_544


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_vae_has_the_published_tensors(layout: str) -> None:
    published = sources(vae_rules(HUNYUANVIDEO.vae, layout))
    assert len(published) == 248
    assert elements(published) == 246_478_803


def test_text_encoders_have_the_published_tensors() -> None:
    clip = sources(clip_rules(HUNYUANVIDEO.clip))
    assert (len(clip), elements(clip)) == (196, 123_060_480)
    llama = sources(llama_rules(HUNYUANVIDEO.llama))
    assert (len(llama), elements(llama)) == (1 + 30 * 9, 7_068_958_720)
    assert len(unused_llama_names(HUNYUANVIDEO.llama)) == 2 * 9
    assert not unused_llama_names(HUNYUANVIDEO.llama) & set(llama)


def test_layout_c_is_what_diffusers_reads() -> None:
    with torch.device("meta"):
        reference = HunyuanVideoTransformer3DModel()
        reference_vae = AutoencoderKLHunyuanVideo()
    assert sources(dit_rules(HUNYUANVIDEO.dit, "C")) == shapes_of(reference)
    assert sources(vae_rules(HUNYUANVIDEO.vae, "diffusers")) == shapes_of(reference_vae)


def test_other_depths_of_the_vae_are_what_diffusers_reads() -> None:
    dims = TINY_VAE
    with torch.device("meta"):
        reference = AutoencoderKLHunyuanVideo(
            block_out_channels=dims.channels,
            layers_per_block=dims.layers_per_block,
            norm_num_groups=dims.norm_groups,
            latent_channels=dims.latent_channels,
        )
    assert sources(vae_rules(dims, "diffusers")) == shapes_of(reference)


def test_text_names_are_what_transformers_reads() -> None:
    llama, clip = HUNYUANVIDEO.llama, HUNYUANVIDEO.clip
    with torch.device("meta"):
        whole = LlamaModel(
            LlamaConfig(
                vocab_size=llama.vocabulary,
                hidden_size=llama.hidden,
                intermediate_size=llama.mlp_hidden,
                num_hidden_layers=llama.layers,
                num_attention_heads=llama.heads,
                num_key_value_heads=llama.kv_heads,
            )
        )
        tower = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    known = set(sources(llama_rules(llama))) | unused_llama_names(llama) | {"norm.weight"}
    assert known == set(shapes_of(whole))
    assert sources(clip_rules(clip)) == {name.removeprefix("text_model."): s for name, s in shapes_of(tower).items()}


@pytest.mark.parametrize("layout", ["A", "B", "C"])
def test_what_comes_out_is_what_our_transformer_has(layout: str) -> None:
    with torch.device("meta"):
        dit = Dit(HUNYUANVIDEO.dit)
    assert targets(dit_rules(HUNYUANVIDEO.dit, layout)) == shapes_of(dit)


def test_what_comes_out_is_what_our_other_parts_have() -> None:
    with torch.device("meta"):
        vae = Vae(HUNYUANVIDEO.vae)
    for layout in VAE.marks:
        assert targets(vae_rules(HUNYUANVIDEO.vae, layout)) == shapes_of(vae)
    assert targets(llama_rules(HUNYUANVIDEO.llama)) == shapes_of(build_llama(HUNYUANVIDEO.llama))
    assert targets(clip_rules(HUNYUANVIDEO.clip)) == shapes_of(build_clip(HUNYUANVIDEO.clip))


def test_layouts_a_and_c_agree_with_diffusers_own_conversion() -> None:
    """The conversion knows one width only, where it splits linear1; that split is shown by the parity of the DiT."""
    ours = random_dit()
    original = {name: tensor for name, tensor in publish_dit(ours, TINY_DIT, "A").items() if ".linear1." not in name}
    converted: dict[str, Any] = convert_hunyuan_video_transformer_to_diffusers(original)
    expected = publish_dit(ours, TINY_DIT, "C")
    of_linear1 = ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")
    missing = {name for name in expected if name.startswith("single_") and any(word in name for word in of_linear1)}
    assert set(converted) == set(expected) - missing
    assert all(torch.equal(converted[name], expected[name]) for name in converted)


def test_ldm_names_of_the_vae_are_frozen() -> None:
    names = {rule.sources[0]: rule.targets[0] for rule in vae_rules(HUNYUANVIDEO.vae, "ldm")}
    renamed = {source[0]: target[0] for source, target in names.items()}
    assert renamed["decoder.up.3.block.2.conv1.conv.weight"] == "decoder.up_blocks.0.resnets.2.conv1.conv.weight"
    assert renamed["decoder.up.1.upsample.conv.conv.bias"] == "decoder.up_blocks.2.upsamplers.0.conv.conv.bias"
    assert renamed["encoder.down.2.block.0.nin_shortcut.conv.weight"].endswith("2.resnets.0.conv_shortcut.conv.weight")
    assert renamed["encoder.down.0.downsample.conv.conv.weight"].endswith(
        "down_blocks.0.downsamplers.0.conv.conv.weight"
    )
    assert renamed["decoder.mid.block_2.norm1.weight"] == "decoder.mid_block.resnets.1.norm1.weight"
    assert renamed["encoder.mid.attn_1.norm.bias"] == "encoder.mid_block.attentions.0.group_norm.bias"
    assert renamed["decoder.norm_out.weight"] == "decoder.conv_norm_out.weight"
    attention = ("encoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1, 1))
    assert names[attention] == ("encoder.mid_block.attentions.0.to_out.0.weight", (512, 512))


@pytest.mark.parametrize("prefix", DIT.prefixes)
@pytest.mark.parametrize("layout", ["A", "B", "C"])
def test_layout_and_prefix_are_detected_by_keys(layout: str, prefix: str) -> None:
    keys = {prefix + name for name in sources(dit_rules(TINY_DIT, layout))}
    assert DIT.detect(keys) == Found(layout, prefix)


def test_a_foreign_file_has_no_layout() -> None:
    keys = sources(dit_rules(TINY_DIT, "A"))
    assert VAE.detect(keys) is None
    assert LLAMA.detect(keys) is None
    assert CLIP.detect(keys) is None
    assert DIT.detect({}) is None


def test_a_transformer_without_guidance_expects_none() -> None:
    dims = HUNYUANVIDEO.dit
    plain = {name for name in sources(dit_rules(dims, "A")) if not name.startswith("guidance_in.")}
    assert set(sources(dit_rules(replace(dims, has_guidance=False), "A"))) == plain


def test_published_name_of_a_plain_renaming() -> None:
    assert published_name("img_in.weight", "C") == "x_embedder.proj.weight"
    assert published_name("double_blocks.0.img.fc1.weight", "B") == "double_blocks.0.img_mlp.0.weight"
