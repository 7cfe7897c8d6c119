"""`hvlite batch`: a file of prompts to the queue, all of it or nothing. See `cli` for the contract."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hvlite import paths
from hvlite.cli_flags import ModelFlags, OutputFlags, RequestFlags, draw_seed, given_fields
from hvlite.cli_jobs import Next, job_how, new_jobs, opened, tell_added
from hvlite.cli_tables import job_table, span
from hvlite.errors import ExitCode, RequestError
from hvlite.jobs.batch import Batch, parse_seeds, read_batch
from hvlite.jobs.eta import History
from hvlite.jobs.job import How, Job, NewJob, job_json
from hvlite.jobs.prompt_files import MOST_BYTES, BatchError, Format
from hvlite.jobs.store import open_store
from hvlite.progress import Talk, print_json
from hvlite.request import Request

PAST = 200
ROWS = 100
MOST_FAULTS = 50
WIDE = 200


def batch_command(
    file: Path,
    *,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    where: OutputFlags | None = None,
    form: Annotated[Format | None, Parameter(name="--format")] = None,
    seeds: str | None = None,
    stop_after_step: int | None = None,
    dry_run: bool = False,
    first: Next = False,
) -> int:
    """Queue every prompt of a file; where one line is wrong, none is queued.

    Parameters
    ----------
    file
        Prompts: .txt (a paragraph each), .csv with a header, .jsonl, .toml, or - for stdin. Flags say what it does not.
    form
        txt, lines (a prompt a line), csv, jsonl or toml (by default by the file's name, else by its content).
    seeds
        Seeds for prompts without one: 0,1,5-9, or 3x for three of them from --seed.
    stop_after_step
        Make drafts: stop after so many steps, and wait for `hvlite queue finish`.
    dry_run
        Show what would be queued, and queue nothing.
    """
    what, how, where = what or RequestFlags(), how or ModelFlags(), where or OutputFlags()
    talk = Talk(quiet=where.quiet)
    if where.output is not None or where.save_latents is not None:
        raise RequestError("--output and --save-latents name one file: use --save-path FOLDER, or a column `output`")
    defaults = given_fields(what)
    # the flags have their own words for what is wrong with them
    NewJob(request=Request("", **defaults), how=How(), folder=where.save_path, stop_after=stop_after_step)
    wanted = None if seeds is None else parse_seeds(seeds, defaults.get("seed", 0))
    defaults |= {} if stop_after_step is None else {"stop_after_step": stop_after_step}
    raw = _read(file)
    try:
        batch = read_batch(raw, name=file.name, form=form, defaults=defaults, seeds=wanted, draw=draw_seed)
    except BatchError as error:
        raise _told(error, file, talk) from None
    for note in batch.notes:
        talk.insist(note)
    clips = [entry.request for entry in batch.entries]
    outputs = [entry.output for entry in batch.entries]
    stops = [entry.stop_after for entry in batch.entries]
    jobs = new_jobs(clips, job_how(how, talk), where, stops, outputs)
    talk.say(f"read {file} as {batch.format}: {_count(batch.prompts, 'prompt')}, {_count(len(jobs), 'clip')}")
    if dry_run:
        return show_dry_run(batch, jobs, talk, json=where.json)
    with opened(talk) as (store, _):
        tell_added(store, store.add(jobs, first=first, kind="batch"), talk, json=where.json)
    return ExitCode.DONE


def _read(file: Path) -> bytes:
    try:
        if file == paths.STDIN:
            raw = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with file.open("rb") as stream:
                raw = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from None
    if len(raw) > MOST_BYTES:
        raise RequestError(f"{file} has more than {MOST_BYTES >> 20} MiB: split it")
    return raw


def _told(error: BatchError, file: Path, talk: Talk) -> RequestError:
    """A line for each fault, and the error for the end."""
    if len(error.faults) == 1:
        return RequestError(f"{file}, {error}. Nothing was queued")
    for fault in error.faults[:MOST_FAULTS]:
        talk.insist(f"{file}, {fault}")
    more = "" if len(error.faults) <= MOST_FAULTS else f", the first {MOST_FAULTS} of them are above"
    return RequestError(f"{file}: {len(error.faults)} faults{more}. Nothing was queued")


def past() -> History:
    """What the jobs that are done tell of times, as long as there is a queue that knows some."""
    if not paths.queue_file().exists():
        return History(())
    with open_store() as store:
        return History(store.page(("done",), limit=PAST))


def show_dry_run(batch: Batch, jobs: Sequence[NewJob], talk: Talk, *, json: bool) -> int:
    """What would be queued, what it would take here, and how long, by history or else by the plan."""
    from hvlite.cli_outlook import outlooks

    history, looks = past(), outlooks([job.request for job in jobs], jobs[0].how)
    learnt = [history.seconds(job.request, job.how, stop_after=job.stop_after) for job in jobs]
    planned = [look.seconds_of(job.stop_after) for job, look in zip(jobs, looks, strict=True)]
    seconds = [known if known is not None else guess for known, guess in zip(learnt, planned, strict=True)]
    known = [each for each in seconds if each is not None]
    total = sum(known) if len(known) == len(jobs) else None
    shown = [_as_job(new, index + 1) for index, new in enumerate(jobs)]
    if json:
        rows = [
            {
                "line": entry.line,
                **{key: job_json(job)[key] for key in ("model", "profile", "request", "output")},
                **{"seconds": each, "fits": look.plan.fits, "peak_bytes": look.plan.peak_bytes},
            }
            for entry, job, each, look in zip(batch.entries, shown, seconds, looks, strict=True)
        ]
        print_json({"jobs": rows, "seconds": total})
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
        for line in job_table(shown[:ROWS], {}, time.time(), width, without=("id", "state")):
            talk.result(line)
        if len(shown) > ROWS:
            talk.say(f"and {len(shown) - ROWS:,} more")
        for text, clips in Counter(look.text for look in looks).items():
            talk.say(f"{text} ({_count(clips, 'clip')})")
        took = "time unknown: no clips like these were made here yet" if total is None else f"about {span(total)}"
        if total is not None and None in learnt:
            took += " by the plan, decodes not counted"
        talk.say(f"{_count(len(jobs), 'job')}, {took}. Nothing was queued (--dry-run)")
    return ExitCode.DONE if all(look.plan.fits for look in looks) else ExitCode.DOES_NOT_FIT


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _as_job(new: NewJob, position: int) -> Job:
    """A job as it would be, to be shown."""
    return Job(
        id=position,
        state="queued",
        position=position,
        revision=0,
        request=new.request,
        how=new.how,
        folder=new.folder,
        output=new.output,
        stop_after=new.stop_after,
    )
