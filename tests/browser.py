"""A headless Chromium that a test looks at a page with, over the pipe of its developer tools; nothing but the library.

Where none is installed (Debian: chromium-headless-shell), the tests that need one are skipped.
"""

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--mute-audio", "--no-first-run")
PATIENCE_S = 60

# The protocol is spoken on descriptors 3 and 4; both are first moved out of the way of the other.
START = """
import fcntl, os, sys
given = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
for target, each in zip((3, 4), given):
    os.dup2(each, target)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The first Chromium in PATH."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """One page: `heard` is every event it sent so far."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser = to_browser
        self.from_browser = from_browser
        self.unread = b""
        self.numbers = itertools.count(1)
        self.heard: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        message = {"id": next(self.numbers), "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != message["id"]:
            self.heard.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, file: Path) -> None:
        """Load a file; returns when it is there with all that it refers to at once."""
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(each.get("method") == "Page.loadEventFired" for each in self.heard):
            self.heard.append(self._read())

    def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def events(self, method: str) -> list[dict[str, Any]]:
        """The parameters of every such event."""
        return [each["params"] for each in self.heard if each.get("method") == method]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            assert select.select([self.from_browser], [], [], PATIENCE_S)[0], "the browser says nothing"
            part = os.read(self.from_browser, 1 << 16)
            assert part, "the browser has gone"
            self.unread += part
        message, self.unread = self.unread.split(b"\0", 1)
        parsed: dict[str, Any] = json.loads(message)
        return parsed


@contextmanager
def opened_page(program: str, profile: Path) -> Iterator[Page]:
    """A fresh browser with one page; `profile` is an empty folder for its files."""
    their_input, to_browser = os.pipe()
    from_browser, their_output = os.pipe()
    pipes = (str(their_input), str(their_output))
    process = subprocess.Popen(
        [sys.executable, "-c", START, *pipes, program, *SWITCHES, f"--user-data-dir={profile}"],
        pass_fds=(their_input, their_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_input)
    os.close(their_output)
    try:
        yield Page(to_browser, from_browser)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser)
        os.close(from_browser)
