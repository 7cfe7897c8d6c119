"""What the machine has: NVML by a stand-in, memory by trees like /proc and /sys/fs/cgroup."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from hvlite.telemetry import (
    Holder,
    cpu_seconds,
    disk_state,
    driver_state,
    has_nvidia_card,
    host_state,
    is_wsl,
    load_average,
    mount_of,
    nearest_existing,
)

GIB = 1 << 30


class NvmlError(Exception):
    """NVML's own: a code and its words."""

    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


NOT_SUPPORTED, NO_PERMISSION, NOT_LOADED, NO_LIBRARY, LOST, MISMATCH = 3, 4, 9, 12, 15, 18

ANSWERS: dict[str, Any] = {
    "nvmlSystemGetDriverVersion": "580.95.05",
    "nvmlSystemGetCudaDriverVersion_v2": 13000,
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, free=20 * GIB),
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=37),
    "nvmlDeviceGetPowerUsage": 123_400,
    "nvmlDeviceGetCudaComputeCapability": (8, 9),
    "nvmlDeviceGetUUID": "GPU-1234",
    "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
    "nvmlDeviceGetTemperature": 51,
    "nvmlDeviceGetMaxPcieLinkGeneration": 4,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetComputeRunningProcesses": [],
    "nvmlDeviceGetGraphicsRunningProcesses": [],
}


@dataclass
class Nvml:
    """A stand-in for pynvml. An answer that is an exception is raised; `calls` are counted."""

    answers: Mapping[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    NVMLError = NvmlError
    NVMLLibraryMismatchError = KeyError
    NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_NO_PERMISSION = NO_PERMISSION
    NVML_ERROR_DRIVER_NOT_LOADED = NOT_LOADED
    NVML_ERROR_LIBRARY_NOT_FOUND = NO_LIBRARY
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = MISMATCH
    nvmlMemory_v2 = 2

    def __getattr__(self, name: str) -> Any:
        def answer(*_arguments: object) -> Any:
            self.calls.append(name)
            found = self.answers.get(name, ANSWERS.get(name))
            if isinstance(found, Exception):
                raise found
            return found

        return answer


def process(pid: int, nbytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=nbytes)


def test_a_card_is_described() -> None:
    nvml = Nvml()
    driver = driver_state(nvml)
    assert (driver.version, driver.cuda, driver.fault) == ("580.95.05", "13.0", None)
    (card,) = driver.cards
    assert (card.name, card.uuid, card.index) == ("NVIDIA GeForce RTX 4090", "GPU-1234", 0)
    assert (card.total_bytes, card.free_bytes) == (24 * GIB, 20 * GIB)
    assert (card.utilisation, card.temperature_c, card.power_w) == (37, 51, 123.4)
    assert (card.capability, card.pcie_gen, card.pcie_width) == ((8, 9), 4, 16)
    assert card.holders == ()
    assert nvml.calls[-1] == "nvmlShutdown"


def test_holders_are_named_once_and_the_largest_comes_first() -> None:
    compute = [process(os.getpid(), 2 * GIB), process(2**22 + 7, 3 * GIB)]
    graphics = [process(os.getpid(), GIB), process(2**22 + 8, None)]
    answers = {
        "nvmlDeviceGetComputeRunningProcesses": compute,
        "nvmlDeviceGetGraphicsRunningProcesses": graphics,
    }
    (card,) = driver_state(Nvml(answers)).cards
    assert card.holders is not None
    assert [(holder.pid, holder.held_bytes) for holder in card.holders] == [
        (2**22 + 7, 3 * GIB),
        (os.getpid(), 2 * GIB),
        (2**22 + 8, None),
    ]
    assert card.holders[0] == Holder(pid=2**22 + 7, name=None, held_bytes=3 * GIB)  # no such process
    assert card.holders[1].name


@pytest.mark.parametrize("error", [NvmlError(NOT_SUPPORTED), KeyError("of another version")])
def test_what_a_driver_does_not_tell_is_none(error: Exception) -> None:
    told = ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")
    (card,) = driver_state(Nvml({name: error for name in ANSWERS if name not in told})).cards
    assert card.name == "an NVIDIA card"
    silent = [name for name in card.__slots__ if name not in ("index", "name")]
    assert {name: getattr(card, name) for name in silent} == dict.fromkeys(silent)


def test_without_the_memory_of_each_process_holders_are_still_named() -> None:
    """As under WSL2."""
    answers = {
        "nvmlDeviceGetComputeRunningProcesses": [process(os.getpid(), None)],
        "nvmlDeviceGetGraphicsRunningProcesses": NvmlError(NOT_SUPPORTED),
    }
    (card,) = driver_state(Nvml(answers)).cards
    assert card.holders is not None
    assert [holder.held_bytes for holder in card.holders] == [None]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (NO_LIBRARY, "no NVIDIA driver found"),
        (NOT_LOADED, "not loaded: reboot"),
        (MISMATCH, "differ in version"),
        (NO_PERMISSION, "refuses"),
        (LOST, "does not answer: code 15"),
    ],
)
def test_no_driver_says_why(code: int, words: str) -> None:
    driver = driver_state(Nvml({"nvmlInit": NvmlError(code)}))
    assert driver.cards == ()
    assert driver.fault is not None
    assert words in driver.fault


def test_a_lost_card_does_not_hide_the_driver() -> None:
    driver = driver_state(Nvml({"nvmlDeviceGetHandleByIndex": NvmlError(LOST)}))
    assert driver.version == "580.95.05"
    assert driver.fault == "card 0 does not answer: code 15"


def test_a_driver_without_cards_says_so() -> None:
    assert driver_state(Nvml({"nvmlDeviceGetCount": 0})).fault == "the NVIDIA driver is loaded but has no card"


def test_cards_are_seen_on_the_bus(tmp_path: Path) -> None:
    assert not has_nvidia_card(tmp_path / "none")
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not has_nvidia_card(tmp_path)  # another vendor's card, and NVIDIA's sound
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert has_nvidia_card(tmp_path)


# Host memory.


@dataclass
class Tree:
    """A /proc with 64 GiB of memory, 40 of it available, and an empty /sys/fs/cgroup."""

    root: Path

    def __post_init__(self) -> None:
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: {9 << 20} kB\nMemAvailable: {40 << 20} kB\n")
        self.write("proc/self/status", f"Name:\tpython\nVmHWM:\t{3 << 20} kB\nVmRSS:\t{2 << 20} kB\n")

    def write(self, name: str, text: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, name: str, **files: str) -> None:
        for file, text in files.items():
            self.write(f"cgroup/{name}/{file.replace('__', '.')}", text)

    def available_gib(self) -> float:
        return host_state(self.root / "proc", self.root / "cgroup").available_bytes / GIB

    def limit_gib(self) -> float | None:
        limit = host_state(self.root / "proc", self.root / "cgroup").cgroup_limit
        return None if limit is None else limit / GIB


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_cgroups_the_machine_is_what_there_is(tree: Tree) -> None:
    host = host_state(tree.root / "proc", tree.root / "cgroup")
    assert (host.total_bytes, host.available_bytes, host.cgroup_limit) == (64 * GIB, 40 * GIB, None)
    assert (host.process_rss, host.process_peak) == (2 * GIB, 3 * GIB)


def test_the_smallest_limit_on_the_way_up_holds(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/user.slice/job.scope\n")
    tree.group("user.slice", memory__max=f"{16 * GIB}\n", memory__high="max\n", memory__current=f"{6 * GIB}\n")
    tree.group("user.slice/job.scope", memory__max="max\n", memory__high="max\n", memory__current=f"{GIB}\n")
    assert (tree.available_gib(), tree.limit_gib()) == (10, 16)


def test_memory_high_is_a_limit_too(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/job\n")
    tree.group("job", memory__max=f"{16 * GIB}\n", memory__high=f"{8 * GIB}\n", memory__current=f"{2 * GIB}\n")
    assert (tree.available_gib(), tree.limit_gib()) == (6, 8)


def test_cached_files_do_not_count_as_taken(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/job\n")
    stat = f"anon {3 * GIB}\ninactive_file {4 * GIB}\nactive_file {2 * GIB}\nslab_reclaimable {GIB}\n"
    tree.group("job", memory__max=f"{16 * GIB}\n", memory__current=f"{10 * GIB}\n", memory__stat=stat)
    assert tree.available_gib() == 13


def test_version_1_is_read(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/job\n0::/elsewhere\n")
    tree.group("memory", memory__limit_in_bytes="9223372036854771712\n", memory__usage_in_bytes=f"{50 * GIB}\n")
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
    tree.group(
        "memory/job",
        memory__limit_in_bytes=f"{12 * GIB}\n",
        memory__usage_in_bytes=f"{5 * GIB}\n",
        memory__stat=stat,
    )
    assert (tree.available_gib(), tree.limit_gib()) == (9, 12)


@pytest.mark.parametrize("own", ["/docker/0123", "/../..", "/"])
def test_in_a_container_the_mounted_root_is_its_group(tree: Tree, own: str) -> None:
    tree.write("proc/self/cgroup", f"0::{own}\n")
    tree.group(".", memory__max=f"{4 * GIB}\n", memory__current=f"{GIB}\n")
    assert (tree.available_gib(), tree.limit_gib()) == (3, 4)


def test_a_limit_above_the_machine_is_none(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/job\n")
    tree.group("job", memory__max=f"{65 * GIB}\n", memory__current=f"{64 * GIB}\n")
    assert (tree.available_gib(), tree.limit_gib()) == (40, None)


def test_a_full_group_leaves_nothing(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/job\n")
    tree.group("job", memory__max=f"{4 * GIB}\n", memory__current=f"{5 * GIB}\n")
    assert tree.available_gib() == 0


def test_this_machine_can_be_read() -> None:
    host = host_state()
    assert 0 < host.process_rss <= host.process_peak <= host.total_bytes
    assert 0 < host.available_bytes <= host.total_bytes
    assert load_average() >= 0
    assert 0 < cpu_seconds() <= cpu_seconds()


def test_windows_below_is_known(tree: Tree) -> None:
    assert not is_wsl(tree.root / "proc")
    tree.write("proc/sys/kernel/osrelease", "6.6.87.2-microsoft-standard-WSL2\n")
    assert is_wsl(tree.root / "proc")


# Disks.


def test_a_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\n/dev/b {tmp_path} xfs rw 0 0\n")
    disk = disk_state(tmp_path / "not" / "there", mounts)
    assert disk.filesystem == "xfs"
    assert disk.free_bytes > 0
    assert disk_state(tmp_path, tmp_path / "missing").filesystem == ""
    assert nearest_existing(tmp_path / "not" / "there") == tmp_path


def test_the_later_of_two_mounts_at_one_place_shows() -> None:
    text = "a / ext4 rw\nb /data ext4 rw\nc /data nfs4 rw\nd /data/my\\040disk btrfs rw\nbroken\n"
    assert mount_of(PurePosixPath("/data/x"), text) == (PurePosixPath("/data"), "nfs4")
    assert mount_of(PurePosixPath("/data/my disk/x"), text) == (PurePosixPath("/data/my disk"), "btrfs")
    assert mount_of(PurePosixPath("/database"), text) == (PurePosixPath("/"), "ext4")
