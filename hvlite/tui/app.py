"""The terminal UI: a window onto the durable queue. It owns no job; closing it changes nothing, several may be open.

The app looks at the queue twice a second and hands what it sees to the screen in front; what a user does goes to the
queue's own thread. No torch here: the worker is a process of its own.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from subprocess import Popen
from typing import Any, ClassVar, TypeVar

from textual import events
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from hvlite.errors import HvliteError, RequestError
from hvlite.jobs.job import Job
from hvlite.jobs.store import Store
from hvlite.tui import ends, outside, workers
from hvlite.tui.actions import NO_KEY, actions_of, bindings
from hvlite.tui.desk import Desk, View, view_now
from hvlite.tui.device_strip import DeviceStrip
from hvlite.tui.dialogs import Question, Reading
from hvlite.tui.ends import Severity
from hvlite.tui.frame import Banner, MainScreen, Top, warning
from hvlite.tui.graphics import widget_for
from hvlite.tui.pausing import lift, turn
from hvlite.tui.queue_screen import QueueScreen
from hvlite.tui.settings import Memory, TuiSettings, change_memory, read_memory, read_settings
from hvlite.tui.surroundings import LOOK_SECONDS, Surroundings

T = TypeVar("T")

THEMES = ("textual-dark", "textual-light", "ansi-dark", "ansi-light")


class HvliteApp(App[None]):
    """Screens, what they share, and the look at the queue."""

    TITLE = "hvlite"
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("app"), Binding("ctrl+c", "help_quit", show=False, system=True)]
    COMMAND_PALETTE_BINDING = NO_KEY  # ours is bound by its own action
    DEFAULT_MODE = "queue"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012

    def __init__(
        self,
        settings: TuiSettings | None = None,
        memory: Memory | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.memory = settings or TuiSettings(), memory or Memory()
        self.surroundings = surroundings or Surroundings()
        self.desk = Desk(self.surroundings.clock)
        self.draw_seed = self.surroundings.draw_seed
        self.view: View | None = None
        self.fault: str | None = None
        self.leaving = False
        self.undone_work = self.looks = self.probes = 0
        self.held: dict[str, int] = {}
        self.started: list[Popen[bytes]] = []
        self.ending: set[int] = set()
        self._pulse = workers.Pulse()
        self._stale = asyncio.Event()
        for name in ("queue", "compose", "gallery"):
            self.add_mode(name, partial(_made_screen, name))

    # From start to end.

    def on_mount(self) -> None:
        asked = (self.settings.theme, self.memory.theme)
        self.theme = next((name for name in asked if name in self.available_themes), None) or THEMES[0]
        self.set_keymap(self.settings.keys)
        self.run_worker(self._look_for_ever(), group="look")
        self.run_worker(self._probe_for_ever(), group="probe")

    def on_unmount(self) -> None:
        self.desk.close()

    # Looking.

    def look_again(self) -> None:
        """Do not wait for the next half second."""
        self._stale.set()

    async def _look_for_ever(self) -> None:
        while True:
            await self._look()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stale.wait(), self.surroundings.look_seconds)
            self._stale.clear()

    async def _look(self) -> None:
        screen = self.shown
        if screen is None:
            return
        try:
            view = await self.desk.look(screen.wanted())
            if view is not None and screen is self.shown:
                await self._tell_ends(self.view, view)
            self.fault = None
        except HvliteError as error:
            view, self.fault = None, str(error)
            self.desk.forget()
        for note in self.desk.notes:
            self.tell(note, severity="warning")
        self.desk.notes.clear()
        if screen is not self.shown:
            self.desk.forget()
            self.look_again()
            return
        if view is not None:
            self.view = view
            screen.show(view)
            for strip in screen.query(DeviceStrip):
                strip.show_jobs(view.running)
        self._warn(screen)
        self.looks += 1

    @property
    def front(self) -> MainScreen:
        """The one that the tabs show, whatever is laid over it."""
        screen = self.screen_stack[0]
        assert isinstance(screen, MainScreen)
        return screen

    @property
    def shown(self) -> MainScreen | None:
        """The screen in front; None while it is being made or taken down."""
        if not self.is_running or not self.screen_stack:
            return None
        return self.front if self.front.query("Footer") and self.front.is_mounted else None

    def _warn(self, screen: Screen[Any]) -> None:
        """Totals, and one line of what has to be known."""
        warning, alarming = self._warning()
        screen.query_one(Banner).show(warning, alarming=alarming)
        if self.view is not None:
            screen.query_one(Top).show(self.view, len(self.held), self.front.marks)

    def _warning(self) -> tuple[str | None, bool]:
        """The worst first; and whether it is an alarm."""
        if self.fault is not None:
            return f"the queue cannot be read: {self.fault}", True
        if self.view is None:
            return None, False
        silent = self._pulse.silent(list(self.view.running), self.surroundings.steady())
        return warning(self.view, self.held, silent)

    async def _tell_ends(self, before: View | None, after: View) -> None:
        """What has come to its end between two looks, and the end of the queue."""
        still = {job.id for job in after.running}
        gone = [job.id for job in before.running if job.id not in still] if before is not None else []
        if not gone:
            return
        ended = await self.desk.call(lambda store: ends.found(store, gone))
        for text, severity in ends.words_of(ended, after):
            self.tell(text, severity=severity)
        alarm = ends.alarm_of(ended, after)
        if alarm is not None and self.settings.notify != "off":
            self.bell()
            if self.settings.notify == "desktop":
                self.write_to_terminal(ends.desktop_note(alarm))

    def write_to_terminal(self, sequence: str) -> None:
        """What is no part of the screen."""
        if self._driver is not None:
            self._driver.write(sequence)

    async def _probe_for_ever(self) -> None:
        while True:
            self.held = await asyncio.to_thread(workers.held_locks)
            machine = await asyncio.to_thread(self.surroundings.probe, frozenset(self.held.values()))
            view, screen = self.view, self.shown
            if screen is not None:
                for strip in screen.query(DeviceStrip):
                    strip.show(machine, () if view is None else view.running)
                self._warn(screen)
                self.probes += 1
            await asyncio.sleep(self.surroundings.probe_seconds)

    # Acting.

    def act(self, deed: Callable[[Store], T], then: Callable[[T], object] = lambda _: None) -> None:
        """Do something to the queue, then say or show it; what the queue refuses is told."""
        if self.leaving:
            return
        self.undone_work += 1
        self.run_worker(self._act(deed, then), group="act")

    async def _act(self, deed: Callable[[Store], T], then: Callable[[T], object]) -> None:
        try:
            result = await self.desk.call(deed)
        except HvliteError as error:
            self.tell(str(error), severity="error")
        else:
            then(result)
        finally:
            self.undone_work -= 1
            self.look_again()
            if self.leaving and not self.undone_work:
                self.exit()

    def tell(self, text: str, *, severity: Severity = "information") -> None:
        """A note in the corner, for some seconds."""
        self.notify(text, severity=severity, markup=False, timeout=5 if severity == "information" else 10)

    def remember(self, change: Callable[[Memory], Memory]) -> None:
        """Change what is kept now, another window's prompts and templates among it."""
        self.memory, fault = change_memory(self.memory, change)
        if fault is not None:
            self.tell(fault, severity="warning")

    def copy(self, text: str) -> None:
        """By OSC 52: the terminal puts it into the clipboard, over ssh too, if it allows that."""
        self.copy_to_clipboard(text)
        self.tell(f"copied: {text}")

    def play(self, job: Job) -> None:
        """Open its file with the user's player."""
        if job.output is None or not job.output.exists():
            self.tell(f"job {job.id} has no file to open", severity="warning")
            return
        fault = outside.play(job.output, self.settings.player)
        self.tell(fault or f"playing {job.output}", severity="information" if fault is None else "warning")

    # Screens.

    def go(self, name: str) -> None:
        """Show that screen; the others keep what is in them."""
        while len(self.screen_stack) > 1:
            self.pop_screen()
        if name != self.current_mode:
            self.switch_mode(name)
            self.desk.forget()
            self.look_again()

    def write_new(self) -> None:
        """The composer for a new job, whatever was being changed there."""
        from hvlite.tui.compose_screen import ComposeScreen, open_new

        self.go("compose")
        screen = self.front
        assert isinstance(screen, ComposeScreen)
        screen.call_after_refresh(open_new, screen)

    def edit(self, job: Job) -> None:
        """Change a job in the composer."""
        self._compose(job, to_edit=True)

    def reuse(self, job: Job) -> None:
        """Make another one like it, in the composer."""
        self._compose(job, to_edit=False)

    def _compose(self, job: Job, *, to_edit: bool) -> None:
        from hvlite.tui.compose_screen import ComposeScreen, open_form

        if job.request is None or job.how is None:
            self.tell(f"job {job.id} cannot be read: {job.error}", severity="error")
            return
        self.go("compose")
        screen = self.front
        assert isinstance(screen, ComposeScreen)
        screen.call_after_refresh(open_form, screen, job, to_edit=to_edit)

    # The actions of every screen.

    def action_queue(self) -> None:
        self.go("queue")

    def action_compose(self) -> None:
        self.go("compose")

    def action_gallery(self) -> None:
        self.go("gallery")

    def action_undo(self) -> None:
        self.act(lambda store: ends.undone_words(store.undo()), lambda told: self.tell(told[0], severity=told[1]))

    def action_pause(self) -> None:
        self.act(lambda store: turn(store, now=False), self.tell)

    def action_pause_now(self) -> None:
        self.act(lambda store: turn(store, now=True), self.tell)

    def action_worker(self) -> None:
        if self.held:
            pids = sorted(set(self.held.values()))
            question = f"Stop the worker (process {', '.join(map(str, pids))})? What it renders is saved, and goes on"
            self.push_screen(
                Question(f"{question} with the next worker.", "stop"),
                lambda yes: self._stop(pids) if yes else None,
            )
            return

        def started(store: Store) -> tuple[Popen[bytes], str]:
            lifted = lift(store)
            return workers.start_worker(), lifted

        def watched(done: tuple[Popen[bytes], str]) -> None:
            process, lifted = done
            outside.reap(process)
            self.started.append(process)
            self.tell(f"started a worker; what it says is in {workers.worker_log()}{lifted}")
            self.run_worker(self._watch(process), group="watch")

        self.act(started, watched)

    def _stop(self, pids: list[int]) -> None:
        told, asked = workers.stop_workers(pids)
        self.ending |= asked
        self.tell(told)

    def at_work(self) -> set[int]:
        """The workers' processes, one that was started a moment ago among them."""
        return {*workers.held_locks().values(), *(each.pid for each in self.started if each.poll() is None)}

    async def _watch(self, process: Popen[bytes]) -> None:
        """Tell why a worker has ended that was started here; it outlives this window all the same."""
        while (code := process.poll()) is None:
            await asyncio.sleep(LOOK_SECONDS)
        fault = workers.last_words(code)
        if fault is not None:
            self.tell(fault, severity="error")

    def action_theme(self) -> None:
        at = THEMES.index(self.theme) if self.theme in THEMES else -1
        self.theme = THEMES[(at + 1) % len(THEMES)]
        self.remember(lambda memory: replace(memory, theme=self.theme))
        fixed = self.settings.theme
        self.tell(f"theme {self.theme}" + (f"; the next window has tui.toml's {fixed} again" if fixed else ""))

    def action_palette(self) -> None:
        self.action_command_palette()

    def action_help(self) -> None:
        from hvlite.tui.help import help_text

        self.push_screen(Reading("Keys", help_text(self.front.id or "queue", self.settings.keys)))

    def action_help_quit(self) -> None:
        self.tell("q closes this window; the worker goes on. x cancels a job")

    def action_leave(self) -> None:
        """Once all is done that was asked for before."""
        self.leaving = True
        if not self.undone_work:
            self.exit()

    async def action_quit(self) -> None:
        self.action_leave()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every action of the screen in front, each with the command line that does the same."""
        front = self.front
        for action in actions_of(str(front.id), "app"):
            target = self if action.screen == "app" else front
            title = f"{action.help[0].upper()}{action.help[1:]}"
            cli = action.cli.replace("{id}", front.ids_text())
            keys = self.settings.keys.get(action.name, action.keys).split(",")
            key = "" if keys[0] == NO_KEY else keys[0]
            yield SystemCommand(title, f"{key}  {cli}".strip(), getattr(target, f"action_{action.method}"))

    def on_app_focus(self, event: events.AppFocus) -> None:
        self.look_again()


def _made_screen(name: str) -> MainScreen:
    """Imported when it is first shown."""
    match name:
        case "queue":
            return QueueScreen(id=name)
        case "compose":
            from hvlite.tui.compose_screen import ComposeScreen

            return ComposeScreen(id=name)
        case _:
            from hvlite.tui.gallery_screen import GalleryScreen

            return GalleryScreen(id=name)


def tui() -> int:
    """Look at the queue and work on it, in the terminal; the worker goes on when it is closed."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RequestError("hvlite tui needs a terminal; for scripts there is: hvlite queue ls --json")
    settings = read_settings()
    app = HvliteApp(settings, read_memory(), Surroundings(graphic=widget_for(settings.pictures)))
    app.run()
    said = ends.farewell(view_now(app.view), app.at_work(), app.ending)
    if said is not None:
        sys.stderr.write(f"{said}\n")
    return app.return_code or 0
