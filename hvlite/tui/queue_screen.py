"""The queue: what runs, what waits, what has ended, and everything that can be done to it."""

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Footer, Static

from hvlite.jobs.job import ACTIONS, ENDED, Job, Place, Spot, State, refusal
from hvlite.jobs.store import Store
from hvlite.tui import workers
from hvlite.tui.actions import bindings
from hvlite.tui.desk import ALL, View
from hvlite.tui.device_strip import DeviceStrip
from hvlite.tui.dialogs import Question, Reading
from hvlite.tui.frame import Banner, Top
from hvlite.tui.job_details import JobDetails, log_file, log_text
from hvlite.tui.job_screen import JobScreen
from hvlite.tui.job_table import JobTable
from hvlite.tui.words import counted, named

EMPTY = """\
The queue is empty.

  n   write a prompt: it is queued with its settings, and you see at once whether it fits
  W   start the worker, which renders what is queued; it goes on when you close this window
  ?   all keys

From the command line:  hvlite queue add "a red circle moving left on a black background"
                        hvlite work
"""

# What an action needs of the job under the cursor; the others are for any job.
FOR_STATES = {
    "retry": ACTIONS["retry"],
    "move_up": ACTIONS["mv"],
    "move_down": ACTIONS["mv"],
    "move_top": ACTIONS["mv"],
    "move_bottom": ACTIONS["mv"],
    "open": frozenset({"done"}),
}
ON_A_JOB = {"edit", "cancel", "finish", "duplicate", "new_seed", "whole", "log", "copy_path", "copy_command"}


class QueueScreen(JobScreen):
    """The list, and the chosen job beside it (below it on narrow screens)."""

    STATES: ClassVar[tuple[State, ...]] = ALL
    BINDINGS = bindings("queue")

    def compose(self) -> ComposeResult:
        yield Top("queue")
        yield Banner(id="banner")
        with Horizontal(id="body"):
            with Vertical(id="list"):
                yield from self.compose_list()
                yield Static(Text(EMPTY), id="empty")
            yield JobDetails(id="details")
        yield DeviceStrip()
        yield Footer(compact=True, show_command_palette=False)

    def show(self, view: View) -> None:
        self.show_list(view)
        self.query_one("#details").display = self.table.display

    @on(JobTable.Chosen)
    def _show_job(self) -> None:
        view = self.table.view
        if view is not None:
            job = self.job
            self.query_one(JobDetails).show(job, view.at, None if job is None else view.ends.get(job.id))
        self.renew_footer()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The footer shows what fits the job under the cursor; with marks the store says what does not fit."""
        if action in FOR_STATES or action in ON_A_JOB:
            if not self.is_mounted or not self.query(JobTable):
                return False
            if self.table.marked and action != "open":
                return True
            job = self.job
            if job is not None and action == "finish":
                return refusal(action, job.id, job.state, is_draft=job.stop_after is not None) is None
            return job is not None and job.state in FOR_STATES.get(action, frozenset({job.state}))
        return True

    # Acting.

    def action_new(self) -> None:
        self.hvlite.write_new()

    def action_edit(self) -> None:
        job = self.job
        if job is None:
            return
        refused = refusal("edit", job.id, job.state)
        if refused is not None:
            self.hvlite.tell(f"{refused}; here: d, then e", severity="error")
        else:
            self.hvlite.edit(job)

    def action_duplicate(self) -> None:
        ids = self.table.chosen()
        self.hvlite.act(lambda store: store.duplicate(ids), self._told_new)

    def action_retry(self) -> None:
        ids = self.table.chosen()
        self.hvlite.act(lambda store: store.retry(ids), lambda _: self.table.mark_only([]))

    def action_move_up(self) -> None:
        self._move("up")

    def action_move_down(self) -> None:
        self._move("down")

    def action_move_top(self) -> None:
        self._move("top")

    def action_move_bottom(self) -> None:
        self._move("bottom")

    def _move(self, place: Place) -> None:
        ids = self.table.chosen()
        self.hvlite.act(lambda store: store.move(ids, Spot(place)))

    def action_cancel(self) -> None:
        """A running job is asked for, since its work may be lost; the others can be brought back."""
        ids, job = self.table.chosen(), self.job
        runs = [each for each in self.table.running() if each.id in ids]
        if not runs:
            self._cancel(ids)
            return
        steps = [f"step {each.progress.step} of {each.progress.steps}" for each in runs if each.progress is not None]
        at = f" ({', '.join(steps)})" if steps else ""
        assert job is not None
        question = f"Cancel {counted(len(ids))}, {counted(len(runs), 'running job')} among them{at}?"
        if len(ids) == 1:
            question = f"Cancel job {ids[0]}, which is running{at}? It stops at the next block; r queues it again."
            if workers.is_gone(runs[0], self.hvlite.held):
                question = f"Cancel job {ids[0]}, whose worker is gone{at}? The next one (W) cancels it."
        self.app.push_screen(Question(question, "cancel"), lambda yes: self._cancel(ids) if yes else None)

    def _cancel(self, ids: list[int]) -> None:
        self.hvlite.act(lambda store: _cancelled(store, ids), self._told_cancelled)

    def _told_cancelled(self, said: str) -> None:
        self.table.mark_only([])
        self.hvlite.tell(said)

    def action_clear(self) -> None:
        waiting = 0 if self.table.view is None else self.table.view.counts["queued"]
        if not waiting:
            self.hvlite.tell("no job is waiting")
            return
        question = f"Remove {counted(waiting, 'waiting job')}? What runs goes on. u brings them back."
        self.app.push_screen(Question(question, "remove"), lambda yes: self._clear() if yes else None)

    def _clear(self) -> None:
        self.hvlite.act(
            lambda store: store.clear(), lambda count: self.hvlite.tell(f"removed {counted(count)}; u: undo")
        )

    def action_log(self) -> None:
        job = self.job
        if job is not None:
            self.app.push_screen(Reading(str(log_file(job)), _log(job), lambda: _log(job)))


def _log(job: Job) -> Text:
    return Text(log_text(job) or "no log yet")


def _cancelled(store: Store, ids: list[int]) -> str:
    """Cancel what is open, take off the list what has ended -> what to tell."""
    jobs, held = {job_id: store.job(job_id) for job_id in ids}, workers.held_locks()
    ended = [job_id for job_id, job in jobs.items() if job.state in ENDED]
    still = [job_id for job_id in ids if job_id not in ended]
    said = []
    if still:
        running = store.cancel(still)
        waiting = [job_id for job_id in still if job_id not in running]
        left = [job_id for job_id in running if workers.is_gone(jobs[job_id], held)]
        asked = [job_id for job_id in running if job_id not in left]
        if asked:
            said.append(f"asked the worker to stop {named(asked)}")
        if left:
            said.append(f"the worker of {named(left)} is gone; the next one cancels what it left: W")
        if waiting:
            said.append(f"cancelled {named(waiting)}; u: undo")
    if ended:
        store.remove(ended)
        said.append(f"took {named(ended)} off the list, files stay; u: undo")
    return "; ".join(said)
