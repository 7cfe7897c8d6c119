"""THE LINE: Request + Profile -> file. Here, and in `opened`, model, memory and weights meet; nowhere else.

`generate` is a generator of events, so that the caller draws progress and cancels with plain Python. No grad mode and
no other switch is held across a yield; an abandoned generator gives the device back.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from hvlite import metadata, paths, sampler
from hvlite.atomic import check_new, explained, free_path
from hvlite.dims import LatentShape, latent_shape
from hvlite.errors import DoesNotFit, RequestError
from hvlite.events import BlockDone, Event, Finished, Note, Saved, Stage, StepDone, TileDone
from hvlite.memory.device import device_name, is_out_of_memory, wait_for
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, TileStep, decode_tiles
from hvlite.metadata import Metadata, ModelMade
from hvlite.model.dit import Activations, Conditioning, Dit, Workspace
from hvlite.model.text import PromptStates
from hvlite.opened import Model, open_model
from hvlite.origin import Checkpoint
from hvlite.profile import Profile
from hvlite.request import Request, ResolvedRequest, request_notes
from hvlite.video.frames import FrameLike, frames_to_uint8
from hvlite.video.latents import load_latents, save_latents
from hvlite.video.mp4 import open_mp4
from hvlite.video.png import write_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where results go: the new file `file` (.mp4, .png for one frame), else a free name in `folder`.

    The final latents are always saved before decode. Once the clip is written they stay only if `latents` names a file.
    """

    file: Path | None = None
    folder: Path = paths.DEFAULT_OUTPUT
    latents: Path | None = None
    decode_tile: TileGeometry = PUBLISHED_TILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The files of one run, chosen and checked before any work."""

    clip: Path
    latents: Path
    keep_latents: bool
    decode_tile: TileGeometry


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

    `model` is an opened Model, or a name or folder that is opened for this call with `profile` and `device`. `prompts`,
    if given, are the states of `prompts_of(request)` from `encode_prompts`, and no encoder is loaded.
    """
    if not isinstance(model, Model):
        with open_model(model, profile, device=device) as opened:
            yield from generate(request, opened, outputs=outputs, prompts=prompts)
        return
    resolved = request.resolve(model.dims)
    if prompts is not None and len(prompts) != len(prompts_of(resolved)):
        raise RequestError(f"{len(prompts)} prompt states were given; this request needs {len(prompts_of(resolved))}")
    outputs = outputs or Outputs()
    places = None if model.device.type == "meta" else choose_places(outputs, resolved)
    yield from map(Note, request_notes(request, model.dims))
    timings = Timings()
    with released(model):
        latents = yield from compute_latents(model, resolved, prompts, timings)
        model.release("dit")
        if places is None:
            yield from finish_on_meta(model, latents, outputs.decode_tile, timings)
        else:
            yield from finish(model, resolved, latents, places, timings)


@contextmanager
def released(model: Model) -> Iterator[None]:
    """Give cold parts back at the end, also after a failure; a failed allocation becomes DoesNotFit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"out of memory on {device_name(model.device)}: {error}. Try a smaller --size, or fewer --frames."
        ) from error
    finally:
        model.release_cold()


def compute_latents(
    model: Model, resolved: ResolvedRequest, prompts: Sequence[PromptStates] | None, timings: Timings
) -> Generator[Event, None, Tensor]:
    """Prompt -> final latents [1,C,T,H,W] on the device."""
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
    shape = latent_shape(resolved.size, resolved.frames, model.dims.vae)
    noise = sampler.make_noise(shape, model.dims.dit.latent_channels, resolved.seed, model.device.type)
    with timings.measure("denoise"):
        return (yield from denoise(model, resolved, noise, sigmas, branches))


def prompts_of(resolved: ResolvedRequest) -> list[str]:
    """The texts to encode: the prompt, and the negative one where true guidance is on."""
    return [resolved.prompt, resolved.negative_prompt] if resolved.uses_cfg else [resolved.prompt]


def encode_prompts(texts: Sequence[str], model: Model, template: str = "video") -> list[PromptStates]:
    """Text states without padding and the pooled vector of each text; several cost one load of the encoders."""
    with released(model):
        return model.encode(list(texts), template)


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
        wait_for(work.q.device)
        yield index


def _velocity(dit: Dit, branch: Branch, step: int, shape: LatentShape, chunk: int) -> Tensor:
    """The model's output for one branch; its residual stream is given back."""
    assert branch.x is not None
    velocity = dit.head(branch.x, branch.conditioning.final[step], shape, chunk)
    branch.x = None
    return velocity


def choose_places(outputs: Outputs, resolved: ResolvedRequest) -> Places:
    """Where the clip and its latents will lie; what cannot be written is refused now, not after hours."""
    stem = paths.output_stem(resolved.prompt, resolved.seed, f"{datetime.now():%Y%m%d-%H%M%S}")
    suffix = ".png" if resolved.frames == 1 else ".mp4"
    clip = outputs.file
    if clip is None:
        _make_folder(outputs.folder)
        clip = free_path(outputs.folder, stem, suffix)
    elif clip.suffix.lower() != suffix:
        raise RequestError(f"{resolved.frames} frame(s) make a {suffix} file; the output is named {clip.name}")
    check_new(clip)
    latents = outputs.latents
    if latents is None:
        _make_folder(paths.latents_folder())
        latents = free_path(paths.latents_folder(), stem, ".safetensors")
    check_new(latents)
    keep = outputs.latents is not None
    return Places(clip=clip, latents=latents, keep_latents=keep, decode_tile=outputs.decode_tile)


def _make_folder(folder: Path) -> None:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def finish(
    model: Model, resolved: ResolvedRequest, latents: Tensor, places: Places, timings: Timings
) -> Iterator[Event]:
    """Latents -> disk -> frames -> file. What is computed is on disk before the step that could fail."""
    made = Metadata(request=resolved, model=model_made(model, with_folder=True))
    save_latents(places.latents, latents.cpu(), metadata.encode(made))
    yield Saved("latents", places.latents)
    yield from write_clip(model, resolved, latents, places, timings)
    if not places.keep_latents:
        places.latents.unlink(missing_ok=True)
    yield Finished(places.clip, timings.seconds)


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
    # tiles are joined where they are decoded to: in host memory, not on a card that has better use for its own
    joined_on = torch.device("cpu" if model.device.type == "cuda" else model.device)
    scaled = (latents.float() / model.dims.vae.scaling_factor).to(model.device, model.vae_dtype)
    yield from decode_tiles(scaled, lambda tile: vae.decode(tile).to(joined_on), geometry)


def write_clip(
    model: Model, resolved: ResolvedRequest, latents: Tensor, places: Places, timings: Timings
) -> Iterator[Event]:
    """Decode and write frames as they come; the file gets its name when it is complete."""
    yield Stage("decode")
    made = metadata.encode(clip_metadata(model, resolved, places.decode_tile, timings))
    with timings.measure("decode"), _open_clip(places.clip, made, resolved.prompt) as add_frame:
        for tile in decode(model, latents, places.decode_tile):
            if tile.frames is not None:
                for frame in frames_to_uint8(tile.frames):
                    add_frame(frame)
            yield TileDone(tile.tile, tile.tiles)
    yield Saved("image" if places.clip.suffix == ".png" else "video", places.clip)


@contextmanager
def _open_clip(path: Path, made: str, title: str) -> Iterator[Callable[[FrameLike], None]]:
    """A function that adds a frame to the new mp4 or, for the only one, writes the PNG."""
    if path.suffix.lower() == ".png":
        yield partial(write_png, path, metadata=made, title=title)
    else:
        with open_mp4(path, metadata=made, title=title) as add_frame:
            yield add_frame


def model_made(model: Model, *, with_folder: bool = False) -> ModelMade:
    """How a file names the model that made it."""
    made = ModelMade(name=model.dims.name, fingerprint=model.fingerprint)
    if not with_folder or model.origin is None:
        return made
    vae = str(model.origin.sources.vae.resolve()) if isinstance(model.origin, Checkpoint) else None
    return replace(made, folder=str(model.origin.folder.resolve()), vae=vae)


def clip_metadata(model: Model, resolved: ResolvedRequest, geometry: TileGeometry, timings: Timings) -> Metadata:
    """What a finished file says of itself. Timings are of the stages before decode: the header comes first."""
    return Metadata(
        request=resolved,
        model=model_made(model),
        versions={
            "hvlite": version("hvlite"),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
            "av": version("av"),
        },
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=model.attention,
        profile=model.profile.name,
        decode_tile=asdict(geometry),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        timings=timings.seconds,
    )


def decode_file(path: Path, model: Model, outputs: Outputs | None = None) -> Generator[Event, None, None]:
    """Finish a clip from saved latents: they carry the Request, so nothing else is needed.

    Latents that a failed run left in hvlite's own folder are removed when the clip is written; others stay.
    """
    latents, stored = load_latents(path)
    made = metadata.decode(stored, path)
    shape = latent_shape(made.request.size, made.request.frames, model.dims.vae)
    expected = [1, model.dims.vae.latent_channels, shape.frames, shape.height, shape.width]
    if list(latents.shape) != expected:
        raise RequestError(f"{path}: latents are {list(latents.shape)}, its request and this VAE make {expected}")
    if made.model.fingerprint != model.fingerprint:
        yield Note(f"these latents were made with other weights (model {made.model.name}): the clip may differ")
    timings = Timings()
    with released(model):
        places = choose_places(outputs or Outputs(), made.request)
        yield from write_clip(model, made.request, latents, places, timings)
    if path.resolve().parent == paths.latents_folder().resolve():
        path.unlink(missing_ok=True)
    yield Finished(places.clip, timings.seconds)
