"""The command line: each command is one call; stdout is the result, stderr the talk, the exit code a
contract.

Nothing here imports torch at the top: `--help` and the first line appear at once.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError, Parameter

from hvlite import paths
from hvlite.cli_flags import ModelFlags, OutputFlags, RequestFlags, clips_of, model_name, read_made, request_from
from hvlite.errors import ExitCode, HvliteError, RequestError
from hvlite.memory.geometry import AskedTiles, parse_tiles
from hvlite.progress import Interrupted, Stop, Talk, interruptible, print_json, printable

if TYPE_CHECKING:
    from hvlite.opened import Model
    from hvlite.request import Request
    from hvlite.run import Outputs

app = App(
    name="hvlite",
    help="HunyuanVideo text to video in a memory budget that you name.",
    version_flags=["--version"],
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)
app.command("hvlite.cli_plan:plan_command", name="plan", help="Say what a clip takes, and whether it fits.")
app.command("hvlite.cli_queue:queue", name="queue", help="The queue: clips to be rendered, in order.")
app.command("hvlite.cli_batch:batch_command", name="batch", help="Queue every prompt of a file.")
app.command("hvlite.cli_models:models", name="models", help="The published weights, and packed stores.")
app.command(
    "hvlite.cli_machine:profiles", name="profiles", help="How memory is used: profiles listed, explained, checked."
)
app.command("hvlite.cli_work:work_command", name="work", help="Render what is queued, until it is told to stop.")
app.command("hvlite.cli_machine:doctor", name="doctor", help="Say what this machine has, to paste into a bug report.")
app.command("hvlite.cli_report:report", name="report", help="Write one page about the clips of a night.")
app.command("hvlite.tui.app:tui", name="tui", help="Look at the queue and work on it, in the terminal.")


@app.command
def gen(
    prompt: str | None = None,
    *,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    where: OutputFlags | None = None,
    like: Path | None = None,
    resume: Path | None = None,
    num_videos: int = 1,
    dry_run: bool = False,
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
    resume
        Go on with the clip that an interrupted run left in this file.
    num_videos
        Clips with seeds seed, seed+1, ...
    dry_run
        Say what the clip would take on this machine now, and render nothing.
    use_cpu_offload
        Accepted as in the published tool; hvlite always loads the parts one after the other.
    use_fp8
        Accepted as in the published tool; hvlite knows fp8 weights by themselves.
    """
    what, how, where = what or RequestFlags(), how or ModelFlags(), where or OutputFlags()
    talk = Talk(quiet=where.quiet, as_json=where.json)
    if resume is not None and (like is not None or prompt is not None or what != RequestFlags() or num_videos != 1):
        raise RequestError(f"{resume} says what is rendered: leave prompt, --like and all settings of the clip away")
    request, made = request_from(prompt, what, resume or like)
    clips = clips_of(request, num_videos, where)
    name = model_name(how, talk, made.model if made else None)
    if dry_run:
        from hvlite.cli_plan import plan_here

        return plan_here(request, replace(how, model=name), resume, as_json=where.json)
    talk.say(f"model {name}, seed {', '.join(str(clip.seed) for clip in clips)}: {request.prompt}")
    if use_cpu_offload:
        talk.say("--use-cpu-offload changes nothing: parts are always loaded one after the other")
    if use_fp8:
        talk.say("--use-fp8 changes nothing: fp8 weights are known by themselves (--weights fp8 makes them)")
    tiles = parse_tiles(how.decode_tile or "auto")
    outputs = [_outputs(where, index if len(clips) > 1 else None, tiles) for index in range(len(clips))]
    with interruptible(talk) as stop, _opened(name, how, talk) as model:
        if made is not None and made.model.fingerprint != model.origin.fingerprint:
            talk.say("these are not the weights that the clip was made with: it will differ")
        _render(clips, outputs, model, stop, resume)
    return ExitCode.DONE


def _render(clips: list["Request"], outputs: list["Outputs"], model: "Model", stop: Stop, resume: Path | None) -> None:
    """One clip after the other, their prompt encoded once; what cannot be written is refused before the first."""
    from hvlite.clip import choose_places
    from hvlite.line import encode_prompts, generate, prompts_of

    resolved = clips[0].resolve(model.dims)
    if model.device.type != "meta":
        for each in outputs:
            choose_places(each, resolved, resume)
    prompts = encode_prompts(prompts_of(resolved), model, resolved.template) if len(clips) > 1 else None
    for clip, each in zip(clips, outputs, strict=True):
        stop.follow(generate(clip, model, outputs=each, prompts=prompts, resume=resume))


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
    tiles = parse_tiles(how.decode_tile or "auto")
    made = metadata.decode(load_latents(latents).request, latents)
    name = model_name(how, talk, made.model)
    if how.model is None and how.vae is None and made.model.vae and Path(made.model.vae).exists():
        how = replace(how, vae=Path(made.model.vae))
    talk.say(f"model {name}: {made.request.prompt}")
    with interruptible(talk) as stop, _opened(name, how, talk) as model:
        from hvlite.clip import decode_file

        stop.follow(decode_file(latents, model, _outputs(where, None, tiles)))
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

    values = metadata.as_json(read_made(file))
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
    # cyclopts takes a lone `-` for an option
    arguments = [str(paths.STDIN) if argument == "-" else argument for argument in sys.argv[1:]]
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


@contextmanager
def _opened(name: str, how: ModelFlags, talk: Talk) -> Iterator["Model"]:
    """The model on its device, with the flags laid over the profile."""
    from hvlite.jobs.opening import open_asked
    from hvlite.memory.device import choose_device, unused_card_note

    device = choose_device(how.device)
    if how.device is None and (note := unused_card_note()):
        talk.say(note)
    if device.type == "cuda":
        from hvlite.jobs.devices import check_free
        from hvlite.jobs.store import open_store

        with open_store() as store:
            check_free(str(device), lambda: store.page(("running",)))
    with open_asked(name, how, device, talk.packing) as model:
        talk.close()
        yield model


def _outputs(where: OutputFlags, index: int | None, tiles: AskedTiles) -> "Outputs":
    """The flags as the library takes them; `index` numbers the latents of several clips."""
    from hvlite.run import Outputs

    latents = where.save_latents
    if latents is not None and index is not None:
        latents = latents.with_stem(f"{latents.stem}-{index}")
    return Outputs(file=where.output, folder=where.save_path, latents=latents, decode_tile=tiles)


def _compact(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_compact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "x".join(str(item) for item in value)
    return str(value)


if __name__ == "__main__":
    main()
