"""What a command says while it works: progress and notes on stderr, results on stdout; and how signals end
it.

On a terminal a bar for each stage, elsewhere a plain line at every tenth or every minute.
"""

import json
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from hvlite.errors import ExitCode
from hvlite.events import BlockDone, Chosen, Event, Finished, Loaded, Note, Saved, Stage, TileDone

if TYPE_CHECKING:
    from rich.console import Console

    from hvlite.metadata import MemoryUsed
    from hvlite.weights.pack import Progress

PLAIN_SECONDS = 60.0
# The stages without a bar of their own.
STAGE_WORDS = {
    "text": "loading the text encoders, reading the prompt",
    "schedule": "loading the transformer, preparing the schedule",
}


class Interrupted(BaseException):
    """A signal ended the work in good order. No Exception: nobody that handles errors may swallow it."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code)
        self.code = code


class Talk:
    """All that a command says."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        # rich is imported where it is needed: --help must appear at once
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.meter: Meter | None = None
        self.latents: Path | None = None
        self.are_final = False
        self.noted: set[str] = set()

    def say(self, text: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            self.insist(text)

    def insist(self, text: str) -> None:
        """One line on stderr that even --quiet does not silence."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """One line on stdout."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def event(self, event: Event) -> None:
        """Show one event of the engine."""
        if self.as_json:
            print_json({"event": type(event).__name__, **{name: getattr(event, name) for name in event.__slots__}})
        match event:
            case Note(text) if text not in self.noted:
                self.noted.add(text)
                self.say(text)
            case Stage(name):
                self.close()
                if name in STAGE_WORDS:
                    self.say(STAGE_WORDS[name])
            case Loaded(done, total):
                self.advance("load", done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB of weights")
                if done == total:
                    self.close()
            case BlockDone():
                done = event.step * event.blocks + event.block + 1
                where = f"step {event.step + 1}/{event.steps} block {event.block + 1}/{event.blocks}"
                self.advance("denoise", done, event.steps * event.blocks, where)
            case TileDone():
                self.advance("decode", event.tile + 1, event.tiles, f"tile {event.tile + 1}/{event.tiles}")
            case Chosen(_, latents):
                self.latents, self.are_final = latents, False
            case Saved("latents", _):
                self.are_final = True
            case Finished(path, timings, memory):
                self.close()
                self.latents = None
                peak = memory_text(memory)
                self.say("done: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timings.items()) + peak)
                if path is not None and not self.as_json:
                    self.result(str(path))
            case _:
                pass

    def tell_what_is_kept(self) -> None:
        """After the last event: how to finish a clip that was not finished."""
        if self.latents is None or not self.latents.exists():
            return
        if self.are_final:
            self.insist(f"the finished latents are safe; finish with: hvlite decode {self.latents}")
        else:
            self.insist(f"the steps that are done are safe; go on with: hvlite gen --resume {self.latents}")

    def packing(self, event: "Progress | Note") -> None:
        """Show how far a packing is."""
        if isinstance(event, Note):
            self.event(event)
        else:
            size = f"{event.done_bytes / 1e9:.2f} of {event.total_bytes / 1e9:.2f} GB"
            self.advance("pack", event.done_bytes, event.total_bytes, f"{size}  {event.slab}")

    def follow_packing(self, stream: "Iterator[Progress | Note]") -> None:
        """Show all of it."""
        for event in stream:
            self.packing(event)
        self.close()

    def close(self) -> None:
        """End the running bar."""
        if self.meter is not None:
            self.meter.close()
            self.meter = None

    def advance(self, stage: str, done: int, total: int, where: str) -> None:
        """Move the bar of `stage`, or write a line of it."""
        if self.quiet:
            return
        if self.meter is None:
            self.meter = Bar(self.console, stage) if self.console.is_terminal else Plain(self, stage)
        self.meter.show(done, total, where)


class Bar:
    """A bar with elapsed and remaining time, for a terminal."""

    def __init__(self, console: "Console", stage: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.fields[stage]:8}"),
            BarColumn(),
            TextColumn("{task.fields[where]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task(stage, total=None, stage=stage, where="")
        self.progress.start()

    def show(self, done: int, total: int, where: str) -> None:
        self.progress.update(self.task, completed=done, total=total, where=where)

    def close(self) -> None:
        self.progress.stop()


class Plain:
    """A line at every tenth of the work and at every minute, for logs."""

    def __init__(self, talk: Talk, stage: str) -> None:
        self.talk = talk
        self.stage = stage
        self.began = self.spoke = time.monotonic()
        self.tenth = 0
        self.first: int | None = None
        """What was done when this began: most of it, perhaps, by an earlier attempt."""

    def show(self, done: int, total: int, where: str) -> None:
        now, tenth = time.monotonic(), 10 * done // total
        if self.first is None:
            self.first = done
        if tenth == self.tenth and now - self.spoke < PLAIN_SECONDS:
            return
        self.tenth, self.spoke = tenth, now
        made = done - self.first
        eta = f"  eta {_clock((now - self.began) / made * (total - done))}" if made else ""
        self.talk.say(f"{self.stage} {100 * done // total:3d} %  {where}{eta}")

    def close(self) -> None:
        """Nothing is held."""


Meter = Bar | Plain


class Stop:
    """What a signal asked for; while `deferred` the first one only sets `code`, else work ends at once."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.deferred = False
        self.code: ExitCode | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED
        if self.code is not None or not self.deferred:
            raise Interrupted(code)
        self.code = code
        self.talk.say("stopping at the next block or tile (once more: stop now)")

    def follow(self, stream: Generator[Event, None, None]) -> None:
        """Show every event; end the stream between two blocks or tiles when a signal has asked for that."""
        try:
            for event in stream:
                self.talk.event(event)
                if isinstance(event, Stage):
                    self.deferred = event.name in ("denoise", "decode")
                if self.code is not None and isinstance(event, Loaded | BlockDone | TileDone | Stage):
                    raise Interrupted(self.code)
        finally:
            self.deferred = False
            stream.close()
            self.talk.close()
            self.talk.tell_what_is_kept()


@contextmanager
def interruptible(talk: Talk) -> Iterator[Stop]:
    """SIGINT and SIGTERM end the work in good order."""
    stop = Stop(talk)
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        talk.close()


def printable(text: str) -> str:
    """Control characters as escapes: no prompt and no file drives the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(value: object) -> None:
    """One JSON object on one line of stdout; paths as text."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else str(value)


def memory_text(memory: "MemoryUsed | None") -> str:
    """What the device gave, beside what was predicted, where it is known."""
    if memory is None or memory.actual_bytes is None:
        return ""
    return f"; peak memory {memory.actual_bytes / 2**30:.2f} GiB, planned {memory.predicted_bytes / 2**30:.2f} GiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
