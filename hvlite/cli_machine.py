"""The commands about this machine: `hvlite profiles ...` and `hvlite doctor`. See `cli` for the contract."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Parameter

from hvlite import paths
from hvlite.errors import ExitCode
from hvlite.profile import LoadedProfile, Overrides, profile_names, read_profile
from hvlite.progress import Talk, interruptible, print_json, printable

if TYPE_CHECKING:
    from hvlite.memory.rates import Rates

# What other processes may take of the CPU while it is measured.
BUSY_CORES = 0.1

profiles = App(
    name="profiles",
    help="How memory is used: profiles listed, explained, checked.",
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileFlags(Overrides):
    """The fields and their help are those of `Overrides`; here they become flags."""


@profiles.command(name="ls")
def ls_command(*, json: bool = False) -> int:
    """List the profiles: the shipped ones and your own, in HVLITE_HOME/profiles.

    Parameters
    ----------
    json
        One object on stdout.
    """
    loaded = [read_profile(name) for name in profile_names()]
    if json:
        print_json({"profiles": [_as_json(each) for each in loaded]})
        return ExitCode.DONE
    print(f"{'name':8} {'memory':>8} {'reserve':>8} {'host':>8}  {'weights':13} {'text':11} {'dtype':6} file")
    for each in loaded:
        found = each.profile
        sizes = " ".join(f"{size:>4g} GiB" for size in (found.memory_gib, found.reserve_gib, found.host_gib))
        file = _short(str(each.file))
        print(f"{found.name:8} {sizes}  {found.weights:13} {found.text_weights:11} {found.dtype:6} {file}")
    return ExitCode.DONE


@profiles.command(name="show")
def show_command(name: str, *, flags: ProfileFlags | None = None, json: bool = False) -> int:
    """Show every value of a profile and where it comes from; flags are laid over it as `hvlite gen` does.

    Parameters
    ----------
    name
        A profile's name, or a .toml file.
    json
        One object on stdout.
    """
    _print_profile(read_profile(name, **(flags or ProfileFlags()).overrides()), as_json=json)
    return ExitCode.DONE


@profiles.command(name="check")
def check_command(file: Path, *, json: bool = False) -> int:
    """Check a profile's file; an error names the key, the value and what is allowed.

    Parameters
    ----------
    file
        A .toml file.
    json
        One object on stdout.
    """
    _print_profile(read_profile(file), as_json=json)
    Talk().say(f"{file} is a valid profile: use it by --profile {file}")
    return ExitCode.DONE


@profiles.command(name="detect")
def detect_command(*, device: str | None = None, json: bool = False) -> int:
    """Show which profile `--profile auto` takes here now, and why.

    Parameters
    ----------
    device
        cpu, cuda or cuda:N (by default the CUDA device with most free memory, else cpu).
    json
        One object on stdout.
    """
    from hvlite.machine import default_profile, room_of
    from hvlite.memory.device import choose_device, device_name, unused_card_note
    from hvlite.planning import fits_by_plan
    from hvlite.profile import choose_profile

    chosen = choose_device(device)
    room = room_of(chosen)
    choice = choose_profile(room, fits_by_plan)
    if json:
        print_json({"device": str(chosen), "room": dataclasses.asdict(room), **dataclasses.asdict(choice)})
        return ExitCode.DONE if choice.name else ExitCode.DOES_NOT_FIT
    if note := unused_card_note():
        Talk().say(note)
    gib = 1 << 30
    free, total = room.free_bytes / gib, room.total_bytes / gib
    print(f"device   {chosen} ({device_name(chosen)}): {free:.1f} of {total:.1f} GiB free")
    print(f"auto     {choice.name or 'none fits'} (without --profile, {default_profile(chosen)} is used)")
    for verdict in choice.verdicts:
        mark = "fits" if verdict.fits else "no"
        print(f"{verdict.name:8} {mark:5}{verdict.why}")
    return ExitCode.DONE if choice.name else ExitCode.DOES_NOT_FIT


def _print_profile(loaded: LoadedProfile, *, as_json: bool) -> None:
    if as_json:
        print_json(_as_json(loaded))
        return
    print(f"{'name':14} {loaded.profile.name}")
    for key, value in loaded.settings().items():
        print(f"{key:14} {printable(str(value)):14} {_short(loaded.sources[key])}")


def _as_json(loaded: LoadedProfile) -> dict[str, Any]:
    return {"name": loaded.profile.name, "settings": loaded.settings(), "sources": dict(loaded.sources)}


def _short(source: str) -> str:
    """A file in the user's home by ~; flags and other words as they are."""
    home = f"{Path.home()}/"
    return printable("~/" + source.removeprefix(home) if source.startswith(home) else source)


def doctor(*, measure: bool = False, json: bool = False) -> int:
    """Say what this machine has and what hvlite makes of it: the text to paste into a bug report.

    Parameters
    ----------
    measure
        First measure how fast it computes and reads (a minute or two; it should be idle), and keep the figures.
    json
        One object on stdout.
    """
    talk = Talk()
    with interruptible(talk):
        from hvlite.doctor import examine

        if measure:
            _measure(talk)
        sections = {}
        for section in examine():
            sections[section.name] = section.values
            for index, line in enumerate(() if json else section.lines):
                talk.result(f"{'' if index else section.name:10} {printable(line)}")
        if json:
            print_json(sections)
    return ExitCode.DONE


def _measure(talk: Talk) -> None:
    from hvlite.measure import ON_CPU, ON_CUDA, measure_rates
    from hvlite.memory.device import choose_device
    from hvlite.memory.rates import save_rates

    device = choose_device()
    effort = ON_CUDA if device.type == "cuda" else ON_CPU
    rates = measure_rates(device, paths.packed_folder(), effort, lambda what: talk.say(f"measuring {what}"))
    save_rates(rates, paths.rates_file())
    for line in rates_lines(rates):
        talk.say(line)
    if rates.others_cores > BUSY_CORES:
        talk.say(
            f"other processes took {rates.others_cores:.1f} cores meanwhile, so these figures are too low: "
            "measure again when the machine is idle"
        )
    talk.say(f"kept in {paths.rates_file()}")


def rates_lines(rates: "Rates") -> list[str]:
    """The figures as a table: rates by tokens, in units of 10^9 a second."""
    lines = [f"rates of {rates.made_by}"]
    for dtype, compute in rates.compute.items():
        for what, unit in (("matmul", "GFLOP/s"), ("attention", "GFLOP/s"), ("elementwise", "GB/s")):
            points = ", ".join(f"{tokens}: {rate / 1e9:.4g}" for tokens, rate in getattr(compute, what).points)
            lines.append(f"{dtype:5} {what:12} {unit:8} by tokens {points}")
    lines += [f"{weights:12} dequantised at {rate / 1e9:.3g} G weights/s" for weights, rate in rates.dequantise.items()]
    others = (("host to device", rates.host_to_device), ("disk", rates.disk_read))
    lines += [f"{what:14} {rate / 1e9:.2f} GB/s" for what, rate in others if rate is not None]
    return lines
