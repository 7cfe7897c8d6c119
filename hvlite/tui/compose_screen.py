"""Write a prompt with its settings; every field is checked, and the plan made anew, while one types."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.suggester import SuggestFromList
from textual.widgets import Footer, Input, Static, TextArea

from hvlite.jobs.job import Job, NewJob
from hvlite.request import Request
from hvlite.tui.actions import bindings
from hvlite.tui.desk import View
from hvlite.tui.forms import FIELDS, Field, Filled, choices, defaults_of, form_of, model_name, read_form
from hvlite.tui.frame import Banner, MainScreen, Top
from hvlite.tui.planner import PlanWords, plan_words, room_here, time_words
from hvlite.tui.templates import Templates

PLACEHOLDER = "What is to be seen, in full sentences. An empty line begins another prompt, which becomes another job."
NEW = "new job"


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
    """A form. While `editing` is a job, it is changed; else new ones are queued."""

    BINDINGS = bindings("compose")

    def __init__(self, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self.editing: Job | None = None
        self.filled = Filled(faults={"prompt": ""})
        self._back_in_time = -1

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
        """Totals and warnings are shown by the frame."""

    # The form as values.

    @property
    def prompt(self) -> TextArea:
        return self.query_one("#prompt", TextArea)

    def form(self) -> dict[str, str]:
        """What was typed, without the empty fields."""
        return {box.id: box.value for box in self.query(".field Input").results(Input) if box.id and box.value}

    def fill(self, prompt: str, form: dict[str, str], editing: Job | None = None) -> None:
        """Put these values into the form, in place of what is there."""
        self.editing = editing
        with self.prevent(Input.Changed, TextArea.Changed):
            self.prompt.text = prompt
            for box in self.query(".field Input").results(Input):
                box.value = form.get(box.id or "", "")
        self.query_one("#form-title", Static).update(NEW if editing is None else f"change job {editing.id}")
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
        defaults = defaults_of(model_name(replace(self.filled.how, model=model or None)))
        for name in ("size", "frames", "steps", "guidance", "flow_shift"):
            value = None if defaults is None else getattr(defaults, name)
            text = "x".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else f"{value:g}"
            self.query_one(f"#{name}", Input).placeholder = text
        self.query_one("#model", Input).placeholder = model_name(self.filled.how)

    # The plan.

    @work(group="plan", exclusive=True)
    async def _plan(self, filled: Filled, form: dict[str, str]) -> None:
        await asyncio.sleep(self.hvlite.surroundings.typing_seconds)
        if not filled.faults:
            shown = await self._planned(filled)
        else:
            rest = {name: fault for name, fault in filled.faults.items() if name != "prompt"}
            shown = PlanWords(fits=False, lines=list(rest.values()))
            if not rest:  # a plan needs no prompt
                shown = await self._planned(read_form(form, "any", lambda: 0))
                shown = replace(shown, lines=[*shown.lines, filled.faults["prompt"]])
        panel = self.query_one("#plan-words", Static)
        panel.update(Text("\n".join(shown.lines)))
        panel.set_class(shown.fits is False, "-refused")
        panel.set_class(shown.fits is True, "-fits")

    async def _planned(self, filled: Filled) -> PlanWords:
        now = self.hvlite.surroundings.clock()
        planned = await asyncio.to_thread(lambda: plan_words(filled.requests[0], filled.how, room_here()))
        told = await self.hvlite.desk.call(
            lambda store: time_words(store, filled.requests, filled.how, filled.stop_after, now)
        )
        return replace(planned, lines=[planned.lines[0], told, *planned.lines[1:]])

    # Acting.

    def action_add(self) -> None:
        self._queue(first=False)

    def action_add_next(self) -> None:
        self._queue(first=True)

    def _queue(self, *, first: bool) -> None:
        filled = read_form(self.form(), self.prompt.text, self.hvlite.draw_seed)
        if filled.faults:
            self.hvlite.tell("; ".join(filled.faults.values()), severity="error")
            return
        if self.editing is not None:
            self._change(self.editing, filled)
            return
        jobs = filled.jobs()
        self.hvlite.act(lambda store: store.add(jobs, first=first), lambda ids: self._queued(ids, filled.requests))

    def _queued(self, ids: Sequence[int], requests: Sequence[Request]) -> None:
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        self.hvlite.remember(self.hvlite.memory.with_prompts(prompts))
        number = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
        self.hvlite.tell(f"queued {number}; u: undo")
        self._back_in_time = -1
        self.hvlite.go("queue")

    def _change(self, job: Job, filled: Filled) -> None:
        if len(filled.requests) != 1:
            many = f"{len(filled.requests)} prompts and seeds"
            self.hvlite.tell(f"job {job.id} is one clip; this form asks for {many}", severity="error")
            return
        request, form_how = filled.requests[0], filled.how

        def changed(old: NewJob) -> NewJob:
            how = replace(old.how, **{name: getattr(form_how, name) for name in FORM_HOW})
            return replace(old, request=request, how=how, stop_after=filled.stop_after)

        self.hvlite.act(lambda store: store.edit([job.id], changed), lambda _: self._changed(job))

    def _changed(self, job: Job) -> None:
        self.hvlite.tell(f"changed job {job.id}; u: undo")
        self.fill("", {})
        self.hvlite.go("queue")

    def action_earlier(self) -> None:
        self._recall(1)

    def action_later(self) -> None:
        self._recall(-1)

    def _recall(self, step: int) -> None:
        prompts = self.hvlite.memory.prompts
        self._back_in_time = max(-1, min(self._back_in_time + step, len(prompts) - 1))
        if prompts:
            self.prompt.text = prompts[self._back_in_time] if self._back_in_time >= 0 else ""

    def action_template(self) -> None:
        self.app.push_screen(Templates(self.hvlite.memory.templates), self._use_template)

    def _use_template(self, answer: tuple[str, str] | None) -> None:
        """`answer` is what to do (keep, take, drop) and the template's name."""
        if answer is None:
            return
        deed, name = answer
        memory = self.hvlite.memory
        if deed == "take":
            self.fill(self.prompt.text, memory.templates.get(name, {}), self.editing)
            return
        rest = {key: form for key, form in memory.templates.items() if key != name}
        self.hvlite.remember(replace(memory, templates={**rest, name: self.form()} if deed == "keep" else rest))
        self.hvlite.tell(f"{'kept these settings as' if deed == 'keep' else 'dropped'} {name}")

    def action_reset(self) -> None:
        self.fill("", {})

    def action_help(self) -> None:
        self.hvlite.action_help()

    def action_back(self) -> None:
        if self.editing is not None:
            self.fill("", {})
        self.hvlite.go("queue")


FORM_HOW = ("model", "profile", "weights", "text_weights", "device")


def open_form(screen: ComposeScreen, job: Job, *, to_edit: bool) -> None:
    """Fill the form with a job: to change it, or to make another one like it."""
    prompt, form = form_of(job)
    screen.fill(prompt, form, job if to_edit else None)
