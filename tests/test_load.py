"""Every published layout and container gives the same tensors of ours; whatever does not fit is one line of error."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvlite.errors import WeightsError
from hvlite.model.text import build_clip, build_llama
from hvlite.model.vae import Vae
from hvlite.weights.checkpoint import Stored
from hvlite.weights.dit_layouts import DIT, dit_rules
from hvlite.weights.load import clip_tensors, dit_tensors, fill, llama_tensors, vae_tensors
from tests.layouts import (
    CONTAINERS,
    TINY_CLIP,
    TINY_DIT,
    TINY_LLAMA,
    TINY_VAE,
    State,
    cast_fp8,
    comfy_fp8,
    dequantised,
    publish_clip,
    publish_dit,
    publish_llama,
    publish_vae,
    random_clip,
    random_dit,
    random_llama,
    random_vae,
    scale_fp8,
    with_prefix,
    write_dit,
    write_pickle,
    write_safetensors,
)

LAYOUTS = ("A", "B", "C")


def same(found: State, expected: State) -> bool:
    """The same names, dtypes, shapes and numbers, bit for bit."""
    assert found.keys() == expected.keys()
    return all(
        found[name].dtype == tensor.dtype and found[name].is_contiguous() and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def refusal(read: Callable[[], object], *words: str) -> None:
    """`read` fails, before a tensor comes, in one line with these words."""
    with pytest.raises(WeightsError) as caught:
        read()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


# The transformer.


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_container_gives_the_same_transformer(tmp_path: Path, layout: str, container: str) -> None:
    ours = random_dit()
    path = write_dit(tmp_path, ours, layout=layout, container=container)
    assert same(dict(dit_tensors(path, TINY_DIT)), ours)


@pytest.mark.parametrize("prefix", DIT.prefixes)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_prefix_is_stripped(tmp_path: Path, layout: str, prefix: str) -> None:
    ours = random_dit()
    path = write_dit(tmp_path, ours, layout=layout, prefix=prefix)
    assert same(dict(dit_tensors(path, TINY_DIT)), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = random_dit(dtype=dtype)
    assert same(dict(dit_tensors(write_dit(tmp_path, ours, layout="C"), TINY_DIT)), ours)


def test_newer_files_of_layout_b_call_norms_weight(tmp_path: Path) -> None:
    ours = random_dit()
    path = write_safetensors(tmp_path / "b.safetensors", publish_dit(ours, TINY_DIT, "B", scale_names=False))
    assert same(dict(dit_tensors(path, TINY_DIT)), ours)


def test_both_names_of_a_norm_would_fill_it_twice(tmp_path: Path) -> None:
    state = publish_dit(random_dit(), TINY_DIT, "B")
    state["double_blocks.0.img_attn.norm.query_norm.weight"] = torch.ones(16)
    path = write_safetensors(tmp_path / "b.safetensors", state)
    refusal(lambda: dit_tensors(path, TINY_DIT), "query_norm.scale", "query_norm.weight", "both")


def test_load_key_chooses_the_averaged_weights(tmp_path: Path) -> None:
    plain, averaged = random_dit(), random_dit(seed=9)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": publish_dit(plain, TINY_DIT, "A"), "ema": publish_dit(averaged, TINY_DIT, "A")}, path)
    assert same(dict(dit_tensors(path, TINY_DIT)), plain)
    assert same(dict(dit_tensors(path, TINY_DIT, load_key="ema")), averaged)


def test_a_transformer_without_guidance(tmp_path: Path) -> None:
    ours = {name: tensor for name, tensor in random_dit().items() if not name.startswith("guidance_in.")}
    dims = replace(TINY_DIT, has_guidance=False)
    path = write_safetensors(tmp_path / "a.safetensors", publish_dit(ours, dims, "A"))
    assert same(dict(dit_tensors(path, dims)), ours)
    refusal(lambda: dit_tensors(path, TINY_DIT), "guidance_in.mlp.0.weight", "missing", "[32, 256]")


def spoilt(layout: str, change: Callable[[State], object]) -> Callable[[Path], Callable[[], object]]:
    """Writes the transformer with a fault and returns the attempt to read it."""

    def write(folder: Path) -> Callable[[], object]:
        state = publish_dit(random_dit(), TINY_DIT, layout)
        change(state)
        path = write_safetensors(folder / "spoilt.safetensors", state)
        return lambda: dit_tensors(path, TINY_DIT)

    return write


FAULTS: dict[str, tuple[Callable[[Path], Callable[[], object]], tuple[str, ...]]] = {
    "missing": (
        spoilt("C", lambda state: state.pop("transformer_blocks.1.attn.to_k.weight")),
        ("transformer_blocks.1.attn.to_k.weight", "missing", "[32, 32]"),
    ),
    "unknown": (spoilt("A", lambda state: state.update(lora_A=torch.ones(2))), ("'lora_A' is unknown",)),
    "one block more": (
        spoilt("A", lambda state: state.update({"single_blocks.3.linear1.bias": torch.ones(2)})),
        ("'single_blocks.3.linear1.bias' is unknown",),
    ),
    "wrong shape": (
        spoilt("B", lambda state: state.update({"img_in.proj.weight": torch.ones(32, 33, 1, 2, 2)})),
        ("img_in.proj.weight", "[32, 33, 1, 2, 2]", "[32, 4, 1, 2, 2]"),
    ),
    "fused where it should be split": (
        spoilt("C", lambda state: state.update({"transformer_blocks.0.attn.to_q.weight": torch.ones(96, 32)})),
        ("to_q.weight", "[96, 32]", "[32, 32]"),
    ),
    "integers": (
        spoilt("A", lambda state: state.update({"img_in.proj.bias": torch.ones(32, dtype=torch.int8)})),
        ("img_in.proj.bias", "int8"),
    ),
    "a second model": (
        spoilt("A", lambda state: state.update(with_prefix(publish_dit(random_dit(), TINY_DIT, "A"), "module."))),
        ("'module.", "unknown"),
    ),
    "another layout beside": (
        spoilt("A", lambda state: state.update(publish_dit(random_dit(), TINY_DIT, "C"))),
        ("unknown",),
    ),
    "a hint about nothing": (
        spoilt("A", lambda state: state.update({"x.input_scale": torch.ones(())})),
        ("'x.input_scale' is unknown",),
    ),
    "a scale of nothing": (
        spoilt("A", lambda state: state.update({"x.scale_weight": torch.ones(())})),
        ("'x.scale_weight' is unknown",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_known_before_a_tensor_is_read(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, words = FAULTS[fault]
    read = write(tmp_path)
    monkeypatch.setattr(Stored, "read", lambda self: pytest.fail(f"read {self.name}"))
    refusal(read, "spoilt.safetensors", *words)


def test_keys_outside_the_prefix_are_unknown(tmp_path: Path) -> None:
    state = with_prefix(publish_dit(random_dit(), TINY_DIT, "A"), "module.")
    path = write_safetensors(tmp_path / "a.safetensors", state | {"first_stage.bias": torch.ones(2)})
    refusal(lambda: dit_tensors(path, TINY_DIT), "'first_stage.bias'", "'module.'")


def test_a_file_of_another_part_is_named_as_such(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "vae.safetensors", publish_vae(random_vae(), TINY_VAE, "diffusers"))
    refusal(lambda: dit_tensors(path, TINY_DIT), "vae.safetensors", "no transformer", "double_blocks.0", "'decoder.")


# fp8.


def dequantised_dit(published: State, scales: State | None = None) -> State:
    """Layout A in fp8, read by the rule of spec 2.4."""
    scales = scales or {}
    plain = {
        name: dequantised(tensor, scales.get(name.removesuffix(".weight"), torch.ones(1)))
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in published.items()
    }
    ours: State = {}
    for rule in dit_rules(TINY_DIT, "A"):
        (source, _), width = rule.sources[0], 0
        for name, shape in rule.targets:
            columns = plain[source] if plain[source].ndim != 2 else plain[source][:, width : width + shape[-1]]
            ours[name] = columns.reshape(shape).contiguous()
            width += shape[-1]
    return ours


def test_official_fp8_pair_and_its_forms_give_the_same_numbers(tmp_path: Path) -> None:
    state, scales = scale_fp8(publish_dit(random_dit(), TINY_DIT, "A"))
    assert len(scales) == 10 * TINY_DIT.double_blocks + 3 * TINY_DIT.single_blocks
    expected = dequantised_dit(state, scales)
    assert all(tensor.dtype == torch.bfloat16 for tensor in expected.values())

    official = write_pickle(tmp_path / "pt/mp_rank_00_model_states_fp8.pt", state)
    write_pickle(tmp_path / "pt/mp_rank_00_model_states_fp8_map.pt", scales, None)
    assert same(dict(dit_tensors(official, TINY_DIT)), expected)
    assert same(dict(dit_tensors(official.parent, TINY_DIT)), expected)

    wrapped = write_pickle(tmp_path / "st/mp_rank_00_model_states_fp8.pt", with_prefix(state, "module."), None)
    write_safetensors(tmp_path / "st/mp_rank_00_model_states_fp8_map.safetensors", scales)
    assert same(dict(dit_tensors(wrapped, TINY_DIT)), expected)


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfy_scaled_fp8_gives_the_official_numbers(tmp_path: Path, suffix: str, prefix: str) -> None:
    published = publish_dit(random_dit(), TINY_DIT, "A")
    path = write_safetensors(tmp_path / "a.safetensors", with_prefix(comfy_fp8(published, suffix), prefix))
    assert same(dict(dit_tensors(path, TINY_DIT)), dequantised_dit(*scale_fp8(published)))


@pytest.mark.parametrize("layout", ["B", "C"])
def test_scaled_fp8_in_the_other_layouts(tmp_path: Path, layout: str) -> None:
    """In layout C each of q, k and v has its own scale."""
    ours = random_dit()
    path = write_safetensors(tmp_path / "x.safetensors", comfy_fp8(publish_dit(ours, TINY_DIT, layout)))
    found = dict(dit_tensors(path, TINY_DIT))
    assert found.keys() == ours.keys()
    for name, tensor in ours.items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name] - tensor).abs().max() <= 0.04 * tensor.abs().max()


@pytest.mark.parametrize("beside_a_map", [True, False])
def test_unscaled_fp8_is_a_plain_cast(tmp_path: Path, beside_a_map: bool) -> None:
    state = cast_fp8(publish_dit(random_dit(), TINY_DIT, "A"))
    path = write_safetensors(tmp_path / "mp_rank_00_model_states_fp8.safetensors", state)
    if beside_a_map:  # the official map lies beside it, but belongs to the .pt
        write_pickle(path.with_name("mp_rank_00_model_states_fp8_map.pt"), {"x": torch.ones(1)}, None)
    assert same(dict(dit_tensors(path, TINY_DIT)), dequantised_dit(state))


def test_the_other_fp8_dtype_is_a_plain_cast_too(tmp_path: Path) -> None:
    ours = random_dit()
    state = {name: tensor.to(torch.float8_e5m2) for name, tensor in publish_dit(ours, TINY_DIT, "A").items()}
    path = write_safetensors(tmp_path / "a.safetensors", state)
    expected = {name: tensor.to(torch.float8_e5m2).to(torch.bfloat16) for name, tensor in ours.items()}
    assert same(dict(dit_tensors(path, TINY_DIT)), expected)


def test_scale_and_product_are_rounded_to_bf16(tmp_path: Path) -> None:
    """Spec 2.4 with a published scale: 0.00198800233 becomes 130 * 2^-16, and 5 times that a tie, 648 * 2^-16."""
    state, scales = scale_fp8(publish_dit(random_dit(), TINY_DIT, "A"))
    name = "double_blocks.0.img_mod.linear"
    state[f"{name}.weight"] = torch.full((192, 32), 5.0).to(torch.float8_e4m3fn)
    scales[name] = torch.tensor([0.00198800233])
    path = write_pickle(tmp_path / "dit_fp8.pt", state)
    write_pickle(tmp_path / "dit_fp8_map.pt", scales, None)
    weight = dict(dit_tensors(path, TINY_DIT))["double_mods.0.img.weight"]
    assert weight.float().unique().tolist() == [648 * 2**-16]


SCALE_FAULTS: dict[str, tuple[Callable[[State], object], tuple[str, ...]]] = {
    "one scale missing": (
        lambda state: state.pop("single_blocks.1.linear2.scale_weight"),
        ("single_blocks.1.linear2.weight", "no scale"),
    ),
    "all scales missing": (
        lambda state: [state.pop(name) for name in list(state) if name.endswith("scale_weight")],
        ("no scale",),
    ),
    "scale of a plain weight": (
        lambda state: state.update({"img_in.proj.scale_weight": torch.ones(())}),
        ("img_in.proj.weight", "one number for an fp8 tensor"),
    ),
    "scale of the wrong shape": (
        lambda state: state.update({"single_blocks.1.linear2.scale_weight": torch.ones(2, 2)}),
        ("single_blocks.1.linear2.weight", "[2, 2]"),
    ),
    "scale twice": (
        lambda state: state.update({"single_blocks.1.linear2.weight_scale": torch.ones(())}),
        ("linear2.scale_weight", "linear2.weight_scale", "both"),
    ),
}


@pytest.mark.parametrize("fault", SCALE_FAULTS)
def test_scales_are_strict(tmp_path: Path, fault: str) -> None:
    change, words = SCALE_FAULTS[fault]
    state = comfy_fp8(publish_dit(random_dit(), TINY_DIT, "A"))
    change(state)
    path = write_safetensors(tmp_path / "a.safetensors", state)
    refusal(lambda: dit_tensors(path, TINY_DIT), "a.safetensors", *words)


def test_official_fp8_without_its_map_is_refused(tmp_path: Path) -> None:
    """Read without scales it would render black clips."""
    state, scales = scale_fp8(publish_dit(random_dit(), TINY_DIT, "A"))
    path = write_pickle(tmp_path / "mp_rank_00_model_states_fp8.pt", state)
    refusal(lambda: dit_tensors(path, TINY_DIT), "mp_rank_00_model_states_fp8_map.pt")
    scales.pop("single_blocks.0.linear1")
    write_pickle(tmp_path / "mp_rank_00_model_states_fp8_map.pt", scales, None)
    refusal(lambda: dit_tensors(path, TINY_DIT), "single_blocks.0.linear1.weight", "no scale")
    write_pickle(tmp_path / "mp_rank_00_model_states_fp8_map.pt", scales | {"extra": torch.ones(1)}, None)
    refusal(lambda: dit_tensors(path, TINY_DIT), "'extra' is unknown")


def test_the_disk_is_told_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tensor is read, the one that is read after it is announced, and nothing that nobody wants."""
    path = write_dit(tmp_path, random_dit(), layout="C")
    calls: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _, offset, size, advice: calls.append(("next", (offset, size))))
    read = Stored.read

    def recorded(self: Stored) -> Tensor:
        calls.append(("read", (self.offset, self.nbytes)))
        return read(self)

    monkeypatch.setattr(Stored, "read", recorded)
    found = dict(dit_tensors(path, TINY_DIT, wanted=lambda name: name.startswith("double_blocks.1.img.attn")))
    assert len(found) == 4
    announced = [place for kind, place in calls if kind == "next"]
    places = [place for kind, place in calls if kind == "read"]
    assert len(places) == 2 * 3 + 2  # q, k and v apart, weights and biases
    assert announced == places[3:]
    assert all(calls.index(("next", place)) < calls.index(("read", place)) for place in announced)


# The other parts.


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", ["", "vae."])
@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_every_layout_gives_the_same_vae(tmp_path: Path, layout: str, prefix: str, container: str) -> None:
    ours = random_vae()
    path = CONTAINERS[container](tmp_path, with_prefix(publish_vae(ours, TINY_VAE, layout), prefix))
    assert same(dict(vae_tensors(path, TINY_VAE)), ours)


def test_a_wrapped_pickle_of_the_vae(tmp_path: Path) -> None:
    ours = random_vae()
    path = write_pickle(tmp_path / "pytorch_model.pt", with_prefix(ours, "vae."), "state_dict")
    assert same(dict(vae_tensors(path, TINY_VAE)), ours)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", ["llava", "llava5", "causal", "base", "comfy"])
def test_every_layout_gives_the_same_language_model(tmp_path: Path, layout: str, container: str) -> None:
    ours = random_llama()
    path = CONTAINERS[container](tmp_path, publish_llama(ours, TINY_LLAMA, layout))
    assert same(dict(llama_tensors(path, TINY_LLAMA)), ours)


def test_scaled_fp8_language_model(tmp_path: Path) -> None:
    state = comfy_fp8(publish_llama(random_llama(), TINY_LLAMA, "comfy"))
    state |= {"lm_head.scale_weight": torch.ones(()), "model.layers.0.mlp.up_proj.scale_input": torch.ones(())}
    found = dict(llama_tensors(write_safetensors(tmp_path / "llava.safetensors", state), TINY_LLAMA))
    assert found.keys() == random_llama().keys()
    name = "layers.1.mlp.down_proj"
    scale = state[f"model.{name}.scale_weight"]
    assert torch.equal(found[f"{name}.weight"], dequantised(state[f"model.{name}.weight"], scale))
    assert torch.equal(found["embed_tokens.weight"], random_llama()["embed_tokens.weight"])


def test_a_language_model_without_the_layers_that_are_not_used(tmp_path: Path) -> None:
    ours = random_llama()
    assert same(dict(llama_tensors(write_safetensors(tmp_path / "l.safetensors", ours), TINY_LLAMA)), ours)


@pytest.mark.parametrize("extra", ["audio_tower.weight", "layers.4.mlp.up_proj.weight", "layers.3.mlp.extra.weight"])
def test_only_what_the_table_names_is_dropped(tmp_path: Path, extra: str) -> None:
    state = publish_llama(random_llama(), TINY_LLAMA, "base") | {extra: torch.ones(2)}
    path = write_safetensors(tmp_path / "llama.safetensors", state)
    refusal(lambda: llama_tensors(path, TINY_LLAMA), f"'{extra}' is unknown")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", ["text", "bare", "whole"])
def test_every_layout_gives_the_same_clip(tmp_path: Path, layout: str, container: str) -> None:
    ours = random_clip()
    path = CONTAINERS[container](tmp_path, publish_clip(ours, layout))
    assert same(dict(clip_tensors(path, TINY_CLIP)), ours)


def test_clip_is_strict(tmp_path: Path) -> None:
    state = publish_clip(random_clip(), "text") | {"text_model.extra": torch.ones(2)}
    path = write_safetensors(tmp_path / "clip.safetensors", state)
    refusal(lambda: clip_tensors(path, TINY_CLIP), "'text_model.extra' is unknown")


# Into a module.


class Small(nn.Module):
    """A parameter, one below, a convolution's kernel in its own memory format, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(3))
        self.inner = nn.Sequential(nn.Linear(3, 2))
        self.conv = nn.Conv3d(2, 4, 3)
        self.conv.weight = nn.Parameter(self.conv.weight.contiguous(memory_format=torch.channels_last_3d))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("computed", torch.ones(2), persistent=False)


def small_state() -> State:
    """Numbers for all that `Small` saves."""
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(t.shape, generator=generator) for name, t in Small().state_dict().items()}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_fill_puts_every_tensor_in_its_place(device: str) -> None:
    state = small_state()
    with torch.device(device):
        module = Small()
    fill(module, iter(state.items()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_fill_goes_through_the_transform() -> None:
    """It may cast, and may change the shape: what it gives is what the module holds."""
    seen: list[str] = []

    def transform(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return tensor.to(torch.bfloat16) if tensor.ndim == 1 else nn.Parameter(tensor.flatten(), requires_grad=False)

    state = small_state()
    with torch.device("meta"):
        module = Small()
    fill(module, iter(state.items()), transform)
    assert seen == list(state)
    assert module.gain.dtype == torch.bfloat16
    assert module.get_parameter("inner.0.weight").shape == (6,)


def test_fill_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Whatever the loader gave is gone when the next one is made, if the transform does not keep it."""
    dims, path = TINY_VAE, tmp_path / "vae.safetensors"
    write_safetensors(path, publish_vae(random_vae(), dims, "ldm"))
    given: list[weakref.ref[Tensor]] = []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in vae_tensors(path, dims):
            assert not any(reference() is not None for reference in given)
            given.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    with torch.device("meta"):
        vae = Vae(dims)
    fill(vae, watched(), lambda _, tensor: tensor.to(torch.bfloat16))
    assert len(given) == len(random_vae())


FILL_FAULTS: dict[str, tuple[Callable[[State], Iterator[tuple[str, Tensor]]], str]] = {
    "unknown": (lambda state: iter([("other", torch.ones(1)), *state.items()]), "'other' is not in Small"),
    "computed": (lambda state: iter([("computed", torch.ones(2)), *state.items()]), "'computed' is not in Small"),
    "twice": (lambda state: iter([*state.items(), ("gain", torch.ones(3))]), "'gain' was filled already"),
    "shape": (lambda state: iter((state | {"gain": torch.ones(4)}).items()), "'gain' has shape [4]; expected [3]"),
    "missing": (lambda state: iter(list(state.items())[:-1]), "1 of 6 parameters"),
}


@pytest.mark.parametrize("fault", FILL_FAULTS)
def test_fill_is_strict(fault: str) -> None:
    tensors, words = FILL_FAULTS[fault]
    with torch.device("meta"):
        module = Small()
    refusal(lambda: fill(module, tensors(small_state())), words)


def test_our_modules_are_filled_completely(tmp_path: Path) -> None:
    llama, clip = build_llama(TINY_LLAMA), build_clip(TINY_CLIP)
    path = write_safetensors(tmp_path / "llama.safetensors", publish_llama(random_llama(), TINY_LLAMA, "llava"))
    fill(llama, llama_tensors(path, TINY_LLAMA))
    path = write_safetensors(tmp_path / "clip.safetensors", publish_clip(random_clip(), "whole"))
    fill(clip, clip_tensors(path, TINY_CLIP))
    for module in (llama, clip):
        assert not any(parameter.is_meta for parameter in module.parameters())
