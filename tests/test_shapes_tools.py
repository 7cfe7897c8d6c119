"""The tools that made the embedded model: data, measurement, export and resuming after a kill."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import train_vae
from checkpoint import Clock
from data import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, all_scenes, caption_form, draw_clips, split_scenes
from evaluate import wilson
from export import fold_statistics
from measure import look_at
from torch import Tensor
from train_vae import build_vae, decode_clips, encode_moments


def drawn(count: int, seed: int, size: tuple[int, int] = (64, 64), frames: int = 17) -> Tensor:
    """Clips of the first scenes."""
    return draw_clips(all_scenes()[:count], frames, *size, torch.Generator().manual_seed(seed))


def test_a_fifth_is_held_out_and_both_parts_know_every_word() -> None:
    trained, held_out = split_scenes()
    assert len(held_out) == 43
    assert len(trained) == 173
    assert not set(trained) & set(held_out)
    for part in (trained, held_out):
        assert {scene.colour for scene in part} == set(COLOURS)
        assert {scene.shape for scene in part} == set(SHAPES)
        assert {scene.direction for scene in part} == set(DIRECTIONS)
        assert {scene.background for scene in part} == set(BACKGROUNDS)


def test_clips_are_a_function_of_the_seed_and_objects_stay_inside() -> None:
    assert torch.equal(drawn(8, 3), drawn(8, 3))
    assert not torch.equal(drawn(8, 3), drawn(8, 4))
    for size in ((64, 64), (64, 96), (96, 64)):
        clips = drawn(72, 5, size, 33)
        for edge in (clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]):
            touched = (edge != edge[:, :, :1, :1]).any(dim=1).sum(dim=-1)
            assert touched.max() <= 3, "more than the tip of a triangle touches the border"


def test_every_scene_is_recognised_in_its_drawing() -> None:
    scenes = all_scenes()
    clips = draw_clips(scenes, 17, 64, 64, torch.Generator().manual_seed(1))
    for scene, clip in zip(scenes, clips, strict=True):
        frames = ((clip + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
        assert all(look_at(frames).matches(scene).values()), (scene, look_at(frames))


def test_an_empty_clip_shows_no_object() -> None:
    seen = look_at(np.zeros((17, 64, 64, 3), np.uint8))
    assert (seen.colour, seen.shape, seen.direction) == (None, None, None)


def test_captions_of_one_form_have_one_length() -> None:
    for seed in range(50):
        form: Callable[..., str] = caption_form(random.Random(seed))
        assert len({len(form(scene).split()) for scene in all_scenes()}) == 1


def test_folded_statistics_are_the_normalised_latents() -> None:
    torch.manual_seed(0)
    vae, folded = build_vae(), build_vae()
    folded.load_state_dict(vae.state_dict())
    mean, deviation = torch.randn(16), torch.rand(16) + 0.2
    fold_statistics(folded, mean, deviation)
    clips = drawn(1, 0, frames=5)
    with torch.no_grad():
        (plain, plain_log), (new, new_log) = encode_moments(vae, clips), encode_moments(folded, clips)
        shape = (1, 16, 1, 1, 1)
        torch.testing.assert_close(new, (plain - mean.view(shape)) / deviation.view(shape), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(new_log, plain_log - 2 * deviation.log().view(shape), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decode_clips(folded, new), decode_clips(vae, plain), atol=1e-3, rtol=1e-3)


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "due", lambda _: True)
    train_vae.train(tmp_path / "whole", 1, 3)
    draw = train_vae.batch_for

    def killed(step: int, phase: int) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return draw(step, phase)

    monkeypatch.setattr(train_vae, "batch_for", killed)
    with pytest.raises(KeyboardInterrupt):
        train_vae.train(tmp_path / "killed", 1, 3)
    monkeypatch.setattr(train_vae, "batch_for", draw)
    train_vae.train(tmp_path / "killed", 1, 3)
    whole, resumed = (torch.load(tmp_path / name / "vae_phase1.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(129, 129)
    assert low == pytest.approx(0.971, abs=1e-3)
    assert high == pytest.approx(1.0)
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
