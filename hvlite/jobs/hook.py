"""The command that a user wants run when something is done: notifications, copies, the next program of the night.

It gets JSON on stdin and words in its environment, never text of ours in its command line. What it does is its own
affair: nobody waits for it while there is work, and its failure is a note.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

# What a last command gets before it is left to itself.
LAST_SECONDS = 60.0
WORDS = ("id", "output", "error")


class Hook:
    """Runs `command`, if there is one, by the shell; its output goes to stderr."""

    def __init__(self, command: str | None) -> None:
        self.command = command
        self._running: list[subprocess.Popen[bytes]] = []
        self._failures: list[str] = []

    def run(self, event: str, values: Mapping[str, Any]) -> None:
        """Start it: HVLITE_EVENT is `event`, HVLITE_ID, HVLITE_OUTPUT and HVLITE_ERROR are of `values`."""
        if self.command is None:
            return
        words = {f"HVLITE_{name.upper()}": str(values[name]) for name in WORDS if values.get(name) is not None}
        try:
            with TemporaryFile() as stdin:  # a pipe could fill, and nobody waits here
                stdin.write(json.dumps({"event": event, **values}, ensure_ascii=False).encode() + b"\n")
                stdin.seek(0)
                environment = {**os.environ, "HVLITE_EVENT": event, **words}
                self._running.append(
                    subprocess.Popen(
                        self.command, shell=True, stdin=stdin, stdout=2, env=environment, start_new_session=True
                    )
                )
        except (OSError, ValueError) as error:
            self._failures.append(f"the command --on-done {self.command!r} could not be started: {error}")

    def failures(self) -> list[str]:
        """A sentence for each command that has failed since the last time."""
        ended = [process for process in self._running if process.poll() is not None]
        self._running = [process for process in self._running if process.returncode is None]
        failed = [
            f"the command --on-done {self.command!r} failed: code {each.returncode}"
            for each in ended
            if each.returncode
        ]
        told, self._failures = [*self._failures, *failed], []
        return told

    def wait(self) -> list[str]:
        """As `failures`, when all have ended or had their time."""
        ends = time.monotonic() + LAST_SECONDS
        for process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends - time.monotonic()))
        return self.failures()
