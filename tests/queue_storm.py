"""Writes to a queue without end and says what is committed, line by line, until somebody kills it.

Run by `test_queue_claims` in processes of its own: `python -m tests.queue_storm PATH OWNER`.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

from hvlite.errors import RequestError
from hvlite.jobs.job import Outcome, Progress, Spot
from hvlite.jobs.store import Claims, Store, open_store
from tests.queue_hands import new_job


def say(word: str, number: int) -> None:
    sys.stdout.write(f"{word} {number}\n")
    sys.stdout.flush()


def add(store: Store, claims: Claims) -> None:
    for number in store.add([new_job("x" * random.randrange(5000))]):
        say("added", number)


def work(store: Store, claims: Claims) -> None:
    job = claims.claim()
    if job is not None:
        claims.reserve_output(job.id, ".mp4")
        claims.report(job.id, Progress(stage="denoise", step=1, steps=9))
        claims.save_checkpoint(job.id, Path("/c"), 1)
        claims.end(job.id, Outcome(state="done"))
        say("done", job.id)


def shuffle(store: Store, claims: Claims) -> None:
    waiting = [job.id for job in store.page(("queued",), limit=9)]
    if waiting:
        store.move([random.choice(waiting)], Spot("bottom"))


DEEDS: tuple[Callable[[Store, Claims], None], ...] = (add, add, work, shuffle)


def main() -> None:
    path, owner = sys.argv[1:]
    with open_store(Path(path)) as store:
        claims = store.claims(owner, "cpu", {None})
        say("ready", 0)
        while True:
            try:
                random.choice(DEEDS)(store, claims)
            except RequestError:  # the job that was to move has been claimed by another process
                continue


if __name__ == "__main__":
    main()
