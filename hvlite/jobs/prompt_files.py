"""Prompt files of every format -> records of named values; what is wrong with a file as a file is told as faults."""

import csv
import difflib
import io
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args, get_type_hints

from hvlite.errors import RequestError
from hvlite.request import Request

Format = Literal["txt", "lines", "csv", "jsonl", "toml"]
FORMATS: tuple[Format, ...] = get_args(Format)

MOST_BYTES = 64 * 2**20

FIELDS: Mapping[str, Any] = get_type_hints(Request)
COLUMNS = (*FIELDS, "stop_after_step", "seeds", "output")
# The published tool's names.
OTHER_NAMES = {
    "video_size": "size",
    "video_length": "frames",
    "infer_steps": "steps",
    "embedded_cfg_scale": "guidance",
    "neg_prompt": "negative_prompt",
}
SUFFIXES: Mapping[str, Format] = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".toml": "toml",
}
# A line of TOML that begins a clip.
TABLE = re.compile(r"^[ \t]*(\[\[[ \t]*job[ \t]*\]\])[ \t]*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and where. `field` is empty where it is the line as a whole."""

    line: int
    field: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}{', ' if self.field else ''}{self.field}: {self.text}"


class BatchError(RequestError):
    """A prompt file with faults; all of them are in `faults`."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__(f"{faults[0]}{more}")
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Record:
    """An entry as it stands in the file; `texts`: every value is text, as in csv."""

    line: int
    values: Mapping[str, Any]
    texts: bool = False


def decoded(raw: bytes) -> str:
    """Text without a byte order mark, lines ended by one newline."""
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        fault = Fault(line, "", f"byte 0x{raw[error.start]:02x} is no {encoding.removesuffix('-sig').upper()} text")
        raise BatchError([fault]) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def guessed(text: str, name: str) -> Format:
    """By the suffix; without a known one, by what the text begins with."""
    known = SUFFIXES.get(PurePosixPath(name).suffix.lower())
    if known is not None:
        return known
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.startswith("{") and _is_json_object(first):
        return "jsonl"
    if TABLE.search(text):
        return "toml"
    header = next(csv.reader([first], delimiter=_delimiter(first)), [])
    if len(header) > 1 and all(plain_name(name) in COLUMNS for name in header):
        return "csv"
    return "txt"


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_records(text: str, form: Format, faults: list[Fault]) -> Iterable[Record]:
    """The entries of a file; those that cannot be told apart from their neighbours become faults."""
    match form:
        case "txt":
            return _paragraphs(text)
        case "lines":
            lines = enumerate(text.split("\n"), start=1)
            return [Record(number, {"prompt": line.strip()}) for number, line in lines if line.strip()]
        case "csv":
            return _csv_records(text, faults)
        case "jsonl":
            return _json_records(text, faults)
        case "toml":
            return _toml_records(text, faults)


def _paragraphs(text: str) -> Iterator[Record]:
    """Lines between empty ones are one prompt; a line break within it is a space."""
    gathered: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            gathered.append(line.strip())
        elif gathered:
            yield Record(number - len(gathered), {"prompt": " ".join(gathered)})
            gathered = []


def _delimiter(header: str) -> str:
    """Spreadsheets of many countries write semicolons."""
    return max(",;\t", key=header.count)


def _csv_records(text: str, faults: list[Fault]) -> Iterator[Record]:
    header_line = next((line for line in text.split("\n") if line.strip()), "")
    csv.field_size_limit(MOST_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(header_line), strict=True)
    header: list[str] | None = None
    before = 0
    try:
        for row in reader:
            line, before = before + 1, reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = row
                faults += [Fault(line, name, "this column comes twice") for name in _twice(row)]
                if "prompt" not in map(plain_name, row):
                    faults.append(Fault(line, "", f"no column is named prompt: {', '.join(row)}"))
                    return
            elif len(row) != len(header):
                faults.append(Fault(line, "", f"{len(row)} cells under {len(header)} columns: is a quote missing?"))
            else:
                yield Record(line, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}, True)
    except csv.Error as error:
        faults.append(Fault(before + 1, "", f"not valid CSV: {error}"))


def _twice(names: Sequence[str]) -> list[str]:
    plain = [plain_name(name) for name in names]
    return [name for index, name in enumerate(names) if plain[index] in plain[:index]]


def _json_records(text: str, faults: list[Fault]) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            faults.append(Fault(number, "", f"not valid JSON: {error}"))
            continue
        if isinstance(value, str):
            value = {"prompt": value}
        if isinstance(value, dict):
            yield Record(number, {key: item for key, item in value.items() if item is not None})
        else:
            faults.append(Fault(number, "", f"a line is an object or a prompt in quotes, not {line.strip()[:40]}"))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = _twice([name for name, _ in pairs])
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    return dict(pairs)


def _toml_records(text: str, faults: list[Fault]) -> Iterator[Record]:
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r"at line (\d+)", str(error))
        faults.append(Fault(int(at[1]) if at else text.count("\n") + 1, "", f"not valid TOML: {error}"))
        return
    jobs = values.pop("job", [])
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        faults.append(Fault(1, "job", "the clips are tables, each headed by [[job]]"))
        return
    lines = [text.count("\n", 0, head.start(1)) + 1 for head in TABLE.finditer(text)]
    if len(lines) != len(jobs):  # written in another way, or such a line is part of a prompt
        lines = [1] * len(jobs)
    known: dict[str, Any] = {}
    for name, value in values.items():
        place = re.search(rf"^[ \t]*[\"']?{re.escape(name)}[\"']?\s*=", text, re.M)
        fault = unknown_column(1 + text.count("\n", 0, place.start()) if place else 1, name)
        faults += [] if fault is None else [fault]
        known |= {name: value} if fault is None else {}
    for line, job in zip(lines, jobs, strict=True):
        yield Record(line, {**known, **job})


def plain_name(name: str) -> str:
    """`Video-Size ` is `size`."""
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    return OTHER_NAMES.get(plain, plain)


def unknown_column(line: int, name: str) -> Fault | None:
    plain = plain_name(name)
    if plain in COLUMNS:
        return None
    nearest = difflib.get_close_matches(plain, [*COLUMNS, *OTHER_NAMES], n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(COLUMNS)}"
    return Fault(line, name.strip() or "(no name)", f"no such column; {hint}")
