"""Downloads the published weights: asks the hub what there is, then brings the files, each held against its hash.

The only module that reaches the network: over the session, the tokens and the settings of huggingface_hub, by plain
HTTP. Its own downloader begins a broken file anew, this one goes on where it ended. A file gets its name when its hash
is right, so that a kill at any point keeps the whole ones and the beginning of the one in hand (see `fetched`).
"""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoSibling

from hvlite.atomic import explained, locked, sync_folder
from hvlite.errors import Busy, OutputError, WeightsError
from hvlite.events import Note
from hvlite.weights.fetched import (
    PART_SUFFIX,
    RECORD,
    Digest,
    Journal,
    Plan,
    Record,
    RemoteFile,
    accepted_licences,
    read_record,
    server_name,
    size_text,
    work_folder,
)
from hvlite.weights.published import VARIANTS, Variant, Wanted

CHUNK_BYTES = 1 << 20
# Before each new try after a lost connection; bytes that arrive begin the row anew.
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
BUSY_STATUS = frozenset({408, 429, 500, 502, 503, 504})

# Else huggingface_hub tells its server what runs here, and asks it for a list of programs to look for.
constants.HF_HUB_DISABLE_TELEMETRY = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """Files that were there are read (`check`), or bytes have arrived (`fetch`); the totals are this run's."""

    stage: Literal["check", "fetch"]
    place: str
    done_bytes: int
    total_bytes: int


Progress = Fetching | Note


def plan_fetch(folder: Path, variant: Variant, endpoint: str | None = None) -> Plan:
    """What it takes to have the variant at `folder`; where all of it is there already, no server is asked.

    `endpoint` is HF_ENDPOINT's server by default. OutputError if something else is in the way; WeightsError if the
    server cannot be asked, or does not hold the files.
    """
    folder = Path(os.path.realpath(folder))
    work = work_folder(folder)
    record = read_record(work / RECORD)
    if record is not None and record.variant != variant:
        raise OutputError(
            f"{work} holds the {record.variant} variant, and {variant} is asked for: a model is of one of them. Fetch "
            f"it with --variant {record.variant}, or move the folder away first."
        )
    plan = Plan(
        folder=folder,
        work=work,
        variant=variant,
        endpoint=(endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"),
        files=record.files if record is not None else (),
        accepted=record.accepted if record is not None and record.licences == accepted_licences() else None,
    )
    if plan.files and not plan.absent:
        return plan
    _refuse_offline()
    return replace(plan, files=_published_files(plan, record))


def accept(plan: Plan) -> Plan:
    """The plan of somebody who accepts the licences now; `fetch` writes it down."""
    return replace(plan, accepted=datetime.now(UTC).isoformat(timespec="seconds"))


def fetch(plan: Plan) -> Generator[Progress, None, None]:
    """Download what is missing and check what is there; at the end the model is at `plan.folder`.

    WeightsError if a file's hash is wrong, which deletes that file, or if the server fails; OutputError if the disk is
    too small, Busy if another process fetches to the same place. What is whole stays in each case.
    """
    assert plan.accepted is not None, "the licences come first"
    with _begun(plan):
        plan.check_space()
        journal = Journal(plan)
        digests: dict[str, Digest] = {}
        yield from _check_present(plan, journal, digests)
        yield from _download(plan, journal, digests)
        _finish(plan)


@contextmanager
def _begun(plan: Plan) -> Iterator[None]:
    """The work folder is there, and this process alone changes it."""
    with explained(plan.work):
        plan.work.mkdir(parents=True, exist_ok=True)
    with locked(plan.work):
        try:
            if work_folder(plan.folder) != plan.work:
                raise Busy(f"another hvlite has just fetched {plan.folder}. Run the same command again to check it.")
            yield
        finally:
            with suppress(OSError):  # goes only if it is empty
                plan.work.rmdir()


def _check_present(plan: Plan, journal: Journal, digests: dict[str, Digest]) -> Iterator[Progress]:
    """Read what is not known to be right: whole files against their hashes, beginnings to go on from (`digests`)."""
    unchecked = plan.unchecked
    absent = {file.place for file in plan.absent}
    lengths = [plan.begun_bytes(file) if file.place in absent else file.size for file in unchecked]
    done, total = 0, sum(lengths)
    for file, length in zip(unchecked, lengths, strict=True):
        digest = Digest(file)
        path = plan.part(file) if file.place in absent else plan.work / file.place
        for chunk in _read(path) if length else ():
            digest.update(chunk)
            done += len(chunk)
            yield Fetching(stage="check", place=file.place, done_bytes=done, total_bytes=total)
        if file.place in absent:
            digests[file.place] = digest
        else:
            digest.check(path)
            journal.mark(file)


def _read(path: Path) -> Iterator[bytes]:
    with explained(path), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _download(plan: Plan, journal: Journal, digests: dict[str, Digest]) -> Iterator[Progress]:
    done, total = 0, plan.needed_bytes
    for file in plan.absent:
        for item in _bring(plan, file, digests.get(file.place) or Digest(file)):
            if isinstance(item, Note):
                yield item
            else:
                done += item
                yield Fetching(stage="fetch", place=file.place, done_bytes=done, total_bytes=total)
        journal.mark(file)


def _bring(plan: Plan, file: RemoteFile, digest: Digest) -> Iterator[int | Note]:
    """Append what is missing to the file's beginning, check it and give it its name; yields the lengths of pieces."""
    path, part = plan.work / file.place, plan.part(file)
    with explained(part):
        part.parent.mkdir(exist_ok=True)
        with part.open("ab" if digest.count else "wb") as out:
            for item in _received(file, digest.count, plan.endpoint):
                if isinstance(item, Note):
                    yield item
                else:
                    out.write(item)
                    digest.update(item)
                    yield len(item)
            out.flush()
            os.fsync(out.fileno())
    digest.check(part)
    with explained(path):
        os.replace(part, path)
        sync_folder(path.parent)


def _finish(plan: Plan) -> None:
    with explained(plan.folder):
        for left_over in plan.work.glob(f"*/*{PART_SUFFIX}"):  # of another commit
            left_over.unlink()
        if plan.work != plan.folder:
            sync_folder(plan.work)
            os.rename(plan.work, plan.folder)
            sync_folder(plan.folder.parent)


# What the server tells.


def _refuse_offline() -> None:
    if constants.is_offline_mode():
        names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
        raise WeightsError(
            f"{' and '.join(names) or 'HF_HUB_OFFLINE'} forbids to use the network, and not every file is there. Unset "
            "it to fetch them."
        )


def _published_files(plan: Plan, record: Record | None) -> tuple[RemoteFile, ...]:
    """The variant's files at one commit of each repository: the recorded one, so that a broken fetch stays of one."""
    commits = record.commits if record is not None else {}
    known = {file.place: file for file in record.files} if record is not None else {}
    listings: dict[str, tuple[str, list[RepoSibling]]] = {}
    files: list[RemoteFile] = []
    for wanted in VARIANTS[plan.variant]:
        if wanted.repository not in listings:
            revision = commits.get(wanted.repository, wanted.revision)
            listings[wanted.repository] = _list_repository(wanted.repository, revision, plan.endpoint)
        files += _chosen(wanted, *listings[wanted.repository])
    return tuple(_with_check(file, known.get(file.place)) for file in files)


def _with_check(file: RemoteFile, known: RemoteFile | None) -> RemoteFile:
    """`file`, and when the same one was checked."""
    return known if known is not None and msgspec.structs.replace(known, checked_ns=None) == file else file


def _list_repository(repository: str, revision: str, endpoint: str) -> tuple[str, list[RepoSibling]]:
    """The commit that `revision` is, and its files."""
    api = HfApi(endpoint=endpoint, library_name="hvlite", library_version=version("hvlite"))
    try:
        info = api.model_info(
            repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
    except HfHubHTTPError as error:
        raise _refusal(error.response.status_code, f"revision {revision}", repository, endpoint) from error
    except Exception as error:  # of the HTTP library, which changes with huggingface_hub, or for an answer of no hub
        raise WeightsError(
            f"{server_name(endpoint)} cannot be asked for {repository} ({_reason(error)}). Check the network, its "
            "proxy, and HF_ENDPOINT if it is set."
        ) from error
    return str(info.sha), info.siblings or []


def _chosen(wanted: Wanted, commit: str, siblings: list[RepoSibling]) -> list[RemoteFile]:
    """The files that `wanted` names. The server's names and numbers are believed as far as `RemoteFile` allows."""
    files: list[RemoteFile] = []
    unfound = set(wanted.names)
    for sibling in sorted(siblings, key=lambda sibling: sibling.rfilename):
        folder, _, name = sibling.rfilename.rpartition("/")
        found = [pattern for pattern in (*wanted.names, *wanted.optional) if fnmatchcase(name, pattern)]
        if folder == wanted.folder and found:
            unfound.difference_update(found)
            files.append(_remote_file(wanted, commit, name, sibling))
    if unfound:
        raise WeightsError(
            f"{wanted.repository} at {commit} has no {wanted.folder}/{min(unfound)}, which hvlite needs: the "
            "repository has changed. Get the model by hand and name its folder: --model FOLDER."
        )
    return files


def _remote_file(wanted: Wanted, commit: str, name: str, sibling: RepoSibling) -> RemoteFile:
    lfs = sibling.lfs
    git = f"git:{sibling.blob_id}" if sibling.blob_id else ""
    values = {
        "repository": wanted.repository,
        "commit": commit,
        "name": sibling.rfilename,
        "place": f"{wanted.part}/{name}",
        "size": lfs.size if lfs else sibling.size,
        "digest": f"sha256:{lfs.sha256}" if lfs else git,
    }
    try:
        return msgspec.convert(values, RemoteFile)
    except msgspec.ValidationError as error:
        raise WeightsError(
            f"{wanted.repository}: the server describes {sibling.rfilename!r} as no file that hvlite takes: {error}"
        ) from error


# What the server sends.


class _Dropped(Exception):
    """The connection was lost, or the server is busy: another try may go better."""


def _received(file: RemoteFile, start: int, endpoint: str) -> Iterator[bytes | Note]:
    """The file from byte `start` to its end, over as many connections as it takes."""
    done, failures = start, 0
    while done < file.size:
        try:
            for chunk in _chunks(file, done, endpoint):
                piece = chunk[: file.size - done]  # a longer file than promised is left to its digest
                done, failures = done + len(piece), 0
                yield piece
            if done < file.size:
                raise _Dropped(f"{file.size - done} bytes are missing")
        except _Dropped as drop:
            if failures == len(RETRY_SECONDS):
                raise WeightsError(
                    f"{file.place}: the download from {server_name(endpoint)} broke off after {done} of {file.size} "
                    f"bytes ({drop}). They are kept; run the same command to go on."
                ) from drop
            yield Note(f"{file.place}: the connection was lost at {size_text(done)} ({drop}); trying again")
            time.sleep(RETRY_SECONDS[failures])
            failures += 1


def _chunks(file: RemoteFile, start: int, endpoint: str) -> Iterator[bytes]:
    """What one connection gives of the file from byte `start` on."""
    url = hf_hub_url(file.repository, file.name, revision=file.commit, endpoint=endpoint)
    try:
        # The client follows redirects to the hub's storage, and leaves the token away where they lead to another host.
        with get_session().stream(
            "GET", url, headers=_headers(start), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code in BUSY_STATUS:
                raise _Dropped(f"HTTP {response.status_code}")
            if response.status_code not in (200, 206):
                raise _refusal(response.status_code, file.name, file.repository, endpoint)
            surplus = start if response.status_code == 200 else 0  # some mirrors ignore ranges
            for chunk in response.iter_bytes():
                if len(chunk) > surplus:
                    yield chunk[surplus:]
                surplus = max(0, surplus - len(chunk))
    except (WeightsError, _Dropped):
        raise
    except Exception as error:  # of the HTTP library, which changes with huggingface_hub
        raise _Dropped(_reason(error)) from error


def _headers(start: int) -> dict[str, str]:
    headers = {"user-agent": f"hvlite/{version('hvlite')}", "accept-encoding": "identity"}
    if start:
        headers["range"] = f"bytes={start}-"
    if (token := _token()) is not None:
        headers["authorization"] = f"Bearer {token}"
    return headers


def _token() -> str | None:
    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def _refusal(status: int, what: str, repository: str, endpoint: str) -> WeightsError:
    page = f"{server_name(endpoint)}/{repository}"
    if status in (401, 403):
        sent = "without a token" if _token() is None else "with the token that is set"
        return WeightsError(
            f"{page} does not give {what} {sent} (HTTP {status}). Accept its terms on that page, then set HF_TOKEN to "
            "a token that may read it, or log in with `hf auth login`."
        )
    if status == 404:
        return WeightsError(f"{page} has no {what} (HTTP 404). Look at that page, and at HF_ENDPOINT if it is set.")
    return WeightsError(f"{page} answers HTTP {status} for {what}. Try again later.")


def _reason(error: Exception) -> str:
    """One line; an HTTP library's messages name hosts and system errors, never headers."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
