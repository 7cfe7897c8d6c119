"""From flags to jobs: complete, with absolute paths, and checked now, since nobody watches when they run.

Also what all commands of the queue share: job numbers as they are typed, the opened store, and what is said of jobs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os.path import lexists
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hvlite.atomic import check_new
from hvlite.cli_flags import ModelFlags, OutputFlags, model_name
from hvlite.cli_tables import NO_WORKER, ranges_text
from hvlite.errors import OutputError
from hvlite.jobs.asking import absolute, given_how, known_model
from hvlite.jobs.devices import any_worker
from hvlite.jobs.job import How, NewJob, check_suffix, job_json
from hvlite.jobs.store import Store, open_store
from hvlite.progress import Talk, print_json, printable
from hvlite.request import Request

if TYPE_CHECKING:
    from hvlite.metadata import ModelMade

Ids = Annotated[list[str], Parameter(help="Job numbers: 3, or 3-7, or 3,5-7.")]
Next = Annotated[bool, Parameter(name="--next", help="Put it at the head of the line.")]
Json = Annotated[bool, Parameter(name="--json", help="One object on stdout.")]
# Of so many new jobs the seeds are named.
SEEDS_TOLD = 8


def job_how(flags: ModelFlags, talk: Talk, made_with: "ModelMade | None" = None) -> How:
    """With which weights and where, for a new job: the model is always named."""
    return How(**{**given_how(flags), "model": known_model(model_name(flags, talk, made_with))})


def new_jobs(
    clips: Sequence[Request],
    how: How,
    where: OutputFlags,
    stops: Sequence[int | None],
    outputs: Sequence[str | None] = (),
) -> list[NewJob]:
    """A job for each clip; what could not be written is refused now. `outputs` are names in the output folder.

    `stops` are the steps after which the clips are parked, as drafts.
    """
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
            stop_after=stops[index],
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
    if result.output is not None:
        check_suffix(result.output, result.request)
        if result.output != new.output:
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
    jobs = [store.job(number) for number in (ids if json else ids[:SEEDS_TOLD])]
    if json:
        print_json({"jobs": [job_json(job) for job in jobs]})
        return
    first = jobs[0]
    model = first.how.model if first.how is not None else ""
    seeds = list(dict.fromkeys(str(job.request.seed) for job in jobs if job.request is not None))
    more = ", ..." if len(ids) > len(jobs) else ""
    details = f"model {model}, seed{'s' * (len(seeds) > 1 or bool(more))} {', '.join(seeds)}{more}"
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
