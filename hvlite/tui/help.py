"""The help of a screen, from the table of actions."""

from collections.abc import Mapping

from rich.text import Text

from hvlite.tui.actions import NO_KEY, actions_of

SIGNS = {
    "question_mark": "?",
    "slash": "/",
    "colon": ":",
    "escape": "esc",
    "delete": "del",
    "pagedown": "pgdn",
    "pageup": "pgup",
    NO_KEY: "-",
}
PARTS = {
    "queue": (("The queue", "queue"), ("The list", "table"), ("Everywhere", "app")),
    "compose": (("Write a prompt", "compose"), ("Everywhere (outside of a field)", "app")),
    "gallery": (("Finished clips", "gallery"), ("The list", "table"), ("Everywhere", "app")),
}
MORE = """\
Actions take the marked jobs, else the one under the cursor. To select text with the mouse, hold Shift.
The worker is a process of its own: closing this window, or losing the connection, changes nothing.
Other keys: in tui.toml in your HVLITE_HOME, as  [keys]  "queue.cancel" = "ctrl+x"  (names are on the right)."""


def help_text(screen: str, keys: Mapping[str, str]) -> Text:
    """`keys` are those that the user has given."""
    text = Text()
    for title, part in PARTS[screen]:
        text.append(f"{title}\n", "bold underline")
        for action in actions_of(part):
            shown = " ".join(_sign(key) for key in keys.get(action.name, action.keys).split(","))
            text.append(f"  {shown:16}", "bold")
            text.append(f" {action.help:62}")
            text.append(f" {action.name}\n", "dim")
        text.append("\n")
    text.append(MORE)
    return text


def _sign(key: str) -> str:
    return SIGNS.get(key, key)
