"""`hvlite plan`: what a clip will take, stage by stage, before anything is loaded. See `cli` for the contract."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvlite.cli_flags import ModelFlags, RequestFlags
from hvlite.cli_outlook import REAL, clip_text, disk_rate, gib, profile_name, rates_for, room_here, setting_for
from hvlite.errors import ExitCode, HvliteError, RequestError
from hvlite.memory.choice import steps_left
from hvlite.memory.geometry import AUTO, AskedTiles, parse_tiles, tiles_text
from hvlite.memory.plan import Plan
from hvlite.memory.predict import Prediction, predict
from hvlite.memory.rates import Rates
from hvlite.planning import Setting, Wishes, plan_clip
from hvlite.profile import Profile, Room, card_profiles, load_profile
from hvlite.progress import Talk, interruptible, print_json
from hvlite.request import Request, ResolvedRequest

if TYPE_CHECKING:
    from hvlite.memory.trace import StagePeak
    from hvlite.unfinished import Knobs

# How far a plan may be from its trace.
TRACE_TOLERANCE = 0.02


def plan_command(
    *,
    what: RequestFlags | None = None,
    how: ModelFlags | None = None,
    card: str | None = None,
    here: bool = False,
    verify: bool = False,
    json: bool = False,
) -> int:
    """Say what a clip takes in every stage, and whether it fits; without --profile, for every profile.

    Parameters
    ----------
    card
        Predict seconds for this card (such as 4090), by public figures of it.
    here
        Plan for what is free on this machine now, not for the card that the profile is named after.
    verify
        Run the whole line on tensors without memory and count every byte (some seconds to a minute).
    json
        One object on stdout.
    """
    what, how = what or RequestFlags(), how or ModelFlags()
    tiles = parse_tiles(how.decode_tile or AUTO)
    request = Request("any", **{key: value for key, value in vars(what).items() if value is not None})
    if here and verify:
        raise RequestError("--verify proves the plan for the card that the profile is named after: leave --here away")
    if how.profile is None and not (here or verify or json or card):
        return _print_overview(request, how, Wishes(tiles=tiles))
    profile = load_profile(profile_name(how, card), **how.overrides())
    if verify and "cpu" in (profile.kind, how.device):
        raise RequestError("--verify counts what lies on a card, and a CPU has no memory apart: name a card's profile")
    room = room_here(how) if here else None
    setting = setting_for(how, profile, room)
    shown = Shown(
        profile=profile,
        setting=setting,
        resolved=request.resolve(setting.dims),
        room=room,
        wishes=Wishes(tiles=tiles),
        rates=rates_for(card, setting, profile),
        traced=_trace(request, profile, setting, how, tiles) if verify else None,
    )
    return show_plan(shown, as_json=json)


def plan_here(request: Request, how: ModelFlags, resume: Path | None, *, as_json: bool) -> int:
    """What `gen` would do with these on this machine now; with `resume`, what is left of that clip."""
    tiles = parse_tiles(how.decode_tile or AUTO)
    profile = load_profile(profile_name(how), **how.overrides())
    room = None if how.device == "meta" else room_here(how)
    setting = setting_for(how, profile, room)
    resolved = request.resolve(setting.dims)
    shown = Shown(
        profile=profile,
        setting=setting,
        resolved=resolved,
        room=room,
        wishes=Wishes(tiles=tiles),
        rates=rates_for(None, setting, profile),
    )
    return show_plan(shown if resume is None else _resumed(shown, resume), as_json=as_json)


def _resumed(shown: "Shown", path: Path) -> "Shown":
    """With what an earlier run left of the clip; RequestError where it cannot go on with that."""
    from hvlite.line import wishes_of
    from hvlite.run import Outputs
    from hvlite.unfinished import load_unfinished

    saved = load_unfinished(path)
    # which weights these are is not known before they are opened
    saved.check(path, shown.resolved, shown.setting.dims, saved.made.model.fingerprint, shown.profile.dtype)
    began = None if saved.progress is None else saved.progress.knobs
    return replace(shown, wishes=wishes_of(Outputs(decode_tile=shown.wishes.tiles), saved), began=began)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a plan is made and shown of."""

    profile: Profile
    setting: Setting
    resolved: ResolvedRequest
    room: Room | None
    wishes: Wishes
    rates: Rates | None = None
    traced: "dict[str, StagePeak] | None" = None
    began: "Knobs | None" = None


def show_plan(shown: Shown, *, as_json: bool) -> int:
    """Make the plan, print it, and say by the exit code whether it fits and agrees with its trace."""
    plan = plan_clip(shown.resolved, shown.profile, shown.setting, shown.room, shown.wishes)
    if shown.began is not None:
        from hvlite.run import differences, knobs_of

        plan = replace(plan, notes=(*plan.notes, *differences(shown.began, knobs_of(plan))))
    can_predict = shown.rates is not None and plan.fits
    predicted = predict(plan, shown.rates) if can_predict and shown.rates else None
    if as_json:
        print_json(_as_json(plan, shown.profile, shown.resolved, shown.traced, predicted))
    else:
        _print_plan(plan, shown.profile, shown.setting, shown.resolved, shown.traced)
        if shown.rates is not None and predicted is not None:
            _print_prediction(predicted, shown.rates, steps_left(plan.inputs))
    for need in plan.stages if shown.traced is not None else ():
        traced = shown.traced[need.name].peak_bytes if shown.traced else 0
        if abs(traced - need.live_bytes) > TRACE_TOLERANCE * traced:
            raise HvliteError(
                f"stage {need.name} holds {gib(traced)}, the plan says {gib(need.live_bytes)}: more than "
                f"{TRACE_TOLERANCE:.0%} apart. Please report it with this command"
            )
    return ExitCode.DONE if plan.fits else ExitCode.DOES_NOT_FIT


def _print_prediction(predicted: Prediction, rates: Rates, steps: int) -> None:
    step = predicted.step
    print(f"\npredicted, by {rates.made_by} and a disk of {(rates.disk_read or 0) / 1e9:.1f} GB/s; not measured:")
    print(
        f"a step {step.seconds:.1f} s: computing {step.compute_s:.1f} s, waiting for copies {step.copy_wait_s:.1f} s, "
        f"for the disk {step.disk_wait_s:.1f} s"
    )
    print(
        f"a clip {_clock(predicted.clip_s)} and its decode: text {predicted.text_s:.1f} s, schedule "
        f"{predicted.schedule_s:.1f} s, {steps} steps {_clock(predicted.steps_s)}; once more {predicted.load_s:.1f} s "
        "for the first clip, to load what stays"
    )
    if predicted.spill_s:
        print(f"its decode also moves its layers back and forth: {_clock(predicted.spill_s)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _trace(
    request: Request, profile: Profile, setting: Setting, how: ModelFlags, tiles: AskedTiles
) -> "dict[str, StagePeak]":
    """What the line holds in each stage, counted."""
    talk = Talk()
    with interruptible(talk):
        from hvlite.proof import open_on_meta, trace_clip

        with open_on_meta(how.model or REAL, profile, setting, how.files()) as model:
            peaks = trace_clip(request, model, tiles, lambda stage: talk.say(f"tracing {stage}"))
    return {peak.stage: peak for peak in peaks}


def _print_overview(request: Request, how: ModelFlags, wishes: Wishes) -> int:
    """One line for each profile."""
    profiles = [load_profile(name, **how.overrides()) for name in card_profiles()]
    settings = [setting_for(how, profile) for profile in profiles]
    resolved = request.resolve(settings[0].dims)
    plans = [
        plan_clip(resolved, profile, setting, None, wishes) for profile, setting in zip(profiles, settings, strict=True)
    ]
    print(f"{clip_text(resolved)}, {settings[0].dims.name}, every profile as it is named")
    print(f"{'profile':8} {'weights':13} {'fits':4} {'peak':>9} {'budget':>9}  {'on the card':>11}  {'host':>9}  tiles")
    for profile, setting, plan in zip(profiles, settings, plans, strict=True):
        blocks = f"{plan.resident_blocks}/{plan.resident_blocks + plan.streamed_blocks}"
        held = "as stored" if setting.formats is None else setting.formats.weights
        print(
            f"{profile.name:8} {held:13} {'yes' if plan.fits else 'no':4} {gib(plan.peak_bytes):>9} "
            f"{gib(plan.budget_bytes):>9}  {blocks:>11}  {gib(plan.host_bytes):>9}  {tiles_text(plan.tiles)}"
        )
    print("stage by stage: hvlite plan --profile NAME; what is free here: --here; the proof: --verify")
    return ExitCode.DONE if any(plan.fits for plan in plans) else ExitCode.DOES_NOT_FIT


def _print_plan(
    plan: Plan, profile: Profile, setting: Setting, resolved: ResolvedRequest, traced: "dict[str, StagePeak] | None"
) -> None:
    formats = setting.formats
    held = "as stored" if formats is None else f"{formats.weights} weights, {formats.text_weights} text weights"
    print(f"{clip_text(resolved)}, {setting.dims.name}, profile {profile.name} ({profile.dtype}; {held})")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    print(f"{verdict}: {gib(plan.peak_bytes)} of {gib(plan.budget_bytes)}")
    print(f"\n{'stage':9} {'weights':>10} {'activations':>12} {'workspace':>10} {'peak':>10}", end="")
    print("" if traced is None else f" {'live':>10} {'traced':>10}")
    for need in plan.stages:
        numbers = (need.activation_bytes, need.workspace_bytes, need.peak_bytes)
        line = f"{need.name:9} {gib(need.weights_bytes):>10} " + " ".join(
            f"{gib(number):>{width}}" for number, width in zip(numbers, (12, 10, 10), strict=True)
        )
        if traced is not None:
            line += f" {gib(need.live_bytes):>10} {gib(traced[need.name].peak_bytes):>10}"
        print(line)
    print(f"\n{plan.knobs_text}")
    moved = f"{gib(plan.bytes_per_step)} travel to the device at every step"
    if plan.disk_bytes_per_step:
        rate = disk_rate()
        seconds = f"{plan.disk_bytes_per_step / rate:.1f} s at {rate / 1e9:.1f} GB/s, while others are computed"
        moved += f", {gib(plan.disk_bytes_per_step)} of them from disk ({seconds})"
    print(f"{moved}; {gib(plan.once_bytes)} once a clip; {gib(plan.host_bytes)} of host memory")
    print(f"decoded in tiles of {tiles_text(plan.tiles)}" if plan.spilled is None else "decoded without tiles", end="")
    print(f": {plan.decoded_volume:.2f} times the clip's volume")
    if plan.warm:
        print(f"stay loaded between clips: {', '.join(plan.warm)}")
    for note in plan.notes:
        print(f"note: {note}")
    if not plan.fits:
        advice = plan.advice()
        print(f"to make it fit: {' or '.join(advice)}" if advice else "no smaller clip fits either")


def _as_json(
    plan: Plan,
    profile: Profile,
    resolved: ResolvedRequest,
    traced: "dict[str, StagePeak] | None",
    predicted: Prediction | None,
) -> dict[str, Any]:
    values = plan.as_dict()
    stages = [asdict(need) for need in plan.stages]
    if traced is not None:
        for stage in stages:
            stage["traced_bytes"] = traced[stage["name"]].peak_bytes
    size = {"size": resolved.size, "frames": resolved.frames, "steps": resolved.steps}
    seconds = None if predicted is None else {**asdict(predicted), "clip_s": predicted.clip_s}
    return {**size, "profile": profile.name, **values, "stages": stages, "predicted": seconds}
