"""One hand on the queue: does what it is told by name, in this process or in one of its own that talks JSON lines.

Run as a script it is that other process: `{"path": ...}` opens a queue, `{"do": ..., "with": {...}}` acts on it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvlite.errors import HvliteError, RequestError
from hvlite.jobs.job import How, NewJob, Outcome, Spot
from hvlite.jobs.store import Store, open_store
from hvlite.request import Request

ROOT = Path(__file__).resolve().parent.parent
OWNER = "the only worker"


def new_job(prompt: str = "a red circle", *, folder: Path = Path("/clips"), **fields: Any) -> NewJob:
    """A job as the CLI would queue it; `fields` are NewJob's, or else Request's."""
    own = {name: fields.pop(name) for name in ("how", "output", "latents", "stop_after") if name in fields}
    return NewJob(request=Request(prompt, **fields), folder=folder, **{"how": How(model="shapes"), **own})


def reordered(line: Sequence[int], moved: Sequence[int], spot: Spot) -> tuple[list[int], int]:
    """The law of every move, on a plain list: the line without `moved`, and the index in it at which they come back.

    They stand together, in their old order.
    """
    taken = set(moved)
    rest: list[int] = []
    ahead: list[int] = []  # for each moved job, how many of the others stand before it
    for job in line:
        (ahead if job in taken else rest).append(len(rest) if job in taken else job)
    match spot.place:
        case "top":
            return rest, 0
        case "bottom":
            return rest, len(rest)
        case "up":
            return rest, max(min(ahead) - 1, 0)
        case "down":
            return rest, min(max(ahead) + 1, len(rest))
        case _:
            assert spot.anchor is not None
            if spot.anchor not in rest:
                raise RequestError(f"job {spot.anchor} is not another job in line: name one that is queued and stays")
            return rest, rest.index(spot.anchor) + (spot.place == "after")


class Hand:
    """Acts on a store; what a RequestError says comes back as {"error": ...}."""

    def __init__(self, path: Path) -> None:
        self.store: Store = open_store(path)
        self.claims = self.store.claims(OWNER, "cpu", {None})

    def act(self, name: str, **values: Any) -> Any:
        try:
            return getattr(self, name)(**values)
        except HvliteError as error:
            return {"error": str(error)}

    def close(self) -> None:
        self.store.close()

    def add(self, prompts: list[str], first: bool) -> list[int]:
        return self.store.add([new_job(prompt) for prompt in prompts], first=first)

    def dup(self, ids: list[int]) -> list[int]:
        return self.store.duplicate(ids)

    def edit(self, ids: list[int], prompt: str) -> None:
        self.store.edit(ids, lambda new: replace(new, request=replace(new.request, prompt=prompt)))

    def mv(self, ids: list[int], place: Any, anchor: int | None) -> None:
        self.store.move(ids, Spot(place, anchor))

    def rm(self, ids: list[int]) -> None:
        self.store.remove(ids)

    def cancel(self, ids: list[int]) -> list[int]:
        return self.store.cancel(ids)

    def retry(self, ids: list[int], first: bool) -> None:
        self.store.retry(ids, first=first)

    def finish(self, ids: list[int]) -> None:
        self.store.finish(ids)

    def clear(self) -> int:
        return self.store.clear()

    def undo(self) -> dict[str, Any]:
        undone = self.store.undo()
        return {"kind": undone.kind, "jobs": list(undone.jobs), "kept": len(undone.obstacles)}

    def claim(self) -> int | None:
        job = self.claims.claim()
        return None if job is None else job.id

    def give_back(self, job: int) -> None:
        self.claims.give_back(job)

    def save_checkpoint(self, job: int, step: int) -> None:
        self.claims.save_checkpoint(job, Path(f"/checkpoints/{job}"), step)

    def crashed(self, job: int) -> str:
        return self.claims.crashed(job, "died").state

    def end(self, job: int, state: Any, reason: str | None) -> None:
        self.claims.end(job, Outcome(state=state, reason=reason))

    def seen(self) -> list[tuple[int, str, int | None, str, int, int]]:
        """What matters of every job: number, state, position, prompt, attempts, crashes."""
        jobs = self.store.page()
        return [(job.id, job.state, job.position, job.prompt, job.attempts, job.crashes) for job in jobs]


class FarHand:
    """A Hand in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def open(self, path: Path) -> None:
        self._ask({"path": str(path)})

    def act(self, name: str, **values: Any) -> Any:
        return self._ask({"do": name, "with": values})

    def _ask(self, question: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def far_hand() -> Iterator[FarHand]:
    """Start the other process, and end it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.queue_hands"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield FarHand(process)
        assert process.stdin is not None
        process.stdin.close()


def main() -> None:
    hand: Hand | None = None
    for line in sys.stdin:
        question = json.loads(line)
        answer = None
        if "path" in question:
            if hand is not None:
                hand.close()
            hand = Hand(Path(question["path"]))
        else:
            assert hand is not None
            answer = hand.act(question["do"], **question["with"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
