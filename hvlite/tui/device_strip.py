"""Two lines on the card, or without one on this machine: how busy it is, its last minute, who holds its memory."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from hvlite.jobs.job import Job
from hvlite.profile import GIB
from hvlite.telemetry import Card, Driver, Host, driver_state, host_state
from hvlite.tui.words import gib

SECONDS = 60
BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
# On a line that is ROOMY; else a tenth of it.
BAR_WIDTH = 30
ROOMY = 116
LIMIT = "\u2502"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the device and the host say at one moment. `ours` are workers and their supervisors."""

    driver: Driver
    host: Host
    ours: frozenset[int] = frozenset()
    ours_rss: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a memory; `sign` draws it in the bar and stands before its words, `colour` is a class of the strip."""

    sign: str
    colour: str
    words: str
    nbytes: int


def probe(supervisors: frozenset[int]) -> Machine:
    """Ask driver and kernel; takes some milliseconds, so not on the screen's thread."""
    ours: dict[int, int] = {}
    for pid in supervisors:
        ours |= _family(pid)
    return Machine(driver=driver_state(), host=host_state(), ours=frozenset(ours), ours_rss=sum(ours.values()))


def _family(pid: int) -> dict[int, int]:
    """The RAM of a supervisor and of the worker under it, which holds the card, by process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return {each.pid: int(each.memory_info().rss) for each in (process, *process.children(recursive=True))}
    except psutil.Error:
        return {}


class Line(Static):
    """Part of the strip, which is drawn for the room that each of them has: that may change while its own does not."""

    def on_resize(self) -> None:
        self.query_ancestor(DeviceStrip).redraw()


class DeviceStrip(Vertical):
    """Shows a Machine, and a minute of it."""

    COMPONENT_CLASSES = {f"device--{name}" for name in ("tensors", "cache", "others", "free", "limit")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.minute: deque[float] = deque(maxlen=SECONDS)
        self._machine: Machine | None = None
        self._at_work: Sequence[Job] = ()

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Line(id="device-words")
            yield Line(id="device-minute")
        yield Line(id="device-memory")

    def show(self, machine: Machine, running: Sequence[Job]) -> None:
        self._machine, self._at_work = machine, running
        self.minute.append(_share(machine, card_of(machine, running)))
        self._draw(machine)

    def show_jobs(self, running: Sequence[Job]) -> None:
        """What runs has changed since the machine was asked."""
        if running != self._at_work:
            self._at_work = running
            self.redraw()

    def redraw(self) -> None:
        if self._machine is not None:
            self._draw(self._machine)

    def _draw(self, machine: Machine) -> None:
        card = card_of(machine, self._at_work)
        job = next((job for job in self._at_work if card is not None and job.lock == card.uuid), None)
        bars, line = self.query_one("#device-minute", Line), self.query_one("#device-words", Line)
        bars.update(Text(minute_bars(self.minute, bars.size.width)), layout=False)
        words = host_words(machine) if card is None else card_words(card, len(machine.driver.cards))
        line.update(Text(fitting(words, line.size.width), no_wrap=True, overflow="ellipsis"), layout=False)
        self._show_memory(machine, card, job or next(iter(self._at_work), None))

    def _show_memory(self, machine: Machine, card: Card | None, job: Job | None) -> None:
        line = self.query_one("#device-memory", Line)
        is_roomy = line.size.width >= ROOMY
        gap = "   " if is_roomy else " "
        parts = host_parts(machine) if card is None else card_parts(card, machine, job)
        limit = None if job is None else job.predicted_bytes
        text = Text(no_wrap=True, overflow="ellipsis")
        cells = memory_bar(parts, limit, BAR_WIDTH if is_roomy else line.size.width // 10)
        for (sign, colour), alike in groupby(cells):
            text.append(sign * len(list(alike)), self.get_component_rich_style(f"device--{colour}", partial=True))
        for part in parts:
            text.append(gap)
            text.append(part.sign, self.get_component_rich_style(f"device--{part.colour}", partial=True))
            text.append(f" {part.words} {part.nbytes / GIB:.1f}")
        if parts:
            text.append(f"/{sum(part.nbytes for part in parts) / GIB:.1f}{' GiB' if is_roomy else ''}")
        if limit is not None:
            text.append(f"{gap}{LIMIT}", self.get_component_rich_style("device--limit", partial=True))
            text.append(f" plan {limit / GIB:.1f}")
        line.update(text, layout=False)


def card_of(machine: Machine, running: Sequence[Job]) -> Card | None:
    """The card that works for us; where none does, the first."""
    cards = machine.driver.cards
    at_work = {job.lock for job in running}
    return next((card for card in cards if card.uuid in at_work), cards[0] if cards else None)


def minute_bars(shares: Collection[float], width: int) -> str:
    """The last seconds, newest at the right, each of `width` columns the most of some of them; the scale is 0 to 1."""
    each = -(-SECONDS // max(1, width))
    values = list(shares)[::-1]
    most = [max(values[index : index + each]) for index in range(0, len(values), each)]
    return "".join(BARS[min(len(BARS) - 1, int(share * len(BARS)))] for share in reversed(most))


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts as there is room for, the first ones first."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(kept)) > width:
        kept.pop()
    return "  ".join(kept)


def memory_bar(parts: Sequence[Part], limit: int | None, width: int) -> list[tuple[str, str]]:
    """`width` cells, each the sign and the colour of the part that has most of it, and a mark where the plan ends."""
    total = sum(part.nbytes for part in parts)
    if not total or width < 1:
        return []
    ends = [sum(part.nbytes for part in parts[: index + 1]) for index in range(len(parts))]
    cells = []
    for cell in range(width):
        middle = (cell + 0.5) * total / width
        part = next(part for part, end in zip(parts, ends, strict=True) if middle <= end)
        cells.append((part.sign, part.colour))
    if limit is not None and 0 < limit <= total:
        cells[min(width - 1, int(limit * width / total))] = (LIMIT, "limit")
    return cells


def _share(machine: Machine, card: Card | None) -> float:
    if card is not None and card.utilisation is not None:
        return card.utilisation / 100
    return 1 - machine.host.available_bytes / machine.host.total_bytes


def card_words(card: Card, count: int) -> list[str]:
    """Which it is, how busy, and how hot."""
    parts = [card.name.removeprefix("NVIDIA ") + (f" ({card.index} of {count})" if count > 1 else "")]
    if card.utilisation is not None:
        parts.append(f"util {card.utilisation} %")
    if card.temperature_c is not None:
        parts.append(f"{card.temperature_c} \u00b0C")
    if card.power_w is not None:
        parts.append(f"{card.power_w:.0f} W")
    return parts


def card_parts(card: Card, machine: Machine, job: Job | None) -> list[Part]:
    """What torch has in tensors, what it keeps for the next ones, what all others hold, what is free.

    A worker that does not tell is one part, as the driver counts it; a driver that tells nothing gives none.
    """
    if card.total_bytes is None or card.free_bytes is None:
        return []
    used = card.total_bytes - card.free_bytes
    progress = None if job is None else job.progress
    if progress is not None and progress.tensor_bytes is not None and progress.torch_bytes is not None:
        torch = min(used, progress.torch_bytes)
        tensors = min(torch, progress.tensor_bytes)
        ours = [Part("\u2588", "tensors", "tensors", tensors), Part("\u2593", "cache", "cache", torch - tensors)]
    else:
        held = sum(holder.held_bytes or 0 for holder in card.holders or () if holder.pid in machine.ours)
        torch = min(used, held)
        ours = [Part("\u2588", "tensors", "worker", torch)]
    others = Part("\u2592", "others", "others", used - torch)
    return [*ours, others, Part("\u00b7", "free", "free", card.free_bytes)]


def host_words(machine: Machine) -> list[str]:
    """Why there is no card to tell of, and what of this machine is shown instead."""
    host = machine.host
    fault = (machine.driver.fault or "no NVIDIA card").split(" (")[0]
    limit = [] if host.cgroup_limit is None else [f"limit {gib(host.cgroup_limit)}"]
    return [f"{fault}: this machine's RAM", *limit, f"this window {host.process_rss / 2**20:.0f} MiB"]


def host_parts(machine: Machine) -> list[Part]:
    """RAM: the workers', all others', and what is free."""
    host = machine.host
    used = host.total_bytes - host.available_bytes
    ours = min(used, machine.ours_rss)
    return [
        Part("\u2588", "tensors", "worker", ours),
        Part("\u2592", "others", "others", used - ours),
        Part("\u00b7", "free", "free", host.available_bytes),
    ]
