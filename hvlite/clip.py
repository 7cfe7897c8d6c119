"""From final latents to a file: where results lie, decode, and what a clip says of itself.

What was computed is on disk before the step that could fail: latents are saved before they are decoded, and stay until
the clip has its name.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from hvlite import metadata, paths
from hvlite.atomic import check_new, free_path, make_folder, remove_leftovers
from hvlite.dims import latent_shape
from hvlite.errors import RequestError
from hvlite.events import Event, Finished, Note, Saved, Stage, TileDone
from hvlite.memory.decode_ladder import Fell, Rung, decode_on_ladder, tile_rungs, untiled_rung
from hvlite.memory.device import device_name, give_back, is_out_of_memory
from hvlite.memory.geometry import AUTO, Exact, parse_tiles, tiles_text
from hvlite.memory.spill import Spill
from hvlite.memory.tiles import Joint, TileGeometry, TileStep, decode_tiles
from hvlite.memory.trace import counted, on_host, to_host
from hvlite.metadata import Metadata, ModelMade
from hvlite.model.exact import exact_decode
from hvlite.model.vae import Vae
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
        make_folder(outputs.folder)
        clip = free_path(outputs.folder, stem, suffix)
    elif clip.suffix.lower() != suffix:
        raise RequestError(f"{resolved.frames} frame(s) make a {suffix} file; the output is named {clip.name}")
    check_new(clip)
    if outputs.unfinished is not None:
        make_folder(outputs.unfinished.parent)
        return Places(clip=clip, latents=outputs.unfinished, keep_latents=False)
    if resume is not None:
        return Places(clip=clip, latents=resume, keep_latents=not is_own(resume))
    latents = outputs.latents
    if latents is None:
        make_folder(paths.latents_folder())
        latents = free_path(paths.latents_folder(), stem, ".safetensors")
    check_new(latents)
    return Places(clip=clip, latents=latents, keep_latents=outputs.latents is not None)


def is_own(latents: Path) -> bool:
    """Whether these lie in hvlite's own folder, which they leave when their clip is written."""
    return latents.resolve().parent == paths.latents_folder().resolve()


def finish(run: Run, latents: Tensor, places: Places) -> Iterator[Event]:
    """Latents -> disk -> frames -> file. What is computed is on disk before the step that could fail."""
    made = metadata.encode(made_so_far(run))
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
    for step in decode(run, latents):
        if isinstance(step, TileStep):
            yield TileDone(step.tile, step.tiles)
    yield Finished(None, run.timings.seconds, run.memory)


def scaled(model: Model, latents: Tensor) -> Tensor:
    """Latents in model space as the VAE takes them, on its device."""
    return (latents.float() / model.dims.vae.scaling_factor).to(model.device, model.vae_dtype)


def decode(run: Run, latents: Tensor) -> Iterator[TileStep | Fell]:
    """Latents [1,C,T,H,W] in model space -> tiles, with finished frames [3,F,H,W] in [-1,1] as they become final.

    Where memory runs out a leaner way goes on at the first frame that is not finished (or, with `anew`, from the
    beginning), on a card at last on the CPU.
    """
    planned = run.plan
    for step in decode_on_ladder(_rungs(run, latents), is_out_of_memory, lambda: give_back(run.model.device)):
        if isinstance(step, Fell):
            run.descents.append(f"out of memory in decode: going on with {step.name} from frame {step.frame}")
            run.bit_exact &= step.name == (run.decoded_in or tiles_text(planned.tiles))
            run.decoded_in = step.name
        yield step
        del step  # its frames are not to be held beside the next ones


def _rungs(run: Run, latents: Tensor) -> Iterator[Rung]:
    """As planned, then by each leaner plan; after a card the CPU, in the first of their tiles."""
    model, first = run.model, run.plan
    yield _rung(run, latents)
    while (leaner := run.plan.next_rung("decode")) is not None:
        run.plan = leaner
        first = leaner if isinstance(first.tiles, Exact) else first
        model.release(keep=("vae",))
        yield _rung(run, latents)
    if has_another_memory(model.device):
        model.release(pinned=False)  # the decode takes place where they lie
        on_cpu = model.vae_on_cpu()
        taken = latents.float().cpu() / model.dims.vae.scaling_factor
        run.plan = first
        assert isinstance(first.tiles, TileGeometry), "tiles follow an exact decode"
        yield from tile_rungs(taken, on_cpu.decode, first.tiles, " on the CPU")


def has_another_memory(device: torch.device) -> bool:
    """Whether the host's memory is not the device's own."""
    return device.type == "cuda"


def _rung(run: Run, latents: Tensor) -> Rung:
    """By the plan as it is now; nothing is loaded before it begins."""
    model, tiles, spilled = run.model, run.plan.tiles, run.plan.spilled

    def in_tiles(joint: Joint) -> Iterator[TileStep]:
        assert isinstance(tiles, TileGeometry)
        return on_host(decode_tiles(scaled(model, latents), _tile_decoder(model.vae()), tiles, joint))

    if spilled is None:
        return Rung(name=tiles_text(tiles), run=in_tiles)
    folder = paths.scratch_folder() if spilled.place == "disk" else None
    pieces = partial(_exactly, model, latents, folder)
    return untiled_rung(tiles_text(tiles), pieces, spilled.chunks)


def _tile_decoder(vae: Vae) -> Callable[[Tensor], Tensor]:
    """Tiles are joined in host memory: a card has better use for its own."""
    shapes: dict[torch.Size, torch.Size] = {}

    def decode_one(tile: Tensor) -> Tensor:
        if tile.device.type != "meta":
            return vae.decode(tile).cpu()
        if tile.shape not in shapes:  # one of each shape shows the memory of all
            with counted():
                shapes[tile.shape] = vae.decode(tile).shape
        return tile.new_empty(shapes[tile.shape])

    return decode_one


def _exactly(model: Model, latents: Tensor, folder: Path | None) -> Iterator[Tensor | None]:
    """The pieces of an exact decode, in the host's memory; what it puts aside lies in `folder`, if there is one."""
    if folder is not None:
        remove_leftovers(folder)
    with Spill(model.vae_dtype, model.device, folder) as spill:
        for piece in exact_decode(model.vae(), scaled(model, latents), spill):
            yield None if piece is None else to_host(piece)


def write_clip(run: Run, latents: Tensor, clip: Path) -> Iterator[Event]:
    """Decode and write frames as they come; the file gets its name when it is complete."""
    yield Stage("decode")
    with run.timings.measure("decode"):
        steps, is_whole = decode(run, latents), False
        while not is_whole:
            is_whole = yield from _write_frames(run, steps, clip)
    yield Saved("image" if clip.suffix == ".png" else "video", clip)


class _BeginsAnew(Exception):
    """The frames that were written are void."""


def _write_frames(run: Run, steps: Iterator[TileStep | Fell], clip: Path) -> Generator[Event, None, bool]:
    """Whether the file is there; otherwise the decode begins anew with the next step, and nothing is left of it."""
    made = clip_metadata(run)
    try:
        with _open_clip(clip, lambda: metadata.encode(as_decoded(made, run)), run.resolved.prompt) as add_frame:
            for step in steps:
                if isinstance(step, Fell):
                    yield Note(run.descents[-1])
                    if step.anew:
                        raise _BeginsAnew
                    continue
                for frame in () if step.frames is None else step.frames.split(1, dim=1):
                    add_frame(frames_to_uint8(frame)[0])  # one by one: the copies of all would be as large as they
                    del frame
                yield TileDone(step.tile, step.tiles)
                del step  # its frames are not to be held beside the next ones
    except _BeginsAnew:
        return False
    return True


@contextmanager
def _open_clip(path: Path, made: Callable[[], str], title: str) -> Iterator[Callable[[FrameLike], None]]:
    """A function that adds a frame to the new mp4 or, for the only one, writes the PNG."""
    if path.suffix.lower() == ".png":
        yield lambda frame: write_png(path, frame, metadata=made(), title=title)
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


def made_so_far(run: Run) -> Metadata:
    """What latents say of themselves, and in which tiles they are to be decoded, if some were asked for."""
    asked = run.outputs.decode_tile
    return Metadata(
        request=run.resolved,
        model=model_made(run.model, with_folder=True),
        decode_tile="" if asked == AUTO else asked if isinstance(asked, str) else tiles_text(asked),
        bit_exact=run.bit_exact,
    )


def with_tiles_of(made: Metadata, outputs: Outputs) -> Outputs:
    """Decoded as was asked for when the clip was begun, where nothing else is asked for now."""
    if outputs.decode_tile != AUTO or not made.decode_tile:
        return outputs
    return dataclasses.replace(outputs, decode_tile=parse_tiles(made.decode_tile))


def clip_metadata(run: Run) -> Metadata:
    """What a finished file says of itself, but for what only its decode shows."""
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
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        timings=dict(run.timings.seconds),
    )


def as_decoded(made: Metadata, run: Run) -> Metadata:
    """The same with the way in which the clip is decoded by now, and the memory that it took up to now.

    Of a clip that was decoded in more than one way it is the last one, and its volume is not known.
    """
    way = run.decoded_in or tiles_text(run.plan.tiles)
    volume = round(run.plan.decoded_volume, 3) if run.decoded_in is None else None
    return replace(made, decode_tile=way, decoded_volume=volume, bit_exact=run.bit_exact, memory=run.memory)


def decode_file(path: Path, model: Model, outputs: Outputs | None = None) -> Generator[Event, None, None]:
    """Finish a clip from saved latents: they carry the Request, so nothing else is needed.

    Latents that a failed run left in hvlite's own folder are removed when the clip is written; others stay.
    """
    yield from model.alone(_decode_file(path, model, outputs or Outputs()))


def _decode_file(path: Path, model: Model, outputs: Outputs) -> Generator[Event, None, None]:
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
    if model.device.type == "meta":
        raise RequestError("device meta computes nothing, so there is no clip to write: use --device cpu or cuda")
    outputs = with_tiles_of(made, outputs)
    plan = model.plan(made.request, Wishes(tiles=outputs.decode_tile, stages=("decode",)))
    yield from map(Note, plan.notes)
    run = Run(model, made.request, outputs, plan, made.bit_exact)
    with released(model, lambda: run.plan):
        places = choose_places(outputs, made.request, path)
        yield from write_clip(run, saved.latents, places.clip)
    if not places.keep_latents:
        path.unlink(missing_ok=True)
    yield Finished(places.clip, run.timings.seconds, run.memory)
