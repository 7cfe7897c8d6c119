"""What the screens with a list of jobs share: the table, its filter, and the actions that take the chosen jobs."""

import shlex
from dataclasses import replace
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.widgets import Input

from hvlite.jobs.job import Job, NewJob, State
from hvlite.tui import words
from hvlite.tui.desk import View, Wanted
from hvlite.tui.dialogs import Reading
from hvlite.tui.frame import MainScreen
from hvlite.tui.job_details import facts, facts_text
from hvlite.tui.job_table import JobTable


class JobScreen(MainScreen):
    """A table of jobs in `STATES`; subclasses add what stands beside it."""

    STATES: ClassVar[tuple[State, ...]]
    _moment: tuple[State | None, bool] | None = None
    _told_marks = 0

    @property
    def table(self) -> JobTable:
        return self.query_one(JobTable)

    @property
    def job(self) -> Job | None:
        return self.table.job

    @property
    def marks(self) -> int:
        return len(self.table.marked)

    def compose_list(self) -> ComposeResult:
        yield JobTable()
        yield Input(
            placeholder="words that a job must have; enter keeps them, esc shows all", id="filter", compact=True
        )

    def wanted(self) -> Wanted:
        table = self.table
        follow = None if table.job is None else table.job.id
        return Wanted(
            states=self.STATES,
            start=table.start(),
            words=self.query_one("#filter", Input).value,
            follow=follow,
            marked=frozenset(table.marked),
        )

    # The list.

    def renew_footer(self) -> None:
        """Where the keys of the moment are others than before: the footer is built anew, which takes its time."""
        if self.marks != self._told_marks:
            self._told_marks = self.marks
            self.hvlite.look_again()
        moment = (None if self.job is None else self.job.state, bool(self.table.marked))
        if moment != self._moment:
            self._moment = moment
            self.refresh_bindings()

    def show_list(self, view: View) -> None:
        """The jobs; where there are none at all, what to do first."""
        is_empty = view.total == 0 and not view.wanted.words
        self.query_one("#empty").display = is_empty
        self.table.display = not is_empty
        self.table.show(view)
        if not is_empty and self.focused is None:  # what is not displayed loses the focus
            self.table.focus()

    def on_mount(self) -> None:
        self.query_one("#filter", Input).display = False
        self.table.focus()

    @on(JobTable.Moved)
    def _read_more(self) -> None:
        if self.job is None:  # the keys that a job has are known when it is read
            self._moment = None
        self.hvlite.look_again()

    @on(JobTable.Opened)
    def _opened(self) -> None:
        self.action_whole()

    @on(Input.Changed, "#filter")
    def _filtered(self) -> None:
        if self.query_one("#filter", Input).value:  # where all are shown again, the cursor stays on its job
            self.table.cursor = 0
        self.hvlite.look_again()

    @on(Input.Submitted, "#filter")
    def _keep_filter(self) -> None:
        self.query_one("#filter", Input).display = bool(self.query_one("#filter", Input).value)
        self.table.focus()

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.display = True
        box.focus()

    def action_back(self) -> None:
        box = self.query_one("#filter", Input)
        if box.has_focus or (box.value and not self.table.marked):
            box.value, box.display = "", False
            self.table.focus()
        elif self.table.marked:
            self.table.mark_only([])
            self.renew_footer()
        else:
            self.leave()

    def leave(self) -> None:
        """Nothing is left to go back from."""

    def action_mark_all(self) -> None:
        wanted = self.wanted()
        self.hvlite.act(
            lambda store: store.search(wanted.states, wanted.words)[0],
            lambda ids: self.table.mark_only([] if set(ids) == set(self.table.marked) else ids),
        )

    # The chosen jobs.

    def action_new_seed(self) -> None:
        """The same with a seed that nobody has seen yet."""
        draw = self.hvlite.draw_seed

        def changed(new: NewJob) -> NewJob:
            return replace(new, request=replace(new.request, seed=draw()))

        ids = self.table.chosen()
        self.hvlite.act(lambda store: store.duplicate(ids, changed), self._told_new)

    def _told_new(self, ids: list[int]) -> None:
        self.table.mark_only([])
        self.hvlite.tell(f"queued as {words.named(ids)}")

    def action_finish(self) -> None:
        ids = self.table.chosen()
        self.hvlite.act(lambda store: store.finish(ids), lambda _: self.table.mark_only([]))

    def action_whole(self) -> None:
        job, view = self.job, self.table.view
        if job is not None and view is not None:
            found = facts(job, view.at, view.ends.get(job.id))
            if job.request is not None and job.how is not None:
                found.append(("command", words.command_of(job.request, job.how)))
            if job.log is not None:
                found.append(("log", str(job.log)))
            self.app.push_screen(Reading(f"Job {job.id}", facts_text(found)))

    def action_open(self) -> None:
        if self.job is not None:
            self.hvlite.play(self.job)

    def action_copy_path(self) -> None:
        job = self.job
        if job is not None and job.output is not None:
            self.hvlite.copy(str(job.output))
        elif job is not None:
            self.hvlite.tell(f"job {job.id} has no file yet", severity="warning")

    def action_copy_command(self) -> None:
        job = self.job
        if job is not None and job.request is not None and job.how is not None:
            self.hvlite.copy(words.command_of(job.request, job.how))

    def ids_text(self) -> str:
        ids = self.table.chosen()
        return shlex.join(map(str, ids)) if ids else "ID"
