"""What every screen has around its own part: tabs and totals above, the device and the keys below."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import Static

from hvlite.jobs.job import State
from hvlite.tui import words, workers
from hvlite.tui.desk import FORECAST, View, Wanted
from hvlite.tui.pausing import pause_words

if TYPE_CHECKING:
    from hvlite.tui.app import HvliteApp

TABS = (("queue", "1 Queue"), ("compose", "2 Compose"), ("gallery", "3 Gallery"))


class MainScreen(Screen[None]):
    """One of the screens that the tabs show: it says what it wants to see of the queue, and shows it."""

    @property
    def marks(self) -> int:
        """How many jobs are marked."""
        return 0

    @property
    def hvlite(self) -> "HvliteApp":
        return self.app  # type: ignore[return-value]

    def wanted(self) -> Wanted:
        """Totals only, where a screen shows no jobs."""
        return Wanted(states=())

    def show(self, view: View) -> None:
        raise NotImplementedError

    def ids_text(self) -> str:
        """The chosen jobs as a command line names them."""
        return "ID"


class Tab(Static):
    """Shows a screen when it is clicked."""

    def __init__(self, name: str, label: str) -> None:
        super().__init__(label, classes="tab", id=f"tab-{name}", markup=False)
        self.target = name

    def on_click(self, event: events.Click) -> None:
        event.stop()
        screen = self.screen
        if isinstance(screen, MainScreen):
            screen.hvlite.go(self.target)


class Top(Horizontal):
    """Tabs, and how the queue stands."""

    def __init__(self, current: str) -> None:
        super().__init__()
        self.current = current
        self.said = ""

    def compose(self) -> ComposeResult:
        for name, label in TABS:
            tab = Tab(name, label)
            tab.set_class(name == self.current, "-current")
            yield tab
        yield Static(id="totals")

    def show(self, view: View, served: int, marks: int) -> None:
        room = self.size.width - sum(len(label) + 2 for _, label in TABS) - 2
        text = totals(view, served, room, marks)
        if text != self.said:  # a line that is drawn again every second is felt over a slow connection
            self.said = text
            self.query_one("#totals", Static).update(Text(text, no_wrap=True, overflow="ellipsis"))


class Banner(Static):
    """One line that is there only while something has to be known."""

    said: tuple[str | None, bool] | None = None

    def show(self, text: str | None, *, alarming: bool = False) -> None:
        if self.said == (text, alarming):
            return
        self.said = text, alarming
        self.display = text is not None
        self.set_class(alarming, "-alarming")
        self.update(Text(text or "", overflow="ellipsis"))


def warning(view: View, held: Mapping[str, int], silent: Mapping[int, float]) -> tuple[str | None, bool]:
    """What has to be known, the worst first; and whether it is an alarm."""
    running = list(view.running)
    wrong = workers.worker_words(running, held, silent)
    if wrong is not None:
        return wrong, True
    if view.settings.queue != "active":
        return pause_words(view), False
    if view.counts["queued"] and not running and not held:
        return "no worker is running: W starts one, which goes on when this window is closed", False
    return None, False


def totals(view: View, served: int, room: int, marks: int = 0) -> str:
    """How many jobs there are, when the last waiting one is done, and whether anybody works: what there is room for.

    Marks first: the filter may hide those jobs, and actions take them all the same.
    """
    counts = [f"{view.counts[state]} {state}" for state in _worth_telling(view.counts)]
    rest = []
    if view.end is not None:
        more = "after " if view.counts["queued"] > FORECAST else ""
        rest.append(f"all done {more}{words.clock(view.end, view.at)}")
    working = {"active": "worker on" if served else "no worker", "draining": "pausing"}
    rest.append(working.get(view.settings.queue, "paused"))
    marked = [f"{marks} marked"] if marks else []
    while counts and len("  ".join([*marked, *counts, *rest])) > room:
        counts.pop()
    return "  ".join([*marked, *counts, *rest])


def _worth_telling(counts: Mapping[State, int]) -> list[State]:
    shown: tuple[State, ...] = ("running", "queued", "failed", "done")
    return [state for state in shown if counts[state] or state == "queued"]
