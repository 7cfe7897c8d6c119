"""The transformer equals diffusers' class through the real keymap, whatever its schedule of activations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, DitDims, LatentShape
from hvlite.model.dit import Activations, Dit, patchify, unpatchify
from hvlite.weights.configs import read_dit_dims
from hvlite.weights.load import dit_tensors, fill
from tests.tiny_model import tiny_transformer

GUIDANCE = 6.0


def our_dit(reference: HunyuanVideoTransformer3DModel, folder: Path) -> Dit:
    """The same weights, through a file in the diffusers layout."""
    reference.save_pretrained(folder)
    dims = read_dit_dims(folder, "module")
    dit = Dit(dims)
    fill(dit, dit_tensors(folder, dims))
    return dit


def velocity(
    dit: Dit,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    pooled: Tensor,
    knobs: Activations | None = None,
    guidance: float = GUIDANCE,
) -> Tensor:
    """One forward pass as `generate.denoise` makes it."""
    knobs = knobs or Activations()
    shape = LatentShape(*latents.shape[2:])
    (conditioning,) = dit.prepare_schedule(timestep, guidance, [(text, pooled)])
    work = dit.make_workspace(shape, len(text), knobs, latents.dtype)
    x = dit.embed(latents, conditioning.text[0])
    for index in range(dit.dims.blocks):
        dit.run_block(index, x, conditioning.of_block(index)[0], work)
    return dit.head(x, conditioning.final[0], shape, knobs.token_chunk)


def reference_velocity(
    reference: HunyuanVideoTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    pooled: Tensor,
    guidance: float = GUIDANCE,
) -> Tensor:
    """diffusers' forward, with the text padded as its pipeline pads it."""
    padded = torch.zeros(1, 12, text.shape[1], dtype=text.dtype)
    padded[0, : len(text)] = text
    mask = (torch.arange(12) < len(text)).long()[None]
    number = torch.tensor([guidance]) * 1000 if reference.config.guidance_embeds else None
    with torch.no_grad():
        out: Tensor = reference(latents, timestep, padded, mask, pooled[None], guidance=number, return_dict=False)[0]
    return out


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timestep, text states, pooled vector."""
    return torch.randn(1, 16, 3, 6, 4), torch.tensor([870.5]), torch.randn(5, 32), torch.randn(24)


@pytest.mark.parametrize(
    ("changes", "grid", "text_tokens"),
    [
        ({}, (1, 4, 4), 1),
        ({}, (3, 6, 10), 5),
        ({}, (2, 2, 14), 12),
        ({"guidance_embeds": False}, (2, 4, 6), 3),
        ({"num_attention_heads": 3, "attention_head_dim": 8, "rope_axes_dim": (2, 2, 4)}, (2, 6, 4), 4),
        ({"num_layers": 1, "num_single_layers": 3, "num_refiner_layers": 1}, (5, 4, 4), 7),
    ],
)
def test_velocity_equals_diffusers(
    tmp_path: Path, changes: dict[str, Any], grid: tuple[int, int, int], text_tokens: int
) -> None:
    reference = tiny_transformer(**changes)
    dit = our_dit(reference, tmp_path)
    latents, timestep = torch.randn(1, 16, *grid), torch.tensor([731.25])
    text, pooled = torch.randn(text_tokens, 32), torch.randn(24)
    expected = reference_velocity(reference, latents, timestep, text, pooled)
    assert expected.std() > 0.1, "the reference's output says nothing"
    # one pass of a few fp32 blocks: the sums are ordered differently, nothing else differs
    torch.testing.assert_close(velocity(dit, latents, timestep, text, pooled), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("knobs", [Activations(token_chunk=64), Activations(token_chunk=128, head_groups=2)])
def test_chunks_and_head_groups_change_no_bit(tmp_path: Path, knobs: Activations) -> None:
    dit = our_dit(tiny_transformer(), tmp_path)
    latents = torch.randn(1, 16, 3, 20, 18)  # 270 video tokens
    rest = (torch.tensor([500.0]), torch.randn(9, 32), torch.randn(24))
    whole = velocity(dit, latents, *rest)
    assert torch.equal(velocity(dit, latents, *rest, knobs=knobs), whole)


def test_schedule_prepared_at_once_equals_step_by_step(
    tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    dit = our_dit(tiny_transformer(), tmp_path)
    _, _, text, pooled = inputs
    timesteps = torch.tensor([1000.0, 700.0, 125.0])
    (whole,) = dit.prepare_schedule(timesteps, GUIDANCE, [(text, pooled)])
    for step, timestep in enumerate(timesteps.split(1)):
        (alone,) = dit.prepare_schedule(timestep, GUIDANCE, [(text, pooled)])
        assert torch.equal(whole.double[step], alone.double[0])
        assert torch.equal(whole.single[step], alone.single[0])
        assert torch.equal(whole.final[step], alone.final[0])
        assert torch.equal(whole.text[step], alone.text[0])


def test_bf16_is_as_far_from_fp32_as_diffusers_bf16(
    tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    reference = tiny_transformer()
    dit = our_dit(reference, tmp_path)
    latents, timestep, text, pooled = inputs
    exact = velocity(dit, *inputs, guidance=4.0)  # 4000 is a bf16 number
    half = velocity(dit.bfloat16(), latents.bfloat16(), timestep, text, pooled, guidance=4.0)
    theirs = reference_velocity(
        reference.bfloat16(), latents.bfloat16(), timestep, text.bfloat16(), pooled.bfloat16(), guidance=4.0
    )
    assert half.dtype == torch.bfloat16
    # both are about 1.3 % here; which of the two is nearer depends on the weights
    assert (half.float() - exact).norm() < 1.3 * (theirs.float() - exact).norm()


def test_guidance_is_rounded_as_the_reference_rounds_it(tmp_path: Path) -> None:
    dit = our_dit(tiny_transformer(), tmp_path)
    seen: list[float] = []
    dit.guidance_in.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0, 0].item()))
    timestep, text, pooled = torch.tensor([10.0]), torch.randn(2, 32), torch.randn(24)
    dit.prepare_schedule(timestep, GUIDANCE, [(text, pooled)])
    dit.bfloat16().prepare_schedule(timestep, GUIDANCE, [(text, pooled)])
    assert seen == pytest.approx(torch.tensor([6000.0, 6016.0]).cos().tolist(), abs=1e-3)


def test_patches_are_channel_major_and_return_unchanged() -> None:
    latents = torch.arange(16 * 2 * 4 * 6, dtype=torch.float32).view(1, 16, 2, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2 * 2 * 3, 64)
    # token (t=1, y=0, x=2), feature c*4 + dy*2 + dx
    assert tokens[1 * 6 + 0 * 3 + 2, 5 * 4 + 1 * 2 + 0] == latents[0, 5, 1, 1, 4]
    dims = replace(HUNYUANVIDEO.dit, hidden=32, heads=2)
    assert torch.equal(unpatchify(tokens, LatentShape(2, 4, 6), dims), latents)


def test_the_published_model_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        dit = Dit(HUNYUANVIDEO.dit)
    assert sum(parameter.numel() for parameter in dit.parameters()) == 12_821_012_544


def test_a_full_size_block_runs_on_meta() -> None:
    dims: DitDims = replace(HUNYUANVIDEO.dit, double_blocks=1, single_blocks=1)
    with torch.device("meta"):
        dit = Dit(dims).bfloat16()
        latents = torch.empty(1, 16, 33, 90, 160)
        timestep, text, pooled = torch.empty(1), torch.empty(256, 4096), torch.empty(768)
    out = velocity(dit, latents, timestep, text, pooled, Activations(token_chunk=4096, head_groups=4))
    assert out.shape == latents.shape
