"""The page: one HTML file that works from disk. It holds its style and pictures, refers to clips, and runs no script.

Its policy allows nothing else: no request to a network, no style or script that a prompt could have brought in.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from xml.etree.ElementTree import Element

from hvlite.atomic import explained, new_file, replaced_file
from hvlite.errors import RequestError
from hvlite.jobs.job import STATES, State
from hvlite.report.entries import Entry
from hvlite.report.markup import element, html_of, link_to
from hvlite.report.pictures import frames_of, strip_of

MARK = "<!doctype html>\n<!-- made by hvlite report -->\n"
LOG_BYTES = 16 * 2**10
LOG_LINES = 40
MARKS: Mapping[State, str] = {
    "done": "\u2713",
    "failed": "\u2717",
    "cancelled": "\u2013",
    "parked": "\u2016",
    "queued": "\u2026",
    "running": "\u25b6",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a page is made of: clips in order, how many jobs are still to be done, what a reader must know of it all."""

    title: str
    entries: Sequence[Entry]
    waiting: int = 0
    remark: str | None = None


def write_report(path: Path, report: Report) -> Iterator[int]:
    """Write the page to `path`, in place of an older report but of no other file; yields how many clips are in it."""
    taking = replaced_file if is_report(path) else new_file
    with taking(path) as temporary, explained(path), temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(MARK + '<html lang="en">\n' + html_of(_head(report.title)) + "<body>\n")
        file.write(html_of(_summary(report)) + "<main>\n")
        for index, entry in enumerate(report.entries, 1):
            file.write(html_of(_card(index, entry, path.parent)))
            yield index
        file.write("</main>\n</body>\n</html>\n")


def is_report(path: Path) -> bool:
    """Whether an earlier report lies there: that may be replaced, other files are not touched."""
    try:
        with path.open("rb") as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def _head(title: str) -> Element:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    files = "'self' file:"
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data: {files}; media-src {files}; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"hvlite {version('hvlite')}"),
        element("title", title),
        element("style", style),
    )


def _summary(report: Report) -> Element:
    entries = report.entries
    counts = Counter(entry.state for entry in entries)
    badges = [
        element("li", f"{MARKS[state]} {counts[state]} {state}", class_=state) for state in STATES if counts[state]
    ]
    if report.waiting:
        badges.append(element("li", f"{MARKS['queued']} {report.waiting} still to be done", class_="queued"))
    seconds = sum(sum(entry.timings.values()) for entry in entries)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return element(
        "header",
        element("h1", report.title),
        element("ul", *badges, class_="states") if badges else element("p", "Nothing ended in this time."),
        element("p", f"{_duration(seconds)} of rendering", class_="quiet") if seconds else None,
        _troubles(entries),
        _table_of_kinds(entries),
        element("p", report.remark, class_="quiet") if report.remark else None,
        element("p", f"written {made} by hvlite {version('hvlite')}", class_="quiet"),
    )


def _troubles(entries: Sequence[Entry]) -> Element | None:
    """Each reason for which clips failed, with links to them."""
    places: dict[str, list[int]] = {}
    for index, entry in enumerate(entries, 1):
        if entry.state == "failed":
            places.setdefault(entry.reason or "failed", []).append(index)
    if not places:
        return None
    rows = []
    for reason, indices in places.items():
        links: list[Element | str] = []
        for index in indices:
            links += [" ", element("a", entries[index - 1].name, href=f"#clip-{index}")]
        rows.append(element("li", f"{reason}:", *links))
    return element("ul", *rows, class_="troubles")


def _table_of_kinds(entries: Sequence[Entry]) -> Element | None:
    """Clips that take about equally long: how many, how long a step and a whole clip took."""
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.timings:
            kinds.setdefault(entry.kind, []).append(entry)
    if not kinds:
        return None
    rows = []
    for kind, alike in kinds.items():
        steps = [entry.seconds_per_step for entry in alike if entry.seconds_per_step is not None]
        whole = [sum(entry.timings.values()) for entry in alike if entry.state == "done"]
        cells = (
            str(len(alike)),
            _seconds(median(steps)) if steps else "-",
            _duration(median(whole)) if whole else "-",
        )
        rows.append(element("tr", element("th", kind, scope="row"), *(element("td", cell) for cell in cells)))
    names = ("", "clips", "a step (median)", "a clip (median)")
    head = element("tr", *(element("th", name, scope="col") for name in names))
    return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")


def _card(index: int, entry: Entry, folder: Path) -> Element:
    state = element("span", f"{MARKS[entry.state]} {entry.state}", class_=f"state {entry.state}")
    when = None if entry.ended is None else element("span", _clock(entry.ended), class_="quiet")
    return element(
        "article",
        element("h2", element("a", entry.name, href=f"#clip-{index}"), " ", state, " ", when),
        element("p", entry.prompt, class_="prompt", dir="auto"),
        *_shown(entry, folder),
        *_failure(entry),
        _facts(entry),
        element("details", element("summary", "settings"), _list(entry.settings)) if entry.settings else None,
        id=f"clip-{index}",
    )


def _shown(entry: Entry, folder: Path) -> list[Element]:
    """The clip to play with some of its frames; the picture, if it is one; or the last preview."""
    if entry.clip is None:
        strip = None if entry.strip is None else strip_of(entry.strip)
        return [] if strip is None else [element("img", class_="strip", src=strip, alt="preview")]
    if not entry.clip.is_file():
        return [element("p", f"{entry.clip} is no longer there.", class_="error")]
    link = link_to(entry.clip, folder)
    file = element("p", element("a", str(entry.clip), href=link), class_="quiet")
    if entry.clip.suffix.lower() == ".png":
        return [element("img", class_="strip", src=link, alt="the picture", loading="lazy"), file]
    try:
        frames = frames_of(entry.clip)
    except RequestError as error:
        return [element("p", str(error), class_="error"), file]
    video = element("video", controls="", preload="none", src=link, poster=frames[0] if frames else None)
    pictures = [element("img", src=frame, alt=f"frame {number}") for number, frame in enumerate(frames, 1)]
    return [element("div", video, element("div", *pictures, class_="sheet"), class_="clip"), file]


def _failure(entry: Entry) -> list[Element]:
    """Why there is no clip, what the log said last, and what to do."""
    parts = [] if entry.error is None else [element("p", entry.error, class_="error")]
    if entry.error is None and entry.reason is not None:
        parts.append(element("p", entry.reason, class_="error"))
    tail = "" if entry.log is None else _tail(entry.log)
    if tail:
        summary = element("summary", f"the end of {entry.log}")
        parts.append(element("details", summary, element("pre", tail)))
    if entry.command is not None:
        parts.append(element("p", element("code", entry.command), class_="quiet"))
    return parts


def _facts(entry: Entry) -> Element | None:
    """Times and memory."""
    until = "" if entry.is_whole else " before the decode"
    rows = {}
    if entry.timings:
        parts = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in entry.timings.items())
        rows["time"] = f"{_duration(sum(entry.timings.values()))}{until} ({parts})"
    if entry.seconds_per_step is not None:
        rows["a step"] = _seconds(entry.seconds_per_step)
    if entry.began is not None and entry.ended is not None:
        rows["from, to"] = f"{_clock(entry.began)}, {_clock(entry.ended)}"
    predicted, peak = entry.predicted_bytes, entry.peak_bytes
    memory = [f"predicted {_gib(predicted)}"] if predicted else []
    if peak:
        change = f" ({peak / predicted - 1:+.1%})" if predicted and entry.is_whole else ""
        memory.append(f"peak {_gib(peak)}{until}{change}")
    if memory:
        rows["memory"] = ", ".join(memory)
    return _list(rows) if rows else None


def _list(rows: Mapping[str, str]) -> Element:
    pairs = [part for name, text in rows.items() for part in (element("dt", name), element("dd", text, dir="auto"))]
    return element("dl", *pairs)


def _tail(log: Path) -> str:
    """The last lines of a log; nothing where it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_BYTES))
            lines = file.read(LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    whole = lines if size <= LOG_BYTES else lines[1:]
    return "\n".join(whole[-LOG_LINES:])


def _clock(when: float) -> str:
    try:
        return datetime.fromtimestamp(when).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(when)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else _duration(seconds)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
