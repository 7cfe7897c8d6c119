"""The queue against a plain list, worked by two connections and a second process in any order.

The model knows no keys and no tables: the line is a list of numbers. Every rule picks a hand, does one thing to both,
and everything that users see must then be equal, through every hand.
"""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hvlite.jobs.job import ACTIONS, CHANGES, Spot, State
from tests.queue_hands import FarHand, Hand, far_hand, reordered

MOST_JOBS = 12
picks = st.lists(st.integers(0, MOST_JOBS - 1), min_size=1, max_size=3)


@dataclass
class Known:
    """What the model knows of a job."""

    state: State = "queued"
    prompt: str = ""
    attempts: int = 0
    crashes: int = 0
    best: int = 0
    progressed: bool = False
    touched: int = 0  # the moment of the last change by a worker


@dataclass
class Model:
    """The queue as a list, and the deeds that can be undone: each with the world before it."""

    jobs: dict[int, Known] = field(default_factory=dict)
    line: list[int] = field(default_factory=list)
    paused: bool = False
    streak: list[str] = field(default_factory=list)
    moment: int = 0
    deeds: "list[tuple[int, set[int], dict[int, Known], list[int], set[int]]]" = field(default_factory=list)

    def remember(self, touched: set[int], stuck: set[int] | None = None) -> None:
        """Before a deed: the jobs that it touches, and those for which it cannot be undone."""
        self.moment += 1
        self.deeds.append((self.moment, touched, deepcopy(self.jobs), list(self.line), stuck or set()))

    def worker(self, job: int, state: State) -> Known:
        """A worker changes a job's state."""
        self.moment += 1
        known = self.jobs[job]
        known.state, known.touched = state, self.moment
        if job in self.line:
            self.line.remove(job)
        return known

    def undo(self) -> tuple[list[int], int]:
        """The jobs that are as before, and how many are not."""
        moment, touched, jobs, line, stuck = self.deeds.pop()
        kept = {job for job in touched if job in stuck or (job not in self.jobs and job not in jobs)}
        kept |= {job for job in touched if job in self.jobs and self.jobs[job].touched > moment}
        back = touched - kept
        for job in back:
            self.jobs.pop(job, None)
            if job in jobs:
                self.jobs[job] = jobs[job]
        now = [job for job in self.line if job not in back]
        since = [job for job in now if self.jobs[job].touched > moment]  # given back meanwhile: ahead of everybody
        others = {job for job in now if job not in since} | {job for job in back if job in line}
        self.line = since + [job for job in line if job in others]
        return sorted(back), len(kept)


class QueueMachine(RuleBasedStateMachine):
    far: FarHand

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="queue-", dir=shared_memory())
        path = Path(self.folder.name) / "queue.db"
        self.near = [Hand(path), Hand(path)]
        self.far.open(path)
        self.model = Model()

    def teardown(self) -> None:
        for hand in self.near:
            hand.close()
        self.folder.cleanup()

    def act(self, hand: int, name: str, **values: Any) -> Any:
        return self.far.act(name, **values) if hand == 2 else self.near[hand].act(name, **values)

    def chosen(self, numbers: list[int]) -> list[int]:
        """Existing jobs, each once."""
        known = sorted(self.model.jobs)
        return list(dict.fromkeys(known[number % len(known)] for number in numbers)) if known else []

    def allowed(self, action: str, ids: list[int]) -> bool:
        return bool(ids) and all(self.model.jobs[job].state in ACTIONS[action] for job in ids)

    def refused(self, answer: Any) -> None:
        assert isinstance(answer, dict)
        assert "error" in answer

    @initialize(count=st.integers(3, 6))
    def begin(self, count: int) -> None:
        self.add(0, [f"clip {number}" for number in range(count)], False)

    @rule(hand=st.integers(0, 2), prompts=st.lists(st.text("ab,'\"\n", max_size=4), max_size=3), first=st.booleans())
    def add(self, hand: int, prompts: list[str], first: bool) -> None:
        if len(self.model.jobs) + len(prompts) > MOST_JOBS or not prompts:
            return
        ids = self.act(hand, "add", prompts=prompts, first=first)
        self.model.remember(set(ids))
        self.model.jobs |= {job: Known(prompt=prompt) for job, prompt in zip(ids, prompts, strict=True)}
        self.model.line = ids + self.model.line if first else self.model.line + ids

    @rule(hand=st.integers(0, 2), numbers=picks)
    def dup(self, hand: int, numbers: list[int]) -> None:
        ids = self.chosen(numbers)
        if not ids or len(self.model.jobs) + len(ids) > MOST_JOBS:
            return
        new = self.act(hand, "dup", ids=ids)
        self.model.remember(set(new))
        self.model.jobs |= {job: Known(prompt=self.model.jobs[old].prompt) for job, old in zip(new, ids, strict=True)}
        self.model.line += new

    @rule(hand=st.integers(0, 2), numbers=picks, prompt=st.text("xy", max_size=3))
    def edit(self, hand: int, numbers: list[int], prompt: str) -> None:
        ids = self.chosen(numbers)
        answer = self.act(hand, "edit", ids=ids, prompt=prompt) if ids else None
        if not ids:
            return
        if not self.allowed("edit", ids):
            self.refused(answer)
            return
        self.model.remember(set(ids))
        for job in ids:
            known = self.model.jobs[job]
            if known.prompt != prompt:
                known.prompt, known.crashes, known.best = prompt, 0, 0

    @rule(
        hand=st.integers(0, 2),
        numbers=picks,
        place=st.sampled_from(["top", "bottom", "up", "down", "before", "after"]),
        anchor=st.integers(0, MOST_JOBS - 1),
    )
    def mv(self, hand: int, numbers: list[int], place: Any, anchor: int) -> None:
        ids, anchors = self.chosen(numbers), self.chosen([anchor])
        if not ids:
            return
        answer = self.act(hand, "mv", ids=ids, place=place, anchor=anchors[0])
        fits = place not in ("before", "after") or anchors[0] in set(self.model.line) - set(ids)
        if not self.allowed("mv", ids) or not fits:
            self.refused(answer)
            return
        self.model.remember(set(ids))
        rest, index = reordered(self.model.line, ids, Spot(place, anchors[0]))
        moved = [job for job in self.model.line if job in ids]
        self.model.line = rest[:index] + moved + rest[index:]

    @rule(hand=st.integers(0, 2), numbers=picks)
    def rm(self, hand: int, numbers: list[int]) -> None:
        ids = self.chosen(numbers)
        if not ids:
            return
        answer = self.act(hand, "rm", ids=ids)
        if not self.allowed("rm", ids):
            self.refused(answer)
            return
        self.model.remember(set(ids))
        for job in ids:
            del self.model.jobs[job]
        self.model.line = [job for job in self.model.line if job not in ids]

    @rule(hand=st.integers(0, 2), numbers=picks)
    def cancel(self, hand: int, numbers: list[int]) -> None:
        ids = self.chosen(numbers)
        if not ids:
            return
        answer = self.act(hand, "cancel", ids=ids)
        if not self.allowed("cancel", ids):
            self.refused(answer)
            return
        running = [job for job in ids if self.model.jobs[job].state == "running"]
        assert answer == running
        self.model.remember(set(ids), set(running))
        for job in set(ids) - set(running):
            self.model.jobs[job].state = "cancelled"
        self.model.line = [job for job in self.model.line if job not in ids]
        for job in running:  # by its worker, or given back by one that left it for another reason
            if job % 2:
                self.act(hand, "give_back", job=job)
            else:
                self.act(hand, "end", job=job, state="cancelled", reason="cancelled by user")
            self.model.worker(job, "cancelled")

    @rule(hand=st.integers(0, 2), numbers=picks, first=st.booleans(), action=st.sampled_from(["retry", "finish"]))
    def again(self, hand: int, numbers: list[int], first: bool, action: str) -> None:
        ids = self.chosen(numbers)
        if not ids:
            return
        first = first and action == "retry"
        answer = self.act(hand, action, ids=ids, **({"first": first} if action == "retry" else {}))
        if not self.allowed(action, ids):
            self.refused(answer)
            return
        self.model.remember(set(ids))
        for job in ids:
            self.model.jobs[job].state, self.model.jobs[job].crashes = "queued", 0
        self.model.line = ids + self.model.line if first else self.model.line + ids

    @rule(hand=st.integers(0, 2))
    def clear(self, hand: int) -> None:
        cleared = list(self.model.line)
        assert self.act(hand, "clear") == len(cleared)
        if cleared:
            self.model.remember(set(cleared))
            for job in cleared:
                del self.model.jobs[job]
            self.model.line = []

    @rule(hand=st.integers(0, 2), numbers=picks, place=st.sampled_from(["top", "bottom"]))
    def mv_and_think_better(self, hand: int, numbers: list[int], place: Any) -> None:
        deeds = len(self.model.deeds)
        self.mv(hand, numbers, place, 0)
        if len(self.model.deeds) > deeds:
            self.all_see_the_same()
            self.undo(hand)

    @rule(hand=st.integers(0, 2))
    def undo(self, hand: int) -> None:
        answer = self.act(hand, "undo")
        if not self.model.deeds:
            self.refused(answer)
            return
        jobs, kept = self.model.undo()
        assert (answer["jobs"], answer["kept"]) == (jobs, kept)

    @rule(hand=st.integers(0, 2))
    def claim(self, hand: int) -> None:
        job = self.act(hand, "claim")
        if self.model.paused or not self.model.line:
            assert job is None
            return
        assert job == self.model.line[0]
        known = self.model.worker(job, "running")
        known.attempts, known.progressed = known.attempts + 1, False

    @rule(hand=st.integers(0, 2), number=st.integers(0, 3), step=st.integers(1, 4))
    def checkpoint(self, hand: int, number: int, step: int) -> None:
        if (job := self.a_running(number)) is None:
            return
        self.act(hand, "save_checkpoint", job=job, step=step)
        known = self.model.worker(job, "running")
        if step > known.best:
            known.best, known.progressed, known.crashes = step, True, 0

    @rule(hand=st.integers(0, 2), number=st.integers(0, 3))
    def give_back(self, hand: int, number: int) -> None:
        if (job := self.a_running(number)) is not None:
            self.act(hand, "give_back", job=job)
            self.model.worker(job, "queued")
            self.model.line.insert(0, job)

    @rule(hand=st.integers(0, 2), number=st.integers(0, 3))
    def crash(self, hand: int, number: int) -> None:
        if (job := self.a_running(number)) is None:
            return
        state = self.act(hand, "crashed", job=job)
        known = self.model.jobs[job]
        known.crashes += not known.progressed
        assert state == ("failed" if known.crashes >= 2 else "queued")
        self.model.worker(job, state)
        if state == "queued":
            self.model.line.insert(0, job)
        else:
            self.count_failure("quarantined")

    @rule(
        hand=st.integers(0, 2),
        number=st.integers(0, 3),
        outcome=st.sampled_from(["done", "failed", "parked"]),
        reason=st.sampled_from(["disk full", "no memory"]),
    )
    def end(self, hand: int, number: int, outcome: Any, reason: str) -> None:
        if (job := self.a_running(number)) is None:
            return
        self.act(hand, "end", job=job, state=outcome, reason=reason)
        self.model.worker(job, outcome)
        if outcome != "failed":
            self.model.streak = []
        if outcome == "failed":
            self.count_failure(reason)

    def count_failure(self, reason: str) -> None:
        streak = [*self.model.streak, reason]
        self.model.streak = streak if len(set(streak)) == 1 else [reason]
        self.model.paused = self.model.paused or len(self.model.streak) >= 3

    @rule()
    def resume(self) -> None:
        self.near[0].store.resume()
        self.model.paused, self.model.streak = False, []

    def a_running(self, number: int) -> int | None:
        running = sorted(job for job, known in self.model.jobs.items() if known.state == "running")
        return running[number % len(running)] if running else None

    @invariant()
    def all_see_the_same(self) -> None:
        place = {job: index + 1 for index, job in enumerate(self.model.line)}
        expected = {
            (job, known.state, place.get(job), known.prompt, known.attempts, known.crashes)
            for job, known in self.model.jobs.items()
        }
        for hand in range(3):
            seen = self.act(hand, "seen")
            assert {tuple(job) for job in seen} == expected
            assert [job[0] for job in seen if job[1] == "queued"] == self.model.line
        assert set(CHANGES) >= {known.state for known in self.model.jobs.values()}


def shared_memory() -> str | None:
    """A folder in memory, where a synced commit costs nothing; None, the default, where there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture(scope="module")
def other_process() -> Iterator[FarHand]:
    with far_hand() as hand:
        yield hand


def test_the_queue_is_a_list_that_several_processes_share(other_process: FarHand) -> None:
    machine = type("Machine", (QueueMachine,), {"far": other_process})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
