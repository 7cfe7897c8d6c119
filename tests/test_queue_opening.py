"""How a queue database is opened: made by many at once, migrated with a copy, refused, repaired; and what a full disk
or a busy neighbour does to it."""

import fcntl
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from hvlite.errors import Busy, ExitCode, OutputError, QueueError
from hvlite.jobs.job import Spot
from hvlite.jobs.store import Store, database, open_store, opening, salvage
from hvlite.jobs.store.opening import open_database
from hvlite.jobs.store.schema import MIGRATIONS
from tests.queue_hands import ROOT, new_job
from tests.refusal import refusal
from tests.test_queue_store import fill

NEXT = (*MIGRATIONS, ("ALTER TABLE job ADD COLUMN mood TEXT", "UPDATE job SET mood = 'good'"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "queue.db"


def filled(path: Path, count: int = 3) -> Path:
    with open_store(path) as store:
        fill(store, count)
    return path


def raw(path: Path, *statements: str) -> list[tuple[object, ...]]:
    """Run SQL behind the store's back -> the rows of the last statement."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def test_it_is_durable_and_strict(path: Path) -> None:
    with open_store(path) as store:
        connection = store.database.connection
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert found == ["wal", 2]
        tables = [row["sql"] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE type = 'table'")]
    assert [sql for sql in tables if "STRICT" not in sql] == ["CREATE TABLE sqlite_sequence(name,seq)"]


def test_many_processes_may_make_it_at_once(path: Path) -> None:
    script = "import sys; from pathlib import Path; from tests.queue_hands import *\n"
    script += "sys.stdin.readline(); Hand(Path(sys.argv[1])).act('add', prompts=['a'], first=False)"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdin=subprocess.PIPE) for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    with open_store(path) as store:
        assert store.counts()["queued"] == 3


def test_one_that_another_made_a_moment_ago_is_opened_while_it_stays_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes, others = opening._takes, list[Store]()

    def late(lock: int, kind: int) -> bool:
        if kind == fcntl.LOCK_EX and not others:
            with monkeypatch.context() as patch:
                patch.setattr(opening, "_takes", takes)
                others.append(open_store(path))
        return takes(lock, kind)

    monkeypatch.setattr(opening, "_takes", late)
    with open_store(path) as store:
        assert store.notes == []
        (other,) = others
        with other:
            other.add([new_job("a")])
            assert store.counts()["queued"] == 1


def test_one_from_a_newer_version_is_refused_and_not_touched(path: Path) -> None:
    filled(path)
    raw(path, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = sha256(path.read_bytes()).digest()
    refusal(lambda: open_store(path), "newer hvlite (database version 2, this one knows 1)", kind=QueueError)
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))  # not even if it is damaged
    damaged = sha256(path.read_bytes()).digest()
    refusal(lambda: open_store(path), "update hvlite", kind=QueueError)
    assert before != damaged == sha256(path.read_bytes()).digest()
    assert QueueError.exit_code is ExitCode.FAILED


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    raw(path, "CREATE TABLE recipes (name)")
    before = path.read_bytes()
    refusal(lambda: open_store(path), "another program", kind=QueueError)
    assert path.read_bytes() == before


def test_an_old_one_is_migrated_and_a_copy_kept(path: Path) -> None:
    filled(path)
    opened = open_database(path, migrations=NEXT)
    opened.close()
    copy = path.with_name("queue.db.version-1")
    assert opened.notes == [f"the queue was brought up to date; the old one was kept as {copy}"]
    assert raw(path, "PRAGMA user_version", "SELECT DISTINCT mood FROM job") == [("good",)]
    assert raw(copy, "SELECT count(*) FROM job") == [(3,)]
    again = open_database(path, migrations=NEXT)
    again.close()
    assert again.notes == []
    refusal(lambda: open_store(path), "newer hvlite", kind=QueueError)


def test_a_failed_migration_changes_nothing(path: Path) -> None:
    filled(path)
    broken = (*MIGRATIONS, ("ALTER TABLE job ADD COLUMN mood TEXT", "UPDATE nothing SET mood = 'good'"))
    with pytest.raises(sqlite3.OperationalError):
        open_database(path, migrations=broken)
    with open_store(path) as store:
        assert store.counts()["queued"] == 3


def damage_header(path: Path) -> None:
    path.write_bytes(b"no database" + path.read_bytes()[11:])


def damage_half(path: Path) -> None:
    content = bytearray(path.read_bytes())
    noise = random.Random(0)
    for page in range(12, len(content) // 4096, 3):  # every third page; not the tables' own descriptions
        content[page * 4096 : page * 4096 + 4096] = noise.randbytes(4096)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "fewest"), [(damage_header, 0), (damage_half, 40), (cut, 40)])
def test_a_damaged_one_is_set_aside_and_what_can_be_read_is_saved(
    path: Path, damage: Callable[[Path], None], fewest: int
) -> None:
    with open_store(path) as store:
        ids = store.add([new_job(f"{number} " + "x" * 900) for number in range(200)])
        store.change_settings(crash_limit=7)
        store.remove(ids[:1])
    damage(path)
    broken = path.read_bytes()
    with open_store(path) as store:
        jobs = store.page()
        (note,) = store.notes
        aside = next(file for file in path.parent.iterdir() if re.search("damaged-[-0-9]+$", file.name))
        assert aside.read_bytes() == broken
        assert str(aside) in note
        assert f"{len(jobs)} jobs were saved" in note
        assert len(jobs) < 200
        whole = [job for job in jobs if job.state == "queued"]
        assert len(whole) >= fewest
        assert all(job.prompt == f"{job.id - 1} " + "x" * 900 for job in whole)
        new = store.add([new_job("a new one")])
        store.move(new, Spot("top"))
        assert new[0] > max([job.id for job in jobs], default=0)
    with open_store(path) as store:
        assert store.notes == []
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_repair_that_was_cut_off_is_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    damage_half(path)
    cut(path)

    class PowerCut(BaseException):
        pass

    def no_power(_path: Path) -> None:
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(salvage, "take_salvaged", no_power)
        with pytest.raises(PowerCut):
            open_store(path)
    assert not path.exists()
    path.with_name("queue.db-wal").write_bytes(b"of the old one")
    with open_store(path) as store:
        assert store.page() is not None
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_an_empty_file_is_a_new_queue(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with open_store(path) as store:
        assert (store.page(), store.notes) == ([], [])


def test_what_needs_the_file_alone_waits_for_nobody_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "ALONE_SECONDS", 0.0)
    with open_store(filled(path)):
        refusal(lambda: open_database(path, migrations=NEXT), "have it open", "stop the worker", kind=Busy)
    open_database(path, migrations=NEXT).close()


def test_a_lock_that_is_held_alone_keeps_others_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "ALONE_SECONDS", 0.0)
    filled(path)
    with path.with_name("queue.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refusal(lambda: open_store(path), "other hvlite processes", kind=Busy)


def test_a_network_drive_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "unfit_file_system", lambda _path: "/x lies on /x, a network file system (nfs4)")
    refusal(lambda: open_store(path), "nfs4", "HVLITE_HOME", kind=QueueError)
    assert not path.parent.exists()


def test_an_old_sqlite_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "OLDEST_SQLITE", (99, 0, 0))
    refusal(lambda: open_store(path), "needs SQLite", sqlite3.sqlite_version, kind=QueueError)


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    refusal(lambda: open_store(tmp_path / "home" / "queue.db"), "cannot be written", kind=OutputError)
    (tmp_path / "queue.db").mkdir()
    refusal(lambda: open_store(tmp_path / "queue.db"), str(tmp_path / "queue.db"), kind=OutputError)


def full(store: Store) -> None:
    """As on a full disk: the file cannot grow by another page."""
    pages = store.database.connection.execute("PRAGMA page_count").fetchone()[0]
    store.database.connection.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_leaves_the_queue_as_it_was(path: Path) -> None:
    with open_store(path) as store:
        ids = fill(store, 2)
        before = store.page()
        full(store)
        huge = [new_job("x" * 90_000)]
        refusal(lambda: store.add(huge), "the disk is full", kind=OutputError)
        assert store.page() == before
        store.database.connection.execute("PRAGMA max_page_count = 1000000")
        assert store.add(huge) == [ids[-1] + 1]


def test_a_neighbour_that_writes_for_too_long_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with open_store(filled(path)) as store, open_store(path) as neighbour, neighbour.database.writing():
        refusal(lambda: store.clear(), "was busy for", kind=Busy)
        assert len(store.page()) == 3  # who only looks does not wait


def test_damage_that_shows_later_says_what_to_do(path: Path) -> None:
    with open_store(path) as store:
        store.add([new_job("x" * 3000) for _ in range(60)])
    store = open_store(path)
    damage_half(path)
    store.database.connection.execute("PRAGMA cache_size = 0")
    refusal(store.page, "is damaged", "stop the worker", kind=QueueError)
    store.close()
