"""What users do to the queue: each action, what it refuses, and how it is taken back."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import RequestError
from hvlite.jobs.job import ENDED, OPEN, UNREADABLE, How, NewJob, Outcome, Place, Spot
from hvlite.jobs.store import Store, open_store, ordering
from hvlite.request import Request
from tests.queue_hands import new_job
from tests.refusal import refusal


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[Store]:
    with open_store(path, clock) as opened:
        yield opened


def fill(store: Store, count: int) -> list[int]:
    return store.add([new_job(f"clip {number}") for number in range(count)])


def line(store: Store) -> list[int]:
    return [job.id for job in store.page(("queued",))]


def run(store: Store, state: str = "done", **outcome: object) -> int:
    """Claim the first job and end it -> its number."""
    claims = store.claims("worker", "cpu", {None})
    job = claims.claim()
    assert job is not None
    claims.end(job.id, Outcome(state=state, **outcome))  # type: ignore[arg-type]  # tests name states as words
    return job.id


def test_a_job_comes_back_as_it_was_asked_for(store: Store, clock: Clock) -> None:
    new = NewJob(
        request=new_job('two\nlines, "quotes" and \N{CAT FACE}', size=(64, 96), seed=2**63 - 1, guidance=3.5).request,
        how=How(model="/models/x", dit=Path("/a b/dit.safetensors"), weights="nf4", profile="24g"),
        folder=Path("/clips"),
        output=Path("/clips/one.mp4"),
        latents=Path("/clips/one.safetensors"),
        stop_after=3,
    )
    job = store.job(store.add([new])[0])
    assert (job.request, job.how, job.folder, job.output, job.latents) == (
        *(new.request, new.how, new.folder),
        *(new.output, new.latents),
    )
    assert (job.state, job.position, job.stop_after, job.created) == ("queued", 1, 3, clock.now)
    assert (job.attempts, job.crashes, job.lost, job.owner, job.progress, job.error) == (0, 0, 0, None, None, None)


def test_pages_follow_the_states_and_positions_count_on(store: Store, clock: Clock) -> None:
    ids = fill(store, 6)
    first, second = run(store), run(store, "failed", reason="disk full")
    clock.now += 1
    third = run(store)
    assert store.counts() == {"queued": 3, "running": 0, "done": 2, "failed": 1, "cancelled": 0, "parked": 0}
    assert [job.id for job in store.page((*OPEN, *ENDED))] == [*ids[3:], second, third, first]
    assert [(job.id, job.position) for job in store.page(OPEN, limit=1, offset=1)] == [(ids[4], 2)]
    assert [job.id for job in store.page((*OPEN, *ENDED), limit=3, offset=2)] == [ids[5], second, third]
    assert store.page(OPEN, limit=5, offset=9) == []
    assert store.job(ids[5]).position == 3


def test_a_search_looks_at_what_is_shown_in_the_order_of_pages(store: Store) -> None:
    ids = fill(store, 12)
    how = How(model="shapes", profile="24g")
    ids += store.add(
        [
            new_job(
                "a GR\N{LATIN CAPITAL LETTER U WITH DIAERESIS}N fox",
                size=(64, 96),
                frames=17,
                seed=4711,
                how=how,
                stop_after=2,
            )
        ]
    )
    run(store)
    claims = store.claims("worker", "cpu", {None})
    running = claims.claim()
    assert running is not None
    assert running.request is not None
    claims.record_plan(running.id, running.request.resolve(HUNYUANVIDEO), 1)
    states = (*OPEN, *ENDED)
    assert store.search(states, "", limit=99) == ([job.id for job in store.page(states)], store.page(states))
    for words in (
        "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n FOX",
        "#13 queued",
        "64x96x17",
        "seed4711 24g",
        "shapes draft",
    ):
        assert store.search(states, words)[0] == [ids[12]], words
    assert store.search(states, "auto default clip")[0] == [*ids[2:12], ids[0]]
    assert store.search(states, "running 720x1280x129")[0] == [running.id]
    assert store.search(("done",), "clip")[0] == [ids[0]]
    assert store.search(states, "clip fox") == ([], [])
    found, jobs = store.search(states, "queued clip", limit=2, offset=3)
    assert (found, jobs) == (ids[2:12], [store.job(ids[5]), store.job(ids[6])])


def test_numbers_are_found_in_ranges(store: Store) -> None:
    ids = fill(store, 5)
    store.remove([ids[2]])
    assert store.numbers([(2, 4), (1, 1), (4, 99)]) == [2, 4, 1, 5]
    refusal(lambda: store.numbers([(3, 3)]), "no job 3", kind=RequestError)
    refusal(lambda: store.numbers([(6, 9)]), "no jobs 6 to 9", kind=RequestError)
    refusal(lambda: store.job(3), "no job 3", kind=RequestError)


def test_the_head_of_the_line_keeps_its_order(store: Store) -> None:
    behind = fill(store, 2)
    ahead = store.add([new_job("x"), new_job("y")], first=True)
    assert line(store) == [*ahead, *behind]


def test_one_job_that_refuses_stops_the_whole_action(store: Store) -> None:
    ids = fill(store, 3)
    run(store)
    store.claims("worker", "cpu", {None}).claim()
    for act in (store.remove, store.retry, store.finish, lambda ids: store.move(ids, Spot("top"))):
        before = store.page()
        with pytest.raises(RequestError) as caught:
            act([ids[2], ids[1], ids[0]])
        assert store.page() == before
        assert f"job {ids[1]} is running" in str(caught.value)
    refusal(lambda: store.cancel(ids), f"job {ids[0]} is done", kind=RequestError)
    refusal(lambda: store.remove([99, 98]), "no job 99", "no job 98", kind=RequestError)
    store.undo()  # the add: no refused action is remembered
    refusal(store.undo, "nothing to undo", kind=RequestError)


def test_an_action_on_nothing_is_no_action(store: Store) -> None:
    assert store.add([]) == []
    assert store.clear() == 0
    refusal(lambda: store.move([], Spot("top")), "no job was named", kind=RequestError)
    refusal(store.undo, "nothing to undo", kind=RequestError)


def test_an_edit_drops_what_was_computed_for_something_else(store: Store) -> None:
    job_id = fill(store, 1)[0]
    claims = store.claims("worker", "cpu", {None})
    claims.claim()
    output = claims.reserve_output(job_id, ".mp4")
    claims.save_checkpoint(job_id, Path("/c"), 7)
    claims.give_back(job_id)
    store.edit([job_id], lambda new: replace(new, stop_after=4))
    kept = store.job(job_id)
    assert (kept.checkpoint, kept.output, kept.stop_after) == (Path("/c"), output, 4)
    store.edit([job_id], lambda new: replace(new, request=replace(new.request, steps=9)))
    changed = store.job(job_id)
    assert (changed.checkpoint, changed.checkpoint_step, changed.best_step, changed.output) == (None, None, 0, None)
    store.undo()
    assert replace(store.job(job_id), revision=0) == replace(kept, revision=0)
    refusal(
        lambda: store.edit([job_id], lambda new: replace(new, request=replace(new.request, steps=0))),
        "steps must be 1 to 1000",
        kind=RequestError,
    )


def test_retry_forgives_and_keeps_the_checkpoint(store: Store) -> None:
    job_id = fill(store, 1)[0]
    claims = store.claims("worker", "cpu", {None})
    claims.claim()
    claims.save_checkpoint(job_id, Path("/c"), 7)
    claims.end(job_id, Outcome(state="failed", reason="disk full", error="no room"))
    store.retry([job_id])
    again = store.job(job_id)
    assert (again.state, again.reason, again.error, again.finished) == ("queued", None, None, None)
    assert (again.crashes, again.attempts, again.checkpoint) == (0, 1, Path("/c"))
    store.undo()
    assert (store.job(job_id).state, store.job(job_id).error) == ("failed", "no room")
    store.retry([job_id], anew=True)
    assert (store.job(job_id).checkpoint, store.job(job_id).best_step) == (None, 0)


def test_a_duplicate_is_a_new_job_with_a_file_of_its_own(store: Store) -> None:
    job_id = store.add([new_job("a", output=Path("/clips/a.mp4"), seed=4)])[0]
    copies = store.duplicate([job_id, job_id], lambda new: replace(new, request=replace(new.request, seed=5)))
    copy = store.job(copies[0])
    assert len(copies) == 1
    assert copy.request == replace(new_job("a").request, seed=5)
    assert (copy.output, copy.folder) == (None, Path("/clips"))


def test_drafts_are_finished_to_their_end(store: Store) -> None:
    job_id = store.add([new_job("a", stop_after=3)])[0]
    run(store, "parked")
    assert store.counts()["parked"] == 1
    store.finish([job_id])
    assert (store.job(job_id).state, store.job(job_id).stop_after) == ("queued", None)
    store.undo()
    assert (store.job(job_id).state, store.job(job_id).stop_after) == ("parked", 3)


def test_two_jobs_never_write_one_file(store: Store) -> None:
    output = Path("/clips/a.mp4")
    first = store.add([new_job("a", output=output)])[0]
    refusal(
        lambda: store.add([new_job("b"), new_job("b", output=output)]), f"job {first} will write", kind=RequestError
    )
    other = store.add([new_job("b", output=Path("/clips/b.mp4"))])[0]
    refusal(lambda: store.edit([other], lambda new: replace(new, output=output)), "/clips/a.mp4", kind=RequestError)
    store.remove([first])
    store.add([new_job("c", output=output)])
    store.undo()
    store.undo()
    assert store.job(first).output == output
    store.cancel([first])
    second = store.add([new_job("c", output=output)])[0]
    refusal(lambda: store.retry([first]), f"job {second} will write", kind=RequestError)


def test_undo_does_not_give_a_taken_name_back(store: Store) -> None:
    output = Path("/clips/a.mp4")
    first = store.add([new_job("a", output=output)])[0]
    store.remove([first])
    second = store.add([new_job("c", output=output)])[0]
    run(store, "cancelled")
    store.retry([second])
    claims = store.claims("worker", "cpu", {None})
    claims.claim()
    undone = [store.undo(), store.undo(), store.undo()]
    assert [(list(each.jobs), len(each.obstacles)) for each in undone] == [([], 1)] * 3
    assert "would write /clips/a.mp4" in undone[2].obstacles[0]


@pytest.mark.parametrize("deed", ["add", "rm", "mv", "edit", "retry", "dup", "clear", "cancel", "finish"])
def test_every_deed_is_undone_by_another_process(path: Path, store: Store, deed: str) -> None:
    ids = fill(store, 5)
    failed = run(store, "failed", reason="x")
    parked = run(store, "parked")
    before = store.page()
    deeds: dict[str, Callable[[], object]] = {
        "add": lambda: fill(store, 3),
        "rm": lambda: store.remove([ids[3], failed]),
        "mv": lambda: store.move([ids[4]], Spot("top")),
        "edit": lambda: store.edit([failed, ids[3]], lambda new: replace(new, folder=Path("/elsewhere"))),
        "retry": lambda: store.retry([failed], first=True),
        "dup": lambda: store.duplicate(ids),
        "clear": store.clear,
        "cancel": lambda: store.cancel([ids[2], parked]),
        "finish": lambda: store.finish([parked]),
    }
    deeds[deed]()
    assert store.page() != before
    with open_store(path) as other:
        undone = other.undo()
    assert (undone.kind, undone.obstacles) == (deed, [])
    assert store.page() == before


def test_what_a_worker_has_taken_cannot_be_undone_and_says_why(store: Store) -> None:
    ids = fill(store, 3)
    run(store)
    store.claims("worker", "cpu", {None}).claim()
    undone = store.undo()
    assert undone.jobs == [ids[2]]
    assert list(undone.obstacles) == [f"job {ids[0]} is done now", f"job {ids[1]} is running now"]
    assert store.cancel([ids[1]]) == [ids[1]]
    undone = store.undo()
    assert (list(undone.jobs), list(undone.obstacles)) == ([], [f"job 2 was running: hvlite queue retry {ids[1]}"])


def test_a_hundred_deeds_are_remembered_and_removed_rows_go_with_them(store: Store, path: Path) -> None:
    first = fill(store, 1)
    store.remove(first)
    for _ in range(100):
        fill(store, 1)
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT count(*) FROM job WHERE removed IS NOT NULL").fetchone() == (0,)
    raw.close()
    for _ in range(100):
        store.undo()
    refusal(store.undo, "nothing to undo", kind=RequestError)
    assert store.page() == []


@pytest.mark.parametrize(
    ("spot", "expected"),
    [
        (Spot("top"), [2, 5, 1, 3, 4, 6]),
        (Spot("bottom"), [1, 3, 4, 6, 2, 5]),
        (Spot("up"), [2, 5, 1, 3, 4, 6]),
        (Spot("down"), [1, 3, 4, 6, 2, 5]),
        (Spot("before", 4), [1, 3, 2, 5, 4, 6]),
        (Spot("after", 4), [1, 3, 4, 2, 5, 6]),
        (Spot("after", 6), [1, 3, 4, 6, 2, 5]),
        (Spot("before", 1), [2, 5, 1, 3, 4, 6]),
    ],
)
def test_moved_jobs_stand_together_where_they_were_sent(store: Store, spot: Spot, expected: list[int]) -> None:
    fill(store, 6)
    store.move([5, 2], spot)
    assert line(store) == expected


@pytest.mark.parametrize("place", ["top", "bottom", "up", "down"])
def test_all_of_the_line_moves_nowhere(store: Store, place: Place) -> None:
    ids = fill(store, 3)
    store.move(ids, Spot(place))
    assert line(store) == ids


def test_a_job_is_not_moved_next_to_itself_or_to_one_that_is_not_in_line(store: Store) -> None:
    ids = fill(store, 3)
    run(store)
    for anchor in (ids[2], ids[0], 99):
        refusal(
            lambda anchor=anchor: store.move([ids[2]], Spot("before", anchor)),  # type: ignore[misc]
            f"job {anchor} is not another job in line",
            kind=RequestError,
        )


def test_a_gap_that_is_used_up_is_widened(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "GAP", 2)
    ids = fill(store, 5)
    store.cancel([ids[2]])
    expected = [ids[0], ids[1], ids[3], ids[4]]
    for _ in range(5):
        store.move([expected[-1]], Spot("after", expected[0]))
        expected.insert(1, expected.pop())
        assert line(store) == expected
    for _ in range(5):
        store.undo()
    store.undo()
    assert line(store) == ids


def test_pause_drains_what_runs(store: Store) -> None:
    fill(store, 2)
    claims = store.claims("worker", "cpu", {None})
    job = claims.claim()
    assert job is not None
    assert store.pause(reason="lunch").queue == "draining"
    assert claims.claim() is None
    assert claims.report(job.id) is None
    claims.end(job.id, Outcome(state="done"))
    assert (store.settings().queue, store.settings().pause_reason) == ("paused", "lunch")
    store.resume()
    assert (store.settings().queue, store.settings().pause_reason) == ("active", None)
    assert claims.claim() is not None


def test_pause_now_asks_the_worker_and_resume_takes_it_back(store: Store) -> None:
    fill(store, 2)
    claims = store.claims("worker", "cpu", {None})
    job = claims.claim()
    assert job is not None
    store.pause(now=True)
    assert claims.report(job.id) == "pause"
    store.resume()
    assert claims.report(job.id) is None
    store.pause(now=True)
    claims.give_back(job.id)
    assert store.settings().queue == "paused"
    assert (store.job(job.id).position, store.job(job.id).asked) == (1, None)


def test_settings_are_kept_and_checked(store: Store, path: Path) -> None:
    store.change_settings(crash_limit=5, on_done="true")
    refusal(lambda: store.change_settings(lost_limit=0), "lost_limit must be at least 1; got 0", kind=RequestError)
    with open_store(path) as other:
        found = other.settings()
    assert (found.crash_limit, found.lost_limit, found.on_done) == (5, 8, "true")


def test_a_row_of_another_version_is_kept_and_shown_as_failed(store: Store, path: Path) -> None:
    ids = fill(store, 5)
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE job SET request = json_set(request, '$.audio', 'loud') WHERE id = ?", (ids[0],))
        raw.execute("UPDATE job SET request = '{' WHERE id = ?", (ids[1],))
        raw.execute("UPDATE job SET request = CAST(replace(request, 'clip', x'ff') AS TEXT) WHERE id = ?", (ids[3],))
        raw.execute("UPDATE job SET how = json_set(how, '$.weights', 'int3') WHERE id = ?", (ids[2],))
    raw.close()
    shown = [store.job(job_id) for job_id in ids]
    assert [(job.state, job.reason) for job in shown] == [("failed", UNREADABLE)] * 4 + [("queued", None)]
    assert "audio" in str(shown[0].error)
    assert "does not parse" in str(shown[1].error)
    assert "weights" in str(shown[2].error)
    assert shown[1].prompt == "{"
    refusal(lambda: store.duplicate([ids[0]]), "job 1 cannot be read", "audio", kind=RequestError)
    assert store.search(("queued",), "#2 {")[0] == [ids[1]]
    assert store.search(("queued",), "\\xff")[0] == [ids[3]]
    assert store.search(("queued",), "", limit=9) == (ids, shown)
    assert store.counts()["queued"] == 5  # looking has changed nothing
    job = store.claims("worker", "cpu", {None}).claim()
    assert job is not None
    assert job.id == ids[4]
    assert [store.counts()[state] for state in ("queued", "running", "failed")] == [0, 1, 4]
    store.remove(ids[:4])


def test_a_checkpoint_is_in_use_as_long_as_undo_may_need_it(store: Store) -> None:
    job_id = fill(store, 1)[0]
    claims = store.claims("worker", "cpu", {None})
    claims.claim()
    claims.save_checkpoint(job_id, Path("/c"), 1)
    claims.give_back(job_id)
    store.remove([job_id])
    assert store.checkpoints() == {Path("/c")}
    store.undo()
    store.edit([job_id], lambda new: replace(new, request=Request("another")))
    assert store.job(job_id).checkpoint is None
    assert store.checkpoints() == {Path("/c")}
    store.undo()
    assert store.job(job_id).checkpoint == Path("/c")


def test_the_version_changes_when_another_process_writes(path: Path, store: Store) -> None:
    before = store.data_version()
    assert store.data_version() == before
    with open_store(path) as other:
        fill(other, 1)
    assert store.data_version() != before
