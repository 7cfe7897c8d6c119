"""What a user has set (tui.toml, only read) and what the terminal UI remembers by itself (tui.json).

theme = "ansi-light"            # at every start; without it, the one that `t` chose last
player = "mpv --loop"           # what `o` opens files with
notify = "desktop"              # what an ended queue or a failure does: "bell" (by default), "desktop", "off"
pictures = "kitty"              # how frames are drawn: "blocks" (by default); "kitty", "sixel" need the extra `images`
[keys]
"queue.cancel" = "ctrl+x"       # names are in the help
"""

import difflib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from textual.theme import BUILTIN_THEMES

from hvlite import paths
from hvlite.atomic import explained, replaced_file
from hvlite.errors import OutputError, ProfileError
from hvlite.tui.actions import keymap
from hvlite.tui.outside import command_of

REMEMBERED = 200
Drawing = Literal["blocks", "kitty", "sixel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuiSettings:
    """`keys` by the names of actions."""

    theme: str | None = None
    player: str | None = None
    notify: Literal["bell", "desktop", "off"] = "bell"
    pictures: Drawing = "blocks"
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The theme that was chosen last, prompts newest first, and forms by the names that they were kept under."""

    theme: str | None = None
    prompts: tuple[str, ...] = ()
    templates: dict[str, dict[str, str]] = field(default_factory=dict)

    def with_prompts(self, prompts: list[str]) -> "Memory":
        kept = dict.fromkeys([*reversed(prompts), *self.prompts])
        return replace(self, prompts=tuple(kept)[:REMEMBERED])

    def with_template(self, name: str, form: dict[str, str] | None) -> "Memory":
        """None drops it."""
        rest = {key: kept for key, kept in self.templates.items() if key != name}
        return replace(self, templates=rest if form is None else {**rest, name: form})


def read_settings(file: Path | None = None) -> TuiSettings:
    """ProfileError says what is wrong with the file; none at all is fine."""
    file = file or paths.tui_settings_file()
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TuiSettings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{file} cannot be read: {error}") from None
    unknown = sorted(set(values) - set(TuiSettings.__dataclass_fields__))
    if unknown:
        raise ProfileError(f"{file}: unknown key {unknown[0]!r}; known: theme, player, notify, pictures, [keys]")
    try:
        settings = msgspec.convert({**values, "keys": {}}, TuiSettings)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{file}: {error}") from None
    _check(settings, file)
    asked: Any = values.get("keys", {})
    if not isinstance(asked, dict):
        raise ProfileError(f"{file}: keys must be a table: [keys]")
    return replace(settings, keys=keymap(asked, file))


def _check(settings: TuiSettings, file: Path) -> None:
    """ProfileError for a theme that there is none of, and for a player that is no command."""
    if settings.theme is not None and settings.theme not in BUILTIN_THEMES:
        nearest = difflib.get_close_matches(settings.theme, BUILTIN_THEMES, n=1)
        hint = f" - did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(BUILTIN_THEMES)}"
        raise ProfileError(f"{file}: no theme {settings.theme!r}{hint}")
    if settings.player is not None:
        try:
            command_of(settings.player)
        except ProfileError as error:
            raise ProfileError(f"{file}: {error}") from None


def read_memory(file: Path | None = None) -> Memory:
    """What cannot be read is forgotten: nothing hangs on it."""
    try:
        return msgspec.json.decode((file or paths.tui_state_file()).read_bytes(), type=Memory)
    except (OSError, msgspec.MsgspecError):
        return Memory()


def write_memory(memory: Memory, file: Path | None = None) -> str | None:
    """None, or why it cannot be kept."""
    file = file or paths.tui_state_file()
    try:
        with explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as temporary, explained(file):
            temporary.write_text(json.dumps(msgspec.to_builtins(memory), indent=1), encoding="utf-8")
    except OutputError as error:
        return str(error)
    return None


def change_memory(own: Memory, change: Callable[[Memory], Memory]) -> tuple[Memory, str | None]:
    """Change what the file holds now, to which other windows write too -> what is kept, and why not.

    Where it cannot be written, `own` is what goes on, in this window alone.
    """
    memory = change(read_memory())
    fault = write_memory(memory)
    return (memory, None) if fault is None else (change(own), fault)
