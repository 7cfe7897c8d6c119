"""From final latents to a file: where results lie, decode, and what a clip says of itself.

What was computed is on disk before the step that could fail: latents are saved before they are decoded, and stay until
the clip has its name.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from hvlite import metadata, paths
from hvlite.atomic import check_new, explained, free_path
from hvlite.dims import LatentShape, latent_shape
from hvlite.errors import RequestError
from hvlite.events import Event, Finished, Note, Saved, Stage, TileDone
from hvlite.memory.decode_ladder import Fell, Rung, decode_on_ladder, tile_rungs
from hvlite.memory.device import device_name, give_back, is_out_of_memory
from hvlite.memory.tiles import TileStep, tile_shapes
from hvlite.metadata import Metadata, ModelMade
from hvlite.opened import Model
from hvlite.origin import Checkpoint
from hvlite.planning import Wishes
from hvlite.request import ResolvedRequest
from hvlite.run import Outputs, Run, released
from hvlite.video.frames import FrameLike, frames_to_uint8
from hvlite.video.latents import SavedLatents, load_latents, save_latents
from hvlite.video.mp4 import open_mp4
from hvlite.video.png import write_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The files of one run, chosen and checked before any work."""

    clip: Path
    latents: Path
    keep_latents: bool


def choose_places(outputs: Outputs, resolved: ResolvedRequest, resume: Path | None = None) -> Places:
    """Where the clip and its latents will lie; what cannot be written is refused now, not after hours.

    A clip that goes on from `resume` keeps its latents there.
    """
    stem = paths.output_stem(resolved.prompt, resolved.seed, f"{datetime.now():%Y%m%d-%H%M%S}")
    suffix = ".png" if resolved.frames == 1 else ".mp4"
    clip = outputs.file
    if clip is None:
        _make_folder(outputs.folder)
        clip = free_path(outputs.folder, stem, suffix)
    elif clip.suffix.lower() != suffix:
        raise RequestError(f"{resolved.frames} frame(s) make a {suffix} file; the output is named {clip.name}")
    check_new(clip)
    if resume is not None:
        return Places(clip=clip, latents=resume, keep_latents=not is_own(resume))
    latents = outputs.latents
    if latents is None:
        _make_folder(paths.latents_folder())
        latents = free_path(paths.latents_folder(), stem, ".safetensors")
    check_new(latents)
    return Places(clip=clip, latents=latents, keep_latents=outputs.latents is not None)


def is_own(latents: Path) -> bool:
    """Whether these lie in hvlite's own folder, which they leave when their clip is written."""
    return latents.resolve().parent == paths.latents_folder().resolve()


def _make_folder(folder: Path) -> None:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def finish(run: Run, latents: Tensor, places: Places) -> Iterator[Event]:
    """Latents -> disk -> frames -> file. What is computed is on disk before the step that could fail."""
    made = metadata.encode(Metadata(request=run.resolved, model=model_made(run.model, with_folder=True)))
    save_latents(places.latents, SavedLatents(latents=latents.cpu(), request=made))
    yield Saved("latents", places.latents)
    yield from write_clip(run, latents, places.clip)
    if not places.keep_latents:
        places.latents.unlink(missing_ok=True)
    yield Finished(places.clip, run.timings.seconds, run.memory)


def finish_on_meta(run: Run, latents: Tensor) -> Iterator[Event]:
    """Every allocation of the decode, and no file."""
    yield Note("device meta: nothing is computed and no file is written")
    yield Stage("decode")
    vae, taken = run.model.vae(), scaled(run.model, latents)
    tiles = tile_shapes(LatentShape(*latents.shape[2:]), run.plan.tiles)
    for index, tile in enumerate(tiles):
        if tile not in tiles[:index]:  # one of each shape shows the memory of all
            vae.decode(taken[:, :, : tile.frames, : tile.height, : tile.width])
        yield TileDone(index, len(tiles))
    yield Finished(None, run.timings.seconds, run.memory)


def scaled(model: Model, latents: Tensor) -> Tensor:
    """Latents in model space as the VAE takes them, on its device."""
    return (latents.float() / model.dims.vae.scaling_factor).to(model.device, model.vae_dtype)


def decode(run: Run, latents: Tensor) -> Iterator[TileStep | Note]:
    """Latents [1,C,T,H,W] in model space -> tiles, with finished frames [3,F,H,W] in [-1,1] as they become final.

    Where memory runs out smaller tiles go on at the first frame that is not finished, on a card at last on the CPU.
    """
    model = run.model
    for step in decode_on_ladder(_rungs(run, latents), is_out_of_memory, lambda: give_back(model.device)):
        if isinstance(step, Fell):
            assert not step.anew, "tiles always go on where others ended"
            note = f"out of memory in decode: going on with {step.name} from frame {step.frame}"
            run.descents.append(note)
            yield Note(note)
        else:
            yield step


def _rungs(run: Run, latents: Tensor) -> Iterator[Rung]:
    """The planned tiles, all smaller ones, and the CPU after a card."""
    model = run.model
    vae = model.vae()
    # tiles are joined in host memory: a card has better use for its own
    yield from tile_rungs(scaled(model, latents), lambda tile: vae.decode(tile).cpu(), run.plan.tiles)
    if model.device.type == "cuda":
        model.release()
        on_cpu = model.vae_on_cpu()
        taken = latents.float().cpu() / model.dims.vae.scaling_factor
        yield from tile_rungs(taken, on_cpu.decode, run.plan.tiles, " on the CPU")


def write_clip(run: Run, latents: Tensor, clip: Path) -> Iterator[Event]:
    """Decode and write frames as they come; the file gets its name when it is complete."""
    yield Stage("decode")
    made = metadata.encode(clip_metadata(run))
    with run.timings.measure("decode"), _open_clip(clip, made, run.resolved.prompt) as add_frame:
        for step in decode(run, latents):
            if isinstance(step, Note):
                yield step
                continue
            if step.frames is not None:
                for frame in frames_to_uint8(step.frames):
                    add_frame(frame)
            yield TileDone(step.tile, step.tiles)
    yield Saved("image" if clip.suffix == ".png" else "video", clip)


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
    made = ModelMade(name=model.dims.name, fingerprint=model.origin.fingerprint)
    if not with_folder or model.origin.folder is None:
        return made
    vae = str(model.origin.sources.vae.resolve()) if isinstance(model.origin, Checkpoint) else None
    return replace(made, folder=str(model.origin.folder.resolve()), vae=vae)


def clip_metadata(run: Run) -> Metadata:
    """What a finished file says of itself; its timings and memory end before decode, since the header comes first."""
    model = run.model
    return Metadata(
        request=run.resolved,
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
        decode_tile=asdict(run.plan.tiles),
        memory=run.memory,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        timings=run.timings.seconds,
    )


def decode_file(path: Path, model: Model, outputs: Outputs | None = None) -> Generator[Event, None, None]:
    """Finish a clip from saved latents: they carry the Request, so nothing else is needed.

    Latents that a failed run left in hvlite's own folder are removed when the clip is written; others stay.
    """
    saved = load_latents(path)
    made = metadata.decode(saved.request, path)
    if saved.progress is not None:
        raise RequestError(f"{path}: not all steps are done. Go on with: hvlite gen --resume {path}")
    shape = latent_shape(made.request.size, made.request.frames, model.dims.vae)
    expected = [1, model.dims.vae.latent_channels, shape.frames, shape.height, shape.width]
    if list(saved.latents.shape) != expected:
        raise RequestError(f"{path}: latents are {list(saved.latents.shape)}, its request and this VAE make {expected}")
    if made.model.fingerprint != model.origin.fingerprint:
        yield Note(f"these latents were made with other weights (model {made.model.name}): the clip may differ")
    outputs = outputs or Outputs()
    plan = model.plan(made.request, Wishes(tiles=outputs.decode_tile, stages=("decode",)))
    run = Run(model, made.request, outputs, plan)
    with released(model, plan):
        places = choose_places(outputs, made.request, path)
        yield from write_clip(run, saved.latents, places.clip)
    if not places.keep_latents:
        path.unlink(missing_ok=True)
    yield Finished(places.clip, run.timings.seconds, run.memory)
