"""fp8 checkpoints into fp8 stores: the same bytes and scales, but where several published matrices become one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvlite.model.dit import Dit
from hvlite.packing import pack_model
from hvlite.planning import stored_formats
from hvlite.quant.fp8 import quantise_fp8
from hvlite.quant.int8 import quantise_int8
from hvlite.quant.linear import QuantisedLinear
from hvlite.quant.swap import swap
from hvlite.weights.checkpoint import open_checkpoint
from hvlite.weights.dit_layouts import DIT, dit_rules
from hvlite.weights.load import dit_tensors, fill
from hvlite.weights.parts import Fp8Weight, open_part
from hvlite.weights.sources import find_sources
from hvlite.weights.store import Store, open_store
from tests.layouts import (
    TINY_DIT,
    TINY_LLAMA,
    State,
    cast_fp8,
    comfy_fp8,
    publish_dit,
    publish_llama,
    random_dit,
    random_llama,
    scale_fp8,
    write_diffusers_folder,
    write_pickle,
    write_safetensors,
)
from tests.test_pack import TINY, part_tensors


def fp8_store(tmp_path: Path, tiny_model: Path, weights: str, text_weights: str = "fp16", **parts: Path) -> Store:
    """A store of the tiny parts of `layouts`, with these files in place of some."""
    given = {name: tiny_model / name for name in ("tokenizer", "tokenizer_2")} | parts
    sources = find_sources(write_diffusers_folder(tmp_path / "rest"), given)
    list(pack_model(sources, TINY, tmp_path / "store", stored_formats(weights, text_weights)))
    return open_store(tmp_path / "store")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Not the same numbers: fp8 has two zeros."""
    assert one.dtype == other.dtype
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def write_official(folder: Path, state: State) -> Path:
    weights, scales = scale_fp8(state)
    write_pickle(folder / "mp_rank_00_model_states_fp8_map.pt", scales, None)
    return write_pickle(folder / "mp_rank_00_model_states_fp8.pt", weights)


def write_single(folder: Path, state: State) -> Path:
    return write_safetensors(folder / "dit.safetensors", state)


# Layout and how it is written; a cast has scale 1, so that even q, k and v apart share one.
FP8_FILES: dict[str, tuple[str, Callable[[Path, State], Path]]] = {
    "official pair": ("A", write_official),
    "cast": ("A", lambda folder, state: write_single(folder, cast_fp8(state))),
    "comfy": ("B", lambda folder, state: write_single(folder, comfy_fp8(state))),
    "newer comfy": ("B", lambda folder, state: write_single(folder, comfy_fp8(state, "weight_scale"))),
    "cast, q k v apart": ("C", lambda folder, state: write_single(folder, cast_fp8(state))),
}


@pytest.mark.parametrize("kind", FP8_FILES)
def test_fp8_files_go_into_an_fp8_store_byte_for_byte(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    layout, write = FP8_FILES[kind]
    ours = random_dit()
    path = write(tmp_path / "dit", publish_dit(ours, TINY_DIT, layout))
    store = fp8_store(tmp_path, tiny_model, "fp8", dit=path)
    found, read = dict(part_tensors(store, "dit")), open_part(DIT, path)
    adopted = 0
    for rule in dit_rules(TINY_DIT, layout):
        published = [read.read(name) for name, _ in rule.sources]
        stems = [name.removesuffix("weight") for name, _ in rule.targets]
        if not all(isinstance(one, Fp8Weight) for one in published):
            assert f"{stems[0]}qweight" not in found
            continue
        rows = torch.cat([one.weight for one in published if isinstance(one, Fp8Weight)])
        columns = torch.cat([found[f"{stem}qweight"] for stem in stems], 1)
        assert same_bytes(columns, rows), stems
        assert isinstance(published[0], Fp8Weight)
        assert all(torch.equal(found[f"{stem}scale"], published[0].scale) for stem in stems)
        adopted += len(stems)
    assert adopted == 10 * TINY_DIT.double_blocks + 4 * TINY_DIT.single_blocks


def test_an_adopted_fp8_weight_multiplies_as_the_dequantised_one(tmp_path: Path, tiny_model: Path) -> None:
    path = write_official(tmp_path / "dit", publish_dit(random_dit(), TINY_DIT, "A"))
    dequantised = dict(dit_tensors(path, TINY_DIT))
    store = fp8_store(tmp_path, tiny_model, "fp8", dit=path)
    with torch.device("meta"):
        dit = Dit(TINY_DIT)
    swap(dit, "fp8")
    fill(dit, part_tensors(store, "dit"), lambda _, tensor: tensor.float() if tensor.dtype.itemsize == 2 else tensor)
    linears = {name: module for name, module in dit.named_modules() if isinstance(module, QuantisedLinear)}
    assert len(linears) == 10 * TINY_DIT.double_blocks + 4 * TINY_DIT.single_blocks
    for name, linear in linears.items():
        x = torch.randn(5, linear.in_features)
        assert torch.equal(linear(x), F.linear(x, dequantised[f"{name}.weight"].float(), linear.bias)), name


def test_joined_weights_with_scales_of_their_own_are_quantised_anew(tmp_path: Path, tiny_model: Path) -> None:
    """Scaled fp8 with q, k and v apart (and the MLP's half of linear1): one matrix of ours has one scale."""
    path = write_single(tmp_path / "dit", comfy_fp8(publish_dit(random_dit(), TINY_DIT, "C")))
    dequantised, published = dict(dit_tensors(path, TINY_DIT)), open_checkpoint(path)
    found = dict(part_tensors(fp8_store(tmp_path, tiny_model, "fp8", dit=path), "dit"))
    joined = [f"double_blocks.{i}.{half}.attn_qkv" for i in range(2) for half in ("img", "txt")]
    joined += [f"single_blocks.{i}.linear1" for i in range(3)]
    for module in joined:
        made = quantise_fp8(dequantised[f"{module}.weight"])
        assert same_bytes(found[f"{module}.qweight"], made["qweight"])
        assert torch.equal(found[f"{module}.scale"], made["scale"])
    theirs = published["single_transformer_blocks.1.proj_out.weight"].read()
    mine = [found[f"single_blocks.1.linear2_{half}.qweight"] for half in ("attn", "mlp")]
    assert same_bytes(torch.cat(mine, 1), theirs)


def test_the_other_fp8_dtype_is_quantised_anew(tmp_path: Path, tiny_model: Path) -> None:
    state = {name: tensor.to(torch.float8_e5m2) for name, tensor in publish_dit(random_dit(), TINY_DIT, "A").items()}
    path = write_single(tmp_path / "dit", state)
    found = dict(part_tensors(fp8_store(tmp_path, tiny_model, "fp8", dit=path), "dit"))
    made = quantise_fp8(state["double_blocks.0.img_attn_proj.weight"].bfloat16())
    assert same_bytes(found["double_blocks.0.img.attn_proj.qweight"], made["qweight"])


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_fp8_files_become_other_formats_from_their_dequantised_numbers(
    tmp_path: Path, tiny_model: Path, weights: str
) -> None:
    path = write_official(tmp_path / "dit", publish_dit(random_dit(), TINY_DIT, "A"))
    dequantised = dict(dit_tensors(path, TINY_DIT))
    found = dict(part_tensors(fp8_store(tmp_path, tiny_model, weights, dit=path), "dit"))
    weight = dequantised["single_blocks.2.linear2_mlp.weight"]
    made = {"weight": weight} if weights == "bf16" else quantise_int8(weight)
    for part, tensor in made.items():
        assert torch.equal(found[f"single_blocks.2.linear2_mlp.{part}"], tensor)


def test_an_fp8_text_encoder_goes_into_an_fp8_store_byte_for_byte(tmp_path: Path, tiny_model: Path) -> None:
    state = comfy_fp8(publish_llama(random_llama(), TINY_LLAMA, "comfy"))
    folder = tmp_path / "text"
    write_safetensors(folder / "model.safetensors", state)
    found = dict(part_tensors(fp8_store(tmp_path, tiny_model, "bf16", "fp8", text_encoder=folder), "text"))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert same_bytes(found[f"layers.1.{name}.qweight"], state[f"model.layers.1.{name}.weight"])
        assert found[f"layers.1.{name}.scale"].item() == state[f"model.layers.1.{name}.scale_weight"].item()
    assert found["embed_tokens.weight"].dtype == torch.float16
