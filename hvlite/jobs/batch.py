"""A prompt file -> many Requests. Every entry is checked before any is used, and every fault found is told at once.

txt has a prompt a paragraph, lines a prompt a line, csv and tsv a header, jsonl an object (or just a prompt) a line,
toml a `[[job]]` table each and settings for all of them above. Columns are the fields of Request, `stop_after_step`,
`seeds` and `output`, also under their published names. What a file does not say comes from `defaults`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from hvlite.errors import RequestError
from hvlite.jobs.prompt_files import (
    FIELDS,
    BatchError,
    Fault,
    Format,
    Record,
    decoded,
    guessed,
    plain_name,
    read_records,
    unknown_column,
)
from hvlite.request import MAX_SEED, Request

MOST_JOBS = 100_000
MOST_SEEDS = 10_000

SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One clip of a prompt file. `output` is a file name, without a folder; `stop_after` makes a draft."""

    line: int
    request: Request
    stop_after: int | None = None
    output: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a prompt file asks for. `notes` tell what its writer may not have meant."""

    format: Format
    prompts: int
    entries: Sequence[Entry]
    notes: Sequence[str] = ()


def read_batch(
    raw: bytes,
    *,
    name: str,
    form: Format | None = None,
    defaults: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
    draw: Callable[[], int],
) -> Batch:
    """Every clip that the file `name` with the content `raw` asks for; BatchError with all of its faults.

    An entry without a seed gets each of `seeds`, or the default one; `draw` makes the seed of one that says -1.
    `defaults` are under the names of columns.
    """
    text = decoded(raw)
    form = form or guessed(text, name)
    faults: list[Fault] = []
    records = list(read_records(text, form, faults))
    entries: list[Entry] = []
    for record in records:
        entries += _entries(record, defaults, seeds, draw, faults)
        if len(entries) > MOST_JOBS:
            faults.append(Fault(record.line, "", f"more than {MOST_JOBS:,} clips; split the file"))
            break
    faults += _doubled(entries)
    if not records and not faults:
        faults.append(Fault(1, "", "there is no prompt in it"))
    if faults:
        raise BatchError(sorted(faults, key=lambda fault: fault.line))
    return Batch(format=form, prompts=len(records), entries=entries, notes=_notes(text, form, records))


def parse_seeds(text: str, first: int = 0) -> list[int]:
    """`0,1,5-9` -> those seeds; `3x` (or `x3`) -> three of them from `first`."""
    counted = re.fullmatch(r"(?:([0-9]{1,18})x|x([0-9]{1,18}))", text.strip())
    if counted:
        count = int(counted[1] or counted[2])
        return _seed_range(text, first, first + count - 1)
    found: dict[int, None] = {}
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*([0-9]{1,19})(?:\s*-\s*([0-9]{1,19}))?\s*", part)
        if bounds is None:
            raise RequestError(f"{text!r} are no seeds: use 0,1,5-9, or 3x for three of them")
        found.update(dict.fromkeys(_seed_range(text, int(bounds[1]), int(bounds[2] or bounds[1]))))
    return list(found)


def _seed_range(text: str, first: int, last: int) -> list[int]:
    if not 0 < last - first + 1 <= MOST_SEEDS:
        raise RequestError(f"{text!r} would be {max(0, last - first + 1):,} seeds; 1 to {MOST_SEEDS:,} are allowed")
    if last > MAX_SEED:
        raise RequestError(f"seed must be 0 to {MAX_SEED}; got {last}")
    return list(range(first, last + 1))


def _entries(
    record: Record,
    defaults: Mapping[str, Any],
    seeds: Sequence[int] | None,
    draw: Callable[[], int],
    faults: list[Fault],
) -> list[Entry]:
    """The clips of one record; its faults are added, and then there are none."""
    found: list[Fault] = []
    values: dict[str, Any] = {}
    for name, value in record.values.items():
        plain = plain_name(name)
        fault = unknown_column(record.line, name)
        if fault is None:
            try:
                values[plain] = _converted(plain, value, record.texts)
            except (RequestError, msgspec.ValidationError) as error:
                fault = Fault(record.line, plain, str(error))
        found += [] if fault is None else [fault]
    own, output = values.pop("seeds", None), values.pop("output", None)
    if own is not None and "seed" in values:
        found.append(Fault(record.line, "seeds", "seed and seeds are both given"))
    if not str(values.get("prompt", "")).strip() and not any(fault.field == "prompt" for fault in found):
        found.append(Fault(record.line, "prompt", "there is none"))
    fields = {**defaults, **values}
    if fields.get("seed") == -1:
        fields["seed"] = draw()
    wanted = own or (seeds if "seed" not in values and seeds else [fields.get("seed", 0)])
    if output is not None and len(wanted) > 1:
        found.append(Fault(record.line, "output", f"one file name for {len(wanted)} seeds"))
    stop, steps = fields.pop("stop_after_step", None), fields.get("steps")
    if stop is not None and steps is not None and stop >= steps:
        found.append(Fault(record.line, "stop_after_step", f"must be below the steps ({steps}); got {stop}"))
    faults += found
    if found:
        return []
    requests = [Request(**{**fields, "seed": seed}) for seed in wanted]
    return [Entry(line=record.line, request=request, stop_after=stop, output=output) for request in requests]


def _converted(name: str, value: Any, text: bool) -> Any:
    """A value of the field's own type and range."""
    if name == "seeds":
        return _seeds_of(value)
    if name == "output":
        return _file_name(value)
    if name == "stop_after_step":
        return msgspec.convert(value, Annotated[int, msgspec.Meta(ge=1)], strict=not text)
    if name == "size" and isinstance(value, str):
        sides = re.fullmatch(r"\s*([0-9]{1,5})\s*[xX*, ]\s*([0-9]{1,5})\s*", value)
        if sides is None:
            raise RequestError(f"{value!r} is no size: write height x width, as in 720x1280")
        value = [int(sides[1]), int(sides[2])]
    if text and FIELDS[name] is bool:
        if value.strip().lower() not in SWITCHES:
            raise RequestError(f"{value!r} is neither true nor false")
        value = SWITCHES[value.strip().lower()]
    if text and name not in ("prompt", "negative_prompt"):
        value = value.strip() if isinstance(value, str) else value
    if name == "template" and isinstance(value, str):
        converted: Any = value  # Request says it better
    else:
        converted = msgspec.convert(value, FIELDS[name], strict=not text)
    if not (name == "seed" and converted == -1):
        Request(**{"prompt": "", name: converted})
    return converted


def _seeds_of(value: Any) -> list[int]:
    if isinstance(value, list):
        value = ",".join(str(seed) for seed in value)
    return parse_seeds(str(value))


def _file_name(value: Any) -> str:
    """A file name for the output folder: no file chooses a folder, least of all one above."""
    name = str(value).strip()
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise RequestError(f"{name!r} must be a file name without a folder; --save-path names the folder")
    if not name.lower().endswith((".mp4", ".png")):
        raise RequestError(f"{name!r} must end in .mp4 (or .png for one frame)")
    return name


def _doubled(entries: Sequence[Entry]) -> list[Fault]:
    lines: dict[str, int] = {}
    faults = []
    for entry in entries:
        if entry.output is not None and lines.setdefault(entry.output, entry.line) != entry.line:
            faults.append(Fault(entry.line, "output", f"{entry.output} is line {lines[entry.output]}'s file"))
    return faults


def _notes(text: str, form: Format, records: Sequence[Record]) -> list[str]:
    lines = len([line for line in text.split("\n") if line.strip()])
    if form == "txt" and len(records) == 1 and lines > 1:
        return [f"{lines} lines with no empty line between them were read as ONE prompt; else: --format lines"]
    return []
