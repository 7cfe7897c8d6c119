"""What doctor says, and what it advises where torch cannot use a card; the room a device has."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvlite import doctor, machine, paths, torch_check
from hvlite.disk import DiskRate
from hvlite.doctor import Section, examine, tilde
from hvlite.errors import DoesNotFit, OutputError
from hvlite.machine import auto_profile, card_of, default_profile, room_of
from hvlite.measure import made_by
from hvlite.memory.rates import Compute, Curve, Rates, save_rates
from hvlite.telemetry import Card, Driver, Holder, Host
from hvlite.torch_check import TorchSeen, probe_pinning, torch_advice
from tests.refusal import refusal

GIB = 1 << 30
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SECTIONS = [
    *("hvlite", "system", "torch", "driver", "memory", "disk"),
    *("attention", "models", "rates", "profile", "pinning"),
]


def a_card(**changes: object) -> Card:
    values: dict[str, object] = {
        "index": 0,
        "uuid": "GPU-1234",
        "name": "RTX 4090",
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB,
        "holders": (Holder(pid=7, name="Xorg", held_bytes=GIB), Holder(pid=8, name=None, held_bytes=None)),
        "utilisation": 3,
        "temperature_c": 40,
        "power_w": 31.4,
        "driver": "580.95.05",
        "capability": (8, 9),
        "pcie_gen": 4,
        "pcie_width": 16,
    }
    return Card(**{**values, **changes})  # type: ignore[arg-type]


def a_driver(version: str = "580.95.05", cuda: str = "13.0", **changes: object) -> Driver:
    return Driver(version=version, cuda=cuda, cards=(a_card(**changes),))


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = DiskRate(what="a temporary file", read_bytes=10**9, seconds=0.5, cpu_seconds=0.1, device_bytes=10**9)
    monkeypatch.setattr(doctor, "measure_disk", lambda *_: rate)


def sections() -> dict[str, Section]:
    return {section.name: section for section in examine()}


@pytest.mark.usefixtures("quick_disk")
def test_every_section_is_there_without_a_card() -> None:
    found = sections()
    assert list(found) == SECTIONS
    assert not any("not known" in line for section in found.values() for line in section.lines)
    assert "2.00 GB/s, from the disk itself" in found["disk"].lines[1]
    assert "shapes (embedded)" in found["models"].lines
    assert found["attention"].values["chosen"] == "sdpa"
    assert torch.__version__ in found["torch"].lines[0]
    if not torch.cuda.is_available():
        assert found["pinning"].lines == ("no CUDA device",)
        assert found["profile"].values["chosen"] == "cpu"


@pytest.mark.usefixtures("quick_disk")
def test_a_section_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(doctor, "host_state", fail)
    found = sections()
    assert list(found) == SECTIONS
    assert found["memory"].lines == ("not known: RuntimeError: out of order",)
    assert "shapes (embedded)" in found["models"].lines


def test_the_home_folder_is_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert tilde("/home/ann/x and HVLITE_HOME=/home/ann") == "~/x and HVLITE_HOME=~"
    assert tilde("/home/anna/x /home/ann.old") == "/home/anna/x /home/ann.old"
    monkeypatch.setenv("HOME", "/")
    assert tilde("/data/x") == "/data/x"


@pytest.mark.usefixtures("quick_disk")
def test_nothing_secret_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HVLITE_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = sections()
    said = " ".join(line for section in found.values() for line in section.lines) + str(
        [section.values for section in found.values()]
    )
    assert str(tmp_path) not in said
    assert "hf_secret" not in said
    assert "HVLITE_HOME=~/data" in found["hvlite"].lines
    assert found["hvlite"].values["environment"] == {"HVLITE_HOME": "~/data"}


def test_models_are_listed(own_home: Path, tiny_model: Path) -> None:
    (paths.models_folder() / "hunyuanvideo").mkdir(parents=True)
    (paths.models_folder() / "hunyuanvideo" / "x.safetensors").write_bytes(bytes(30_000_000))
    (paths.packed_folder() / "half").mkdir(parents=True)
    (paths.packed_folder() / "half" / "journal.json").write_text("{}")
    section = doctor._models_section()
    assert "hunyuanvideo: checkpoint, 0.03 GB" in section.lines
    assert any(line.startswith("half: store, ") and "not packed to its end" in line for line in section.lines)


@pytest.mark.parametrize("fault", [OutputError("no room here"), None])
def test_a_disk_that_is_not_measured_says_why(monkeypatch: pytest.MonkeyPatch, fault: OutputError | None) -> None:
    def measured(*_: object) -> DiskRate:
        if fault is not None:
            raise fault
        return DiskRate(what="models", read_bytes=10**9, seconds=0.1, cpu_seconds=0.1, device_bytes=0)

    monkeypatch.setattr(doctor, "measure_disk", measured)
    last = doctor._disk_section().lines[-1]
    assert last == (
        "not measured: no room here"
        if fault
        else f"models read at 10.00 GB/s, {'from memory'}: the page cache could not be emptied"
    )


def test_rates_of_another_machine_are_told(own_home: Path) -> None:
    assert "not measured" in doctor._rates_section().lines[0]
    flat = Curve(((1, 1.0),))
    compute = {"fp32": Compute(matmul=flat, attention=flat, elementwise=flat)}
    save_rates(Rates(made_by=made_by(CPU), compute=compute), paths.rates_file())
    here = doctor._rates_section()
    if not torch.cuda.is_available():
        assert here.values["holds"] is True
        assert len(here.lines) == 1
    save_rates(Rates(made_by="another", compute=compute), paths.rates_file())
    assert doctor._rates_section().values["holds"] is False
    assert "measure again" in doctor._rates_section().lines[1]
    paths.rates_file().write_text("{")
    assert "cannot be used" in doctor._rates_section().lines[0]


# Cards.


def test_a_card_is_shown_with_who_holds_it() -> None:
    section = doctor._driver_section(a_driver())
    assert section.lines == (
        "580.95.05, runs CUDA up to 13.0",
        "card 0: RTX 4090, 23.0 GiB of 24.0 GiB free, PCIe 4 x16",
        "  3 % busy, 40 C, 31 W; held by: Xorg[7] 1.0 GiB, process[8]",
    )
    assert "uuid" not in str(section.values)


def test_what_a_driver_does_not_tell_is_said() -> None:
    silent = a_driver(
        total_bytes=None,
        free_bytes=None,
        holders=None,
        utilisation=None,
        temperature_c=None,
        power_w=None,
        pcie_gen=None,
    )
    lines = doctor._driver_section(silent).lines
    assert lines[1] == "card 0: RTX 4090, ? of ? free, PCIe link unknown"
    assert lines[2] == "  its state is not told; held by: the driver does not tell (WSL2, container)"
    assert doctor._driver_section(a_driver(holders=())).lines[2].endswith("held by: nobody")


UNUSABLE = TorchSeen("2.13.0", "13.0", usable=False)


@pytest.mark.parametrize(
    ("driver", "seen", "visible", "words"),
    [
        (
            a_driver(),
            TorchSeen("2.13.0+cpu", None, usable=False),
            None,
            "built without CUDA. Install a torch for CUDA 13.0",
        ),
        (a_driver("535.183.01", "12.2"), UNUSABLE, None, "CUDA 13.0 needs driver 580 or newer. Update the driver"),
        (a_driver(), UNUSABLE, "", "CUDA_VISIBLE_DEVICES is set to ''. Unset it"),
        (
            a_driver(),
            TorchSeen("2.13.0", "13.0", usable=False, said="it fell over"),
            None,
            "it fell over. Run nvidia-smi",
        ),
        (a_driver(), UNUSABLE, None, "it gives no reason. Run nvidia-smi"),
        (a_driver(capability=(7, 5)), TorchSeen("2.13.0", "13.0", usable=True), None, "capability 7.5, below 8.0"),
    ],
)
def test_an_unusable_card_is_named_with_versions_and_the_next_step(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, seen: TorchSeen, visible: str | None, words: str
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (advice,) = torch_advice(driver, seen)
    assert words in advice
    assert "RTX 4090" in advice
    if not seen.usable:
        assert f"driver {driver.version}" in advice
        assert seen.version in advice


def test_a_card_without_a_driver_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_check, "has_nvidia_card", lambda: True)
    (advice,) = torch_advice(Driver(fault="no NVIDIA driver found"), UNUSABLE)
    assert advice == "an NVIDIA card is there, but no NVIDIA driver found. Install or update its driver, then reboot"
    monkeypatch.setattr(torch_check, "has_nvidia_card", lambda: False)
    assert torch_advice(Driver(fault="no NVIDIA driver found"), UNUSABLE) == []


def test_a_card_that_works_needs_no_advice() -> None:
    assert torch_advice(a_driver(), TorchSeen("2.13.0", "13.0", usable=True)) == []


def test_pinning_is_tried_up_to_what_is_refused() -> None:
    tried: list[int] = []

    def register(nbytes: int) -> bool:
        tried.append(nbytes)
        return nbytes < 4

    assert probe_pinning([1, 2, 4, 8], register) == (2, 4)
    assert tried == [1, 2, 4]
    assert probe_pinning([1, 2], register) == (2, None)
    assert probe_pinning([], register) == (0, None)


# Room, and what auto makes of it.


@pytest.fixture
def one_card(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    """A CUDA device of UUID 1234 to torch, and whatever cards the driver is made to tell of."""
    found = [a_card()]
    monkeypatch.setattr(machine, "cards", lambda: tuple(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 6 * GIB))
    return found


def test_room_on_a_card_is_what_its_driver_says(one_card: list[Card]) -> None:
    one_card.insert(0, a_card(index=1, uuid="GPU-9999", free_bytes=GIB))
    assert card_of(CUDA) == one_card[1]
    room = room_of(CUDA)
    assert (room.kind, room.total_bytes, room.free_bytes) == ("cuda", 24 * GIB, 23 * GIB)
    assert auto_profile(CUDA) == "24g"


@pytest.mark.parametrize("changes", [{"uuid": "GPU-5678"}, {"uuid": None}, {"free_bytes": None}])
def test_room_on_a_card_that_the_driver_does_not_tell_of_is_torchs(
    one_card: list[Card], changes: dict[str, object]
) -> None:
    one_card[:] = [a_card(**changes)]
    assert room_of(CUDA).free_bytes == 5 * GIB


def test_a_full_card_names_who_holds_it(one_card: list[Card]) -> None:
    one_card[:] = [a_card(free_bytes=2 * GIB, holders=(Holder(pid=41, name="python", held_bytes=21 * GIB),))]
    words = ("6g, wants 5.2 GiB", "2.0 GiB is free", "python[41] 21.0 GiB", "--profile 6g --memory")
    refusal(lambda: auto_profile(CUDA), *words, kind=DoesNotFit)


def test_room_on_the_cpu_is_what_a_cgroup_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(total_bytes=64 * GIB, available_bytes=5 * GIB, cgroup_limit=8 * GIB, process_rss=0, process_peak=0)
    monkeypatch.setattr(machine, "host_state", lambda: host)
    room = room_of(CPU)
    assert (room.kind, room.total_bytes, room.free_bytes) == ("cpu", 8 * GIB, 5 * GIB)
    assert auto_profile(CPU) == "cpu"


def test_what_is_used_where_no_profile_is_named() -> None:
    assert [default_profile(device) for device in (CUDA, CPU, torch.device("meta"))] == ["auto", "cpu", "24g"]
    assert auto_profile(torch.device("meta")) == "24g"
