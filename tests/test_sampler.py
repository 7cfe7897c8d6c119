"""Noise levels, Euler step and guidance against the spec's values and diffusers' scheduler."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from hvlite.dims import LatentShape
from hvlite.sampler import euler_step, guide, make_noise, make_sigmas, make_timesteps


def test_golden_sigmas_of_five_steps() -> None:
    expected = torch.tensor([1, 0.965517, 0.913043, 0.823529, 0.636364, 0])
    torch.testing.assert_close(make_sigmas(5, 7.0), expected, atol=1e-6, rtol=0)


def test_golden_timesteps_of_fifty_steps() -> None:
    timesteps = make_timesteps(make_sigmas(50, 7.0))
    first = torch.tensor([1000, 997.0930, 994.0829, 990.9639, 987.7301, 984.3750])
    last = torch.tensor([308.8235, 225.8064, 125.0])
    torch.testing.assert_close(timesteps[:6], first, atol=1e-3, rtol=0)
    torch.testing.assert_close(timesteps[-3:], last, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 5.0, 7.0, 17.0])
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_sigmas_equal_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    torch.testing.assert_close(make_sigmas(steps, shift), scheduler.sigmas, atol=1e-6, rtol=0)


@given(steps=st.integers(1, 200), shift=st.floats(0.1, 50))
def test_sigmas_fall_from_one_to_zero_and_rise_when_not_reversed(steps: int, shift: float) -> None:
    sigmas = make_sigmas(steps, shift)
    assert sigmas[0].item() == pytest.approx(1, abs=1e-6)
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    assert torch.equal(make_sigmas(steps, shift, flow_reverse=False), 1 - sigmas)


def test_a_step_along_the_true_velocity_lands_on_the_data() -> None:
    data, noise = torch.randn(1, 4), torch.randn(1, 4)
    sigmas = make_sigmas(8, 7.0)
    latents = noise
    for step in range(8):
        latents = euler_step(latents, noise - data, sigmas, step)
    torch.testing.assert_close(latents, data, atol=1e-6, rtol=0)


def test_guidance_of_one_is_the_positive_branch() -> None:
    negative, positive = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(guide(negative, positive, 1.0), positive)
    assert torch.equal(guide(negative, positive, 0.0), negative)


def test_noise_depends_on_the_seed_alone() -> None:
    shape = LatentShape(2, 4, 6)
    state = torch.random.get_rng_state()
    first = make_noise(shape, 16, 3)
    assert torch.equal(first, make_noise(shape, 16, 3))
    assert not torch.equal(first, make_noise(shape, 16, 4))
    assert first.shape == (1, 16, 2, 4, 6)
    assert abs(first.std().item() - 1) < 5 / math.sqrt(first.numel())
    assert torch.equal(state, torch.random.get_rng_state())
