"""Reports, their clips and jobs, and a page as a parser of its own sees it: for the tests of the report."""

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from hvlite import metadata
from hvlite.jobs.job import How, Job
from hvlite.metadata import Metadata, ModelMade
from hvlite.report.entries import Entry
from hvlite.report.page import Report, write_report
from hvlite.request import Request, ResolvedRequest
from hvlite.video.mp4 import write_mp4
from hvlite.video.png import write_png

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; \u202e ]]> --> </style></pre>"
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "article", "h1", "h2", "p", "ul", "li", "a"),
    *("span", "div", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "details", "summary", "pre"),
    *("code", "img", "video"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "src", "alt", "loading", "controls"),
    *("preload", "poster", "dir", "scope"),
}


class Reader(HTMLParser):
    """A page as a parser of its own sees it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.parts: list[str] = []
        self.style = ""
        self.feed(page)
        self.text = "".join(self.parts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style" and not self.style:
            self.style = data
        else:
            self.parts.append(data)

    def values(self, name: str, tag: str | None = None) -> list[str]:
        return [value for found, key, value in self.attributes if key == name and tag in (None, found)]


def read(path: Path) -> Reader:
    """The page, which holds nothing but what a report may hold."""
    page = Reader(path.read_text(encoding="utf-8"))
    assert page.tags <= TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    for url in (*page.values("src"), *page.values("href"), *page.values("poster")):
        assert urlsplit(url).scheme in ("", "data", "file")
        assert not urlsplit(url).netloc
    return page


def write(path: Path, entries: Sequence[Entry], **more: Any) -> Reader:
    assert list(write_report(path, Report(title="a night", entries=entries, **more))) == [
        index + 1 for index in range(len(entries))
    ]
    return read(path)


def clip_at(path: Path, prompt: str = "a cat", created: str = "", **changes: Any) -> Path:
    """A small clip as hvlite would have made it."""
    request = ResolvedRequest(
        prompt=prompt,
        size=(32, 48),
        frames=5,
        steps=4,
        guidance=6.0,
        flow_shift=7.0,
        flow_reverse=True,
        negative_prompt="",
        cfg_scale=1.0,
        seed=3,
        template="video",
    )
    made = Metadata(
        request=request,
        model=ModelMade(name="shapes", fingerprint="abc"),
        versions={"hvlite": "0.1.0"},
        created=created,
        timings={"schedule": 1.0, "denoise": 8.0},
    )
    text = metadata.encode(msgspec.structs.replace(made, **changes))
    if path.suffix == ".png":
        write_png(path, np.zeros((32, 48, 3), np.uint8), metadata=text, title=prompt)
    else:
        write_mp4(path, np.zeros((5, 32, 48, 3), np.uint8), metadata=text, title=prompt)
    return path


def a_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "id": 41,
        "state": "done",
        "position": None,
        "revision": 1,
        "request": Request("a red circle", seed=7),
        "how": How(model="shapes", profile="8g"),
        "started": 1_795_000_000.0,
        "finished": 1_795_000_060.0,
    }
    return Job(**values | changes)
