"""How long the queue takes with many jobs in it: `python benchmarks/queue_store.py [JOBS] [FOLDER]`.

Every figure is of the store's own method, committed and synced, in a file in FOLDER (by default a temporary one);
beside it stands a bare synced commit of one row on the same disk in the same run, below which no durable queue can be.
Exits with 1 where the median of what was promised is over 50 ms.
"""

import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

from hvlite.jobs.job import How, NewJob, Outcome, Spot
from hvlite.jobs.store import Store, open_store
from hvlite.request import Request

LIMIT_MS = 50.0
PROMISED = ("claim", "first page", "move to the top", "move into the middle", "cancel")
REPEATS = 30
PAGE = 200


def filled(path: Path, count: int) -> Store:
    """A queue of `count` jobs with prompts of a usual length, and a tenth as many that are done."""
    store = open_store(path)
    words = "a red circle moving left on a black background while the camera pans slowly across the scene"
    new = [
        NewJob(request=Request(f"{words}, number {number}", seed=number), how=How(model="shapes"), folder=path.parent)
        for number in range(count + count // 10)
    ]
    store.add(new)
    claims = store.claims("benchmark", "cpu", {None})
    for _ in range(count // 10):
        job = claims.claim()
        assert job is not None
        claims.end(job.id, Outcome(state="done"))
    return store


def measured(act: Callable[[], object]) -> list[float]:
    """Milliseconds of each repetition."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - began))
    return times


def acts(store: Store, noise: random.Random) -> dict[str, Callable[[], object]]:
    """What is measured; each choice of a job is part of the preparation, not of the time."""
    waiting = [job.id for job in store.page(("queued",))]
    picks = iter(noise.sample(waiting[REPEATS:], 5 * REPEATS))
    claims = store.claims("benchmark", "cpu", {None})
    marked = noise.sample(waiting[REPEATS:], 50)
    return {
        "claim": claims.claim,
        "first page": lambda: store.page(("running", "queued", "parked"), limit=PAGE),
        "last page": lambda: store.page(("queued",), limit=PAGE, offset=len(waiting) - 3 * PAGE),
        "one job": lambda: store.job(next(picks)),
        "move to the top": lambda: store.move([next(picks)], Spot("top")),
        "move into the middle": lambda: store.move([next(picks)], Spot("after", waiting[len(waiting) // 2])),
        "move 50 marked": lambda: store.move(marked, Spot("down")),
        "cancel": lambda: store.cancel([next(picks)]),
        "undo": store.undo,
    }


def bare_commit(folder: Path) -> Callable[[], object]:
    """One row into a database of one table, with the same care for the disk."""
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE bare (number)"):
        connection.execute(statement)
    return lambda: connection.execute("INSERT INTO bare VALUES (1)")


def opening(path: Path) -> Callable[[], object]:
    def act() -> None:
        with open_store(path):
            pass

    return act


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        path = Path(name) / "queue.db"
        began = time.perf_counter()
        with closing(filled(path, count)) as store:
            took, size = time.perf_counter() - began, path.stat().st_size / 2**20
            print(f"{count:,} jobs waiting, {count // 10:,} done, made in {took:.1f} s; {size:.1f} MiB")
            found = {"(bare commit)": measured(bare_commit(path.parent)), "open": measured(opening(path))}
            found |= {what: measured(act) for what, act in acts(store, random.Random(0)).items()}
    print(f"{'':22} {'median ms':>10} {'worst ms':>10}")
    for what, times in found.items():
        print(f"{what:22} {median(times):10.2f} {max(times):10.2f}")
    slow = [what for what in PROMISED if median(found[what]) > LIMIT_MS]
    print(f"over {LIMIT_MS:g} ms: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
