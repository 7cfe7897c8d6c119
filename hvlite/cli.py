"""The command line: each command is one call; stdout is the result, stderr the talk, the exit code a
contract.

Nothing here imports torch at the top: `--help` and the first line appear at once.
"""

import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from hvlite import paths
from hvlite.errors import ExitCode, HvliteError, RequestError
from hvlite.formats import TextWeights, Weights
from hvlite.progress import Interrupted, Talk, interruptible, print_json, printable
from hvlite.request import MAX_SEED, Request, Template

if TYPE_CHECKING:
    from hvlite.line import Outputs
    from hvlite.metadata import Metadata, ModelMade
    from hvlite.opened import Model

PARTS = ("dit", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

app = App(
    name="hvlite",
    help="HunyuanVideo text to video in a memory budget that you name.",
    version_flags=["--version"],
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)
app.command("hvlite.cli_models:models", name="models", help="Packed stores: made, listed, checked, removed.")


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
class ModelFlags:
    """With which weights, where."""

    model: str | None = None
    """`shapes` (embedded), `hunyuanvideo`, or a checkpoint folder."""
    dit: Annotated[Path | None, Parameter(name=["--dit", "--dit-weight"])] = None
    """A transformer file or folder that replaces the model's."""
    vae: Path | None = None
    """A VAE file or folder that replaces the model's."""
    text_encoder: Path | None = None
    """A Llama file or folder that replaces the model's."""
    text_encoder_2: Path | None = None
    """A CLIP file or folder that replaces the model's."""
    tokenizer: Path | None = None
    """The folder of Llama's tokenizer (by default that of --text-encoder, else the model's)."""
    tokenizer_2: Path | None = None
    """The folder of CLIP's tokenizer (by default that of --text-encoder-2, else the model's)."""
    profile: str | None = None
    """How memory is used; the names are the files of profiles/."""
    device: str | None = None
    """cpu, cuda, cuda:N or meta (by default the CUDA device with most free memory, else cpu)."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """What the transformer computes in (by profile)."""
    weights: Weights | None = None
    """Form of the transformer's weights; a checkpoint is packed to it once (by default used as it is)."""
    text_weights: TextWeights | None = None
    """Form of the text encoder's weights."""
    attention: Literal["sdpa", "flash", "sage"] | None = None
    """Attention back end (flash-attn where it is installed, else torch's fused kernels)."""


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
    """Events as JSON lines on stdout."""
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False
    """Say nothing but errors."""
    debug: bool = False
    """Show tracebacks."""


@app.command
def gen(
    prompt: str | None = None,
    *,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    where: OutputFlags | None = None,
    like: Path | None = None,
    num_videos: int = 1,
    use_cpu_offload: bool = False,
    use_fp8: bool = False,
) -> int:
    """Render a prompt to a file, now, in this process.

    Parameters
    ----------
    prompt
        What to draw.
    like
        Take every setting from this file's metadata; flags given beside it win.
    num_videos
        Clips with seeds seed, seed+1, ...
    use_cpu_offload
        Accepted as in the published tool; hvlite always loads the parts one after the other.
    use_fp8
        Accepted as in the published tool; hvlite knows fp8 weights by themselves.
    """
    what, how, where = what or RequestFlags(), how or ModelFlags(), where or OutputFlags()
    talk = Talk(quiet=where.quiet, as_json=where.json)
    request, made = _request_from(prompt, what, like)
    clips = _clips_of(request, num_videos, where)
    name = _model_name(how, talk, made.model if made else None)
    talk.say(f"model {name}, seed {', '.join(str(clip.seed) for clip in clips)}: {request.prompt}")
    if use_cpu_offload:
        talk.say("--use-cpu-offload changes nothing: parts are always loaded one after the other")
    if use_fp8:
        talk.say("--use-fp8 changes nothing: fp8 weights are known by themselves (--weights fp8 makes them)")
    with interruptible(talk) as stop, _opened(name, how, talk) as model:
        from hvlite.line import choose_places, encode_prompts, generate, prompts_of

        if made is not None and made.model.fingerprint != model.fingerprint:
            talk.say("these are not the weights that the clip was made with: it will differ")
        resolved = request.resolve(model.dims)
        outputs = [_outputs(where, index if len(clips) > 1 else None) for index in range(len(clips))]
        if model.device.type != "meta":
            for each in outputs:
                choose_places(each, resolved)  # what cannot be written is refused before the first clip
        prompts = encode_prompts(prompts_of(resolved), model, resolved.template) if len(clips) > 1 else None
        for clip, each in zip(clips, outputs, strict=True):
            stop.follow(generate(clip, model, outputs=each, prompts=prompts))
    return ExitCode.DONE


@app.command
def decode(latents: Path, *, how: ModelFlags | None = None, where: OutputFlags | None = None) -> int:
    """Finish a clip from saved latents; they carry the whole request.

    Parameters
    ----------
    latents
        A file written by --save-latents, or kept when a decode failed.
    """
    how, where = how or ModelFlags(), where or OutputFlags()
    talk = Talk(quiet=where.quiet, as_json=where.json)
    from hvlite import metadata
    from hvlite.video.latents import load_latents

    if where.save_latents is not None:
        raise RequestError(f"decode makes no latents: leave --save-latents away; {latents} stays where it is")
    made = metadata.decode(load_latents(latents)[1], latents)
    name = _model_name(how, talk, made.model)
    if how.model is None and how.vae is None and made.model.vae and Path(made.model.vae).exists():
        how = replace(how, vae=Path(made.model.vae))
    talk.say(f"model {name}: {made.request.prompt}")
    with interruptible(talk) as stop, _opened(name, how, talk) as model:
        from hvlite.line import decode_file

        stop.follow(decode_file(latents, model, _outputs(where, None)))
    return ExitCode.DONE


@app.command
def info(file: Path, *, json: bool = False) -> int:
    """Show how a file was made.

    Parameters
    ----------
    file
        An .mp4, a .png or latents that hvlite wrote.
    json
        One object on stdout.
    """
    from hvlite import metadata

    values = metadata.as_json(_read_made(file))
    if json:
        print_json(values)
        return ExitCode.DONE
    for section in (values.pop("request"), values):
        for key, value in section.items():
            print(f"{key:16} {printable(_compact(value))}")
    return ExitCode.DONE


def main() -> None:
    """Run the command line; every error ends in one line and its exit code."""
    if sys.platform == "win32":
        print("hvlite: error: native Windows is not supported; use WSL2 (see README)", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    arguments = sys.argv[1:]
    try:
        result = app(arguments, exit_on_error=False, print_error=False)
        code = result if isinstance(result, int) else ExitCode.DONE
    except CycloptsError as error:
        code = _report(f"{error} See hvlite --help.", ExitCode.USAGE, arguments)
    except HvliteError as error:
        code = _report(str(error), error.exit_code, arguments)
    except (Interrupted, KeyboardInterrupt) as stop:
        print("hvlite: interrupted", file=sys.stderr)
        code = stop.code if isinstance(stop, Interrupted) else ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.FAILED
    except Exception as error:
        log = _log_traceback(error)
        code = _report(f"{type(error).__name__}: {error} (traceback: {log})", ExitCode.FAILED, arguments)
    sys.exit(code)


def _report(message: str, code: ExitCode, arguments: list[str]) -> ExitCode:
    print(f"hvlite: error: {' '.join(message.split())}", file=sys.stderr)
    if "--debug" in arguments:
        traceback.print_exc()
    return code


def _log_traceback(error: Exception) -> Path | None:
    """The traceback goes to a file; None if that cannot be written."""
    try:
        path = paths.logs_folder() / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except (OSError, RuntimeError):
        return None
    return path


def _model_name(how: ModelFlags, talk: Talk, made_with: "ModelMade | None") -> str:
    """--model; else where --dit lies; else what a file was made with; else hunyuanvideo where it is downloaded.

    Where all that fails it is the embedded model, and that is said.
    """
    if how.model is not None:
        return how.model
    if how.dit is not None and (folder := paths.enclosing_model(how.dit)):
        return str(folder)
    if made_with is not None:
        return _name_of(made_with)
    if (paths.models_folder() / "hunyuanvideo").is_dir():
        return "hunyuanvideo"
    talk.say("no model named and none downloaded: using the embedded model `shapes` (64x64 test clips)")
    return "shapes"


def _name_of(made_with: "ModelMade") -> str:
    if made_with.folder is not None and Path(made_with.folder).is_dir():
        return made_with.folder
    if made_with.name in ("shapes", "hunyuanvideo"):
        return made_with.name
    raise RequestError(f"this was made with a model named {made_with.name!r}: say where it is with --model FOLDER")


def _request_from(prompt: str | None, what: RequestFlags, like: Path | None) -> "tuple[Request, Metadata | None]":
    """The Request of flags over `--like`, and what that file says of itself."""
    given: dict[str, Any] = {key: value for key, value in vars(what).items() if value is not None}
    if given.get("seed") == -1:
        given["seed"] = random.SystemRandom().randrange(MAX_SEED)
    if prompt is not None:
        given["prompt"] = prompt
    if like is not None:
        made = _read_made(like)
        return replace(made.request.as_request(), **given), made
    if prompt is None:
        raise RequestError('a prompt is missing: hvlite gen "a red circle moving left on a black background"')
    return Request(**given), None


def _clips_of(request: Request, count: int, where: OutputFlags) -> list[Request]:
    """One Request for each clip, checked before any of them is rendered."""
    if count < 1:
        raise RequestError(f"--num-videos must be at least 1; got {count}")
    if count > 1 and where.output is not None:
        raise RequestError(f"--output names one file, --num-videos asks for {count}; use --save-path FOLDER")
    if where.output is not None and where.output.suffix.lower() not in (".mp4", ".png"):
        raise RequestError(f"--output must end in .mp4 (or .png for one frame); got {where.output}")
    return [replace(request, seed=request.seed + index) for index in range(count)]


def _read_made(file: Path) -> "Metadata":
    from hvlite import metadata
    from hvlite.video.mp4 import read_metadata

    if file.suffix == ".safetensors":
        from hvlite.video.latents import load_latents

        return metadata.decode(load_latents(file)[1], file)
    return metadata.decode(read_metadata(file), file)


@contextmanager
def _opened(name: str, how: ModelFlags, talk: Talk) -> Iterator["Model"]:
    """The model on its device, with the flags laid over the profile."""
    from hvlite.memory.device import choose_device, unused_card_note
    from hvlite.opened import open_model
    from hvlite.profile import load_profile

    device = choose_device(how.device)
    if how.device is None and (note := unused_card_note()):
        talk.say(note)
    default = "24g" if device.type in ("cuda", "meta") else "cpu"
    profile = load_profile(how.profile or default, dtype=how.dtype, attention=how.attention)
    files = {part: getattr(how, part) for part in PARTS}
    folder = name if device.type == "meta" else _packed_once(name, how, files, talk)
    with open_model(folder, profile, str(device), dynamic=how.weights == "int8-dynamic", **files) as model:
        yield model


def _packed_once(name: str, how: ModelFlags, files: dict[str, Path | None], talk: Talk) -> str | Path:
    """What to open for --weights: the store itself, a checkpoint as it is, or the store that it is packed to once."""
    from hvlite.opened import find_origin
    from hvlite.origin import Packed
    from hvlite.packing import check_formats, pack_model, store_path, stored_formats
    from hvlite.weights.store import is_store

    if how.weights is None and how.text_weights is None:
        return name
    origin = find_origin(name, files)
    if isinstance(origin, Packed):
        check_formats(origin.store, how.weights, how.text_weights)
        return name
    formats = stored_formats(how.weights, how.text_weights)
    out = store_path(origin.sources, origin.dims, formats)
    if not is_store(out):
        talk.say(f"packing {origin.folder} once to {out}")
        talk.follow_packing(pack_model(origin.sources, origin.dims, out, formats))
    files.clear()
    return out


def _outputs(where: OutputFlags, index: int | None) -> "Outputs":
    """The flags as the library takes them; `index` numbers the latents of several clips."""
    from hvlite.line import Outputs

    latents = where.save_latents
    if latents is not None and index is not None:
        latents = latents.with_stem(f"{latents.stem}-{index}")
    return Outputs(file=where.output, folder=where.save_path, latents=latents)


def _compact(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_compact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "x".join(str(item) for item in value)
    return str(value)


if __name__ == "__main__":
    main()
