"""Packs a model over and over, each time killed by SIGKILL one event later: run by `test_pack` in its own process.

An event is a call that changes the disk. Each attempt runs in a forked child of a parent that has imported everything
and computed nothing; fsync is counted and left out, since a kill loses nothing that was written.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvlite.weights import pack as packing
from hvlite.weights.pack import pack
from hvlite.weights.slab import Slab
from hvlite.weights.sources import find_sources, read_dims

CHANGES = ("fsync", "replace", "rename", "unlink", "mkdir")


class Fuse:
    """Kills this process at the event of that number; 0 for never."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.events = 0

    def burn(self) -> None:
        self.events += 1
        if self.events == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any], *, skip: bool = False) -> Callable[..., Any]:
        """`call`, after an event; `skip`: only the event."""

        def burning(*arguments: Any, **keywords: Any) -> Any:
            self.burn()
            return None if skip else call(*arguments, **keywords)

        return burning

    def attach(self) -> None:
        for name in CHANGES:
            setattr(os, name, self.before(getattr(os, name), skip=name == "fsync"))
        write_slab: Callable[..., Slab] = vars(packing)["write_slab"]

        def write_half_and_go_on(folder: Path, name: str, *arguments: Any, **keywords: Any) -> Slab:
            """A temporary file that has half of its bytes, then the whole slab."""
            (folder / ".hvlite-0123456789ab.part").write_bytes(b"half")
            self.burn()
            (folder / ".hvlite-0123456789ab.part").unlink()
            return write_slab(folder, name, *arguments, **keywords)

        vars(packing)["write_slab"] = write_half_and_go_on


def pack_in_child(source: Path, out: Path, kill_at: int) -> tuple[bool, int]:
    """Whether the child came to its end, and after how many events."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        fuse = Fuse(kill_at)
        try:
            sources = find_sources(source)
            dims = read_dims(sources)
            fuse.attach()
            for _ in pack(sources, dims, out):
                pass
            os.write(writer, str(fuse.events).encode())
        finally:
            os._exit(1)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader) as answer:
        events = answer.read()
    assert events or os.WTERMSIG(status) == signal.SIGKILL
    return bool(events), int(events or 0)


def main(source: Path, folder: Path, most: int) -> None:
    """Kill at about `most` events and at each of the last ones, then finish; the stores go to stdout."""
    _, events = pack_in_child(source, folder / "undisturbed", 0)
    chosen = sorted({*range(1, events - 12, max(1, events // most)), *range(events - 12, events + 1)})
    stores = {"undisturbed": 0}
    for kill_at in chosen:
        out = folder / f"killed-{kill_at}"
        finished, _ = pack_in_child(source, out, kill_at)
        assert not finished
        if not out.exists():
            finished, _ = pack_in_child(source, out, 0)
            assert finished, f"after a kill at event {kill_at} of {events}"
        stores[out.name] = kill_at
    sys.stdout.write(json.dumps({"events": events, "stores": stores}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
