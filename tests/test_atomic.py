"""Files appear whole or not at all, and never in place of another."""

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from hvlite.atomic import check_new, explained, free_path, new_file, replaced_file
from hvlite.errors import OutputError

CONTENT = b"every byte of it" * 100
OPERATIONS = ("fsync", "link", "replace", "unlink")


def write_new(path: Path, content: bytes = CONTENT) -> None:
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_replaced(path: Path, content: bytes = CONTENT) -> None:
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Recorder:
    """Stands in for the os functions that make a file durable: notes each call, and fails the chosen one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1, error: BaseException | None = None):
        self.log: list[str] = []
        self.synced_bytes: list[int] = []
        self.fail_at = fail_at
        self.error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for operation in OPERATIONS:
            monkeypatch.setattr(os, operation, self.recorded(operation, getattr(os, operation)))

    def recorded(self, operation: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: int | str | Path) -> None:
            self.log.append(self.describe(operation, arguments[0]))
            if len(self.log) - 1 == self.fail_at:
                raise self.error
            real(*arguments)

        return call

    def describe(self, operation: str, first: int | str | Path) -> str:
        if operation != "fsync":
            return operation
        status = os.stat(first)
        if stat.S_ISDIR(status.st_mode):
            return "fsync folder"
        self.synced_bytes.append(status.st_size)
        return "fsync file"


def test_a_new_file_is_whole_alone_and_as_readable_as_any(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    plain = tmp_path / "plain"
    plain.touch()
    write_new(path)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["clip.mp4", "plain"]
    assert path.stat().st_mode == plain.stat().st_mode
    assert path.stat().st_nlink == 1


def test_a_new_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    write_new(tmp_path / "clip.mp4")
    assert recorder.log[:4] == ["fsync file", "link", "unlink", "fsync folder"]
    assert recorder.synced_bytes == [len(CONTENT)]


def test_a_replaced_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    write_replaced(tmp_path / "job.latents")
    assert recorder.log[:3] == ["fsync file", "replace", "fsync folder"]
    assert recorder.synced_bytes == [len(CONTENT)]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
@pytest.mark.parametrize("fail_at", range(4))
def test_whatever_fails_a_new_file_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException | None
) -> None:
    path = tmp_path / "clip.mp4"
    with monkeypatch.context() as patched:
        Recorder(patched, fail_at, error)
        with pytest.raises(KeyboardInterrupt if error else OutputError):
            write_new(path)
    assert names(tmp_path) == ([] if fail_at < 2 else ["clip.mp4"])
    assert not path.exists() or path.read_bytes() == CONTENT


@pytest.mark.parametrize("fail_at", range(3))
def test_whatever_fails_a_replaced_file_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    path = tmp_path / "job.latents"
    path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        Recorder(patched, fail_at)
        with pytest.raises(OutputError, match="MiB free"):
            write_replaced(path)
    assert names(tmp_path) == ["job.latents"]
    assert path.read_bytes() == (b"old" if fail_at < 2 else CONTENT)


@pytest.mark.parametrize("error", [ValueError("decoder"), OSError("weights"), KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.parametrize("opened", [new_file, replaced_file])
def test_an_exception_in_the_block_passes_unchanged_and_leaves_nothing(
    tmp_path: Path, opened: Callable[[Path], AbstractContextManager[Path]], error: BaseException
) -> None:

    def write_half() -> None:
        with opened(tmp_path / "clip.mp4") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert names(tmp_path) == []


def test_replaced_file_replaces(tmp_path: Path) -> None:
    path = tmp_path / "job.latents"
    path.write_bytes(b"old")
    write_replaced(path)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["job.latents"]


def test_a_taken_name_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"yesterday's")
    with pytest.raises(OutputError, match=r"clip\.mp4 .*nothing is ever overwritten"), new_file(path):
        pytest.fail("the block must not run")
    assert path.read_bytes() == b"yesterday's"


def test_check_new_refuses_what_new_file_would_and_leaves_nothing(tmp_path: Path) -> None:
    check_new(tmp_path / "clip.mp4")
    assert names(tmp_path) == []
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(OutputError, match="nothing is ever overwritten"):
        check_new(tmp_path / "clip.mp4")
    with pytest.raises(OutputError, match="there is no folder"):
        check_new(tmp_path / "nowhere" / "clip.mp4")
    assert names(tmp_path) == ["clip.mp4"]


def test_check_new_refuses_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(OutputError, match=r"does not allow it \(Permission denied\)"):
        check_new(tmp_path / "clip.mp4")


def test_a_link_to_nothing_is_a_taken_name(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        write_new(path)
    assert names(tmp_path) == ["clip.mp4"]


def refuse_links(*_: Path) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_name_taken_meanwhile_costs_neither_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    path = tmp_path / "clip.mp4"
    (tmp_path / "clip-2.mp4").write_bytes(b"older")
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_links)

    def write_too_late() -> None:
        with new_file(path) as temporary:
            temporary.write_bytes(CONTENT)
            path.write_bytes(b"somebody else's")

    with pytest.raises(OutputError, match=r"kept as .*clip-3\.mp4"):
        write_too_late()
    assert path.read_bytes() == b"somebody else's"
    assert (tmp_path / "clip-3.mp4").read_bytes() == CONTENT
    assert names(tmp_path) == ["clip-2.mp4", "clip-3.mp4", "clip.mp4"]


def test_file_systems_without_hard_links_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse_links)
    write_new(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == CONTENT
    assert names(tmp_path) == ["clip.mp4"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, fail_at=3, error=OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
    write_new(tmp_path / "clip.mp4")
    assert recorder.log[3] == "fsync folder"
    assert names(tmp_path) == ["clip.mp4"]


def test_of_many_writers_of_one_name_none_loses_its_file(tmp_path: Path) -> None:
    writers = 8
    begun = threading.Barrier(writers)

    def write(number: int) -> None:
        with suppress(OutputError), new_file(tmp_path / "clip.mp4") as temporary:
            begun.wait()
            temporary.write_bytes(b"%d" % number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == sorted(["clip.mp4", *(f"clip-{n}.mp4" for n in range(2, writers + 1))])
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"%d" % n for n in range(writers)}


def test_free_path_takes_the_first_free_number(tmp_path: Path) -> None:
    assert free_path(tmp_path, "clip", ".mp4") == tmp_path / "clip.mp4"
    (tmp_path / "clip.mp4").touch()
    assert free_path(tmp_path, "clip", ".mp4") == tmp_path / "clip-2.mp4"
    assert free_path(tmp_path, "clip", ".png") == tmp_path / "clip.png"
    (tmp_path / "clip-2.mp4").symlink_to("nowhere")
    assert free_path(tmp_path, "clip", ".mp4") == tmp_path / "clip-3.mp4"
    assert free_path(tmp_path, "v1.5", ".mp4") == tmp_path / "v1.5.mp4"


@pytest.mark.parametrize("write", [write_new, write_replaced])
def test_a_missing_folder_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*nowhere\. Create it"):
        write(tmp_path / "nowhere" / "clip.mp4")


@pytest.mark.parametrize("write", [write_new, write_replaced])
def test_a_file_as_folder_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file is not a folder"):
        write(tmp_path / "file" / "clip.mp4")


@pytest.mark.parametrize("write", [write_new, write_replaced])
def test_the_longest_name_works_and_a_longer_one_is_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / ("x" * 255))
    assert (tmp_path / ("x" * 255)).read_bytes() == CONTENT
    with pytest.raises(OutputError, match="its name has 256 bytes, 255 are allowed"):
        write(tmp_path / ("x" * 256))


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EACCES, "does not allow it"),
        (errno.EROFS, "does not allow it"),
        (errno.ENOSPC, "MiB free. Make room"),
        (errno.EDQUOT, "MiB free. Make room"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "system's log"),
        (errno.ENOENT, "system's log"),
    ],
)
def test_every_reason_is_one_line_with_the_path_and_what_to_do(tmp_path: Path, code: int, advice: str) -> None:
    path = tmp_path / "clip.mp4"
    with pytest.raises(OutputError) as caught, explained(path):
        raise OSError(code, os.strerror(code))
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be written: ")
    assert advice in message
    assert "\n" not in message
