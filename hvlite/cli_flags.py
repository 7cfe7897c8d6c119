"""The flags that commands share, and what they mean together: a Request, a model's name, the clips of one call."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hvlite import paths
from hvlite.errors import RequestError
from hvlite.jobs.job import How
from hvlite.progress import Talk
from hvlite.request import MAX_SEED, Request, Template

if TYPE_CHECKING:
    from hvlite.metadata import Metadata, ModelMade


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RequestFlags:
    """What to render. Left out, the model's default applies."""

    size: Annotated[tuple[int, int] | None, Parameter(name=["--size", "--video-size"])] = None
    """Height and width in pixels, multiples of 16 (hunyuanvideo: 720 1280)."""
    frames: Annotated[int | None, Parameter(name=["--frames", "--video-length"])] = None
    """Frames, 4k+1 (hunyuanvideo: 129). One frame makes a PNG."""
    steps: Annotated[int | None, Parameter(name=["--steps", "--infer-steps"])] = None
    """Denoising steps (hunyuanvideo: 50)."""
    guidance: Annotated[float | None, Parameter(name=["--guidance", "--embedded-cfg-scale"])] = None
    """Guidance that the model was distilled with (6.0)."""
    flow_shift: float | None = None
    """Shift of the noise schedule (7.0)."""
    flow_reverse: Annotated[bool | None, Parameter(negative="--no-flow-reverse")] = None
    """The schedule from noise to data; the released weights need it, so it is on."""
    negative_prompt: Annotated[str | None, Parameter(name=["--negative-prompt", "--neg-prompt"])] = None
    """What to avoid; needs --cfg-scale above 1."""
    cfg_scale: float | None = None
    """True two-pass guidance above 1.0; doubles the work (1.0)."""
    seed: int | None = None
    """0 to 2^63-1; -1 draws one (0)."""
    template: Template | None = None
    """What the text encoder is told to describe (by frames: image for one, else video)."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelFlags(How):
    """With which weights, where: the fields and their help are those of `How`; here is only a second name."""

    dit: Annotated[Path | None, Parameter(name=["--dit", "--dit-weight"])] = None
    """A transformer file or folder that replaces the model's."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where results go, and what is said."""

    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    """The file to write (.mp4, or .png for one frame); it must not exist."""
    save_path: Path = paths.DEFAULT_OUTPUT
    """The folder for files that are not named by --output."""
    save_latents: Path | None = None
    """Keep the final latents in this file."""
    json: bool = False
    """JSON on stdout: events as lines where something is rendered, else one object."""
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False
    """Say nothing but errors."""
    debug: bool = False
    """Show tracebacks."""


def model_name(how: How, talk: Talk, made_with: "ModelMade | None") -> str:
    """--model; else where --dit lies; else what a file was made with; else hunyuanvideo where it is downloaded.

    Where all that fails it is the embedded model, and that is said.
    """
    if how.model is not None:
        return how.model
    if how.dit is not None and (folder := paths.enclosing_model(how.dit)):
        return str(folder)
    if made_with is not None:
        return _name_of(made_with)
    name = paths.default_model()
    if name == "shapes":
        talk.say("no model named and none downloaded: using the embedded model `shapes` (64x64 test clips)")
    return name


def _name_of(made_with: "ModelMade") -> str:
    if made_with.folder is not None and Path(made_with.folder).is_dir():
        return made_with.folder
    if made_with.name in ("shapes", "hunyuanvideo"):
        return made_with.name
    raise RequestError(f"this was made with a model named {made_with.name!r}: say where it is with --model FOLDER")


def request_from(prompt: str | None, what: RequestFlags, like: Path | None) -> "tuple[Request, Metadata | None]":
    """The Request of flags over `--like`, and what that file says of itself."""
    given = given_fields(what)
    if prompt is not None:
        given["prompt"] = prompt
    if like is not None:
        made = read_made(like)
        return replace(made.request.as_request(), **given), made
    if prompt is None:
        raise RequestError('a prompt is missing; name it first: "a red circle moving left on a black background"')
    return Request(**given), None


def given_fields(what: RequestFlags) -> dict[str, Any]:
    """The fields of a Request that were typed; a seed of -1 is drawn now."""
    given = {key: value for key, value in vars(what).items() if value is not None}
    if given.get("seed") == -1:
        given["seed"] = draw_seed()
    return given


def draw_seed() -> int:
    """Any seed at all."""
    return random.SystemRandom().randrange(MAX_SEED)


def clips_of(request: Request, count: int, where: OutputFlags) -> list[Request]:
    """One Request for each clip, checked before any of them is rendered."""
    if count < 1:
        raise RequestError(f"--num-videos must be at least 1; got {count}")
    if count > 1 and where.output is not None:
        raise RequestError(f"--output names one file, --num-videos asks for {count}; use --save-path FOLDER")
    if where.output is not None and where.output.suffix.lower() not in (".mp4", ".png"):
        raise RequestError(f"--output must end in .mp4 (or .png for one frame); got {where.output}")
    return [replace(request, seed=request.seed + index) for index in range(count)]


def read_made(file: Path) -> "Metadata":
    """What a clip or saved latents say of themselves."""
    from hvlite import metadata
    from hvlite.video.mp4 import read_metadata

    if file.suffix == ".safetensors":
        from hvlite.video.latents import load_latents

        return metadata.decode(load_latents(file).request, file)
    return metadata.decode(read_metadata(file), file)
