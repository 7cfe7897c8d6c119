"""Every action of the terminal UI, once: its key, its words, and the command that does the same without it.

Footer, help and command palette are made from this table; `[keys]` in tui.toml gives an action other keys by its name.
The part of a name before the dot is the screen, the part behind it the method `action_...` that does it.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from textual.binding import Binding, BindingType
from textual.keys import KEY_NAME_REPLACEMENTS, Keys, key_to_character

from hvlite.errors import ProfileError


@dataclass(frozen=True, slots=True)
class Action:
    """`label` is for the footer, which shows it if `shown`; `cli` may name {id}, the chosen jobs."""

    name: str
    keys: str
    label: str
    help: str
    cli: str = ""
    shown: bool = False

    @property
    def screen(self) -> str:
        return self.name.partition(".")[0]

    @property
    def method(self) -> str:
        return self.name.partition(".")[2]


ACTIONS = (
    # Everywhere.
    Action("app.queue", "1", "queue", "the queue", "hvlite queue ls"),
    Action("app.compose", "2", "compose", "write a prompt", "hvlite queue add PROMPT"),
    Action("app.gallery", "3", "gallery", "finished clips", "hvlite queue ls --state done"),
    Action("app.undo", "u", "undo", "take back the last change to the queue", "hvlite queue undo"),
    Action(
        "app.pause", "p", "pause", "start nothing after the running job; again: go on", "hvlite queue pause", shown=True
    ),
    Action("app.pause_now", "P", "pause now", "stop the running job too, it goes on later", "hvlite queue pause --now"),
    Action(
        "app.worker",
        "W",
        "worker",
        "start the worker; if one is there: have it save and end",
        "hvlite work",
        shown=True,
    ),
    Action("app.theme", "t", "theme", "the next theme: dark, light, your terminal's colours"),
    Action("app.palette", "colon,ctrl+p", "commands", "find an action by its name"),
    Action("app.help", "question_mark", "help", "the keys of this screen", "hvlite --help", shown=True),
    Action("app.leave", "q", "quit", "close this window (also ctrl+q); the worker goes on", shown=True),
    # A list of jobs.
    Action("table.down", "j,down", "down", "next job"),
    Action("table.up", "k,up", "up", "job before"),
    Action("table.top", "g,home", "first", "first job"),
    Action("table.bottom", "G,end", "last", "last job"),
    Action("table.page_down", "pagedown,ctrl+f", "page down", "a page on"),
    Action("table.page_up", "pageup,ctrl+b", "page up", "a page back"),
    Action("table.mark", "space", "mark", "mark a job: actions then take all marked ones"),
    # The queue.
    Action("queue.new", "n", "new", "write a prompt", "hvlite queue add PROMPT", shown=True),
    Action("queue.edit", "e", "edit", "change a waiting job", "hvlite queue edit {id}", shown=True),
    Action("queue.duplicate", "d", "duplicate", "queue the same again", "hvlite queue dup {id}"),
    Action("queue.new_seed", "s", "new seed", "queue it again with another seed", "hvlite queue dup {id} --new-seed"),
    Action("queue.retry", "r", "retry", "queue a failed or cancelled job again", "hvlite queue retry {id}", shown=True),
    Action("queue.finish", "f", "finish", "render a draft to its end", "hvlite queue finish {id}", shown=True),
    Action("queue.move_up", "K,shift+up", "up", "earlier in line", "hvlite queue mv {id} --up"),
    Action("queue.move_down", "J,shift+down", "down", "later in line", "hvlite queue mv {id} --down"),
    Action("queue.move_top", "T", "to top", "next in line", "hvlite queue mv {id} --top", shown=True),
    Action("queue.move_bottom", "B", "to bottom", "last in line", "hvlite queue mv {id} --bottom"),
    Action(
        "queue.cancel",
        "x,delete",
        "cancel",
        "cancel a running or waiting job; an ended one: off the list",
        "hvlite queue cancel {id}",
        shown=True,
    ),
    Action("queue.clear", "C", "clear", "remove all waiting jobs, after a question", "hvlite queue clear"),
    Action("queue.filter", "slash", "filter", "show jobs with these words only", shown=True),
    Action("queue.mark_all", "ctrl+a", "mark all", "mark all that the filter shows"),
    Action("queue.back", "escape", "back", "clear the marks, then the filter"),
    Action("queue.whole", "enter", "details", "everything about a job", "hvlite queue show {id}"),
    Action("queue.log", "l", "log", "the whole log; w wraps its lines"),
    Action("queue.open", "o", "open", "play the finished file", shown=True),
    Action("queue.copy_path", "y", "copy path", "the file's path to your clipboard"),
    Action("queue.copy_command", "Y", "copy command", "the command that renders the same, to your clipboard"),
    # The composer.
    Action("compose.add", "ctrl+s", "add", "queue it, at the end of the line", "hvlite queue add PROMPT", shown=True),
    Action("compose.add_next", "ctrl+n", "add next", "queue it first", "hvlite queue add PROMPT --next", shown=True),
    Action("compose.earlier", "ctrl+up", "earlier", "the prompt before, of those you have queued", shown=True),
    Action("compose.later", "ctrl+down", "later", "the prompt after"),
    Action("compose.template", "ctrl+t", "template", "keep these settings under a name, or take such", shown=True),
    Action("compose.reset", "ctrl+r", "reset", "empty the form"),
    Action("compose.help", "f1", "help", "the keys of this screen (? outside of a field)", shown=True),
    Action("compose.back", "escape", "queue", "back to the queue; what you wrote stays", shown=True),
    # The gallery.
    Action("gallery.open", "o", "play", "play the file", shown=True),
    Action("gallery.reuse", "e", "reuse", "a new clip with these settings", "hvlite gen --like FILE", shown=True),
    Action("gallery.new_seed", "s", "new seed", "queue it again with another seed", "hvlite queue dup {id} --new-seed"),
    Action("gallery.finish", "f", "finish", "render a draft to its end", "hvlite queue finish {id}", shown=True),
    Action("gallery.remove", "x,delete", "remove", "off the list; the file stays; u brings it back"),
    Action("gallery.whole", "enter", "settings", "everything about a clip", "hvlite info FILE", shown=True),
    Action("gallery.filter", "slash", "filter", "show clips with these words only", shown=True),
    Action("gallery.mark_all", "ctrl+a", "mark all", "mark all that the filter shows"),
    Action("gallery.back", "escape", "back", "clear the marks, then the filter, then to the queue"),
    Action("gallery.copy_path", "y", "copy path", "the file's path to your clipboard"),
    Action("gallery.copy_command", "Y", "copy command", "the command that renders the same, to your clipboard"),
)
NAMES = [action.name for action in ACTIONS]
# For an action that its user has taken all keys from; it stays in the palette.
NO_KEY = "f24"
MODIFIERS = {"alt", "ctrl", "hyper", "meta", "shift", "super"}
KEYS = {key.value for key in Keys} | set(KEY_NAME_REPLACEMENTS.values())


def actions_of(*screens: str) -> list[Action]:
    return [action for action in ACTIONS if action.screen in screens]


def bindings(screen: str) -> list[BindingType]:
    """As textual takes them; the name is what a keymap calls them. In the composer they go before those of a field."""
    return [
        Binding(
            action.keys,
            action.method,
            action.label,
            show=action.shown,
            tooltip=action.help,
            id=action.name,
            priority=screen == "compose",
        )
        for action in actions_of(screen)
    ]


def keymap(asked: Mapping[str, object], source: object) -> dict[str, str]:
    """Keys by the names of actions, from a settings file; ProfileError where it names none, or means two by one key.

    A key that the user gives to an action is taken from those that have it on the same screen.
    """
    for name, keys in asked.items():
        if name not in NAMES:
            nearest = difflib.get_close_matches(name, NAMES, n=1)
            hint = f" - did you mean {nearest[0]!r}?" if nearest else ""
            raise ProfileError(f"{source}: [keys] names no action of the terminal UI with {name!r}{hint}")
        if not isinstance(keys, str) or not _keys(keys):
            raise ProfileError(f'{source}: keys.{name} must be keys as in "x,delete"; got {keys!r}')
        if unknown := [key for key in _keys(keys) if not _is_key(key)]:
            raise ProfileError(
                f"{source}: keys.{name}: {unknown[0]!r} is no key, as are x, ctrl+x, shift+up, f5, pageup"
            )
    given = {name: _keys(str(keys)) for name, keys in asked.items()}
    for name, keys in given.items():
        for other in given:
            shared = sorted(set(keys) & set(given[other]))
            if other != name and _meet(name, other) and shared:
                raise ProfileError(f"{source}: [keys] gives {shared[0]!r} to both {name} and {other}")
    return {name: ",".join(keys) for name, keys in (_left_to_others(given) | given).items()}


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def _is_key(text: str) -> bool:
    """As textual calls it: modifiers, then one sign, its Unicode name, or a key that has none."""
    *modifiers, key = text.split("+") if len(text) > 1 else [text]
    named = len(key) == 1 or key in KEYS or key_to_character(key) is not None
    return named and set(modifiers) <= MODIFIERS and len(set(modifiers)) == len(modifiers)


def _meet(name: str, other: str) -> bool:
    """Whether both are on one screen; a list is part of the queue's and of the gallery's."""
    parts = {name.partition(".")[0], other.partition(".")[0]}
    return len(parts) == 1 or "app" in parts or ("table" in parts and "compose" not in parts)


def _left_to_others(given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The keys of the actions that lose some; one that loses all gets a key that no keyboard has."""
    left = {}
    for action in ACTIONS:
        taken = {key for name, keys in given.items() if _meet(name, action.name) for key in keys}
        own = _keys(action.keys)
        kept = [key for key in own if key not in taken]
        if action.name not in given and kept != own:
            left[action.name] = kept or [NO_KEY]
    return left
