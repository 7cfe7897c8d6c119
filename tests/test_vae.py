"""The VAE against diffusers' class at equal random weights, and what must not change its numbers."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvlite.dims import HUNYUANVIDEO, VaeDims
from hvlite.model import causal
from hvlite.model.causal import Moments
from hvlite.model.vae import USED_BY_DECODE, Vae, posterior_mode

# Outputs are of size 1, and both implementations lie up to 2e-5 from what fp64 gives with these weights.
TOLERANCE = 4e-5

ONE_LAYER = VaeDims(channels=(8, 16, 16, 16), layers_per_block=1, norm_groups=4, latent_channels=16, scaling_factor=1.0)
TWO_LAYERS = VaeDims(channels=(8, 8, 24, 16), layers_per_block=2, norm_groups=2, latent_channels=4, scaling_factor=1.0)
BOTH = pytest.mark.parametrize("dims", [ONE_LAYER, TWO_LAYERS], ids=["one layer", "two layers"])


@cache
def reference(dims: VaeDims) -> Any:
    """diffusers' class with random weights everywhere, norms included; untiled."""
    torch.manual_seed(len(dims.channels) + dims.layers_per_block)
    model: Any = AutoencoderKLHunyuanVideo(
        block_out_channels=dims.channels,
        layers_per_block=dims.layers_per_block,
        norm_num_groups=dims.norm_groups,
        latent_channels=dims.latent_channels,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.use_framewise_decoding = False
    model.use_framewise_encoding = False
    return model.eval()


@cache
def ours(dims: VaeDims) -> Vae:
    """Ours with the reference's weights, loaded strictly."""
    model = Vae(dims)
    model.load_state_dict(reference(dims).state_dict(), strict=True)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@BOTH
@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 5), (2, 4, 2), (3, 1, 1), (5, 3, 2), (6, 2, 5)], ids=str)
def test_decode_is_the_published_one(dims: VaeDims, shape: tuple[int, int, int]) -> None:
    latents = noise(1, dims.latent_channels, *shape)
    with torch.no_grad():
        expected = reference(dims).decode(latents).sample
    torch.testing.assert_close(ours(dims).decode(latents), expected, atol=TOLERANCE, rtol=0)


@BOTH
@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 24), (5, 24, 8), (9, 16, 16), (10, 8, 8)], ids=str)
def test_encode_is_the_published_one(dims: VaeDims, shape: tuple[int, int, int]) -> None:
    frames = noise(1, 3, *shape)
    with torch.no_grad():
        expected = reference(dims).encode(frames).latent_dist.parameters
    torch.testing.assert_close(ours(dims).encode(frames), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("latent_frames", range(1, 14))
def test_a_clip_of_t_latents_has_4t_minus_3_frames(latent_frames: int) -> None:
    decoded = ours(ONE_LAYER).decode(noise(1, 16, latent_frames, 1, 2))
    assert decoded.shape == (1, 3, 4 * latent_frames - 3, 8, 16)
    assert ours(ONE_LAYER).encode(decoded).shape == (1, 32, latent_frames, 1, 2)


def test_clips_of_a_batch_do_not_meet() -> None:
    latents = noise(2, 16, 3, 4, 4)
    both = ours(ONE_LAYER).decode(latents)
    for index in range(2):
        alone = ours(ONE_LAYER).decode(latents[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone, atol=TOLERANCE, rtol=0)


def test_inputs_are_left_alone() -> None:
    latents, frames = noise(1, 16, 2, 4, 4), noise(1, 3, 5, 16, 16)
    kept_latents, kept_frames = latents.clone(), frames.clone()
    ours(ONE_LAYER).decode(latents)
    ours(ONE_LAYER).encode(frames)
    assert torch.equal(latents, kept_latents)
    assert torch.equal(frames, kept_frames)


def test_no_graph_is_kept_and_inference_mode_is_fine() -> None:
    latents = noise(1, 16, 2, 2, 2).requires_grad_()
    decoded = ours(ONE_LAYER).decode(latents)
    assert not decoded.requires_grad
    with torch.inference_mode():
        assert torch.equal(ours(ONE_LAYER).decode(latents), decoded)
        assert ours(ONE_LAYER).encode(decoded).shape == (1, 32, 2, 2, 2)


@pytest.mark.parametrize("conv_elements", [1, 2000])
@pytest.mark.parametrize("block_elements", [1, 700])
def test_chunk_sizes_change_rounding_only(
    monkeypatch: pytest.MonkeyPatch, conv_elements: int, block_elements: int
) -> None:
    latents, frames = noise(1, 16, 4, 4, 3), noise(1, 3, 13, 16, 24)
    decoded, moments = ours(ONE_LAYER).decode(latents), ours(ONE_LAYER).encode(frames)
    monkeypatch.setattr(causal, "CONV_ELEMENTS_CPU", conv_elements)
    monkeypatch.setattr(causal, "BLOCK_ELEMENTS_CPU", block_elements)
    torch.testing.assert_close(ours(ONE_LAYER).decode(latents), decoded, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours(ONE_LAYER).encode(frames), moments, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("latent_frames", [1, 4])
def test_summed_taps_change_rounding_only(monkeypatch: pytest.MonkeyPatch, latent_frames: int) -> None:
    latents = noise(1, 16, latent_frames, 3, 4)
    folded = ours(ONE_LAYER).decode(latents)
    monkeypatch.setattr(causal, "may_sum", lambda weight: False)
    torch.testing.assert_close(ours(ONE_LAYER).decode(latents), folded, atol=TOLERANCE, rtol=0)


def test_onednn_asked_directly_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = noise(1, 16, 3, 3, 4)
    direct = ours(ONE_LAYER).decode(latents)
    monkeypatch.setattr(causal, "_onednn_takes", lambda x: False)
    torch.testing.assert_close(ours(ONE_LAYER).decode(latents), direct, atol=TOLERANCE, rtol=0)


# Thirty layers that each round their input to 8 (bf16) or 11 (fp16) bits.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("latent_frames", [1, 3])
def test_half_precision_stays_near_full(dtype: torch.dtype, bound: float, latent_frames: int) -> None:
    model = Vae(TWO_LAYERS)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in ours(TWO_LAYERS).state_dict().items()})
    rounded = model.state_dict()
    latents = noise(1, 4, latent_frames, 4, 4).to(dtype)
    expected = model.decode(latents)
    model.to(dtype)
    decoded = model.decode(latents)
    assert decoded.dtype == dtype
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in model.state_dict().items())
    assert relative_error(decoded, expected) < bound
    frames = expected.to(dtype)
    moments = model.encode(frames)
    assert moments.dtype == dtype
    assert relative_error(moments, model.float().encode(frames.float())) < bound


def test_moments_hold_where_the_mean_is_a_thousand_deviations() -> None:
    x_BTHWC = noise(2, 3, 5, 7, 8) * torch.arange(1, 9) + 1000.0 * torch.arange(1, 9)
    mean, variance = Moments(x_BTHWC).of_groups(4)
    per_group = x_BTHWC.double().view(2, 3, 5, 7, 4, 2).permute(0, 4, 1, 2, 3, 5).flatten(2)
    torch.testing.assert_close(mean, per_group.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance, per_group.var(2, correction=0), rtol=1e-5, atol=0)


def test_moments_of_one_channel_groups_hold_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "BLOCK_ELEMENTS_CPU", 100)
    x_BTHWC = noise(1, 5, 6, 7, 4) + 1000.0
    mean, variance = Moments(x_BTHWC).of_groups(4)
    per_channel = x_BTHWC.double().flatten(1, 3)
    torch.testing.assert_close(mean, per_channel.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance, per_channel.var(1, correction=0), rtol=1e-5, atol=0)


def test_published_sizes_on_meta() -> None:
    with torch.device("meta"):
        model = Vae(HUNYUANVIDEO.vae).half()
    tensors = model.state_dict()
    assert len(tensors) == 248
    assert sum(tensor.numel() for tensor in tensors.values()) == 246_478_803
    decoded = model.decode(torch.empty(1, 16, 17, 32, 32, device="meta", dtype=torch.float16))
    assert decoded.shape == (1, 3, 65, 256, 256)
    assert decoded.dtype == torch.float16
    moments = model.encode(torch.empty(1, 3, 5, 64, 96, device="meta"))
    assert moments.shape == (1, 32, 2, 8, 12)


class LargestOperand(TorchDispatchMode):
    """The most elements that any operation reads or writes; views and new memory are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.largest_memory = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        sizes = [tensor.numel() for tensor in tensors]
        if is_view or func.name().startswith("aten::new_empty"):
            self.largest_memory = max(self.largest_memory, *sizes)
        else:
            self.elements = max(self.elements, *sizes)
        return result


def test_no_operation_meets_more_elements_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "BLOCK_ELEMENTS", 2**28)  # fewer and larger pieces than usual
    with torch.device("meta"):
        model = Vae(HUNYUANVIDEO.vae, encodes=False).half()
    with LargestOperand() as largest:
        decoded = model.decode(torch.empty(1, 16, 4, 90, 160, device="meta", dtype=torch.float16))
    assert decoded.shape == (1, 3, 13, 720, 1280)
    assert largest.largest_memory > 2**31 > largest.elements


def test_a_model_that_only_decodes_has_the_names_it_says() -> None:
    with torch.device("meta"):
        whole, part = Vae(ONE_LAYER), Vae(ONE_LAYER, encodes=False)
    assert set(part.state_dict()) == {name for name in whole.state_dict() if name.startswith(USED_BY_DECODE)}
    part = Vae(ONE_LAYER, encodes=False)
    part.load_state_dict(
        {name: value for name, value in ours(ONE_LAYER).state_dict().items() if name.startswith(USED_BY_DECODE)}
    )
    latents = noise(1, 16, 2, 3, 4)
    assert torch.equal(part.decode(latents), ours(ONE_LAYER).decode(latents))


@pytest.mark.parametrize("assign", [True, False])
def test_loaded_weights_lie_channels_last(assign: bool) -> None:
    model = Vae(ONE_LAYER)
    model.load_state_dict(reference(ONE_LAYER).state_dict(), assign=assign)
    weight = model.decoder.conv_in.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(weight, reference(ONE_LAYER).decoder.conv_in.conv.weight)


def test_the_posteriors_mode_is_diffusers() -> None:
    moments = torch.randn(1, 32, 2, 3, 4) * 20
    assert torch.equal(posterior_mode(moments), DiagonalGaussianDistribution(moments).mode())
