"""Files that appear whole under their final name, or not at all.

A file is filled under a temporary name (`.hvlite-*.part`, in its own folder), synced, given its name in one
step, and the folder is synced after it. A kill or a power cut at any point leaves the old state or the new,
with at worst a temporary file beside it; an exception leaves nothing. `new_file` never replaces a file,
`replaced_file` does. Whoever fills a whole folder that way has it `locked` meanwhile.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from hvlite.errors import Busy, OutputError

# What link(2) answers on file systems that have no hard links (exFAT, many network and FUSE ones).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
# What fsync(2) answers for a folder where only files can be synced.
NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


# A temporary file is made and then locked: one that is older than this and not locked was left behind.
NEW_SECONDS = 5.0


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to fill, which becomes `path` when the block ends.

    A taken `path` raises OutputError before the block runs. Where another process takes it during the block,
    nothing is overwritten or lost: the new file is kept under the next free name, told by an OutputError.
    """
    with explained(path):
        _refuse_taken(path)
    with _temporary(path) as (temporary, handle):
        yield temporary
        kept = _publish(temporary, handle, path, _link_first_free)
    if kept != path:
        raise OutputError(
            f"{path} was taken by another file while it was being written; the new one was kept as {kept}."
        )


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to fill, which takes the place of `path` when the block ends."""
    with _temporary(path) as (temporary, handle):
        yield temporary
        _publish(temporary, handle, path, _rename)


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """The first of STEM.SUFFIX, STEM-2.SUFFIX, STEM-3.SUFFIX ... that is not taken; `suffix` has its dot.

    This only looks: a reservation would be an empty file under a final name. Two processes may get the same
    answer; `new_file` then gives the name to the one that ends first and keeps the other's file beside it.
    """
    return next(path for path in candidates(folder / (stem + suffix)) if not os.path.lexists(path))


def check_new(path: Path) -> None:
    """Raise before hours of work what `new_file` would raise after them: name taken, folder missing or closed."""
    with explained(path):
        _refuse_taken(path)
    with _temporary(path):
        pass


def make_folder(folder: Path) -> None:
    """The folder and its parents, where they are not there yet, as lasting as what will lie in them."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for each in new:
            sync_folder(each.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Busy unless this process alone changes the folder; a kill frees it too."""
    with explained(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another hvlite is writing {folder} now. Wait until it is done, or end it.") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError met while writing `path` into an OutputError that says why and what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {_advice(error, path)}") from error


def _advice(error: OSError, path: Path) -> str:
    folder = path.parent
    match error.errno:
        case errno.EEXIST:
            return "it exists, and nothing is ever overwritten. Choose another name, or remove it."
        case errno.ENOENT if not folder.exists():
            return f"there is no folder {folder}. Create it, or choose another one."
        case errno.ENOTDIR:
            return f"{folder} is not a folder. Choose another one."
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"the folder {folder} does not allow it ({error.strerror}). Choose another one."
        case errno.ENOSPC | errno.EDQUOT:
            return f"{error.strerror}, {_free_mib(folder)} free. Make room, or choose another folder."
        case errno.EFBIG:
            return "it is larger than the file system or `ulimit -f` allows. Choose another folder."
        case errno.ENAMETOOLONG:
            return f"its name has {len(os.fsencode(path.name))} bytes, 255 are allowed. Choose a shorter one."
        case _:
            return f"{error.strerror or error}. Choose another folder, or look at the system's log."


def _free_mib(folder: Path) -> str:
    with suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB"
    return "unknown bytes"


def _refuse_taken(path: Path) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """A new empty file beside `path` and a descriptor of it; on leaving, both are gone."""
    # Not derived from `path`: a name of 255 bytes must still have a temporary one.
    temporary = path.parent / f".hvlite-{secrets.token_hex(6)}.part"
    with explained(path):
        # Held open while others write by name, so that fsync reports every write error since now.
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # says that it is in use, where the file system can say so
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield temporary, handle
    finally:
        os.close(handle)
        with suppress(OSError):
            os.unlink(temporary)


def _publish(temporary: Path, handle: int, path: Path, name: Callable[[Path, Path], Path]) -> Path:
    with explained(path):
        os.fsync(handle)
        named = name(temporary, path)
        sync_folder(path.parent)
    return named


def _rename(temporary: Path, path: Path) -> Path:
    os.replace(temporary, path)
    return path


def _link_first_free(temporary: Path, path: Path) -> Path:
    """Give `temporary` the name `path`, or the next one that is free; returns the name it got."""
    for candidate in candidates(path):
        with suppress(FileExistsError):
            _rename_exclusively(temporary, candidate)
            return candidate
    raise AssertionError("the candidates never end")


def _rename_exclusively(temporary: Path, path: Path) -> None:
    """Rename by a second hard link; unlike rename itself it raises FileExistsError where `path` is taken."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        # Reserve the name, then rename onto the reservation: a kill between the two leaves an empty file.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed: those that are not new and that nobody holds."""
    with suppress(OSError):
        for file in folder.glob(".hvlite-*.part"):
            with suppress(OSError):
                _remove_leftover(file)


def _remove_leftover(file: Path) -> None:
    handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(handle).st_mtime > NEW_SECONDS:
            os.unlink(file)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as lasting as the files they stand for."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def candidates(path: Path) -> Iterator[Path]:
    """STEM.SUFFIX, STEM-2.SUFFIX, STEM-3.SUFFIX ... without end."""
    yield path
    for number in count(2):
        yield path.parent / f"{path.stem}-{number}{path.suffix}"
