"""A model hub on loopback: the requests that huggingface_hub makes of the real one, and the failures it can have.

Large files lie behind a redirect to another host name, as the hub's storage does; every request is written down.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE_BYTES = 400


@dataclass(frozen=True, slots=True)
class Seen:
    """A request."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass(slots=True)
class Hub:
    """What is published, and what goes wrong. Paths are those below `/REPOSITORY/resolve/COMMIT/`.

    `cut` closes the connection after so many bytes of a file, once; `stall` keeps it open without sending more.
    """

    files: dict[str, dict[str, bytes]]
    commits: dict[str, str]
    url: str = ""
    storage: str = ""
    seen: list[Seen] = field(default_factory=list)
    hides: set[str] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    ignores_ranges: bool = False
    siblings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def fetched(self, since: int = 0) -> list[str]:
        """The files that were asked for, in order, each with where the answer began."""
        return [
            f"{request.path.split('/', 5)[5]} {request.range or 'whole'}"
            for request in self.seen[since:]
            if "/resolve/" in request.path
        ]

    def describe(self, repository: str) -> dict[str, Any]:
        """What the hub says of a repository at its commit."""
        listed = [sibling(name, content) for name, content in self.files[repository].items()]
        return {
            "id": repository,
            "sha": self.commits[repository],
            "siblings": listed + self.siblings.get(repository, []),
        }


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """One file of a listing: by SHA-256 if large, else by git's name."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    described: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) >= LARGE_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return described


class Handler(BaseHTTPRequestHandler):
    """Answers for `hub`, which a subclass names."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Tests read `hub.seen`."""

    def do_GET(self) -> None:
        header = self.headers.get
        self.hub.seen.append(Seen(self.command, self.path, header("Range"), header("Authorization")))
        path = unquote(self.path.partition("?")[0])
        owner, _, rest = path.strip("/").removeprefix("api/models/").partition("/")
        name, _, rest = rest.partition("/")
        repository, (kind, _, rest) = f"{owner}/{name}", rest.partition("/")
        if (code := self.hub.status.get(repository)) is not None:
            self._say(code, b"{}")
        elif repository not in self.hub.files:
            self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif kind == "revision":
            self._list(repository, rest)
        else:
            self._give(repository, kind, rest.partition("/")[2])

    def _list(self, repository: str, revision: str) -> None:
        if revision not in ("main", self.hub.commits[repository]):
            self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        self._say(200, json.dumps(self.hub.describe(repository)).encode(), {"Content-Type": "application/json"})

    def _give(self, repository: str, kind: str, name: str) -> None:
        content = self.hub.files[repository].get(name)
        if content is None or name in self.hub.hides:
            self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif (code := self.hub.status.get(name)) is not None:
            self._say(code, b'{"error": "no"}', {"X-Error-Code": "GatedRepo"} if code in (401, 403) else {})
        elif kind == "resolve" and len(content) >= LARGE_BYTES:
            self._say(302, b"", {"Location": f"{self.hub.storage}/{repository}/stored/x/{name}"})
        else:
            self._send(name, content)

    def _send(self, name: str, content: bytes) -> None:
        begin, code, headers = 0, 200, {}
        asked = self.headers.get("Range")
        if asked and not self.hub.ignores_ranges:
            begin, code = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if name in self.hub.corrupt:
            content = bytes(byte ^ 1 for byte in content)
        body = content[begin:]
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        end = self.hub.cut.pop(name, None)
        self.wfile.write(body[: self.hub.stall.get(name, end)])
        self.wfile.flush()
        if name in self.hub.stall:
            self.hub.stalled.set()
            self.hub.released.wait(60)
        self.close_connection = end is not None or name in self.hub.stall

    def _say(self, code: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Clients are killed here."""


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """The hub answers on loopback."""
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    port = server.server_address[1]
    hub.url, hub.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        with suppress(OSError):
            server.shutdown()
        thread.join()
        server.server_close()
