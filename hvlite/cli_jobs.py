"""From flags to jobs: complete, with absolute paths, and checked now, since nobody watches when they run.

Also what all commands of the queue share: job numbers as they are typed, the opened store, and what is said of jobs.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os.path import abspath, lexists
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hvlite import paths
from hvlite.atomic import check_new
from hvlite.cli_flags import ModelFlags, OutputFlags, model_name
from hvlite.cli_tables import NO_WORKER, ranges_text
from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import OutputError, RequestError, WeightsError
from hvlite.jobs.devices import any_worker
from hvlite.jobs.job import How, NewJob, job_json
from hvlite.jobs.store import Store, open_store
from hvlite.memory.geometry import parse_tiles
from hvlite.profile import load_profile
from hvlite.progress import Talk, print_json, printable
from hvlite.request import Request

if TYPE_CHECKING:
    from hvlite.metadata import ModelMade

Ids = Annotated[list[str], Parameter(help="Job numbers: 3, or 3-7, or 3,5-7.")]
Next = Annotated[bool, Parameter(name="--next", help="Put it at the head of the line.")]
Json = Annotated[bool, Parameter(name="--json", help="One object on stdout.")]

DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
EMBEDDED = "shapes"


def job_how(flags: ModelFlags, talk: Talk, made_with: "ModelMade | None" = None) -> How:
    """With which weights and where, for a new job: the model is always named."""
    return How(**{**given_how(flags), "model": _model(model_name(flags, talk, made_with))})


def given_how(flags: ModelFlags) -> dict[str, Any]:
    """The fields of How that were typed, checked as far as that goes without loading anything."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = absolute(value)
            if not given[name].exists():
                raise WeightsError(f"--{name.replace('_', '-')} {given[name]} is not there")
    if "model" in given:
        given["model"] = _model(given["model"])
    if "device" in given and not DEVICE.fullmatch(given["device"]):
        raise RequestError(f"a queued clip runs on cpu, cuda or cuda:N, not on {given['device']!r}")
    if given.get("profile") not in (None, "auto"):
        given["profile"] = _profile(given["profile"], flags)
    parse_tiles(given.get("decode_tile", "auto"))
    return given


def _model(name: str) -> str:
    """A name as it is, a folder as an absolute path; WeightsError where there is no such model."""
    if name == EMBEDDED:
        return name
    if name == HUNYUANVIDEO.name:
        folder = paths.models_folder() / name
        if not folder.is_dir():
            raise WeightsError(f"{name} is not on this machine (looked in {folder}); hvlite models fetch gets it")
        return name
    folder = absolute(Path(name))
    if not folder.is_dir():
        raise WeightsError(f"there is no model folder {folder}; known names: {EMBEDDED}, {HUNYUANVIDEO.name}")
    return str(folder)


def _profile(name: str, flags: ModelFlags) -> str:
    load_profile(name, **flags.overrides())
    return str(absolute(Path(name))) if name.endswith(".toml") else name


def absolute(path: Path) -> Path:
    """From here, without `..`; RequestError for a name that no database could hold."""
    plain = Path(abspath(path.expanduser()))
    try:
        str(plain).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{str(plain)!a} is no UTF-8 file name") from None
    return plain


def new_jobs(
    clips: Sequence[Request], how: How, where: OutputFlags, stop_after: int | None, outputs: Sequence[str | None] = ()
) -> list[NewJob]:
    """A job for each clip; what could not be written is refused now. `outputs` are names in the output folder."""
    jobs = []
    for index, clip in enumerate(clips):
        named = where.output
        if outputs and (name := outputs[index]) is not None:
            named = where.save_path / name
        latents = where.save_latents
        if latents is not None and len(clips) > 1:
            latents = latents.with_stem(f"{latents.stem}-{index}")
        job = NewJob(
            request=clip,
            how=how,
            folder=absolute(where.save_path if named is None else named.parent),
            output=None if named is None else absolute(named),
            latents=None if latents is None else absolute(latents),
            stop_after=stop_after,
        )
        check_places(job)
        jobs.append(job)
    return jobs


def check_places(job: NewJob) -> None:
    """OutputError or RequestError where a file that the user named cannot become this job's."""
    if job.output is not None:
        check_suffix(job.output, job.request)
    for path in (job.output, job.latents):
        if path is not None and path.parent.is_dir():
            check_new(path)
    if job.output is not None and not job.output.parent.is_dir() and lexists(job.output.parent):
        raise OutputError(f"{job.output.parent} is not a folder. Choose another one.")


def check_suffix(output: Path, request: Request) -> None:
    """RequestError for an .mp4 of one frame or a .png of several; unknown counts are left to the worker."""
    if request.frames is None:
        return
    suffix = ".png" if request.frames == 1 else ".mp4"
    if output.suffix.lower() != suffix:
        raise RequestError(f"{request.frames} frame(s) make a {suffix} file; the output is named {output.name}")


def changed(
    new: NewJob, what: dict[str, Any], how: dict[str, Any], files: dict[str, Any], stop_after: int | None
) -> NewJob:
    """The same job with other fields; a new folder takes the place of a named file."""
    result = replace(
        new,
        request=replace(new.request, **what),
        how=replace(new.how, **how),
        stop_after=stop_after if stop_after is not None else new.stop_after,
        **files,
    )
    if result.output is not None and result.output != new.output:
        check_places(result)
    return result


@contextmanager
def opened(talk: Talk | None = None) -> Iterator[tuple[Store, Talk]]:
    """The queue; what its opening has to tell is told, even to those who want no talk."""
    talk = talk or Talk()
    with open_store() as store:
        for note in store.notes:
            talk.insist(note)
        yield store, talk


def tell_added(store: Store, ids: Sequence[int], talk: Talk, *, json: bool) -> None:
    """What was queued: their numbers on stdout, or the jobs as JSON; the rest is talk."""
    jobs = [store.job(number) for number in (ids if json else ids[:1])]
    if json:
        print_json({"jobs": [job_json(job) for job in jobs]})
        return
    first = jobs[0]
    model = first.how.model if first.how is not None else ""
    seed = first.request.seed if first.request is not None and len(ids) == 1 else None
    details = f"model {model}" + ("" if seed is None else f", seed {seed}")
    talk.say(f"queued {named_jobs(ids)}, number {first.position} in line ({details}): {shortened(first.prompt)}")
    tell_idle(store, talk)
    talk.result(ranges_text(ids))


def tell_idle(store: Store, talk: Talk) -> None:
    """What keeps queued jobs waiting, if something does, and what helps."""
    if store.settings().queue != "active":
        talk.say("the queue is paused; go on: hvlite queue resume")
    elif not any_worker():
        talk.say(NO_WORKER)


def shortened(prompt: str, most: int = 80) -> str:
    """The beginning of a prompt, for a line of talk."""
    line = printable(" ".join(prompt.split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def named_jobs(numbers: Sequence[int]) -> str:
    """`job 3`, `jobs 3-5,9`."""
    return f"{'job' if len(numbers) == 1 else 'jobs'} {ranges_text(numbers)}"
