"""Settings under a name: keep the form's, take those that were kept, drop them."""

from collections.abc import Mapping
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option


class Templates(ModalScreen[tuple[str, str] | None]):
    """Answers with what to do (`keep`, `take` or `drop`) and a name."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "back"),
        Binding("delete,ctrl+d", "drop", "drop"),
        Binding("down", "app.focus_next", show=False),
    ]

    def __init__(self, templates: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__()
        self.templates = templates

    def compose(self) -> ComposeResult:
        with Vertical(id="templates"):
            yield Static("Keep the settings of this form under a name, or take such (enter)")
            yield Input(
                placeholder="a name: enter keeps the form's settings under it", id="template-name", compact=True
            )
            lines = [
                Option(_line(name, form), id=str(index)) for index, (name, form) in enumerate(self.templates.items())
            ]
            yield OptionList(*lines, id="template-list", markup=False, compact=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#template-list" if self.templates else "#template-name").focus()

    @on(Input.Submitted)
    def _keep(self, event: Input.Submitted) -> None:
        name = event.value.strip()
        if name:
            self.dismiss(("keep", name))

    @on(OptionList.OptionSelected)
    def _take(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(("take", list(self.templates)[event.option_index]))

    def action_drop(self) -> None:
        at = self.query_one(OptionList).highlighted
        if at is not None:
            self.dismiss(("drop", list(self.templates)[at]))


def _line(name: str, form: Mapping[str, str]) -> str:
    return f"{name}   {', '.join(f'{key} {value}' for key, value in form.items())}"
