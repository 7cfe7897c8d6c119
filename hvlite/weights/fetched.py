"""A folder that `models fetch` fills: which files belong in it, which are there, and which were found right.

They grow in FOLDER.partial, each as NAME.*.part until its digest is right; the last step gives the folder its name.
What is known of them, and that the licences were accepted, stands in `fetched.json`. No network here, and no torch.
"""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from hvlite.atomic import explained, replaced_file
from hvlite.errors import OutputError, WeightsError
from hvlite.weights.published import LICENCES, Variant

RECORD = "fetched.json"
PARTIAL = ".partial"
PART_SUFFIX = ".part"


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file `name` of a repository, which becomes `place` below the model's folder.

    `digest` is the SHA-256 of a large file, git's name for a small one, empty if the server tells neither;
    `checked_ns` the modification time that the local file had when its digest was found right.
    """

    repository: str
    commit: Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")]
    name: str
    place: Annotated[str, Meta(pattern=r"^[a-z0-9_]+/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\Z")]
    size: Annotated[int, Meta(ge=0)]
    digest: Annotated[str, Meta(pattern=r"^(sha256:[0-9a-f]{64}|git:[0-9a-f]{40}|)\Z")]
    checked_ns: int | None = None


class AcceptedLicence(msgspec.Struct, frozen=True):
    """Which text was accepted."""

    name: str
    version: str
    url: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `fetched.json`. `accepted` is the time at which the licences were."""

    hvlite: str
    variant: Variant
    accepted: str
    licences: tuple[AcceptedLicence, ...]
    commits: dict[str, str]
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be fetched to `folder` from the server `endpoint`; until it is all there it grows in `work`.

    `accepted` is the time at which the licences were accepted, None if they were not. What is missing is looked up on
    the disk each time it is asked for.
    """

    folder: Path
    work: Path
    variant: Variant
    endpoint: str
    files: tuple[RemoteFile, ...]
    accepted: str | None

    @property
    def server(self) -> str:
        """The endpoint, fit to be shown."""
        return server_name(self.endpoint)

    @property
    def is_done(self) -> bool:
        """Whether the model is complete and no file has changed since it was checked."""
        return self.work == self.folder and not self.unchecked

    @property
    def unchecked(self) -> list[RemoteFile]:
        """The files that are not known to be right."""
        return [file for file in self.files if not _is_checked(self.work, file)]

    @property
    def absent(self) -> list[RemoteFile]:
        """The files that are not there in their full size."""
        return [file for file in self.files if _size(self.work / file.place) != file.size]

    @property
    def total_bytes(self) -> int:
        """Of all files, the absent ones included."""
        return sum(file.size for file in self.files)

    @property
    def needed_bytes(self) -> int:
        """What must still be downloaded, beginnings of files taken off."""
        return sum(file.size - self.begun_bytes(file) for file in self.absent)

    @property
    def free_bytes(self) -> int:
        """Of the disk that the files go to."""
        place = next(place for place in (self.work, *self.work.parents) if place.is_dir())
        return shutil.disk_usage(place).free

    @property
    def commits(self) -> dict[str, str]:
        """Each repository's."""
        return {file.repository: file.commit for file in self.files}

    def part(self, file: RemoteFile) -> Path:
        """Where the file grows; the name tells contents apart, so that another one's beginning is not continued."""
        return self.work / f"{file.place}.{file.digest[-12:]}{PART_SUFFIX}"

    def begun_bytes(self, file: RemoteFile) -> int:
        """The length of the file's beginning that is there."""
        found = _size(self.part(file)) or 0
        return found if found <= file.size else 0

    def check_space(self) -> None:
        """OutputError if the disk is too small."""
        needed, free = self.needed_bytes, self.free_bytes
        if needed > free:
            raise OutputError(
                f"{self.folder.name} in {self.variant} takes {size_text(needed)} more in {self.work}; "
                f"{size_text(free)} is free. Make room, or set HVLITE_HOME to a folder on a larger disk."
            )


class Journal:
    """The record of a fetch, on disk from the beginning; it knows which files were found right."""

    def __init__(self, plan: Plan) -> None:
        assert plan.accepted is not None
        self.path = plan.work / RECORD
        self.files = {file.place: file for file in plan.files}
        self.head = Record(
            hvlite=version("hvlite"),
            variant=plan.variant,
            accepted=plan.accepted,
            licences=accepted_licences(),
            commits=plan.commits,
            files=(),
        )
        self._write()

    def mark(self, file: RemoteFile) -> None:
        """The local file is what was published, as it lies there now."""
        checked_ns = (self.path.parent / file.place).stat().st_mtime_ns
        self.files[file.place] = msgspec.structs.replace(file, checked_ns=checked_ns)
        self._write()

    def _write(self) -> None:
        record = msgspec.structs.replace(self.head, files=tuple(self.files.values()))
        with replaced_file(self.path) as temporary, explained(self.path):
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record)))


class Digest:
    """The digest of a file, while its bytes pass."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.count = 0
        self.kind, _, _ = file.digest.partition(":")
        self._sum = hashlib.sha256()
        if self.kind == "git":
            self._sum = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        """The next bytes."""
        self._sum.update(chunk)
        self.count += len(chunk)

    def check(self, path: Path) -> None:
        """WeightsError, and `path` is deleted, if these were not the published bytes."""
        found = f"{self.kind}:{self._sum.hexdigest()}"
        if self.file.digest in ("", found):
            return
        with explained(path):
            path.unlink()
        raise WeightsError(
            f"{self.file.place}: its hash is {found}, published is {self.file.digest}: it was damaged on its way or on "
            "the disk. It alone was deleted; run the same command to fetch it again."
        )


def work_folder(folder: Path) -> Path:
    """Where files are put: the model's own folder if it was fetched, else FOLDER.partial.

    OutputError if the folder came from elsewhere: nothing in it is ever changed.
    """
    if (folder / RECORD).is_file():
        return folder
    with explained(folder):
        is_taken = os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))
    if is_taken:
        raise OutputError(
            f"{folder} is there, and hvlite did not fetch it, so nothing in it is changed. Use it as it is, or move it "
            "away."
        )
    return folder.with_name(folder.name + PARTIAL)


def read_record(path: Path) -> Record | None:
    """None where there is none, or none that can be read: then every file is checked again."""
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=Record)
    return None


def accepted_licences() -> tuple[AcceptedLicence, ...]:
    """What is accepted by whoever accepts now."""
    return tuple(AcceptedLicence(licence.name, licence.version, licence.url) for licence in LICENCES)


def server_name(endpoint: str) -> str:
    """Without a password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//", endpoint)


def size_text(count: int) -> str:
    """Bytes in decimal units, as model hubs write them."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None


def _is_checked(work: Path, file: RemoteFile) -> bool:
    with suppress(OSError):
        found = (work / file.place).stat()
        return (found.st_size, found.st_mtime_ns) == (file.size, file.checked_ns)
    return False
