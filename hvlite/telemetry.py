"""What this machine has and who holds it: NVIDIA cards, host memory inside its cgroups, file systems.

Only looks: no torch, no CUDA context, nothing is changed. The only user of NVML, whose errors never leave this module:
what a driver does not tell (under WSL2, in a container, on a card of another kind) is None. Sizes are bytes.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
PCI_DEVICES = Path("/sys/bus/pci/devices")
MOUNTS = Path("/proc/mounts")

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"


# NVIDIA cards.


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process with memory on a card. A name is None where the process cannot be seen from here."""

    pid: int
    name: str | None
    held_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One NVIDIA card, by NVML's index (PCI order; CUDA may count otherwise: compare `uuid`).

    `pcie_gen` is what card and slot can do: an idle card runs its link slower. `holders` is None where the driver does
    not tell, as under WSL2.
    """

    index: int
    uuid: str | None
    name: str
    total_bytes: int | None
    free_bytes: int | None
    holders: tuple[Holder, ...] | None
    utilisation: int | None
    temperature_c: int | None
    power_w: float | None
    driver: str | None
    capability: tuple[int, int] | None
    pcie_gen: int | None
    pcie_width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The NVIDIA driver and its cards; `fault` says why there are none, or which could not be asked."""

    version: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver runs."""
    cards: tuple[Card, ...] = ()
    fault: str | None = None


def cards() -> tuple[Card, ...]:
    """Every card that the driver knows, also those that CUDA_VISIBLE_DEVICES hides; () without a driver."""
    return driver_state().cards


def driver_state(nvml: Any = None) -> Driver:
    """Ask the driver for everything at once. `nvml` stands in for the module pynvml."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    asking = _Asking(nvml)
    try:
        asking.nvml.nvmlInit()
    except asking.errors as error:
        return Driver(fault=asking.why_not(error))
    try:
        return _asked(asking)
    finally:
        asking.ask("nvmlShutdown")


class _Asking:
    """NVML, with None for every question that it does not answer."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.errors = (nvml.NVMLError, nvml.NVMLLibraryMismatchError)

    def ask(self, function: str, *arguments: object) -> Any:
        try:
            return getattr(self.nvml, function)(*arguments)
        except self.errors:
            return None

    def why_not(self, error: Exception) -> str:
        known = {
            self.nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver found (its library libnvidia-ml is missing)",
            self.nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded: reboot",
            self.nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
                "the NVIDIA driver's library and its kernel module differ in version, as after an update: reboot"
            ),
            self.nvml.NVML_ERROR_NO_PERMISSION: "the NVIDIA driver refuses this user or container",
        }
        return known.get(getattr(error, "value", None), f"the NVIDIA driver does not answer: {error}")


def _asked(asking: _Asking) -> Driver:
    version = asking.ask("nvmlSystemGetDriverVersion")
    cuda = asking.ask("nvmlSystemGetCudaDriverVersion_v2")
    found: list[Card] = []
    faults: list[str] = []
    for index in range(asking.ask("nvmlDeviceGetCount") or 0):
        try:
            handle = asking.nvml.nvmlDeviceGetHandleByIndex(index)
        except asking.errors as error:
            faults.append(f"card {index} does not answer: {error}")
        else:
            found.append(_card(asking, index, handle, version))
    if not found and not faults:
        faults.append("the NVIDIA driver is loaded but has no card")
    return Driver(
        version=version,
        cuda=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        cards=tuple(found),
        fault="; ".join(faults) or None,
    )


def _card(asking: _Asking, index: int, handle: Any, driver: str | None) -> Card:
    ask, nvml = asking.ask, asking.nvml
    # Version 2 does not count what the driver itself reserves as used; old drivers have version 1 only.
    memory = ask("nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2) or ask("nvmlDeviceGetMemoryInfo", handle)
    utilisation = ask("nvmlDeviceGetUtilizationRates", handle)
    power = ask("nvmlDeviceGetPowerUsage", handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    return Card(
        index=index,
        uuid=ask("nvmlDeviceGetUUID", handle),
        name=ask("nvmlDeviceGetName", handle) or "an NVIDIA card",
        total_bytes=memory and memory.total,
        free_bytes=memory and memory.free,
        holders=_holders(asking, handle),
        utilisation=utilisation and utilisation.gpu,
        temperature_c=ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        power_w=None if power is None else power / 1000,
        driver=driver,
        capability=capability and (capability[0], capability[1]),
        pcie_gen=ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
    )


def _holders(asking: _Asking, handle: Any) -> tuple[Holder, ...] | None:
    """Every process that computes or draws, the largest first; one that does both is in both lists."""
    lists = [asking.ask(f"nvmlDeviceGet{kind}RunningProcesses", handle) for kind in ("Compute", "Graphics")]
    if lists == [None, None]:
        return None
    held: dict[int, int | None] = {}
    for process in (process for found in lists for process in found or ()):
        known = held.get(process.pid)
        used = process.usedGpuMemory
        held[process.pid] = known if used is None else max(used, known or 0)
    largest_first = sorted(held.items(), key=lambda item: (-(item[1] or 0), item[0]))
    return tuple(Holder(pid=pid, name=_process_name(pid), held_bytes=used) for pid, used in largest_first)


def _process_name(pid: int) -> str | None:
    """Its name alone: arguments may hold secrets."""
    import psutil

    try:
        name: str = psutil.Process(pid).name()
    except psutil.Error:
        return None
    return name


def has_nvidia_card(devices: Path = PCI_DEVICES) -> bool:
    """Whether an NVIDIA card is plugged in, driver or not."""
    if not devices.is_dir():
        return False
    return any(
        _text(device / "vendor").strip() == NVIDIA_VENDOR and _text(device / "class").startswith(DISPLAY_CLASS)
        for device in devices.iterdir()
    )


# Host memory.


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """RAM. `available_bytes` is what this process can still take: the machine's, or its cgroups', if that is less.

    `cgroup_limit` is None where no cgroup holds less than the machine has.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit: int | None
    process_rss: int
    process_peak: int


def host_state(proc: Path = PROC, cgroups: Path = CGROUPS) -> Host:
    """Read /proc and the memory limits (v1 and v2) of every cgroup that this process is in."""
    memory, process = _sizes(proc / "meminfo"), _sizes(proc / "self/status")
    total = memory["MemTotal"]
    groups = [group for group in _groups(_text(proc / "self/cgroup"), cgroups) if group.limit < total]
    return Host(
        total_bytes=total,
        available_bytes=min([memory["MemAvailable"], *(group.room for group in groups)]),
        cgroup_limit=min((group.limit for group in groups), default=None),
        process_rss=process.get("VmRSS", 0),
        process_peak=process.get("VmHWM", 0),
    )


def is_wsl(proc: Path = PROC) -> bool:
    """Whether this Linux runs under Windows."""
    return "microsoft" in _text(proc / "sys/kernel/osrelease").lower()


def load_average(proc: Path = PROC) -> float:
    """How many processes wanted a core, over the last minute."""
    return float((_text(proc / "loadavg").split() or ["0"])[0])


def cpu_seconds(proc: Path = PROC) -> float:
    """Seconds that all cores together have worked, for whomever, since this machine began."""
    fields = _text(proc / "stat").partition("\n")[0].split()
    user, nice, system, _idle, _waiting, *interrupts = map(int, fields[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def cpu_name(proc: Path = PROC) -> str:
    """What the first core calls itself."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(proc / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else "CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """Where a version of cgroups keeps memory: files of limits, of what is used, and the reclaimable part of that."""

    folders: tuple[str, ...]
    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]


# Above memory.high a process is not killed, but slowed down until it is useless: it counts as a limit.
_V2 = _Version(
    folders=(".", "unified"),
    limits=("memory.max", "memory.high"),
    used="memory.current",
    reclaimable=("inactive_file", "active_file", "slab_reclaimable"),
)
_V1 = _Version(
    folders=("memory",),
    limits=("memory.limit_in_bytes",),
    used="memory.usage_in_bytes",
    reclaimable=("total_inactive_file", "total_active_file"),
)


@dataclass(frozen=True, slots=True)
class _Group:
    limit: int
    room: int


def _groups(membership: str, root: Path) -> Iterator[_Group]:
    """Every limited cgroup, from the own one up: the parents' limits hold too.

    In a container the own path may not be there; then the mounted root is the container's own group.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for folder in version.folders:
            for depth in range(len(parts), -1, -1):
                group = _group(root.joinpath(folder, *parts[:depth]), version)
                if group is not None:
                    yield group


def _group(folder: Path, version: _Version) -> _Group | None:
    limits = [int(text) for name in version.limits if (text := _text(folder / name).strip()).isdigit()]
    used = _text(folder / version.used).strip()
    if not limits or not used.isdigit():
        return None
    stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    reclaimable = sum(int(stat.get(name, 0)) for name in version.reclaimable)
    return _Group(min(limits), max(0, min(limits) - max(0, int(used) - reclaimable)))


def _sizes(file: Path) -> dict[str, int]:
    """The lines `Name: N kB` of a file of /proc, as bytes."""
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", _text(file), re.MULTILINE)}


def _text(file: Path) -> str:
    """A file of the kernel's; "" where it is missing or closed to us."""
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    return ""


# Disks.


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system that holds `path`, or will hold it; its kind is "" where that is not known."""

    path: Path
    free_bytes: int
    filesystem: str


def disk_state(path: Path, mounts: Path = MOUNTS) -> Disk:
    """Of `path`, which need not be there yet: then of the nearest folder above it that is."""
    there = nearest_existing(path)
    state = os.statvfs(there)
    _, kind = mount_of(PurePosixPath(there), _text(mounts))
    return Disk(path=path, free_bytes=state.f_bavail * state.f_frsize, filesystem=kind)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def mount_of(path: PurePosixPath, mounts: str) -> tuple[PurePosixPath, str]:
    """Where the file system that holds `path` is mounted, and its kind, by the text of /proc/mounts.

    Of two at one place, the later one shows.
    """
    best = PurePosixPath("/"), ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = PurePosixPath(_unescaped(fields[1]))
        if path.is_relative_to(mount) and len(mount.parts) >= len(best[0].parts):
            best = mount, fields[2]
    return best


def _unescaped(field: str) -> str:
    """Spaces and their like stand in /proc/mounts as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
