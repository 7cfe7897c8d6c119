"""A list of jobs of any length: only the rows on the screen are drawn, and only those around them are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from hvlite.jobs.job import Job
from hvlite.tui import words
from hvlite.tui.actions import bindings
from hvlite.tui.desk import PAGE, View

# Columns that are shown where they leave the prompt so much.
OPTIONAL = ("clip", "profile", "seed")
PROMPT_WIDTH = 20
# Rows before the first visible one that are read too.
AHEAD = 40
MARK = "\u25cf"


@dataclass(frozen=True, slots=True)
class Column:
    """`width` 0 takes what the others leave."""

    title: str
    width: int
    text: Callable[[Job, View], str]
    right: bool = False


def _when(job: Job, view: View) -> str:
    """The expected end of an open job, the end of an ended one."""
    now = view.at
    if job.finished is not None and job.state not in ("queued", "running"):
        return words.clock(job.finished, now)
    end = view.ends.get(job.id)
    return "" if end is None else words.clock(end, now)


def _progress(job: Job, view: View, width: int = 17) -> str:
    if asked := words.asked_text(job):
        return f"{asked} ..."
    share = words.fraction(job)
    text = words.progress_text(job)
    if share is None or len(text) > width - 4:
        return text
    return f"{text} {words.bar(share, width - len(text) - 1)}"


def _seed(job: Job, view: View) -> str:
    return "" if job.request is None else str(job.request.seed)


def _profile(job: Job, view: View) -> str:
    return "" if job.how is None else words.plain(job.how.profile or "auto")


COLUMNS: Mapping[str, Column] = {
    "id": Column("#", 5, lambda job, view: str(job.id), right=True),
    "state": Column("state", 11, lambda job, view: words.state_text(job)),
    "prompt": Column("prompt", 0, lambda job, view: words.plain(job.prompt) or "(no prompt)"),
    "clip": Column("size x frames", 13, lambda job, view: words.shape_text(job), right=True),
    "seed": Column("seed", 6, _seed, right=True),
    "profile": Column("profile", 7, _profile),
    "progress": Column("progress", 17, _progress),
    "when": Column("ready", 9, _when, right=True),
}


class JobTable(ScrollView, can_focus=True):
    """Shows a View; says which job is under the cursor, and which rows it would like to see next."""

    BINDINGS = bindings("table")
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        f"table--{name}" for name in ("head", "cursor", "marked", "faint", *words.SIGNS)
    }

    cursor: reactive[int] = reactive(0)

    class Chosen(Message):
        """Another job is under the cursor, or it has changed."""

        def __init__(self, job: Job | None) -> None:
            super().__init__()
            self.job = job

    class Moved(Message):
        """Other rows are to be seen than those that were read."""

    class Opened(Message):
        """A double click."""

    def __init__(self, view: View | None = None, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.view = view
        self.marked: dict[int, None] = {}
        self._rows: dict[int, Job] = {}
        self._told: Job | None = None

    # What is there.

    @property
    def job(self) -> Job | None:
        """Under the cursor."""
        return self._rows.get(self.cursor)

    @property
    def total(self) -> int:
        return 0 if self.view is None else self.view.total

    def chosen(self) -> list[int]:
        """The marked jobs, else the one under the cursor."""
        return list(self.marked) or ([] if self.job is None else [self.job.id])

    def running(self) -> Sequence[Job]:
        return () if self.view is None else self.view.running

    def start(self) -> int:
        """The first row to read."""
        return max(0, min(round(self.scroll_offset.y) - AHEAD, max(0, self.total - PAGE)))

    def show(self, view: View) -> None:
        """Draw `view`; the cursor stays on its job where that is still to be seen."""
        cursor = self._cursor_in(view)
        self.view = view
        self.marked = {job: None for job in self.marked if job not in view.gone}
        self._rows = {view.start + index: job for index, job in enumerate(view.jobs)}
        self.virtual_size = Size(self.size.width, view.total + 1)
        self.cursor = max(0, min(cursor, view.total - 1))
        self._keep_in_sight()
        self.refresh()
        self._tell()

    def _cursor_in(self, view: View) -> int:
        """Where the cursor is to be; a key that was pressed while the queue was read counts more than what was read."""
        if self.job is not None and view.wanted.follow != self.job.id:
            rows = (view.start + index for index, job in enumerate(view.jobs) if job.id == self.job.id)
            return next(rows, self.cursor)
        return self.cursor if self.job is None or view.followed is None else view.followed

    def mark_only(self, ids: Sequence[int]) -> None:
        self.marked = dict.fromkeys(ids)
        self.refresh()

    # Moving.

    def action_down(self) -> None:
        self._go(self.cursor + 1)

    def action_up(self) -> None:
        self._go(self.cursor - 1)

    def action_top(self) -> None:
        self._go(0)

    def action_bottom(self) -> None:
        self._go(self.total - 1)

    def action_page_down(self) -> None:
        self._go(self.cursor + max(1, self.size.height - 2))

    def action_page_up(self) -> None:
        self._go(self.cursor - max(1, self.size.height - 2))

    def action_mark(self) -> None:
        if self.job is not None:
            if self.job.id in self.marked:
                del self.marked[self.job.id]
            else:
                self.marked[self.job.id] = None
            self._go(self.cursor + 1)
            self.refresh()
            self.post_message(self.Chosen(self.job))

    def on_click(self, event: events.Click) -> None:
        row = event.y - 1 + round(self.scroll_offset.y)
        if 0 <= row < self.total and event.y > 0:
            self._go(row)
            if event.chain == 2:
                self.post_message(self.Opened())

    def _go(self, row: int) -> None:
        self.cursor = max(0, min(row, self.total - 1))
        self._keep_in_sight()
        self.refresh()
        self._tell()

    def _keep_in_sight(self) -> None:
        top, rows = round(self.scroll_offset.y), max(1, self.size.height - 1)
        # forced, since a list that was short has no bar yet by which it could be scrolled
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, immediate=True, force=True)
        elif self.cursor >= top + rows:
            self.scroll_to(y=self.cursor - rows + 1, animate=False, immediate=True, force=True)

    def _tell(self) -> None:
        if self.total and self.job is None:  # what stands beside the list stays until the row is read
            self.post_message(self.Moved())
        elif self.job is not self._told:
            self._told = self.job
            self.post_message(self.Chosen(self.job))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        rows = range(round(new_value), min(round(new_value) + self.size.height - 1, self.total))
        if rows and (rows[0] not in self._rows or rows[-1] not in self._rows):
            self.post_message(self.Moved())

    def on_resize(self) -> None:
        self.virtual_size = Size(self.size.width, self.total + 1)
        self._keep_in_sight()

    # Drawing.

    def columns(self, width: int) -> list[tuple[Column, int]]:
        """The columns that fit, each with its width; the prompt has the rest."""
        names = [name for name in COLUMNS if name not in OPTIONAL]
        room = width - 2 - sum(COLUMNS[name].width + 1 for name in names)
        for name in OPTIONAL:
            if room - COLUMNS[name].width - 1 < PROMPT_WIDTH:
                break
            names.append(name)
            room -= COLUMNS[name].width + 1
        return [(column, column.width or max(8, room)) for name, column in COLUMNS.items() if name in names]

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y == 0:
            return self._head(width)
        row = y - 1 + round(self.scroll_offset.y)
        if row >= self.total:
            return Strip.blank(width, self.rich_style)
        job = self._rows.get(row)
        if job is None:
            return Strip([Segment(set_cell_size("      ...", width), self._style("faint"))])
        return self._row(job, row == self.cursor, width)

    def _head(self, width: int) -> Strip:
        cells = [_cell(column.title, size, column.right) for column, size in self.columns(width)]
        return Strip([Segment(set_cell_size("  " + " ".join(cells), width), self._style("head"))])

    def _row(self, job: Job, at_cursor: bool, width: int) -> Strip:
        assert self.view is not None
        base = self._style("cursor") if at_cursor else self.rich_style
        is_reversed = base.reverse or (at_cursor and self.app.native_ansi_color)  # there a state's colour hides it
        is_marked = job.id in self.marked
        mark = Segment(f"{MARK if is_marked else ' '} ", _over(base, self._style("marked")))
        segments = [mark]
        for column, size in self.columns(width):
            text = _cell(column.text(job, self.view), size, column.right)
            name = job.state if column.title in ("state", "progress") else "faint" if column.title == "#" else None
            style = base if name is None or is_reversed else _over(base, self._style(name))
            segments += [Segment(text, style), Segment(" ", base)]
        return Strip(segments).adjust_cell_length(width, base).simplify()

    def _style(self, name: str) -> Style:
        return self.get_component_rich_style(f"table--{name}")


def _over(base: Style, above: Style) -> Style:
    """The colour and weight of `above` on the background of `base`."""
    return base + Style(color=above.color, bold=above.bold, dim=above.dim)


def _cell(text: str, width: int, right: bool) -> str:
    """Exactly `width` cells wide; what is cut off ends in three dots."""
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "\u2026"
    return text.rjust(width - cell_len(text) + len(text)) if right else set_cell_size(text, width)
