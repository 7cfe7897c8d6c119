"""The commands below `hvlite queue` that change jobs, or the queue as a whole. See `cli` for the contract.

Each is one call to the store, which commits it before it is told; nearly all can be undone, and say so.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import Parameter

from hvlite.cli_flags import ModelFlags, RequestFlags, draw_seed, given_fields
from hvlite.cli_jobs import Ids, Json, Next, changed, named_jobs, opened, tell_added, tell_idle
from hvlite.cli_tables import ranges_text
from hvlite.errors import ExitCode, HvliteError, RequestError
from hvlite.jobs.asking import absolute, given_how
from hvlite.jobs.devices import any_worker
from hvlite.jobs.job import NewJob, Place, Spot, ids_of
from hvlite.progress import print_json, printable

# So many obstacles to an undo are told one by one.
TOLD = 5


def edit_command(
    ids: Ids,
    /,
    *,
    prompt: Annotated[str | None, Parameter(name="--prompt")] = None,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    save_path: Path | None = None,
    stop_after_step: int | None = None,
) -> int:
    """Change what waiting, failed or cancelled jobs ask for; only what is given changes.

    Parameters
    ----------
    prompt
        What to draw.
    output
        The file to write; it must not exist.
    save_path
        The folder for the file.
    stop_after_step
        Make a draft: stop after so many steps.
    """
    fields = given_fields(what or RequestFlags()) | ({} if prompt is None else {"prompt": prompt})
    given, files = given_how(how or ModelFlags()), _files(output, save_path)
    if not (fields or given or files or stop_after_step is not None):
        raise RequestError("nothing to change: name what changes, as in --steps 30")
    with opened() as (store, talk):
        numbers = store.numbers(ids_of(ids))
        if output is not None and len(numbers) > 1:
            raise RequestError(f"--output names one file, {ranges_text(numbers)} are {len(numbers)} jobs")
        store.edit(numbers, lambda new: changed(new, fields, given, files, stop_after_step))
        talk.say(f"changed {named_jobs(numbers)}; undo: hvlite queue undo")
        ended = [number for number in numbers if store.job(number).state != "queued"]
        if ended:
            talk.say(f"{named_jobs(ended)} will run again only by: hvlite queue retry {ranges_text(ended)}")
    return ExitCode.DONE


def _files(output: Path | None, save_path: Path | None) -> dict[str, Any]:
    """The fields of NewJob that change with a new place."""
    if output is not None and save_path is not None:
        raise RequestError("--output and --save-path both name a folder: give one of them")
    if output is not None:
        return {"output": absolute(output), "folder": absolute(output.parent)}
    return {} if save_path is None else {"output": None, "folder": absolute(save_path)}


def dup_command(
    ids: Ids,
    /,
    *,
    prompt: Annotated[str | None, Parameter(name="--prompt")] = None,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    new_seed: bool = False,
    first: Next = False,
    json: Json = False,
) -> int:
    """Queue the same again, with what is given changed; prints the new numbers.

    Parameters
    ----------
    prompt
        What to draw.
    new_seed
        Draw another seed for each.
    """
    fields = given_fields(what or RequestFlags()) | ({} if prompt is None else {"prompt": prompt})
    given = given_how(how or ModelFlags())
    if new_seed and "seed" in fields:
        raise RequestError("--seed and --new-seed both choose a seed: give one of them")

    def change(new: NewJob) -> NewJob:
        return changed(new, fields | ({"seed": draw_seed()} if new_seed else {}), given, {}, None)

    with opened() as (store, talk):
        tell_added(store, store.duplicate(store.numbers(ids_of(ids)), change, first=first), talk, json=json)
    return ExitCode.DONE


def mv_command(
    ids: Ids,
    /,
    *,
    top: bool = False,
    bottom: bool = False,
    up: bool = False,
    down: bool = False,
    before: int | None = None,
    after: int | None = None,
) -> int:
    """Move waiting jobs in the line, together and in their order.

    Parameters
    ----------
    top
        To the head of the line.
    bottom
        To its end.
    up
        One place ahead.
    down
        One place back.
    before
        Right before this job.
    after
        Right after this job.
    """
    asked: dict[Place, int | bool | None] = {
        **{"top": top, "bottom": bottom, "up": up, "down": down},
        **{"before": before, "after": after},
    }
    places: list[Place] = [place for place in get_args(Place) if asked[place] not in (None, False)]
    if len(places) != 1:
        raise RequestError("say where to: one of --top, --bottom, --up, --down, --before ID, --after ID")
    anchor = before if before is not None else after
    with opened() as (store, talk):
        numbers = store.numbers(ids_of(ids))
        store.move(numbers, Spot(places[0], anchor))
        talk.say(f"moved {named_jobs(numbers)}, now number {store.job(numbers[0]).position} in line")
    return ExitCode.DONE


def rm_command(ids: Ids, /) -> int:
    """Take jobs off the list, unless they run; their files stay."""
    with opened() as (store, talk):
        numbers = store.numbers(ids_of(ids))
        store.remove(numbers)
        talk.say(f"removed {named_jobs(numbers)}; undo: hvlite queue undo")
    return ExitCode.DONE


def cancel_command(ids: Ids, /) -> int:
    """Cancel jobs: waiting ones at once, a running one at the next block of its work."""
    with opened() as (store, talk):
        numbers = store.numbers(ids_of(ids))
        running = store.cancel(numbers)
        waiting = [number for number in numbers if number not in running]
        if waiting:
            talk.say(f"cancelled {named_jobs(waiting)}; undo: hvlite queue undo")
        if running and any_worker():
            talk.say(f"{named_jobs(running)} will stop at the next block; to go on from there: hvlite queue retry")
        elif running:
            talk.say(f"the worker of {named_jobs(running)} is gone; the next one cancels what it left: hvlite work")
    return ExitCode.DONE


def retry_command(
    ids: Annotated[list[str] | None, Parameter(help="Job numbers: 3, or 3-7, or 3,5-7.")] = None,
    /,
    *,
    failed: bool = False,
    from_start: bool = False,
    first: Next = False,
) -> int:
    """Queue failed and cancelled jobs again; they go on from their last checkpoint.

    Parameters
    ----------
    failed
        All that failed.
    from_start
        Forget the checkpoints.
    """
    if bool(ids) == failed:
        raise RequestError("name jobs, or say --failed for all that failed")
    with opened() as (store, talk):
        numbers = [job.id for job in store.page(("failed",))] if failed else store.numbers(ids_of(ids or []))
        if not numbers:
            raise RequestError("no job has failed")
        store.retry(sorted(numbers), first=first, anew=from_start)
        talk.say(f"queued {named_jobs(numbers)} again; undo: hvlite queue undo")
        tell_idle(store, talk)
    return ExitCode.DONE


def finish_command(ids: Ids, /, *, first: Next = False) -> int:
    """Have drafts rendered to their end: parked ones are queued again, waiting ones keep their place."""
    with opened() as (store, talk):
        numbers = store.numbers(ids_of(ids))
        store.finish(numbers, first=first)
        talk.say(f"{named_jobs(numbers)} will be rendered to the end; undo: hvlite queue undo")
        tell_idle(store, talk)
    return ExitCode.DONE


def clear_command(*, yes: bool = False) -> int:
    """Remove every waiting job; what runs, and what is over, stays.

    Parameters
    ----------
    yes
        Do not ask.
    """
    with opened() as (store, talk):
        waiting = store.counts()["queued"]
        if waiting and not yes:
            _ask(f"Remove {waiting} waiting {'job' if waiting == 1 else 'jobs'}?")
        cleared = store.clear()
        undo = "; undo: hvlite queue undo" if cleared else ""
        talk.say(f"removed {cleared} waiting {'job' if cleared == 1 else 'jobs'}{undo}")
    return ExitCode.DONE


def _ask(question: str) -> None:
    """RequestError unless somebody at a terminal says yes."""
    if not sys.stdin.isatty():
        raise RequestError("there is nobody to ask: add --yes")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RequestError("nothing was removed")


def undo_command() -> int:
    """Take back the last change to the queue, by whomever; again: the one before it."""
    with opened() as (store, talk):
        undone = store.undo()
    if undone.jobs:
        talk.say(f"`{undone.kind}` of {named_jobs(undone.jobs)} is undone")
    more = len(undone.obstacles) - TOLD
    told = [*undone.obstacles[:TOLD], *([f"and {more} more"] if more > 0 else [])]
    if not undone.jobs:
        raise HvliteError(f"`{undone.kind}` cannot be undone: {'; '.join(told)}")
    for obstacle in told:
        talk.insist(f"not undone: {obstacle}")
    return ExitCode.SOME_FAILED if undone.obstacles else ExitCode.DONE


def pause_command(*, now: bool = False) -> int:
    """Start no more jobs; what runs is finished first.

    Parameters
    ----------
    now
        Stop what runs at its next block and free the device; it goes on from there after `resume`.
    """
    with opened() as (store, talk):
        paused = store.pause(now=now).queue == "paused"
        running = "the running job stops at its next block" if now else "the running job is finished first"
        talk.say(f"the queue is paused{'' if paused else f'; {running}'}; go on: hvlite queue resume")
    return ExitCode.DONE


def resume_command() -> int:
    """Start jobs again."""
    with opened() as (store, talk):
        store.resume()
        waiting = store.counts()["queued"]
        talk.say(f"the queue is active: {waiting} waiting")
        if waiting:
            tell_idle(store, talk)
    return ExitCode.DONE


def settings_command(
    *,
    crash_limit: int | None = None,
    lost_limit: int | None = None,
    failure_limit: int | None = None,
    on_done: str | None = None,
    json: Json = False,
) -> int:
    """Show the settings of the queue, and change those that are given.

    Parameters
    ----------
    crash_limit
        Quarantine a job when its worker died or hung so often in a row without a new checkpoint (2).
    lost_limit
        Quarantine a job when worker and supervisor died so often in a row (8).
    failure_limit
        Pause the queue after so many failures in a row with one reason (3).
    on_done
        A command that the worker runs after every job, and when the queue is empty or pauses itself; '' removes it.
    """
    asked = {"crash_limit": crash_limit, "lost_limit": lost_limit, "failure_limit": failure_limit}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if on_done is not None:
        given["on_done"] = on_done or None
    with opened() as (store, _):
        settings = store.change_settings(**given) if given else store.settings()
    values = {name: getattr(settings, name) for name in settings.__slots__}
    if json:
        print_json(values)
        return ExitCode.DONE
    for name, value in values.items():
        print(f"{name:14} {'-' if value is None else printable(str(value))}")
    return ExitCode.DONE
