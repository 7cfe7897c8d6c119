"""Nothing is lost: a batch of clips whose worker, supervisor or both are killed by SIGKILL again and again.

    python benchmarks/chaos.py [--jobs 24] [--kills 100] [--seed 0] [--model shapes] [--folder DIR]

The same clips are then made once without any disturbance, by `generate` in this process, and every result is compared:
the final latents byte by byte, and the video packets (of pictures: the compressed pixels). Only the text that a file
carries about its making may differ. Jobs are queued in rounds until there were enough kills. Prints a table and then a
JSON line; exit code 1 if anything is missing, doubled, torn or different.

A kill comes some random time after the worker was started, or after it has come to a stage that is drawn for each kill.
No job may be quarantined for deaths that are ours, so both limits are 1,000 here (by default 2 and 8).
"""

import argparse
import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import msgspec

from hvlite.jobs.job import How, Job, NewJob
from hvlite.jobs.store import Store, open_store
from hvlite.line import generate
from hvlite.opened import Model, open_model
from hvlite.profile import load_profile
from hvlite.request import Request
from hvlite.run import Outputs
from hvlite.video.latents import load_latents

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1000
# Where kills are aimed at, how often in a hundred; "start": a worker loads its libraries, for up to so many seconds.
AIMS = {"start": 10, "text": 15, "schedule": 10, "denoise": 55, "decode": 10}
STARTING_SECONDS = 3.0
# What a worker does after another: "between" is after the end of a clip.
COURSE = ("text", "schedule", "denoise", "decode", "between")
# Far longer than any of this takes: a night that stands still is a finding.
STILL_SECONDS = 1800.0

Victim = Literal["worker", "supervisor", "both"]
VICTIMS: tuple[Victim, ...] = ("worker", "supervisor", "both")
COLOURS, SHAPES = ("red", "green", "blue", "yellow", "white"), ("circle", "square", "triangle")
WAYS, GROUNDS = ("left", "right", "up", "down"), ("black", "navy", "maroon")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much of it. `mean_seconds` lie between a stage and a kill; `save_every` between two checkpoints."""

    jobs: int = 24
    kills: int = 100
    seed: int = 0
    model: str = "shapes"
    steps: tuple[int, int] = (12, 30)
    mean_seconds: float = 0.7
    save_every: float = 0.1


@dataclass(slots=True)
class Report:
    """What happened, and what was found: `faults` is empty if nothing is wrong."""

    jobs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    most_attempts: int = 0
    resumed: int = 0
    leftovers: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Work:
    """A running `hvlite work` over one home, and what it has said so far."""

    def __init__(self, home: Path, plan: Plan) -> None:
        command = [sys.executable, "-m", "hvlite.cli", "work", "--until-empty", "--device", "cpu", "--json", "--quiet"]
        self.log = (home / "work.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--save-every", str(plan.save_every)],
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "HVLITE_HOME": str(home), "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout
        self.rest = b""
        self.worker: int | None = None
        self.stage = "start"
        self.ended: list[int] = []

    def listen(self, seconds: float) -> bool:
        """Hear what it says for so long; False when it has ended."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            if not select.select([self.said], [], [], left)[0]:
                return True
            said = os.read(self.said.fileno(), 1 << 16)
            if not said:
                return False
            *lines, self.rest = (self.rest + said).split(b"\n")
            for line in lines:
                self.hear(json.loads(line))
        return True

    def hear(self, event: dict[str, object]) -> None:
        match event:
            case {"event": "WorkerStarted", "pid": int(pid)}:
                self.worker, self.stage = pid, "start"
            case {"event": "Stage", "name": str(name)}:
                self.stage = name
            case {"event": "JobEnded", "job": {"id": int(job)}}:
                self.ended.append(job)
                self.stage = "between"

    def until_at(self, aim: str) -> bool:
        """Wait until its worker is that far with a clip, or farther; False when it has ended before."""
        if aim == "start":
            return self.until(lambda: self.worker is not None)
        return self.until(lambda: self.worker is not None and self.stage in COURSE[COURSE.index(aim) :])

    def until(self, is_so: Callable[[], bool]) -> bool:
        ends = time.monotonic() + STILL_SECONDS
        while not is_so():
            if not self.listen(0.02):
                return False
            assert time.monotonic() < ends, f"nothing new in {STILL_SECONDS:.0f} s: see {self.log.name}"
        return True

    def kill(self, victim: Victim) -> None:
        """SIGKILL, and no wait for what it does to the other one."""
        assert self.worker is not None
        if victim != "supervisor":
            kill(self.worker)
        if victim != "worker":
            kill(self.process.pid)
        self.worker, self.stage = None, "start"

    def end(self) -> int:
        """What it has said until its end; its exit code."""
        while self.listen(STILL_SECONDS):
            raise AssertionError(f"nothing said in {STILL_SECONDS:.0f} s: see {self.log.name}")
        self.said.close()
        self.log.close()
        return self.process.wait()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def new_jobs(plan: Plan, home: Path, number: int) -> list[NewJob]:
    """Round `number` of them."""
    random_ = random.Random(f"{plan.seed} {number}")
    jobs = []
    for index in range(plan.jobs):
        caption = (random_.choice(words) for words in (COLOURS, SHAPES, WAYS, GROUNDS))
        colour, shape, way, ground = caption
        request = Request(
            f"a {colour} {shape} moving {way} on a {ground} background",
            size=random_.choice(((32, 32), (32, 48), (64, 64))),
            frames=random_.choice((1, 5, 9)),
            steps=random_.randint(*plan.steps),
            seed=1000 * number + index,
        )
        latents = home / "latents-kept" / f"{number}-{index}.safetensors"
        jobs.append(NewJob(request=request, how=How(model=plan.model), folder=home / "clips", latents=latents))
    return jobs


def queue_round(plan: Plan, home: Path, number: int) -> None:
    with opened(home) as store:
        store.change_settings(crash_limit=LIMIT, lost_limit=LIMIT)
        (home / "latents-kept").mkdir(exist_ok=True)
        store.add(new_jobs(plan, home, number))


def opened(home: Path) -> Store:
    return open_store(home / "queue.db")


def disturbed(plan: Plan, home: Path, report: Report) -> None:
    """Make rounds of jobs with a kill now and then."""
    random_ = random.Random(plan.seed)
    ended: Counter[int] = Counter()
    rounds = 0
    while report.kills.total() < plan.kills:
        queue_round(plan, home, rounds)
        rounds += 1
        code = None
        while code is None:
            work = Work(home, plan)
            code = killed_at_random(work, plan, random_, report)
            ended.update(work.ended)
        if code != 0:
            report.faults.append(f"round {rounds} ended with code {code}")
            break
    report.faults += [f"job {job} has ended {count} times" for job, count in ended.items() if count > 1]


def killed_at_random(work: Work, plan: Plan, random_: random.Random, report: Report) -> int | None:
    """Kill it now and then -> its exit code if it came to its end, None if it was killed."""
    while report.kills.total() < plan.kills:
        victim = VICTIMS[report.kills.total() % len(VICTIMS)]
        aim = random_.choices([*AIMS], [*AIMS.values()])[0]
        seconds = random_.uniform(0, STARTING_SECONDS) if aim == "start" else random_.expovariate(1 / plan.mean_seconds)
        if not work.until_at(aim) or not work.listen(seconds) or not work.until_at("start"):
            return work.end()
        report.kills[victim] += 1
        report.moments[work.stage] += 1
        work.kill(victim)
        if victim != "worker":
            work.end()
            return None
    return work.end()


def jobs_of(home: Path) -> dict[int, Job]:
    with opened(home) as store:
        return {job.id: job for job in store.page()}


def compare(plan: Plan, home: Path, whole: Path, report: Report) -> None:
    """Hold what the disturbed home has made against what `generate` makes of the same requests."""
    jobs = jobs_of(home)
    report.jobs = len(jobs)
    report.attempts = sum(job.attempts for job in jobs.values())
    report.most_attempts = max(job.attempts for job in jobs.values())
    report.resumed = sum(job.attempts > 1 and job.best_step > 0 for job in jobs.values())
    report.faults += faults_of_files(home, jobs, report)
    with open_model(plan.model, load_profile("cpu")) as model:
        for number, job in jobs.items():
            report.faults += [f"job {number}: {fault}" for fault in faults_of(job, model, whole)]
    with closing(sqlite3.connect(home / "queue.db")) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchall()
    if found != [("ok",)]:
        report.faults.append(f"the database: {found}")


def faults_of_files(home: Path, jobs: dict[int, Job], report: Report) -> Iterator[str]:
    """Files that are missing, or that no job knows."""
    there = {path for folder in ("clips", "latents-kept", "checkpoints") for path in (home / folder).glob("*")}
    leftovers = {path for path in there if path.name.startswith(".hvlite-") and path.suffix == ".part"}
    report.leftovers = len(leftovers)
    known = {path for job in jobs.values() for path in (job.output, job.latents) if path is not None}
    yield from (f"{path} is missing" for path in known - there)
    yield from (f"{path} is nobody's" for path in there - known - leftovers)


def faults_of(job: Job, model: Model, whole: Path) -> Iterator[str]:
    """Where a job's results are not those of an undisturbed run."""
    if job.state != "done":
        yield f"is {job.state} ({job.error})"
        return
    assert job.request is not None
    assert job.output is not None
    assert job.latents is not None
    outputs = Outputs(file=whole / job.output.name, latents=whole / job.latents.name)
    for _ in generate(job.request, model, outputs=outputs):
        pass
    assert outputs.file is not None
    assert outputs.latents is not None
    if latent_bytes(job.latents) != latent_bytes(outputs.latents):
        yield "its latents differ"
    if content(job.output) != content(outputs.file):
        yield "its clip differs"


def latent_bytes(path: Path) -> bytes:
    return load_latents(path).latents.numpy().tobytes()


def content(path: Path) -> list[bytes]:
    """The packets of a video, or the compressed pixels of a picture: all but the text that goes with it."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(video=0)]
    data, chunks, at = path.read_bytes(), [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] in (b"IHDR", b"IDAT"):
            chunks.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    return chunks


def chaos(plan: Plan, folder: Path) -> Report:
    """All of it, in two folders below `folder`."""
    report = Report()
    began = time.monotonic()
    home, whole = folder / "disturbed", folder / "whole"
    for each in (home, whole):
        each.mkdir()
    disturbed(plan, home, report)
    compare(plan, home, whole, report)
    report.seconds = round(time.monotonic() - began, 1)
    return report


def show(report: Report) -> None:
    print(f"{'jobs':24} {report.jobs}, every one done exactly once: {'no' if report.faults else 'yes'}")
    print(f"{'attempts':24} {report.attempts}, at most {report.most_attempts} for one job")
    print(f"{'resumed in the middle':24} {report.resumed} jobs")
    kills = ", ".join(f"{count} {victim}" for victim, count in report.kills.items())
    print(f"{'kills':24} {report.kills.total()}: {kills}")
    print(f"{'while at':24} " + ", ".join(f"{stage} {count}" for stage, count in report.moments.most_common()))
    print(f"{'temporary files left':24} {report.leftovers}")
    print(f"{'seconds':24} {report.seconds}")
    for fault in report.faults:
        print(f"FAULT {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = Plan()
    for name in ("jobs", "kills", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(plan, name))
    parser.add_argument("--model", default=plan.model)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    chosen = Plan(jobs=asked.jobs, kills=asked.kills, seed=asked.seed, model=asked.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = chaos(chosen, folder)
    show(report)
    print(msgspec.json.encode({"plan": chosen, "report": report}).decode())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
