"""What is asked and shown in front of a screen: a question, a text to read."""

from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static


class Question(ModalScreen[bool]):
    """Yes or no; Enter takes what is marked, which is "no"."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q", "answer(False)", "no"),
    ]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self.question, self.yes = question, yes

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Static(Text(self.question))
            with Horizontal(id="answers"):
                yield Button(f"{self.yes} (y)", id="yes", variant="error", compact=True)
                yield Button("no (n)", id="no", variant="primary", compact=True)

    def on_mount(self) -> None:
        self.query_one("#no", Button).focus()

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")


class Reading(ModalScreen[None]):
    """A text over the whole screen; `again` reads it anew every second, and `w` wraps its lines."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter,question_mark", "close", "back"),
        Binding("w", "wrap", "wrap"),
        Binding("j,down", "move(1)", show=False),
        Binding("k,up", "move(-1)", show=False),
        Binding("pagedown,space", "move(15)", show=False),
        Binding("pageup", "move(-15)", show=False),
        Binding("g,home", "move(-100000)", show=False),
        Binding("G,end", "move(100000)", show=False),
    ]

    def __init__(self, title: str, text: Text, again: Callable[[], Text] | None = None) -> None:
        super().__init__()
        self.heading, self.text, self.again = title, text, again

    def compose(self) -> ComposeResult:
        with Vertical(id="reading"):
            yield Static(Text(f"{self.heading}   (esc: back, w: wrap)", style="bold"), id="reading-title")
            with VerticalScroll(id="reading-scroll"):
                yield Static(self.text, id="reading-text")

    def on_mount(self) -> None:
        self.query_one("#reading-scroll").focus()
        if self.again is not None:
            self.call_after_refresh(self.action_move, 100_000)
            self.set_interval(1.0, self._renew)

    def _renew(self) -> None:
        assert self.again is not None
        text = self.again()
        if text.plain == self.text.plain:
            return
        scroll = self.query_one("#reading-scroll", VerticalScroll)
        at_end = scroll.scroll_offset.y >= scroll.max_scroll_y
        text.no_wrap = self.text.no_wrap
        self.text = text
        self._draw()
        if at_end:
            self.call_after_refresh(self.action_move, 100_000)

    def _draw(self) -> None:
        self.query_one("#reading-text", Static).update(self.text)

    def action_wrap(self) -> None:
        self.text.no_wrap = not self.text.no_wrap
        self.set_class(bool(self.text.no_wrap), "-unwrapped")
        self._draw()

    def action_move(self, lines: int) -> None:
        self.query_one("#reading-scroll", VerticalScroll).scroll_relative(y=lines, animate=False)

    def action_close(self) -> None:
        self.dismiss(None)
