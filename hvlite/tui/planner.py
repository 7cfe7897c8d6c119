"""What the composer says of a clip while one types: whether it fits, what each stage takes, how long it will take."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import HvliteError
from hvlite.jobs.asking import EMBEDDED, model_of
from hvlite.jobs.eta import History, finish_times, queue_end
from hvlite.jobs.job import How
from hvlite.jobs.store import Store
from hvlite.memory.geometry import tiles_text
from hvlite.memory.plan import Plan
from hvlite.planning import fits_by_plan, plan_clip, setting_of
from hvlite.profile import Profile, Room, card_profiles, choose_profile, load_profile
from hvlite.request import Request, request_notes
from hvlite.telemetry import driver_state, host_state
from hvlite.tui import words
from hvlite.tui.desk import FORECAST, LEARN_FROM


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWords:
    """`fits` is None where nothing can be said."""

    fits: bool | None
    lines: Sequence[str]


def room_here() -> Room:
    """The card with most free memory; without one, this machine's RAM. Torch-free, so another card may be chosen."""
    cards = [card for card in driver_state().cards if card.total_bytes is not None]
    if not cards:
        host = host_state()
        return Room(kind="cpu", total_bytes=host.total_bytes, free_bytes=host.available_bytes)
    card = max(cards, key=lambda each: each.free_bytes or 0)
    return Room(kind="cuda", total_bytes=card.total_bytes or 0, free_bytes=card.total_bytes or 0)


def profile_for(how: How, room: Room) -> Profile:
    """The asked one, else what `auto` would stand for on an otherwise empty card."""
    name = how.profile or "auto"
    return load_profile(_auto(room) if name == "auto" else name, **how.overrides())


@lru_cache(maxsize=4)
def _auto(room: Room) -> str:
    """Every profile is planned for this: once for a machine, not at every key."""
    return choose_profile(room, fits_by_plan).name or card_profiles()[0]


def plan_words(request: Request, how: How, room: Room) -> PlanWords:
    """The plan of one clip; what is wrong with the profile is said instead."""
    model = model_of(how)
    if model == EMBEDDED:
        return PlanWords(fits=True, lines=["fits: the embedded test model is small enough for every machine"])
    if model != HUNYUANVIDEO.name:
        return PlanWords(fits=None, lines=[f"no plan while typing for {model}: hvlite plan --model {model}"])
    try:
        profile = profile_for(how, room)
        setting = setting_of(HUNYUANVIDEO, profile, asked=True, kind="cpu" if how.device == "cpu" else None)
        plan = plan_clip(request.resolve(HUNYUANVIDEO), profile, setting)
    except HvliteError as error:
        return PlanWords(fits=False, lines=[str(error)])
    assert setting.formats is not None
    held = f"profile {profile.name}, {setting.formats.weights} weights, {setting.formats.text_weights} text weights"
    return PlanWords(fits=plan.fits, lines=[_verdict(plan, held), *_lines(plan), *request_notes(request, HUNYUANVIDEO)])


def _verdict(plan: Plan, held: str) -> str:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"{verdict}: {words.gib(plan.peak_bytes)} of {words.gib(plan.budget_bytes)}, {held}"


def _lines(plan: Plan) -> list[str]:
    peaks = ", ".join(f"{need.name} {need.peak_bytes / 2**30:.1f}" for need in plan.stages)
    blocks = plan.resident_blocks + plan.streamed_blocks
    moved = f", {words.gib(plan.bytes_per_step)} travel every step" if plan.bytes_per_step else ""
    lines = [
        f"peaks in GiB: {peaks}",
        f"{plan.resident_blocks} of {blocks} blocks stay on the card{moved}; decode tiles {tiles_text(plan.tiles)}",
        *plan.notes,
    ]
    if not plan.fits:
        advice = plan.advice()
        lines.insert(0, f"to make it fit: {' or '.join(advice)}" if advice else "no smaller clip fits either")
    return lines


def time_words(
    store: Store, requests: Sequence[Request], how: How, stop_after: int | None, now: float, *, behind: bool
) -> str:
    """How long these clips take; `behind` all that waits, when the last of them would be done too."""
    clips = words.counted(len(requests), "clip")
    history = History(store.page(("done",), limit=LEARN_FROM))
    seconds = [history.seconds(request, how, stop_after=stop_after) for request in requests]
    known = [each for each in seconds if each is not None]
    if not known or len(known) != len(seconds):
        return f"{clips}; how long it takes is known once a clip with these weights is done"
    each = f", {words.duration(known[0])} each" if len(known) > 1 else ""
    ready = _ready(store, history, sum(known), now) if behind else ""
    return f"{clips}, {words.duration(sum(known))}{each}{ready}"


def _ready(store: Store, history: History, seconds: float, now: float) -> str:
    """When as much more work at the end of the line is done; "" where nothing tells, or nothing starts."""
    if store.settings().queue != "active":
        return ""
    ends = finish_times(store.page(("running",)), store.page(("queued",), limit=FORECAST), history, now)
    end = now if not ends else queue_end(ends)
    more = "after " if store.counts()["queued"] > FORECAST else ""
    return "" if end is None else f"; at the end of the line ready {more}{words.clock(end + seconds, now)}"
