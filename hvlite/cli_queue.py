"""The commands below `hvlite queue`: jobs are listed, added, changed, taken back. See `cli` for the contract.

Each command is one call to the store, which commits it before it is told. Numbers on stdout are what the other commands
take: `3`, `3-7`, `3,5-7`.
"""

import difflib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from hvlite.cli_changes import (
    cancel_command,
    clear_command,
    dup_command,
    edit_command,
    finish_command,
    mv_command,
    pause_command,
    resume_command,
    retry_command,
    rm_command,
    settings_command,
    undo_command,
)
from hvlite.cli_flags import ModelFlags, OutputFlags, RequestFlags, clips_of, request_from
from hvlite.cli_jobs import Ids, Json, Next, job_how, new_jobs, opened, tell_added
from hvlite.cli_tables import job_details, job_table, queue_lines
from hvlite.errors import ExitCode, RequestError
from hvlite.jobs.devices import any_worker
from hvlite.jobs.eta import History, finish_times, queue_end
from hvlite.jobs.job import ENDED, OPEN, Job, State, ids_of, job_json
from hvlite.jobs.store import Store
from hvlite.progress import Talk, print_json

queue = App(
    name="queue",
    help="The queue: clips to be rendered, in order. Alone: list it.",
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)

# Enough of the past for medians.
PAST = 200
ROWS = 100
WIDE = 200
WATCH_SECONDS = 0.5
# Times move on even where nothing is written.
REDRAW_SECONDS = 15.0


@queue.default
@queue.command(name="ls")
def ls_command(
    *words: Annotated[str, Parameter(show=False)],
    everything: Annotated[bool, Parameter(name=["--all", "-a"])] = False,
    state: list[State] | None = None,
    limit: int = ROWS,
    json: Json = False,
    watch: bool = False,
) -> int:
    """List what runs and waits, and when it will be done.

    Parameters
    ----------
    everything
        Also what is done, failed or cancelled.
    state
        Only jobs of this state; may be given several times.
    limit
        Show at most so many jobs; 0 shows all (--json always does).
    watch
        Show it again whenever it changes, until Ctrl+C.
    """
    if words:
        raise RequestError(f"there is no `hvlite queue {words[0]}`{_nearest_command(words[0])}")
    states = tuple(state) if state else (*OPEN, *ENDED) if everything else OPEN
    if limit < 0:
        raise RequestError(f"--limit must be 0 or more; got {limit}")
    with opened() as (store, talk):
        if watch:
            return _watch(store, states, limit, json)
        if json:
            _print_json(store, states)
        else:
            _print_table(store, states, limit, talk)
    return ExitCode.DONE


def _nearest_command(word: str) -> str:
    names = [name for name in queue if not name.startswith("-")]
    nearest = difflib.get_close_matches(word, names, n=1)
    return f": did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(sorted(names))}"


def _view(store: Store, states: Sequence[State]) -> tuple[list[Job], dict[int, float | None], float]:
    """The jobs to show, when each will be done, and now."""
    now = time.time()
    history = History(store.page(("done",), limit=PAST))
    jobs = store.page(tuple(dict.fromkeys(("running", "queued", *states))))
    running, queued = ([job for job in jobs if job.state == state] for state in ("running", "queued"))
    shown = [job for state in states for job in jobs if job.state == state]
    is_active = store.settings().queue == "active"
    return shown, finish_times(running, queued, history, now, is_active=is_active), now


def _table(store: Store, states: Sequence[State], limit: int, width: int) -> tuple[list[str], list[str]]:
    """The table, and what stands below it."""
    jobs, ends, now = _view(store, states)
    shown = jobs[:limit] if limit else jobs
    below = queue_lines(store.settings(), store.counts(), queue_end(ends), now, is_served=any_worker())
    if len(shown) < len(jobs):
        below.insert(0, f"and {len(jobs) - len(shown):,} more: --limit 0")
    return job_table(shown, ends, now, width) if shown else [], below


def _print_table(store: Store, states: Sequence[State], limit: int, talk: Talk) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    table, below = _table(store, states, limit, width)
    for line in table:
        talk.result(line)
    for line in below:
        talk.say(line)


def _print_json(store: Store, states: Sequence[State]) -> None:
    jobs, ends, _ = _view(store, states)
    settings = store.settings()
    print_json(
        {
            "jobs": [{**job_json(job), "eta": ends.get(job.id)} for job in jobs],
            "queue": {
                "state": settings.queue,
                "reason": settings.pause_reason,
                "counts": store.counts(),
                "eta": queue_end(ends),
            },
        }
    )


def _watch(store: Store, states: Sequence[State], limit: int, json: bool) -> int:
    """Show the queue at every change, until Ctrl+C; on a terminal in one place, elsewhere one after the other."""
    try:
        if json or not sys.stdout.isatty():
            for _ in _changes(store):
                _print_json(store, states) if json else _print_table(store, states, limit, Talk())
            return ExitCode.DONE
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, screen=True) as live:
            for _ in _changes(store):
                size = shutil.get_terminal_size()
                most = min(limit or size.lines, max(1, size.lines - 6))
                table, below = _table(store, states, most, size.columns)
                live.update(Text("\n".join([*table, "", *below, "Ctrl+C ends"]), no_wrap=True), refresh=True)
    except KeyboardInterrupt:
        pass
    return ExitCode.DONE


def _changes(store: Store) -> Iterator[None]:
    """Now, at every change by another process, and every now and then."""
    while True:
        version, shown = store.data_version(), time.monotonic()
        yield
        while store.data_version() == version and time.monotonic() - shown < REDRAW_SECONDS:
            time.sleep(WATCH_SECONDS)


@queue.command(name="show")
def show_command(ids: Ids, /, *, json: Json = False) -> int:
    """Show everything that is known of some jobs."""
    with opened() as (store, _):
        jobs = [store.job(number) for number in store.numbers(ids_of(ids))]
        _, ends, now = _view(store, ())
    if json:
        print_json({"jobs": [{**job_json(job), "eta": ends.get(job.id)} for job in jobs]})
        return ExitCode.DONE
    for index, job in enumerate(jobs):
        for line in [*([""] if index else []), *job_details(job, ends.get(job.id), now)]:
            print(line)
    return ExitCode.DONE


@queue.command(name="add")
def add_command(
    prompt: str | None = None,
    *,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    where: OutputFlags | None = None,
    like: Path | None = None,
    num_videos: int = 1,
    stop_after_step: int | None = None,
    first: Next = False,
) -> int:
    """Queue a clip; prints its number.

    Parameters
    ----------
    prompt
        What to draw.
    like
        Take every setting from this file's metadata; flags given beside it win.
    num_videos
        Clips with seeds seed, seed+1, ...
    stop_after_step
        Make a draft: stop after so many steps, and wait for `hvlite queue finish`.
    """
    what, how, where = what or RequestFlags(), how or ModelFlags(), where or OutputFlags()
    talk = Talk(quiet=where.quiet)
    request, made = request_from(prompt, what, like)
    clips = clips_of(request, num_videos, where)
    stops = [stop_after_step] * len(clips)
    jobs = new_jobs(clips, job_how(how, talk, made.model if made else None), where, stops)
    with opened(talk) as (store, _):
        tell_added(store, store.add(jobs, first=first), talk, json=where.json)
    return ExitCode.DONE


queue.command(edit_command, name="edit")
queue.command(dup_command, name="dup")
queue.command(mv_command, name="mv")
queue.command(rm_command, name="rm")
queue.command(cancel_command, name="cancel")
queue.command(retry_command, name="retry")
queue.command(finish_command, name="finish")
queue.command(clear_command, name="clear")
queue.command(undo_command, name="undo")
queue.command(pause_command, name="pause")
queue.command(resume_command, name="resume")
queue.command(settings_command, name="settings")
