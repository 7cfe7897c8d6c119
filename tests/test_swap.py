"""Which Linears are exchanged, and that a swapped model is the plain one with dequantised weights."""

from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel

from hvlite.dims import HUNYUANVIDEO, DitDims, LatentShape, LlamaDims
from hvlite.model.dit import Activations, Dit
from hvlite.model.ops import Linear
from hvlite.model.text import build_llama
from hvlite.quant.linear import QuantisedLinear, Scratch
from hvlite.quant.swap import FORMATS, LEFT_ALONE, SwapPlan, plan_swap, swap
from hvlite.weights.load import fill
from tests.quantised import DTYPES

DIT = DitDims(
    hidden=64,
    heads=2,
    double_blocks=2,
    single_blocks=2,
    refiner_blocks=1,
    mlp_ratio=4,
    latent_channels=4,
    text_width=64,
    pooled_width=24,
    rope_axes=(8, 12, 12),
    rope_theta=256.0,
    has_guidance=True,
)
LLAMA = LlamaDims(
    vocabulary=40,
    hidden=64,
    mlp_hidden=128,
    layers=4,
    heads=4,
    kv_heads=2,
    rms_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
)
SHAPE = LatentShape(2, 8, 12)
QUANTISED = ("double_blocks", "double_mods", "single_blocks", "single_mods")
every_format = pytest.mark.parametrize("weights", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def meta_dit(dims: DitDims = DIT, dtype: torch.dtype = torch.float32) -> Dit:
    with torch.device("meta"):
        return Dit(dims).to(dtype)


def random_tensors(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    """Full-precision tensors for every place; norm weights around one."""
    generator = torch.Generator().manual_seed(3)
    tensors = []
    for name, place in module.state_dict().items():
        values = torch.randn(place.shape, generator=generator) * 0.1
        tensors.append((name, (values + (values.dim() == 1 and name.endswith("weight"))).to(dtype)))
    return tensors


def quantised_tensors(plan: SwapPlan, tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield from plan.tensors(name, tensor)


def pair(plain: nn.Module, swapped: nn.Module, weights: str, dtype: torch.dtype) -> SwapPlan:
    """Fill both with the same weights: quantised in the one, quantised and dequantised again in the other."""
    tensors = random_tensors(plain, dtype)
    plan = swap(swapped, weights)
    fill(swapped, quantised_tensors(plan, tensors))
    fill(plain, [(name, dequantised(swapped, name, tensor, plan)) for name, tensor in tensors])
    return plan


def dequantised(swapped: nn.Module, name: str, tensor: Tensor, plan: SwapPlan) -> Tensor:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or module not in plan.replaced:
        return tensor
    linear = swapped.get_submodule(module)
    assert isinstance(linear, QuantisedLinear)
    return linear.dequantise().clone()


def velocity(dit: Dit, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The vectors of one step, and one forward pass over all blocks."""
    generator = torch.Generator().manual_seed(4)
    text, pooled = torch.randn(5, 64, generator=generator), torch.randn(24, generator=generator)
    latents = torch.randn(1, 4, SHAPE.frames, SHAPE.height, SHAPE.width, generator=generator)
    (conditioning,) = dit.prepare_schedule(torch.tensor([700.0]), 6.0, [(text, pooled)])
    work = dit.make_workspace(SHAPE, 5, Activations(token_chunk=64, head_groups=2), dtype)
    x = dit.embed(latents.to(dtype), conditioning.text[0])
    for index in range(len(dit.blocks)):
        dit.run_block(index, x, conditioning.of_block(index)[0], work)
    return conditioning.double, dit.head(x, conditioning.final[0], SHAPE, 64)


@every_format
def test_the_blocks_and_their_modulation_are_quantised_and_nothing_else(weights: str) -> None:
    dit = meta_dit()
    plan = plan_swap(dit, weights)
    linears = {name for name, module in dit.named_modules() if isinstance(module, Linear)}
    inside = {name for name in linears if name.split(".")[0] in QUANTISED}
    assert set(plan.replaced) == inside
    assert set(plan.left) == linears - inside
    assert {name.split(".")[0] for name in plan.left} == {*LEFT_ALONE} - {"embed_tokens"}
    assert plan.left["final_linear"] == LEFT_ALONE["final_linear"]


@every_format
def test_the_published_model_is_quantised_where_the_published_fp8_set_is(weights: str) -> None:
    """Spec 2.4: ten Linears of a double block, three of a single block, of which linear2 is two here."""
    dit = meta_dit(HUNYUANVIDEO.dit, torch.bfloat16)
    plan = swap(dit, weights)
    assert len(plan.replaced) == 20 * 10 + 40 * 4
    assert {linear.dtype for linear in dit.modules() if isinstance(linear, QuantisedLinear)} == {torch.bfloat16}
    assert {parameter.device.type for parameter in dit.parameters()} == {"meta"}


@every_format
def test_every_projection_of_llama_is_quantised(weights: str) -> None:
    llama = build_llama(HUNYUANVIDEO.llama, torch.bfloat16)
    plan = swap(llama, weights)
    assert len(plan.replaced) == 30 * 7
    assert plan.left == {"embed_tokens": LEFT_ALONE["embed_tokens"]}
    assert not any(isinstance(module, nn.Linear) for module in llama.modules())


@pytest.mark.parametrize(("weights", "fits"), [("nf4", False), ("nf4-double", False), ("int8", True), ("fp8", True)])
def test_features_that_are_no_multiple_of_the_group_are_left_alone(weights: str, fits: bool) -> None:
    module = nn.ModuleDict({"odd": nn.Linear(96, 8), "table": nn.Embedding(4, 64), "even": nn.Linear(128, 8)})
    plan = plan_swap(module, weights)
    assert plan.replaced == (("odd", "even") if fits else ("even",))
    assert plan.left["table"] == "Embedding does not multiply by its weight"
    if not fits:
        assert plan.left["odd"] == "its 96 input features are no multiple of the group of 64"


def test_a_swapped_linear_keeps_what_the_old_one_was() -> None:
    module = nn.ModuleDict({"plain": nn.Linear(64, 8, bias=False), "biased": nn.Linear(64, 16).to("meta", torch.half)})
    scratch = Scratch()
    swap(module.eval(), "int8", scratch)
    plain, biased = (cast(QuantisedLinear, module[name]) for name in ("plain", "biased"))
    assert (plain.bias, plain.dtype, plain.qweight.device.type) == (None, torch.float32, "cpu")
    assert (biased.dtype, biased.qweight.device.type) == (torch.float16, "meta")
    assert biased.bias is not None
    assert biased.bias.dtype == torch.float16
    assert plain.scratch is biased.scratch is scratch
    assert not plain.training


def test_a_linear_itself_is_refused() -> None:
    with pytest.raises(AssertionError, match="give the module that holds it"):
        swap(nn.Linear(64, 8), "int8")


def test_tensors_are_renamed_only_where_they_are_quantised() -> None:
    plan = plan_swap(meta_dit(), "int8")
    weight, bias = torch.randn(192, 64), torch.randn(192)
    name = "double_blocks.0.img.attn_qkv"
    assert [key for key, _ in plan.tensors(f"{name}.weight", weight)] == [f"{name}.qweight", f"{name}.scales"]
    others = {f"{name}.bias": bias, "double_blocks.0.img.q_norm.weight": bias, "img_in.weight": weight}
    for kept, tensor in others.items():
        ((key, value),) = plan.tensors(kept, tensor)
        assert key == kept
        assert value is tensor


@pytest.mark.parametrize("weights", [weights for weights in FORMATS if weights != "int8-dynamic"])
@every_dtype
def test_a_swapped_dit_is_the_dit_of_its_dequantised_weights(weights: str, dtype: torch.dtype) -> None:
    plain, swapped = meta_dit(dtype=dtype), meta_dit(dtype=dtype)
    pair(plain, swapped, weights, dtype)
    for expected, found in zip(velocity(plain, dtype), velocity(swapped, dtype), strict=True):
        assert torch.equal(found, expected)


def test_integer_activations_stay_near_the_dequantised_weights() -> None:
    plain, swapped = meta_dit(), meta_dit()
    pair(plain, swapped, "int8-dynamic", torch.float32)
    (mods, expected), (dynamic_mods, found) = velocity(plain, torch.float32), velocity(swapped, torch.float32)
    assert torch.equal(dynamic_mods, mods)  # one token: no integers
    assert 0 < (found - expected).norm() / expected.norm() < 0.02


@every_format
def test_a_swapped_llama_is_the_llama_of_its_dequantised_weights(weights: str) -> None:
    plain, swapped = build_llama(LLAMA), build_llama(LLAMA)
    pair(plain, swapped, weights, torch.float32)

    def states(llama: LlamaModel) -> Tensor:
        with torch.no_grad():
            last: Tensor = llama(torch.arange(20)[None]).last_hidden_state
        return last

    torch.testing.assert_close(states(swapped), states(plain))
