"""Other programs: the player that a finished clip is opened with."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from threading import Thread

from hvlite.errors import ProfileError

OPENERS = ("xdg-open", "wslview")


def command_of(player: str) -> list[str]:
    """The words of a command line; ProfileError where it is none."""
    try:
        words = shlex.split(player)
    except ValueError as error:
        raise ProfileError(f"player {player!r} is no command: {str(error).lower()}") from None
    if not words:
        raise ProfileError(f"player {player!r} names no program; leave it out for the desktop's own")
    return words


def play(file: Path, player: str | None) -> str | None:
    """Start the player and leave it alone; None, or why there is none."""
    try:
        command = _opener() if player is None else command_of(player)
    except ProfileError as error:
        return str(error)
    if command is None:
        return f"no desktop here to play it on; the file is {file} (y copies its path)"
    try:
        process = subprocess.Popen(
            [*command, str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    reap(process)
    return None


def reap(process: "subprocess.Popen[bytes]") -> None:
    """Wait in the background for a process that goes its own way, so that it leaves no zombie behind."""
    Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()


def _opener() -> list[str] | None:
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or shutil.which("wslview")):
        return None
    found = next((path for name in OPENERS if (path := shutil.which(name))), None)
    return None if found is None else [found]
