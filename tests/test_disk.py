"""The disk's rate: from a real file, cold and proved so, with nothing left behind."""

import os
from pathlib import Path

import pytest

from hvlite import disk
from hvlite.disk import DiskRate, measure_disk
from hvlite.errors import OutputError

MIB = 1 << 20


def test_a_temporary_file_is_read_and_removed(tmp_path: Path) -> None:
    rate = measure_disk(tmp_path / "models" / "not" / "there", 3 * MIB)
    assert rate.what == "a temporary file"
    assert rate.read_bytes == 3 * MIB
    assert rate.bytes_per_second > 0
    assert list(tmp_path.iterdir()) == []


def test_the_largest_weights_are_read_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEAST_BYTES", 2 * MIB)
    for name, size in (("small", MIB), ("large", 5 * MIB), ("medium", 3 * MIB)):
        file = tmp_path / "store" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(os.urandom(size))
    assert measure_disk(tmp_path, 64 * MIB).read_bytes == 5 * MIB
    assert measure_disk(tmp_path, 4 * MIB).read_bytes == 4 * MIB
    assert measure_disk(tmp_path / "store" / "small.safetensors", 64 * MIB).read_bytes == MIB
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_nothing_is_left_even_if_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        assert list(tmp_path.iterdir()) == []  # already while it is read: a kill leaves nothing
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "_read", fail)
    with pytest.raises(OutputError, match="cannot be read: Input/output error"):
        measure_disk(tmp_path, MIB)


def counters(file: Path, read_bytes: int) -> Path:
    file.write_text(f"rchar: 1\nread_bytes: {read_bytes}\nwrite_bytes: 7\n")
    return file


def test_a_read_from_the_cache_is_told(tmp_path: Path) -> None:
    rate = measure_disk(tmp_path, MIB, counters(tmp_path / "io", 1000))  # the counter stands still
    assert rate.device_bytes == 0
    assert not rate.is_cold


def test_without_counters_it_is_not_called_cold(tmp_path: Path) -> None:
    rate = measure_disk(tmp_path, MIB, tmp_path / "missing")
    assert rate.device_bytes is None
    assert not rate.is_cold


@pytest.mark.parametrize(("share", "is_cold"), [(1.0, True), (0.95, True), (0.5, False)])
def test_cold_means_from_the_device(share: float, is_cold: bool) -> None:
    rate = DiskRate(what="x", read_bytes=1000, seconds=1.0, cpu_seconds=0.1, device_bytes=round(1000 * share))
    assert rate.is_cold is is_cold


def test_a_full_disk_is_said_and_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SPARED_BYTES", 1 << 62)
    with pytest.raises(OutputError, match="too little to write"):
        measure_disk(tmp_path, MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "FileIO", refuse)
    with pytest.raises(OutputError, match="does not allow it"):
        measure_disk(tmp_path, MIB)
