"""What flags, or a job, mean for a plan: profile, model, machine, its speed. And the outlook of many clips at once."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import HvliteError, RequestError
from hvlite.jobs.job import How
from hvlite.memory.geometry import AUTO, parse_tiles
from hvlite.memory.plan import Plan
from hvlite.memory.predict import predict
from hvlite.memory.rates import CardFigures, Rates, card_rates, find_card, load_rates
from hvlite.planning import Kind, Setting, Wishes, plan_clip, setting_of
from hvlite.profile import GIB, Profile, Room, card_profiles, load_profile
from hvlite.request import Request, ResolvedRequest
from hvlite.telemetry import cards, cpu_name

REAL = HUNYUANVIDEO.name
# Bytes per second of a common NVMe disk, where a card's machine is not this one.
ASSUMED_DISK = 3.5e9


def setting_for(how: How, profile: Profile, room: Room | None = None) -> Setting:
    """The model and its formats: those of a store, else those that a checkpoint would be packed to.

    What computes is what `room` is of; without one, what the profile is of.
    """
    kind: Kind | None = "cpu" if how.device == "cpu" else None if room is None else room.kind
    asked = how.weights is not None or how.text_weights is not None
    if how.model in (None, REAL):
        return setting_of(HUNYUANVIDEO, profile, asked=True, kind=kind)
    from hvlite.origin import Packed, find_origin
    from hvlite.packing import check_formats

    assert how.model is not None
    origin = find_origin(how.model, how.files(), dynamic=profile.weights == "int8-dynamic")
    setting = setting_of(origin.dims, profile, asked=asked, kind=kind)
    if isinstance(origin, Packed):
        check_formats(origin.store, how.weights, how.text_weights)
        return replace(setting, formats=origin.formats, dynamic=origin.dynamic, repacks=False)
    return setting


def profile_name(how: How, card: str | None = None) -> str:
    """What is asked for; else what the named card, or this machine, suggests."""
    if how.profile not in (None, "auto"):
        assert how.profile is not None
        return how.profile
    if card is not None:
        return largest_for(find_card(card))
    from hvlite.machine import AUTO, auto_profile, default_profile
    from hvlite.memory.device import choose_device

    device = choose_device(how.device)
    name = how.profile or default_profile(device)
    return auto_profile(device) if name == AUTO else name


def largest_for(card: CardFigures) -> str:
    """The profile of the largest card that has no more memory than this one."""
    fitting = [name for name in card_profiles() if load_profile(name).memory_gib <= card.memory_gib]
    return fitting[-1]


def room_here(how: How) -> Room:
    """What is free on the device that is asked for."""
    from hvlite.machine import room_of
    from hvlite.memory.device import choose_device

    return room_of(choose_device(how.device))


def rates_for(card: str | None, setting: Setting, profile: Profile) -> Rates | None:
    """Of the named card, or as this machine was measured, if that was of what is planned for."""
    if card is not None:
        figures = find_card(card)
        if setting.kind == "cpu":
            raise RequestError(f"--card {card} is no CPU: name a profile for cards, such as --profile 24g")
        if profile.memory_gib > figures.memory_gib:
            raise RequestError(
                f"the {figures.name} has {figures.memory_gib} GiB, profile {profile.name} wants "
                f"{profile.memory_gib:g}: leave --profile away, or try --profile {largest_for(figures)}"
            )
        return card_rates(figures, disk_read=ASSUMED_DISK)
    measured = load_rates(paths.rates_file())
    if measured is None or measured.disk_read is None or profile.dtype not in measured.compute:
        return None
    names = [cpu_name()] if setting.kind == "cpu" else [each.name for each in cards()]
    return measured if measured.made_by.startswith(tuple(names)) else None


def disk_rate() -> float:
    """Bytes per second: as this machine's disk was measured, else what is common."""
    with suppress(HvliteError):
        measured = load_rates(paths.rates_file())
        if measured is not None and measured.disk_read is not None:
            return measured.disk_read
    return ASSUMED_DISK


def clip_text(resolved: ResolvedRequest) -> str:
    """A clip in a few words."""
    height, width = resolved.size
    return f"{height}x{width}x{resolved.frames}, {resolved.steps} steps"


def gib(nbytes: int) -> str:
    """A size as plans show it."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 or nbytes == 0 else f"{nbytes / 2**20:.1f} MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What becomes of a clip on this machine now; `seconds` are None where the machine was not measured."""

    clip: str
    plan: Plan
    steps: int
    seconds: float | None

    def seconds_of(self, stop_after: int | None) -> float | None:
        """A draft takes its share of the steps; what comes before them hardly counts."""
        share = min(1.0, (stop_after or self.steps) / self.steps)
        return None if self.seconds is None else self.seconds * share

    @property
    def text(self) -> str:
        """One line."""
        verdict = "fits" if self.plan.fits else "DOES NOT FIT"
        return f"{self.clip}: {verdict}, {gib(self.plan.peak_bytes)} of {gib(self.plan.budget_bytes)}"


def outlooks(requests: Sequence[Request], how: How) -> list[Outlook]:
    """One for each; clips that differ in nothing but their words and seeds share one."""
    profile = load_profile(profile_name(how), **how.overrides())
    room = room_here(how)
    setting = setting_for(how, profile, room)
    rates, wishes = rates_for(None, setting, profile), Wishes(tiles=parse_tiles(how.decode_tile or AUTO))

    def look(resolved: ResolvedRequest) -> Outlook:
        plan = plan_clip(resolved, profile, setting, room, wishes)
        predicted = predict(plan, rates) if rates is not None and plan.fits else None
        seconds = None if predicted is None else predicted.clip_s
        return Outlook(clip=clip_text(resolved), plan=plan, steps=resolved.steps, seconds=seconds)

    made: dict[tuple[object, ...], Outlook] = {}
    found = []
    for resolved in (request.resolve(setting.dims) for request in requests):
        key = (resolved.size, resolved.frames, resolved.steps, resolved.uses_cfg)
        made[key] = made.get(key) or look(resolved)
        found.append(made[key])
    return found
