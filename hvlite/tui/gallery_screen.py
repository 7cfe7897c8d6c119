"""Finished clips, newest first, with their first, middle and last frame; and drafts, which wait to be finished."""

import asyncio
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Footer, Static

from hvlite import paths
from hvlite.errors import RequestError
from hvlite.jobs.job import ACTIONS, Job, State
from hvlite.tui import words
from hvlite.tui.actions import bindings
from hvlite.tui.desk import View
from hvlite.tui.frame import Banner, Top
from hvlite.tui.job_details import facts, facts_table
from hvlite.tui.job_screen import JobScreen
from hvlite.tui.job_table import JobTable
from hvlite.tui.pictures import Pictures, read_moments, read_strip

if TYPE_CHECKING:
    from hvlite.video.frames import Frame

EMPTY = """\
No clip is finished yet.

  2   write a prompt, ctrl+s queues it
  W   start the worker
  1   see how far it is

Without a queue, right away:  hvlite gen "a red circle moving left on a black background"
"""
# As many clips are kept with their pictures, for going to and fro.
KEPT = 24


class GalleryScreen(JobScreen):
    """The list, and beside it (below it on narrow screens) the chosen clip."""

    STATES: ClassVar[tuple[State, ...]] = ("done", "parked")
    BINDINGS = bindings("gallery")

    def __init__(self, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self._seen: dict[tuple[Path, float], list[Frame]] = {}
        self._keeping = Lock()

    def compose(self) -> ComposeResult:
        yield Top("gallery")
        yield Banner(id="banner")
        with Horizontal(id="body"):
            with Vertical(id="list"):
                yield from self.compose_list()
                yield Static(Text(EMPTY), id="empty")
            with VerticalScroll(id="clip", can_focus=False):
                yield Pictures(id="moments")
                yield Static(id="clip-words")
        yield Footer(compact=True, show_command_palette=False)

    def show(self, view: View) -> None:
        self.show_list(view)
        self.query_one("#clip").display = self.table.display

    @on(JobTable.Chosen)
    def _show_clip(self) -> None:
        view, job = self.table.view, self.job
        self.renew_footer()
        if view is None:
            return
        self.query_one("#clip-words", Static).update("" if job is None else facts_table(facts(job, view.at, None)))
        self._show_frames(job)

    @work(group="frames", exclusive=True)
    async def _show_frames(self, job: Job | None) -> None:
        """The frames, once they are read; a clip of many frames takes a moment, and a key may come first."""
        pictures = self.query_one(Pictures)
        if job is None:
            pictures.show([])
            return
        await asyncio.sleep(self.hvlite.surroundings.typing_seconds)
        try:
            pictures.show(await asyncio.to_thread(self._frames_of, job))
        except (OSError, RequestError) as error:
            pictures.show([])
            found = [("fault", str(error)), *facts(job, self.hvlite.surroundings.clock(), None)]
            self.query_one("#clip-words", Static).update(facts_table(found))

    def _frames_of(self, job: Job) -> "list[Frame]":
        if job.state == "parked":
            return read_strip(paths.preview_file(job.id))
        if job.output is None:
            return []
        try:
            key = (job.output, job.output.stat().st_mtime)
        except OSError:  # it is gone
            return []
        seen = self._seen.get(key)
        if seen is None:
            found = read_moments(job.output)
            with self._keeping:  # a thread whose frames nobody wants any more may still be reading
                self._seen[key] = found
                while len(self._seen) > KEPT:
                    del self._seen[next(iter(self._seen))]
            return found
        return seen

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The footer shows what fits the clip under the cursor."""
        if action in ("finish", "open", "reuse", "remove", "new_seed", "whole", "copy_path", "copy_command"):
            job = self.job if self.is_mounted and self.query(JobTable) else None
            if job is None:
                return False
            return (
                action not in ("finish", "open") or job.state in {"finish": ACTIONS["finish"], "open": {"done"}}[action]
            )
        return True

    def leave(self) -> None:
        self.hvlite.go("queue")

    def action_reuse(self) -> None:
        if self.job is not None:
            self.hvlite.reuse(self.job)

    def action_remove(self) -> None:
        ids = self.table.chosen()
        self.hvlite.act(lambda store: store.remove(ids), lambda _: self._removed(ids))

    def _removed(self, ids: list[int]) -> None:
        self.table.mark_only([])
        self.hvlite.tell(f"took {words.named(ids)} off the list, files stay; u: undo")
