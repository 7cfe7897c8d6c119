"""Write a prompt with its settings; every field is checked, and the plan made anew, while one types.

A job that is changed, or made again, takes the form for a while: what was half written comes back afterwards.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as made
from math import inf

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.suggester import SuggestFromList
from textual.widgets import Footer, Input, Static, TextArea

from hvlite.errors import HvliteError, RequestError
from hvlite.jobs.asking import model_of
from hvlite.jobs.job import How, Job, NewJob, check_suffix
from hvlite.request import Request
from hvlite.tui.actions import bindings
from hvlite.tui.desk import View
from hvlite.tui.forms import (
    FIELDS,
    HOW,
    Field,
    Filled,
    asked_how,
    choices,
    defaults_of,
    form_of,
    over,
    read_form,
)
from hvlite.tui.frame import Banner, MainScreen, Top
from hvlite.tui.planner import PlanWords, plan_words, room_here, time_words
from hvlite.tui.templates import Templates
from hvlite.tui.words import number

PLACEHOLDER = "What is to be seen, in full sentences. An empty line begins another prompt, which becomes another job."
NEW = "new job"
# A plan tells a time of day, which goes on while nobody types.
PLAN_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the form holds. `source` is the job that it was filled from, `editing` whether that one is to change."""

    prompt: str = ""
    form: dict[str, str] = made(default_factory=dict)
    source: Job | None = None
    editing: bool = False

    @property
    def how(self) -> How:
        """What the form has fields for, and what it has none for."""
        return (self.source and self.source.how) or How()

    @property
    def title(self) -> str:
        if self.source is None:
            return NEW
        kept = {name: value for name, value in vars(self.how).items() if value is not None and name not in HOW}
        rest = "".join(f", {name.replace('_', '-')} {value}" for name, value in kept.items())
        return f"change job {self.source.id}{rest}" if self.editing else f"{NEW} like job {self.source.id}{rest}"


class FormField(Horizontal):
    """A label and a line to type into; red while its value is none."""

    def __init__(self, field: Field) -> None:
        super().__init__(id=f"field-{field.name}", classes="field")
        self.field = field

    def compose(self) -> ComposeResult:
        offered = choices(self.field.name)
        yield Static(self.field.label, classes="label", markup=False)
        yield Input(
            placeholder=self.field.hint or " | ".join(offered),
            suggester=SuggestFromList(offered, case_sensitive=False) if offered else None,
            compact=True,
            id=self.field.name,
        )


class ComposeScreen(MainScreen):
    """A form. A `draft` is what was half written when a job took its place."""

    BINDINGS = bindings("compose")

    def __init__(self, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self.page, self.draft = Page(), Page()
        self.filled = Filled(faults={"prompt": ""})
        self.warned: Filled | None = None
        self._entries: list[str] = []
        self._entry = 0
        self._planned_at = inf

    def compose(self) -> ComposeResult:
        yield Top("compose")
        yield Banner(id="banner")
        with Vertical(id="form"):
            yield Static(NEW, id="form-title", markup=False)
            yield TextArea(placeholder=PLACEHOLDER, id="prompt", compact=True)
            with Vertical(id="fields"):
                for field in FIELDS:
                    yield FormField(field)
            with VerticalScroll(id="plan", can_focus=False):
                yield Static(id="plan-words")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#prompt").focus()
        self._check()

    def show(self, view: View) -> None:
        """Totals and warnings are shown by the frame; here the time of the plan goes on."""
        if view.at - self._planned_at >= PLAN_SECONDS:
            self._check()

    # The form as values.

    @property
    def prompt(self) -> TextArea:
        return self.query_one("#prompt", TextArea)

    def form(self) -> dict[str, str]:
        """What was typed, without the empty fields."""
        return {box.id: box.value for box in self.query(".field Input").results(Input) if box.id and box.value}

    @property
    def editing(self) -> Job | None:
        return self.page.source if self.page.editing else None

    def take(self, page: Page) -> None:
        """Put a job into the form; what was half written there comes back once that is over."""
        if self.page.source is None:
            self.draft = Page(prompt=self.prompt.text, form=self.form())
        self.fill(page)

    def give_back(self) -> None:
        """The job leaves the form."""
        if self.page.source is not None:
            self.fill(self.draft)
            self.draft = Page()

    def fill(self, page: Page) -> None:
        """Put these values into the form, in place of what is there."""
        self.page, self._entries = page, []
        with self.prevent(TextArea.Changed):
            self.prompt.text = page.prompt
        self.query_one("#form-title", Static).update(page.title)
        self._fill_fields(page.form)

    def _fill_fields(self, form: Mapping[str, str]) -> None:
        """The settings; the prompt stays."""
        with self.prevent(Input.Changed):
            for box in self.query(".field Input").results(Input):
                box.value = form.get(box.id or "", "")
        self.prompt.focus()
        self._check()

    @on(Input.Changed)
    @on(TextArea.Changed)
    def _check(self) -> None:
        form = self.form()
        self.filled = read_form(form, self.prompt.text, lambda: 0)
        for field in self.query(FormField):
            field.set_class(field.field.name in self.filled.faults, "-wrong")
        self._show_defaults(form.get("model", ""))
        self._plan(self.filled, form)

    def _show_defaults(self, model: str) -> None:
        """What an empty field stands for."""
        asked = replace(self.page.how, model=model or None)
        defaults = defaults_of(model_of(asked))
        for name in ("size", "frames", "steps", "guidance", "flow_shift"):
            value = None if defaults is None else getattr(defaults, name)
            text = "x".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else number(value)
            self.query_one(f"#{name}", Input).placeholder = text
        self.query_one("#model", Input).placeholder = model_of(replace(asked, model=None))

    # The plan.

    @work(group="plan", exclusive=True)
    async def _plan(self, filled: Filled, form: dict[str, str]) -> None:
        await asyncio.sleep(self.hvlite.surroundings.typing_seconds)
        faults = list(filled.faults.values())
        if set(filled.faults) == {"prompt"}:  # a plan needs no prompt
            filled = read_form(form, "any", lambda: 0)
        self._planned_at = inf
        shown = await self._planned(filled) if filled.requests else PlanWords(fits=False, lines=[])
        panel = self.query_one("#plan-words", Static)
        panel.update(Text("\n".join([*shown.lines, *faults])))
        panel.set_class(shown.fits is False, "-refused")
        panel.set_class(shown.fits is True, "-fits")

    async def _planned(self, filled: Filled) -> PlanWords:
        how, now = over(self.page.how, filled.how), self.hvlite.surroundings.clock()
        behind = self.editing is None  # a job that is changed keeps its place in line
        planned = await asyncio.to_thread(lambda: plan_words(filled.requests[0], how, room_here()))
        try:
            told = await self.hvlite.desk.call(
                lambda store: time_words(store, filled.requests, how, filled.stop_after, now, behind=behind)
            )
        except HvliteError as error:
            now = -inf  # to be planned again as soon as the queue is seen
            told = f"when it would be ready is not known: {error}"
        self._planned_at = now
        return replace(planned, lines=[planned.lines[0], told, *planned.lines[1:]])

    # Acting.

    def action_add(self) -> None:
        self._queue(first=False)

    def action_add_next(self) -> None:
        self._queue(first=True)

    def _queue(self, *, first: bool) -> None:
        if self.hvlite.front is not self:
            return  # a second key in the same burst: the first one has left this screen
        if self.hvlite.undone_work:
            busy = "the queue is still writing what was asked before; this key was left out"
            self.hvlite.tell(busy, severity="warning")
            return
        filled = read_form(self.form(), self.prompt.text, self.hvlite.draw_seed)
        if filled.faults:
            self.hvlite.tell("; ".join(filled.faults.values()), severity="error")
            return
        job = self.editing
        if job is not None and len(filled.requests) != 1:
            many = f"{len(filled.requests)} prompts and seeds"
            self.hvlite.tell(f"job {job.id} is one clip; this form asks for {many}", severity="error")
            return
        self._queue_checked(filled, first)

    @work(group="ask", exclusive=True)
    async def _queue_checked(self, filled: Filled, first: bool) -> None:
        """As `hvlite queue add` checks it; what does not fit is asked for twice."""
        try:
            jobs = filled.jobs(self.page.how)
        except HvliteError as error:
            self.hvlite.tell(str(error), severity="error")
            return
        planned = await asyncio.to_thread(lambda: plan_words(jobs[0].request, jobs[0].how, room_here()))
        asked = replace(filled, requests=tuple(replace(request, seed=0) for request in filled.requests))
        if planned.fits is False and asked != self.warned:
            self.warned = asked
            again = "the same key again queues it all the same, for a machine where it does"
            self.hvlite.tell(f"{planned.lines[0]}; {again}", severity="warning")
            return
        self.warned = None
        if self.editing is not None:
            self._change(self.editing, filled)
        else:
            self.hvlite.act(lambda store: store.add(jobs, first=first), lambda ids: self._queued(ids, filled.requests))

    def _queued(self, ids: Sequence[int], requests: Sequence[Request]) -> None:
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        self.hvlite.remember(lambda memory: memory.with_prompts(prompts))
        numbers = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
        self.hvlite.tell(f"queued {numbers}; u: undo")
        if self.page.source is None:
            self.fill(Page(form=self.form()))  # the next prompt is another one, with the same settings
        self.give_back()
        self.hvlite.go("queue")

    def _change(self, job: Job, filled: Filled) -> None:
        request, folder = filled.requests[0], filled.folder

        def changed(old: NewJob) -> NewJob:
            _check_as_opened(job, old)
            how, stop_after = asked_how(filled.how, old.how), filled.stop_after
            moved = replace(old, folder=folder, output=None) if folder != old.folder else old
            if moved.output is not None:
                check_suffix(moved.output, request)
            return replace(moved, request=request, how=how, stop_after=stop_after)

        self.hvlite.act(lambda store: store.edit([job.id], changed), lambda _: self._changed(job))

    def _changed(self, job: Job) -> None:
        again = "" if job.state == "queued" else " it will run again only by r (retry);"
        self.hvlite.tell(f"changed job {job.id};{again} u: undo")
        self.give_back()
        self.hvlite.go("queue")

    def action_earlier(self) -> None:
        self._recall(1)

    def action_later(self) -> None:
        self._recall(-1)

    def _recall(self, step: int) -> None:
        """Through what was queued, newest first; entry 0 is what was being written, and every change stays for now."""
        if not self._entries:
            self._entries, self._entry = ["", *self.hvlite.memory.prompts], 0
        to = max(0, min(self._entry + step, len(self._entries) - 1))
        if to != self._entry:
            self._entries[self._entry] = self.prompt.text
            self._entry, self.prompt.text = to, self._entries[to]

    def action_template(self) -> None:
        self.app.push_screen(Templates(self.hvlite.memory.templates), self._use_template)

    def _use_template(self, answer: tuple[str, str] | None) -> None:
        """`answer` is what to do (keep, take, drop) and the template's name."""
        if answer is None:
            return
        deed, name = answer
        if deed == "take":
            self._fill_fields(self.hvlite.memory.templates.get(name, {}))
            return
        form = self.form() if deed == "keep" else None
        self.hvlite.remember(lambda memory: memory.with_template(name, form))
        self.hvlite.tell(f"{'kept these settings as' if deed == 'keep' else 'dropped'} {name}")

    def action_reset(self) -> None:
        """Empty the form; what a job took the place of comes back."""
        if self.page.source is not None and not self.page.editing:
            self.give_back()
        else:
            self.fill(replace(self.page, prompt="", form={}))

    def action_help(self) -> None:
        self.hvlite.action_help()

    def action_back(self) -> None:
        if self.page.editing:
            self.give_back()
        self.hvlite.go("queue")


def _check_as_opened(job: Job, now: NewJob) -> None:
    """RequestError where the job is not what the form was filled from: the form would undo that change unseen."""
    fields = ("request", "how", "folder", "stop_after")
    if any(getattr(job, name) != getattr(now, name) for name in fields):
        instead = "nothing was written: escape leaves this form, e on the job then opens it as it is now"
        raise RequestError(f"job {job.id} was changed elsewhere since it was opened here; {instead}")


def open_form(screen: ComposeScreen, job: Job, *, to_edit: bool) -> None:
    """Fill the form with a job: to change it, or to make another one like it."""
    prompt, form = form_of(job)
    screen.take(Page(prompt=prompt, form=form, source=job, editing=to_edit))


def open_new(screen: ComposeScreen) -> None:
    """A change that was not finished is left."""
    job = screen.editing
    if job is not None:
        screen.give_back()
        screen.hvlite.tell(f"job {job.id} stays as it is")
