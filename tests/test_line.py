"""The whole line: against diffusers' pipeline on one folder, and its own promises (files, seeds, events)."""

import errno
import os
import shutil
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

import hvlite
from hvlite import Outputs, Request, encode_prompts, generate, load_profile, metadata, open_model, paths
from hvlite.clip import decode, decode_file
from hvlite.dims import latent_shape
from hvlite.errors import DoesNotFit, OutputError, RequestError, WeightsError
from hvlite.events import BlockDone, Event, Finished, Note, Saved, Stage, StepDone, TileDone
from hvlite.line import begin, denoise
from hvlite.memory.tiles import TileGeometry, TileStep
from hvlite.metadata import ModelMade
from hvlite.model.dit import Dit
from hvlite.model.text import load_tokenizer, text_template
from hvlite.opened import Model
from hvlite.origin import Checkpoint
from hvlite.planning import Wishes
from hvlite.run import Run
from hvlite.sampler import make_noise
from hvlite.video.latents import load_latents
from hvlite.video.mp4 import read_frames, read_metadata

PROMPT = "a red circle"
Value = TypeVar("Value")
SMALL_TILES = TileGeometry(frames=16, frames_stride=12, height=32, height_stride=24, width=32, width_stride=24)


def run(request: Request, model: Model, **options: Any) -> list[Event]:
    """All events of one clip."""
    return list(generate(request, model, **options))


def finished(events: Sequence[Event]) -> Path:
    """The file that a run has made."""
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.path is not None
    return last.path


def latents_and_frames(request: Request, model: Model, tiles: TileGeometry) -> tuple[Tensor, Tensor]:
    """The line's numbers before they are rounded to pixels."""
    resolved = request.resolve(model.dims)
    run = Run(model, resolved, Outputs(), model.plan(resolved, Wishes(tiles=tiles)))
    clip = returned(begin(run, None))
    returned(denoise(run, clip))
    steps = [step for step in decode(run, clip.latents) if isinstance(step, TileStep)]
    return clip.latents, torch.cat([step.frames for step in steps if step.frames is not None], dim=1)


def returned(generator: Generator[Event, None, Value]) -> Value:
    """Run a generator to its end; what it returned."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            value: Value = stop.value
            return value


def their_template(pipeline: HunyuanVideoPipeline) -> dict[str, Any]:
    """The video template with this tokenizer's crop: diffusers counts on the published tokenizer's 95."""
    template = text_template("video")
    crop = len(pipeline.tokenizer(template.prefix)["input_ids"])
    return {"template": template.prefix + "{}" + template.suffix, "crop_start": crop}


@pytest.fixture
def pipeline(tiny_model: Path) -> HunyuanVideoPipeline:
    """diffusers' own line on the same folder."""
    vae = AutoencoderKLHunyuanVideo.from_pretrained(tiny_model / "vae")
    vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_min_num_frames=16,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
        tile_sample_stride_num_frames=12,
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel.from_pretrained(tiny_model / "text_encoder"),
        tokenizer=load_tokenizer(tiny_model / "tokenizer"),
        transformer=HunyuanVideoTransformer3DModel.from_pretrained(tiny_model / "transformer"),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel.from_pretrained(tiny_model / "text_encoder_2"),
        tokenizer_2=load_tokenizer(tiny_model / "tokenizer_2"),
    )


@pytest.mark.parametrize(
    "request_",
    [
        Request(PROMPT, size=(48, 64), frames=21, steps=3, seed=4),
        Request(PROMPT, size=(32, 32), frames=5, steps=2, cfg_scale=3.0, negative_prompt="a blue square"),
        Request(PROMPT, size=(32, 48), frames=1, steps=2, template="video"),
    ],
    ids=["tiled", "true-cfg", "one-frame"],
)
def test_the_line_equals_diffusers_pipeline(
    tiny_model: Path, pipeline: HunyuanVideoPipeline, request_: Request
) -> None:
    with open_model(tiny_model) as model:
        resolved = request_.resolve(model.dims)
        latents, frames = latents_and_frames(request_, model, SMALL_TILES)
        shape = latent_shape(resolved.size, resolved.frames, model.dims.vae)
        pipeline.set_progress_bar_config(disable=True)
        pad = pipeline.tokenizer.pad_token
        assert pad is not None
        options: dict[str, Any] = {
            "prompt": resolved.prompt,
            "negative_prompt": resolved.negative_prompt or None,
            "true_cfg_scale": resolved.cfg_scale,
            "height": resolved.size[0],
            "width": resolved.size[1],
            "num_frames": resolved.frames,
            "num_inference_steps": resolved.steps,
            "latents": make_noise(shape, 16, resolved.seed),
            "guidance_scale": resolved.guidance,
            "max_sequence_length": 40,
            "prompt_template": their_template(pipeline),
            "return_dict": False,
        }
        theirs = pipeline(output_type="latent", **options)[0]
        pictures = pipeline(output_type="pt", **options)[0]
    torch.testing.assert_close(latents, theirs, atol=1e-3, rtol=0)
    ours = (frames / 2 + 0.5).clamp(0, 1).permute(1, 0, 2, 3)
    torch.testing.assert_close(ours, pictures[0].float(), atol=1e-3, rtol=0)
    assert pictures.std() > 0.01, "the reference's picture says nothing"


def test_a_clip_is_written_with_all_that_made_it(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        events = run(Request(PROMPT, seed=9), model, outputs=Outputs(folder=tmp_path))
        path = finished(events)
        made = metadata.decode(read_metadata(path), path)
        assert made.request == Request(PROMPT, seed=9).resolve(model.dims)
        assert made.model == ModelMade(name="tiny", fingerprint=model.origin.fingerprint)
    assert path.parent == tmp_path
    assert len(list(read_frames(path))) == 5
    assert set(made.timings) >= {"text", "schedule", "denoise"}
    assert made.versions["torch"] == torch.__version__
    kinds = [type(event) for event in events]
    assert kinds.count(StepDone) == 2
    assert kinds.count(BlockDone) == 2 * 4
    assert kinds.count(TileDone) == 1
    assert [event.name for event in events if isinstance(event, Stage)] == ["text", "schedule", "denoise", "decode"]
    saved = [event for event in events if isinstance(event, Saved)]
    assert [event.kind for event in saved] == ["latents", "video"]
    assert not saved[0].path.exists(), "latents of a finished clip are not kept unless asked for"


def test_a_seed_is_a_clip(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        clips = [
            np.stack(
                list(read_frames(finished(run(Request(PROMPT, seed=seed), model, outputs=Outputs(folder=tmp_path)))))
            )
            for seed in (1, 1, 2)
        ]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])
    assert len(list(tmp_path.iterdir())) == 3


def test_one_frame_makes_a_png_with_the_image_template(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        path = finished(run(Request(PROMPT, frames=1), model, outputs=Outputs(folder=tmp_path)))
    assert path.suffix == ".png"
    assert metadata.decode(read_metadata(path), path).request.template == "image"


def test_latents_finish_a_clip_later(tiny_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    with open_model(tiny_model) as model:
        first = finished(run(Request(PROMPT), model, outputs=Outputs(file=tmp_path / "a.mp4", latents=kept)))
        saved = load_latents(kept)
        latents, stored = saved.latents, saved.request
        assert latents.shape == (1, 16, 2, 4, 4)
        assert metadata.decode(stored, kept).request.prompt == PROMPT
        again = finished(list(decode_file(kept, model, Outputs(file=tmp_path / "b.mp4"))))
    for ours, theirs in zip(read_frames(first), read_frames(again), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_taken_name_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.mp4"
    taken.write_bytes(b"somebody's clip")
    with open_model(tiny_model) as model, pytest.raises(OutputError, match=r"taken\.mp4"):
        next(generate(Request(PROMPT), model, outputs=Outputs(file=taken)))
    assert taken.read_bytes() == b"somebody's clip"


def test_latents_that_somebody_keeps_are_never_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"from last night")
    outputs = Outputs(folder=tmp_path, latents=kept)
    with open_model(tiny_model) as model, pytest.raises(OutputError, match=r"kept\.safetensors"):
        next(generate(Request(PROMPT), model, outputs=outputs))
    assert kept.read_bytes() == b"from last night"


def test_a_failed_allocation_is_does_not_fit(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    with open_model(tiny_model) as model:
        monkeypatch.setattr(Dit, "run_block", no_memory)
        with pytest.raises(DoesNotFit, match=r"tried to allocate 20\.00 GiB.*smaller --size"):
            run(Request(PROMPT), model, outputs=Outputs(folder=tmp_path))


def test_a_damaged_part_is_found_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="diffusion_pytorch_model"), open_model(copy):
        pass


def test_parts_of_different_models_are_refused(tiny_model: Path) -> None:
    other = paths.SHAPES_MODEL / "transformer"
    with pytest.raises(WeightsError, match="they belong to different models"), open_model(tiny_model, dit=other):
        pass


def test_a_failed_decode_keeps_the_latents(
    tiny_model: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_model(tiny_model) as model:
        with monkeypatch.context() as patch:
            patch.setattr("hvlite.video.mp4.as_frame", full)
            with pytest.raises(OutputError, match="Make room"):
                run(Request(PROMPT), model, outputs=Outputs(file=tmp_path / "clip.mp4"))
        assert list(tmp_path.iterdir()) == []
        (kept,) = (own_home / "latents").iterdir()
        again = finished(list(decode_file(kept, model, Outputs(file=tmp_path / "clip.mp4"))))
    assert len(list(read_frames(again))) == 5


def test_prompts_encoded_before_need_no_encoder(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        prompts = encode_prompts([PROMPT], model)
        model.close()
        first = finished(run(Request(PROMPT), model, outputs=Outputs(folder=tmp_path), prompts=prompts))
        assert "text" not in model.loaded
        second = finished(run(Request(PROMPT), model, outputs=Outputs(folder=tmp_path)))
    for ours, theirs in zip(read_frames(first), read_frames(second), strict=True):
        assert np.array_equal(ours, theirs)


def test_an_abandoned_run_leaves_nothing_and_holds_no_mode(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        stream = generate(Request(PROMPT), model, outputs=Outputs(folder=tmp_path))
        for event in stream:
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            if isinstance(event, BlockDone):
                break
        stream.close()
        assert list(tmp_path.iterdir()) == []
        assert set(model.loaded) <= set(model.plan(Request(PROMPT).resolve(model.dims)).warm)
    assert not model.loaded


def test_the_real_dims_run_on_meta_without_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request("x", size=(192, 336), frames=5, steps=1)
    events = list(generate(request, "hunyuanvideo", profile=load_profile("24g"), device="meta"))
    assert sum(isinstance(event, BlockDone) for event in events) == 60
    assert any(isinstance(event, Note) and "meta" in event.text for event in events)
    assert isinstance(events[-1], Finished)
    assert events[-1].path is None
    assert list(tmp_path.iterdir()) == []
    assert not paths.models_folder().exists()


def test_a_size_outside_the_table_is_a_note(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model:
        known = replace(model.dims.defaults, known_sizes=((64, 64),))
        assert isinstance(model.origin, Checkpoint)
        model.origin = replace(model.origin, dims=replace(model.dims, defaults=known))
        events = run(Request(PROMPT), model, outputs=Outputs(folder=tmp_path))
    assert any(isinstance(event, Note) and "not a published size" in event.text for event in events)


def test_an_output_of_the_wrong_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with open_model(tiny_model) as model, pytest.raises(RequestError, match=r"5 frame\(s\) make a \.mp4 file"):
        run(Request(PROMPT), model, outputs=Outputs(file=tmp_path / "a.png"))


def test_a_missing_model_says_where_it_was_looked_for(own_home: Path) -> None:
    with pytest.raises(WeightsError, match="hunyuanvideo is not on this machine") as caught, open_model("hunyuanvideo"):
        pass
    assert str(own_home / "models" / "hunyuanvideo") in str(caught.value)


def test_the_package_exports_what_it_lists() -> None:
    for name in hvlite.__all__:
        assert getattr(hvlite, name) is not None
    assert callable(hvlite.generate)
