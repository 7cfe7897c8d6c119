"""The composer's form as text, and the jobs that it asks for: every field is checked by itself, in Request's own words.

A form is a mapping from the names below to what was typed; "" leaves a field to the model or the profile.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO, HUNYUANVIDEO_DEFAULTS, RequestDefaults
from hvlite.errors import HvliteError, RequestError
from hvlite.formats import TextWeights, Weights
from hvlite.jobs.asking import EMBEDDED, absolute, given_how, known_device, known_model, known_profile, model_of
from hvlite.jobs.batch import parse_seeds
from hvlite.jobs.job import How, Job, NewJob
from hvlite.profile import profile_names
from hvlite.request import Request
from hvlite.tui.words import number

Form = Mapping[str, str]
SEPARATORS = re.compile(r"[x, ]+")
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
ON, OFF = "yes", "no"


@dataclass(frozen=True, slots=True)
class Field:
    """`choices` are offered while one types; other values may be allowed."""

    name: str
    label: str
    hint: str = ""
    choices: tuple[str, ...] = ()


FIELDS = (
    Field("size", "size", "height x width"),
    Field("model", "model", "", (EMBEDDED, HUNYUANVIDEO.name)),
    Field("frames", "frames", "4k+1"),
    Field("profile", "profile", "by the card", ("auto",)),
    Field("steps", "steps"),
    Field("weights", "weights", "by profile", ("bf16", "int8", "int8-dynamic", "nf4", "nf4-double", "fp8")),
    Field("seeds", "seeds", "0 | 1,5-9 | 4x | -1"),
    Field("text_weights", "text wts", "by profile", ("fp16", "int8", "nf4", "nf4-double", "fp8")),
    Field("guidance", "guidance"),
    Field("device", "device", "the best one", ("cpu", "cuda", "cuda:0", "cuda:1")),
    Field("flow_shift", "shift"),
    Field("template", "template", "by frames", ("video", "image")),
    Field("cfg_scale", "true cfg", "1 (off)"),
    Field("flow_reverse", "reverse", ON, (ON, OFF)),
    Field("stop_after", "draft", "stop after step"),
    Field("folder", "folder", str(paths.DEFAULT_OUTPUT)),
    Field("negative_prompt", "avoid", "what to avoid; needs true cfg above 1"),
)
LABELS = {each.name: each.label for each in FIELDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a form says: a Request for each prompt and seed, or the faults by field (`prompt` is one too)."""

    requests: tuple[Request, ...] = ()
    how: How = field(default_factory=How)
    folder: Path = paths.DEFAULT_OUTPUT
    stop_after: int | None = None
    faults: Mapping[str, str] = field(default_factory=dict)

    def jobs(self, source: How | None = None) -> list[NewJob]:
        """As `hvlite queue add` would make them, with the same checks; HvliteError says what is wrong."""
        how = asked_how(self.how, source or How())
        return [
            NewJob(request=request, how=how, folder=self.folder, stop_after=self.stop_after)
            for request in self.requests
        ]


def asked_how(typed: How, source: How) -> How:
    """What is typed over the rest of `source`; what differs from it is checked, and a model is named."""
    how = over(source, typed)
    new = {name: getattr(typed, name) for name in HOW if getattr(typed, name) != getattr(source, name)}
    how = replace(how, **given_how(How(**new)))
    return how if how.model is not None else replace(how, model=known_model(model_of(how)))


def over(source: How, typed: How) -> How:
    """The form's fields, and all others of `source`."""
    return replace(source, **{name: getattr(typed, name) for name in HOW})


def choices(name: str) -> list[str]:
    """What a field offers."""
    offered = list(next(each for each in FIELDS if each.name == name).choices)
    return [*offered, *profile_names()] if name == "profile" else offered


def read_form(form: Form, prompt: str, draw: Callable[[], int]) -> Filled:
    """Check every field; `draw` makes the seed of a -1."""
    faults: dict[str, str] = {}
    given = {name: form.get(name, "").strip() for name in LABELS}
    values = {name: _checked(name, text, convert, faults) for name, convert in REQUEST.items() if (text := given[name])}
    how = {name: _checked(name, text, convert, faults) for name, convert in HOW.items() if (text := given[name])}
    seeds = _checked("seeds", given["seeds"] or "0", lambda text: _seeds(text, draw), faults) or [0]
    stop_after = _checked("stop_after", given["stop_after"], int, faults) if given["stop_after"] else None
    folder = _checked("folder", given["folder"] or str(paths.DEFAULT_OUTPUT), _folder, faults) or paths.DEFAULT_OUTPUT
    prompts = [part.strip() for part in BLANK_LINES.split(prompt) if part.strip()]
    if not faults:
        _check_together(values, folder, stop_after, faults)
    if not prompts:
        faults["prompt"] = "a prompt is missing"
    if faults:
        return Filled(faults=faults)
    try:
        requests = tuple(Request(each, seed=seed, **values) for each in prompts for seed in seeds)
    except RequestError as error:
        return Filled(faults={"prompt": str(error)})
    return Filled(requests=requests, how=How(**how), folder=folder, stop_after=stop_after)


def _check_together(values: Mapping[str, Any], folder: Path, stop_after: int | None, faults: dict[str, str]) -> None:
    """What only several fields together can be wrong in."""
    try:
        NewJob(request=Request("any", **values), how=How(), folder=folder, stop_after=stop_after)
    except RequestError as error:
        faults["stop_after"] = str(error)


def _checked(name: str, text: str, convert: Callable[[str], Any], faults: dict[str, str]) -> Any:
    """The value of one field, held against Request's rules; what is wrong goes to `faults`."""
    try:
        value = convert(text)
        if name in Request.__dataclass_fields__:
            Request("any", **{name: value})
    except HvliteError as error:
        faults[name] = str(error)
    except ValueError:
        faults[name] = f"{LABELS[name]}: {text!r} is no {_kind(convert)}"
    else:
        return value
    return None


def _kind(convert: Callable[[str], Any]) -> str:
    return {int: "whole number", float: "number"}.get(convert, "value for it")  # type: ignore[call-overload, no-any-return]


def _size(text: str) -> tuple[int, int]:
    parts = SEPARATORS.split(text.lower())
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise RequestError(f"size is height x width, as 720x1280; got {text!r}")
    return int(parts[0]), int(parts[1])


def _seeds(text: str, draw: Callable[[], int]) -> list[int]:
    return [draw()] if text == "-1" else parse_seeds(text)


def _switch(text: str) -> bool:
    if text not in (ON, OFF):
        raise RequestError(f"reverse is {ON} or {OFF}; got {text!r}")
    return text == ON


def _one_of(kind: Any) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return msgspec.convert(text, kind)
        except msgspec.ValidationError:
            raise RequestError(f"{text!r} is none of {', '.join(kind.__args__)}") from None

    return convert


def _folder(text: str) -> Path:
    return absolute(Path(text))


def _profile(text: str) -> str:
    return known_profile(text, How())


def _model(text: str) -> str:
    """A model that is not downloaded yet can be planned for; that it is missing is said once it is to be queued."""
    return text if text == HUNYUANVIDEO.name else known_model(text)


REQUEST: Mapping[str, Callable[[str], Any]] = {
    "size": _size,
    "frames": int,
    "steps": int,
    "guidance": float,
    "flow_shift": float,
    "cfg_scale": float,
    "template": str,
    "flow_reverse": _switch,
    "negative_prompt": str,
}
HOW: Mapping[str, Callable[[str], Any]] = {
    "model": _model,
    "profile": _profile,
    "weights": _one_of(Weights),
    "text_weights": _one_of(TextWeights),
    "device": known_device,
}


def form_of(job: Job) -> tuple[str, dict[str, str]]:
    """The prompt and the form that ask for this job again; `over` keeps what a form has no field for."""
    request, how = job.request, job.how
    assert request is not None
    assert how is not None
    form = {name: _text(getattr(request, name)) for name in REQUEST if getattr(request, name) is not None}
    form |= {name: _text(value) for name in HOW if (value := getattr(how, name)) is not None}
    form |= {"seeds": str(request.seed), "stop_after": _text(job.stop_after), "folder": _text(job.folder)}
    for name, default in (("cfg_scale", "1"), ("flow_reverse", ON)):
        if form.get(name) == default:
            del form[name]
    return request.prompt, {name: text for name, text in form.items() if text}


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return ON if value else OFF
        case tuple():
            return "x".join(map(str, value))
        case float():
            return number(value)
        case _:
            return str(value)


def defaults_of(model: str) -> RequestDefaults | None:
    """What a model does where nothing is said; None where only its own files tell."""
    if model == HUNYUANVIDEO.name:
        return HUNYUANVIDEO_DEFAULTS
    if model != EMBEDDED:
        return None
    settings = msgspec.json.decode((paths.SHAPES_MODEL / "hvlite.json").read_bytes())
    return msgspec.convert(settings["defaults"], RequestDefaults)
