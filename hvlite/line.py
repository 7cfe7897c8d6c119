"""THE LINE: Request + Profile -> file. The only module that joins model, memory and weights.

`generate` is a generator of events, so that the caller draws progress and cancels with plain Python. No
grad mode and no other switch is held across a yield; an abandoned generator gives the device back.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from hvlite import paths, sampler
from hvlite.atomic import check_new, explained, free_path
from hvlite.dims import LatentShape, latent_shape
from hvlite.errors import RequestError
from hvlite.events import BlockDone, Event, Finished, Note, Saved, Stage, StepDone, TileDone
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, TileStep, decode_tiles
from hvlite.model.dit import Activations, Conditioning, Dit, Workspace
from hvlite.model.text import PromptStates
from hvlite.opened import Model, open_model
from hvlite.profile import Profile, load_profile
from hvlite.request import Request, ResolvedRequest, as_fields, resolved_from, unusual_size_note
from hvlite.video.frames import FrameLike, frames_to_uint8
from hvlite.video.latents import load_latents, save_latents
from hvlite.video.mp4 import open_mp4
from hvlite.video.png import write_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where results go. `target` is a file (.mp4, .png) or a folder in which a free name is chosen.

    The final latents are always saved before decode. Once the clip is written they stay only if `latents`
    names a file.
    """

    target: Path = paths.DEFAULT_OUTPUT
    latents: Path | None = None
    decode_tile: TileGeometry = PUBLISHED_TILES


@dataclass(slots=True)
class Branch:
    """One pass through the transformer: the positive one, or the negative one of true guidance."""

    conditioning: Conditioning
    x: Tensor | None = None


class Timings:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.monotonic() - began, 3)


def generate(
    request: Request,
    model: Model | str | Path,
    *,
    profile: Profile | None = None,
    device: str | None = None,
    outputs: Outputs | None = None,
    prompts: Sequence[PromptStates] | None = None,
) -> Generator[Event, None, None]:
    """Render `request`; yields events, the last one `Finished`.

    `model` is an opened Model, or a name or folder that is opened for this call with `profile` and
    `device`. `prompts`, if given, are the states of `prompts_of(request)` from `encode_prompts`, and no
    encoder is loaded.
    """
    if not isinstance(model, Model):
        with open_model(model, profile or load_profile("cpu"), device=device) as opened:
            yield from generate(request, opened, outputs=outputs, prompts=prompts)
        return
    outputs = outputs or Outputs()
    resolved = request.resolve(model.dims)
    timings = Timings()
    if note := unusual_size_note(resolved.size, model.dims.defaults):
        yield Note(note)
    shape = latent_shape(resolved.size, resolved.frames, model.dims.vae)
    places = None if model.device.type == "meta" else choose_places(outputs, resolved)
    try:
        if prompts is None:
            yield Stage("text")
            with timings.measure("text"):
                prompts = encode_prompts(prompts_of(resolved), model, resolved.template)
            yield from (note for states in prompts for note in states.notes)
        yield Stage("schedule")
        sigmas = sampler.make_sigmas(resolved.steps, resolved.flow_shift, resolved.flow_reverse)
        with timings.measure("schedule"):
            branches = prepare_schedule(model, resolved, sigmas, prompts)
        yield Stage("denoise")
        latents = sampler.make_noise(shape, model.dims.dit.latent_channels, resolved.seed)
        with timings.measure("denoise"):
            latents = yield from denoise(model, resolved, latents, sigmas, branches)
        del branches
        model.release("dit")
        if places is None:
            yield from finish_on_meta(model, latents, outputs.decode_tile, timings)
        else:
            yield from finish(model, resolved, latents, places, timings)
    finally:
        model.release_cold()


def prompts_of(resolved: ResolvedRequest) -> list[str]:
    """The texts to encode: the prompt, and the negative one where true guidance is on."""
    return [resolved.prompt, resolved.negative_prompt] if resolved.uses_cfg else [resolved.prompt]


def encode_prompts(texts: Sequence[str], model: Model, template: str = "video") -> list[PromptStates]:
    """Text states without padding and the pooled vector of each text; several cost one load of the encoders."""
    states = model.encode(list(texts), template)
    model.release("text")
    return states


def prepare_schedule(
    model: Model, resolved: ResolvedRequest, sigmas: Tensor, prompts: Sequence[PromptStates]
) -> list[Branch]:
    """All modulation vectors and the refined text of every step, one Branch for each prompt."""
    dit = model.dit()
    timesteps = sampler.make_timesteps(sigmas).to(model.device)
    return [
        Branch(
            dit.prepare_schedule(
                timesteps,
                resolved.guidance,
                states.text.to(model.device),
                states.pooled.to(model.device),
                model.attention,
            )
        )
        for states in prompts
    ]


def denoise(
    model: Model, resolved: ResolvedRequest, latents: Tensor, sigmas: Tensor, branches: list[Branch]
) -> Generator[Event, None, Tensor]:
    """All steps; yields after every block and every step; returns the final latents on the device, fp32."""
    dit = model.dit()
    shape = LatentShape(*latents.shape[2:])
    knobs = Activations(
        token_chunk=model.profile.token_chunk,
        head_groups=model.head_groups,
        attention=model.attention,
    )
    text_tokens = max(branch.conditioning.text.shape[1] for branch in branches)
    work = dit.make_workspace(shape, text_tokens, knobs, model.dtype)
    latents, sigmas = latents.to(model.device), sigmas.to(model.device)
    for step in range(resolved.steps):
        began = time.monotonic()
        for block in _run_blocks(dit, latents, step, branches, work):
            yield BlockDone(step=step, steps=resolved.steps, block=block, blocks=dit.dims.blocks)
        velocities = [_velocity(dit, branch, step, shape, knobs.token_chunk) for branch in branches]
        velocity = velocities[0]
        if resolved.uses_cfg:
            velocity = sampler.guide(velocities[1], velocity, resolved.cfg_scale)
        latents = sampler.euler_step(latents, velocity, sigmas, step)
        yield StepDone(step, resolved.steps, time.monotonic() - began)
    return latents


def _run_blocks(dit: Dit, latents: Tensor, step: int, branches: list[Branch], work: Workspace) -> Iterator[int]:
    """Every branch visits a block before the next one is taken; yields the number of each finished block."""
    for branch in branches:
        branch.x = dit.embed(latents, branch.conditioning.text[step])
    for index in range(dit.dims.blocks):
        for branch in branches:
            assert branch.x is not None
            dit.run_block(index, branch.x, branch.conditioning.block(step, index), work)
        yield index


def _velocity(dit: Dit, branch: Branch, step: int, shape: LatentShape, chunk: int) -> Tensor:
    """The model's output for one branch; its residual stream is given back."""
    assert branch.x is not None
    velocity = dit.head(branch.x, branch.conditioning.final[step], shape, chunk)
    branch.x = None
    return velocity


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The files of one run, chosen and checked before any work."""

    clip: Path
    latents: Path
    keep_latents: bool
    decode_tile: TileGeometry


def choose_places(outputs: Outputs, resolved: ResolvedRequest) -> Places:
    """Where the clip and its latents will lie; what cannot be written is refused now, not after hours."""
    stem = paths.output_stem(resolved.prompt, resolved.seed, f"{datetime.now():%Y%m%d-%H%M%S}")
    suffix = ".png" if resolved.frames == 1 else ".mp4"
    clip = outputs.target
    if clip.suffix.lower() not in (".mp4", ".png"):
        with explained(clip):
            clip.mkdir(parents=True, exist_ok=True)
        clip = free_path(clip, stem, suffix)
    elif clip.suffix.lower() != suffix:
        raise RequestError(f"{resolved.frames} frame(s) make a {suffix} file; the output is named {clip.name}")
    check_new(clip)
    latents = outputs.latents or paths.latents_folder() / f"{clip.stem}.safetensors"
    with explained(latents):
        latents.parent.mkdir(parents=True, exist_ok=True)
    return Places(clip=clip, latents=latents, keep_latents=outputs.latents is not None, decode_tile=outputs.decode_tile)


def finish(
    model: Model, resolved: ResolvedRequest, latents: Tensor, places: Places, timings: Timings
) -> Iterator[Event]:
    """Latents -> disk -> frames -> file. What is computed is on disk before the step that could fail."""
    save_latents(places.latents, latents.cpu(), json.dumps(as_fields(resolved)))
    yield Saved("latents", places.latents)
    yield from write_clip(model, resolved, latents, places, timings)
    if not places.keep_latents:
        places.latents.unlink(missing_ok=True)


def finish_on_meta(model: Model, latents: Tensor, geometry: TileGeometry, timings: Timings) -> Iterator[Event]:
    """Every allocation of the decode, and no file."""
    yield Note("device meta: nothing is computed and no file is written")
    yield Stage("decode")
    for tile in decode(model, latents, geometry):
        yield TileDone(tile.tile, tile.tiles)
    yield Finished(None, timings.seconds)


def decode(model: Model, latents: Tensor, geometry: TileGeometry) -> Iterator[TileStep]:
    """Latents [1,C,T,H,W] in model space -> tiles, with finished frames [3,F,H,W] in [-1,1] as they become final."""
    vae = model.vae()
    scaled = latents.float() / model.dims.vae.scaling_factor
    yield from decode_tiles(scaled.to(model.device, model.vae_dtype), vae.decode, geometry)


def write_clip(
    model: Model, resolved: ResolvedRequest, latents: Tensor, places: Places, timings: Timings
) -> Iterator[Event]:
    """Decode and write frames as they come; the file gets its name when it is complete."""
    yield Stage("decode")
    metadata = json.dumps(clip_metadata(model, resolved, places.decode_tile, timings))
    with timings.measure("decode"), _open_clip(places.clip, metadata, resolved.prompt) as add_frame:
        for tile in decode(model, latents, places.decode_tile):
            if tile.frames is not None:
                for frame in frames_to_uint8(tile.frames).cpu():
                    add_frame(frame)
            yield TileDone(tile.tile, tile.tiles)
    yield Saved("image" if places.clip.suffix == ".png" else "video", places.clip)
    yield Finished(places.clip, timings.seconds)


@contextmanager
def _open_clip(path: Path, metadata: str, title: str) -> Iterator[Callable[[FrameLike], None]]:
    """A function that adds a frame to the new mp4 or, for the only one, writes the PNG."""
    if path.suffix == ".png":
        yield partial(write_png, path, metadata=metadata, title=title)
    else:
        with open_mp4(path, metadata=metadata, title=title) as add_frame:
            yield add_frame


def clip_metadata(
    model: Model, resolved: ResolvedRequest, geometry: TileGeometry, timings: Timings
) -> dict[str, object]:
    """What a finished file says of itself. Timings are of the stages before decode: the header comes first."""
    return {
        "format": 1,
        "request": as_fields(resolved),
        "model": {"name": model.dims.name, "fingerprint": model.fingerprint},
        "versions": {
            "hvlite": version("hvlite"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "av": version("av"),
        },
        "device": model.device_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.attention,
        "profile": model.profile.name,
        "decode_tile": asdict(geometry),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "timings": timings.seconds,
    }


def decode_file(path: Path, model: Model, outputs: Outputs | None = None) -> Generator[Event, None, None]:
    """Finish a clip from saved latents: they carry the Request, so nothing else is needed."""
    outputs = outputs or Outputs()
    latents, stored = load_latents(path)
    resolved = resolved_from(json.loads(stored))
    expected = latent_shape(resolved.size, resolved.frames, model.dims.vae)
    found = tuple(latents.shape[2:])
    if found != (expected.frames, expected.height, expected.width):
        raise RequestError(f"{path}: latents are {found}, its request says {expected}; the file is damaged")
    yield from write_clip(model, resolved, latents, choose_places(outputs, resolved), Timings())
