"""`hvlite report`: one page about the clips of a night. See `cli` for the contract."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from hvlite import paths
from hvlite.atomic import check_new, free_path
from hvlite.errors import ExitCode, RequestError
from hvlite.events import Note
from hvlite.progress import Talk, interruptible

if TYPE_CHECKING:
    from hvlite.report.page import Report

NIGHT = "24h"
OF_FILES = "What files say of themselves: times and peaks of memory are those before the decode."
AGE = re.compile(r"(\d{1,6})([mhdw])")
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
CLOCK = re.compile(r"(\d{1,2}):(\d{2})")


def report(
    *,
    since: str | None = None,
    folder: Path | None = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
) -> int:
    """Write one HTML page about the clips that ended: pictures, settings, times, memory, failures.

    It needs no network and no program but a browser. Beside or above the clips it can be moved together with them.

    Parameters
    ----------
    since
        90m, 24h, 3d, 2w, a time of day (22:00), a date (2026-11-25), a date with a time, or `all`. By default 24h of
        the queue, all of a folder.
    folder
        Report on the clips that lie in this folder, by their own metadata, instead of the queue's jobs.
    output
        The page; an older report there is replaced, any other file is not. By default a new file in the folder of the
        clips, or here.
    """
    talk = Talk()
    with interruptible(talk):
        from hvlite.report.page import write_report

        moment = since_of(since or (NIGHT if folder is None else "all"), datetime.now().astimezone())
        page = output or free_path(folder or Path(), f"report-{datetime.now():%Y%m%d-%H%M%S}", ".html")
        _check_page(page)
        found = _of_queue(moment, talk) if folder is None else _of_folder(folder, moment, talk)
        for done in write_report(page, found):
            talk.advance("report", done, len(found.entries), found.entries[done - 1].name)
    talk.result(str(page))
    return ExitCode.DONE


def since_of(text: str, now: datetime) -> datetime | None:
    """The moment that `text` means; None for `all`. RequestError if it means none."""
    if text == "all":
        return None
    try:
        if age := AGE.fullmatch(text):
            return now - timedelta(**{UNITS[age[2]]: int(age[1])})
        if clock := CLOCK.fullmatch(text):
            today = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
            return today if today <= now else today - timedelta(days=1)
        given = datetime.fromisoformat(text)
        return given if given.tzinfo else given.astimezone()
    except (ValueError, OverflowError):
        raise RequestError(
            f"--since {text!r} is no time: use 24h, 90m, 3d, 22:00, 2026-11-25, 2026-11-25T22:00, or all"
        ) from None


def _check_page(page: Path) -> None:
    """Refuse now what could not be written later."""
    from hvlite.report.page import is_report

    if not is_report(page):
        check_new(page)


def _of_folder(folder: Path, since: datetime | None, talk: Talk) -> "Report":
    from hvlite.report.entries import Entry, entries_of_folder
    from hvlite.report.page import Report

    found: list[Entry] = []
    for each in entries_of_folder(folder, _seconds(since)):
        if isinstance(each, Note):
            talk.event(each)
        else:
            found.append(each)
    if not found:
        raise RequestError(f"{folder} holds no clip that hvlite made{_words(since)}")
    title = f"hvlite: clips in {folder.resolve().name}{_words(since)}"
    return Report(title=title, entries=found, remark=OF_FILES)


def _words(since: datetime | None) -> str:
    return "" if since is None else f" since {since:%Y-%m-%d %H:%M}"


def _seconds(since: datetime | None) -> float | None:
    return None if since is None else since.timestamp()


def _of_queue(since: datetime | None, talk: Talk) -> "Report":
    from hvlite.jobs.job import ENDED
    from hvlite.jobs.store import open_store
    from hvlite.report.entries import entries_of_jobs
    from hvlite.report.page import Report

    if not paths.queue_file().exists():
        raise RequestError(f"there is no queue at {paths.queue_file()}; for a folder of clips: --folder FOLDER")
    with open_store() as store:
        for note in store.notes:
            talk.say(note)
        counts = store.counts()
        jobs = store.page((*ENDED, "parked"))
    entries = entries_of_jobs(jobs, _seconds(since))
    return Report(
        title=f"hvlite: the queue{_words(since)}", entries=entries, waiting=counts["queued"] + counts["running"]
    )
