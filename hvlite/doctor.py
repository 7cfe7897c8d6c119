"""What to paste into a bug report: versions, device, memory and who holds it, disk, models, and the profile to use.

Each section is one thing, as text and as values, made by a function of its own; where one fails, the rest goes on.
No secrets: no arguments of other processes, no environment but what steers hvlite, the home folder as ~.
"""

import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hvlite import paths
from hvlite.disk import measure_disk
from hvlite.errors import HvliteError
from hvlite.machine import default_profile, holders_text, none_fits, room_of
from hvlite.measure import made_by
from hvlite.memory.device import choose_device
from hvlite.memory.rates import load_rates
from hvlite.model.ops import choose_attention
from hvlite.planning import fits_by_plan
from hvlite.profile import CPU, GIB, budget_bytes, choose_profile, load_profile
from hvlite.telemetry import (
    Card,
    Driver,
    cpu_name,
    disk_state,
    driver_state,
    host_state,
    is_wsl,
    load_average,
)
from hvlite.torch_check import TorchSeen, can_register, fused_kernels, probe_pinning, torch_advice
from hvlite.weights.mounts import unfit_file_system
from hvlite.weights.store import ListedStore, list_stores

# What is printed beside torch: where a quantised or encoded clip differs between machines, these are asked for.
PACKAGES = ("transformers", "accelerate", "bitsandbytes", "optimum-quanto", "safetensors", "av", "numpy")
# What steers hvlite or torch from outside. Shown where set.
VARIABLES = (
    "HVLITE_HOME",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
)
PROBE_SIZES = tuple(1 << power for power in range(28, 33))
PROBE_DISK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One thing that was looked at: for people, and for programs."""

    name: str
    lines: tuple[str, ...]
    values: dict[str, object]


def examine() -> Iterator[Section]:
    """Every section, in the order in which they are printed."""
    driver = driver_state()
    makers: tuple[tuple[str, Callable[[], Section]], ...] = (
        ("hvlite", _own_section),
        ("system", _system_section),
        ("torch", lambda: _torch_section(driver)),
        ("driver", lambda: _driver_section(driver)),
        ("memory", _memory_section),
        ("disk", _disk_section),
        ("attention", _attention_section),
        ("models", _models_section),
        ("rates", _rates_section),
        ("profile", lambda: _profile_section(driver)),
        # last: a refusal may leave an error behind in CUDA
        ("pinning", _pinning_section),
    )
    for name, make in makers:
        try:
            yield _without_home(make())
        except Exception as error:  # whatever ails a machine, the rest of the report is wanted all the more
            fault = f"{type(error).__name__}: {error}"
            yield _without_home(Section(name=name, lines=(f"not known: {fault}",), values={"error": fault}))


def _without_home(section: Section) -> Section:
    return Section(
        name=section.name,
        lines=tuple(tilde(line) for line in section.lines),
        values={key: _tilde_all(value) for key, value in section.values.items()},
    )


def _tilde_all(value: object) -> object:
    if isinstance(value, dict):
        return {key: _tilde_all(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_tilde_all(each) for each in value]
    return tilde(str(value)) if isinstance(value, str | Path) else value


def tilde(text: str) -> str:
    """The home folder, wherever it stands in a text, as ~."""
    home = str(Path.home())
    return text if home == "/" else re.sub(re.escape(home) + r"(?![\w.-])", "~", text)


def _own_section() -> Section:
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    values: dict[str, object] = {"version": version("hvlite"), "home": str(paths.home()), "environment": found}
    lines = [f"{version('hvlite')}, home {paths.home()}"]
    lines += [f"{name}={value}" for name, value in found.items()]
    return Section(name="hvlite", lines=tuple(lines), values=values)


def _system_section() -> Section:
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        system = "Linux"
    wsl = ", WSL2" if is_wsl() else ""
    threads, load = os.cpu_count() or 1, load_average()
    lines = (
        f"{system}, kernel {platform.release()}{wsl}, Python {platform.python_version()}",
        f"{cpu_name()}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}, load {load:.1f}",
    )
    values = {
        "system": system,
        "kernel": platform.release(),
        "wsl": is_wsl(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": threads,
        "load": load,
    }
    return Section(name="system", lines=lines, values=values)


# torch and the card.


def _torch_section(driver: Driver) -> Section:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    said = " ".join(str(caught[-1].message).split()) if caught else ""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    packages = {name: _installed(name) for name in PACKAGES}
    advice = torch_advice(driver, TorchSeen(str(torch.__version__), torch.version.cuda, usable, said))
    lines = [f"{torch.__version__}, {built}, {torch.get_num_threads()} threads"]
    lines += [_device_line(index) for index in range(torch.cuda.device_count() if usable else 0)]
    lines += [", ".join(f"{name} {number or 'missing'}" for name, number in packages.items()), *advice]
    values: dict[str, object] = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "usable": usable,
        "packages": packages,
        "advice": advice,
    }
    return Section(name="torch", lines=tuple(lines), values=values)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_line(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _driver_section(driver: Driver) -> Section:
    lines = [f"{driver.version}, runs CUDA up to {driver.cuda}"] if driver.version else []
    for card in driver.cards:
        lines += _card_lines(card)
    if driver.fault:
        lines.append(driver.fault)
    values: dict[str, object] = {
        "version": driver.version,
        "cuda": driver.cuda,
        "fault": driver.fault,
        "cards": [_card_values(card) for card in driver.cards],
    }
    return Section(name="driver", lines=tuple(lines), values=values)


def _card_lines(card: Card) -> list[str]:
    free, total = (_gib(size) for size in (card.free_bytes, card.total_bytes))
    link = f"PCIe {card.pcie_gen} x{card.pcie_width}" if card.pcie_gen and card.pcie_width else "PCIe link unknown"
    state = [
        f"{card.utilisation} % busy" if card.utilisation is not None else "",
        f"{card.temperature_c} C" if card.temperature_c is not None else "",
        f"{card.power_w:.0f} W" if card.power_w is not None else "",
    ]
    held = "the driver does not tell (WSL2, container)" if card.holders is None else holders_text(card.holders)
    return [
        f"card {card.index}: {card.name}, {free} of {total} free, {link}",
        f"  {', '.join(part for part in state if part) or 'its state is not told'}; held by: {held or 'nobody'}",
    ]


def _card_values(card: Card) -> dict[str, object]:
    names = [name for name in Card.__slots__ if name not in ("holders", "uuid")]
    holders = [{"name": each.name, "pid": each.pid, "bytes": each.held_bytes} for each in card.holders or ()]
    return {**{name: getattr(card, name) for name in names}, "holders": holders}


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f} GiB"


# Memory and disk.


def _memory_section() -> Section:
    host = host_state()
    limit = "no cgroup limit" if host.cgroup_limit is None else f"cgroup limit {_gib(host.cgroup_limit)}"
    line = f"{_gib(host.available_bytes)} of {_gib(host.total_bytes)} available, {limit}"
    own = f"this process: {_gib(host.process_rss)} now, {_gib(host.process_peak)} at its peak (Python, torch)"
    return Section(name="memory", lines=(line, own), values={name: getattr(host, name) for name in host.__slots__})


def _pinning_section() -> Section:
    if not torch.cuda.is_available():
        return Section(name="pinning", lines=("no CUDA device",), values={"bytes": None})
    most = host_state().available_bytes // 2
    pinned, refused = probe_pinning([size for size in PROBE_SIZES if size <= most], can_register)
    line = f"{_gib(pinned)} registered with CUDA"
    line += f", {_gib(refused)} refused: more is used unpinned, at a lower rate" if refused else " (no more was tried)"
    return Section(name="pinning", lines=(line,), values={"bytes": pinned, "refused_bytes": refused})


def _disk_section() -> Section:
    folder = paths.packed_folder()
    disk = disk_state(folder)
    values: dict[str, object] = {"folder": str(folder), "free_bytes": disk.free_bytes, "filesystem": disk.filesystem}
    lines = [f"{folder}: {disk.free_bytes / 1e9:.0f} GB free, {disk.filesystem or 'unknown file system'}"]
    if reason := unfit_file_system(folder):
        values["unfit"] = reason
        lines.append(f"{reason}: no store can be kept there. Set HVLITE_HOME to a folder on a local disk")
    try:
        rate = measure_disk(folder, PROBE_DISK_BYTES)
    except HvliteError as error:
        values["error"] = str(error)
        lines.append(f"not measured: {error}")
    else:
        values |= {"bytes_per_second": rate.bytes_per_second, "is_cold": rate.is_cold}
        source = "from the disk itself" if rate.is_cold else "from memory: the page cache could not be emptied"
        lines.append(f"{rate.what} read at {rate.bytes_per_second / 1e9:.2f} GB/s, {source}")
    return Section(name="disk", lines=tuple(lines), values=values)


# What hvlite can use.


def _attention_section() -> Section:
    device = choose_device()
    chosen = choose_attention(device.type)
    flash, sage = _installed("flash-attn"), _installed("sageattention")
    fused = fused_kernels() if device.type == "cuda" else ["torch's CPU kernel"]
    lines = (
        f"used on {device.type}: {chosen}; fused kernels of torch: {', '.join(fused) or 'none'}",
        f"flash-attn {flash}" if flash else "flash-attn is not installed: torch's fused kernels are used instead",
        f"sageattention {sage}" if sage else "sageattention is not installed: only --attention sage wants it",
    )
    values: dict[str, object] = {"chosen": chosen, "fused": fused, "flash-attn": flash, "sageattention": sage}
    return Section(name="attention", lines=lines, values=values)


def _models_section() -> Section:
    rows = [*_checkpoints(), *(_store_row(store) for store in list_stores(paths.packed_folder()))]
    lines = ["shapes (embedded)"]
    lines += [f"{row['name']}: {row['kind']}, {_gb(row['bytes'])}" for row in rows]
    if not rows:
        lines.append(f"none in {paths.models_folder()} and {paths.packed_folder()}")
    return Section(name="models", lines=tuple(lines), values={"models": rows})


def _gb(size: object) -> str:
    assert isinstance(size, int)
    return f"{size / 1e9:.2f} GB"


def _checkpoints() -> Iterator[dict[str, object]]:
    folder = paths.models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield {"name": path.name, "kind": "checkpoint", "bytes": size}


def _store_row(store: ListedStore) -> dict[str, object]:
    index = store.index
    kind = f"store, {store.fault}" if index is None else f"store of {index.weights}, text {index.text_weights}"
    return {"name": store.path.name, "kind": kind, "bytes": store.disk_bytes, "fault": store.fault}


def _rates_section() -> Section:
    file = paths.rates_file()
    try:
        rates = load_rates(file)
    except HvliteError as error:
        return Section(name="rates", lines=(str(error),), values={"error": str(error)})
    if rates is None:
        return Section(name="rates", lines=("not measured (hvlite doctor --measure)",), values={"made_by": None})
    here = made_by(choose_device())
    age = (time.time() - file.stat().st_mtime) / 86400
    lines = [f"measured {age:.0f} days ago on {rates.made_by}"]
    if rates.made_by != here:
        lines.append(f"this is {here}: measure again (hvlite doctor --measure)")
    return Section(name="rates", lines=tuple(lines), values={"made_by": rates.made_by, "holds": rates.made_by == here})


def _profile_section(driver: Driver) -> Section:
    device = choose_device()
    room, named = room_of(device), default_profile(device)
    choice = choose_profile(room, fits_by_plan)
    values: dict[str, object] = {"default": named, "chosen": choice.name, "free_bytes": room.free_bytes}
    if choice.name is None:
        card = driver.cards[0] if len(driver.cards) == 1 else None
        return Section(name="profile", lines=(none_fits(choice, card),), values=values)
    profile = load_profile(choice.name)
    verdict = next(verdict for verdict in choice.verdicts if verdict.name == choice.name)
    budget = budget_bytes(profile, room)
    lines = [f"{choice.name} on {device}: {verdict.why}"]
    if room.kind != CPU:
        lines.append(f"so a run may take {_gib(budget)} of the card")
    host = host_state()
    if host.available_bytes < profile.host_gib * GIB:
        lines.append(
            f"it wants {profile.host_gib:g} GiB of RAM for weights, {_gib(host.available_bytes)} is available: "
            "the rest is read from disk at every step"
        )
    return Section(name="profile", lines=tuple(lines), values={**values, "why": verdict.why, "budget_bytes": budget})
