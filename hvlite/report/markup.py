"""HTML by the standard library's element tree: what is put in as text or attribute can never become markup."""

from pathlib import Path
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: str | None) -> Element:
    """An element of `children` in order; None is left out. A trailing or inner `_` of an attribute: none, and `-`."""
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    made = Element(tag, {name: clean(value) for name, value in given.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + clean(child)
        elif child is not None:
            made.text = (made.text or "") + clean(child)
    return made


def html_of(*elements: Element) -> str:
    """Their markup."""
    return "\n".join(tostring(each, encoding="unicode", method="html") for each in elements) + "\n"


def clean(text: str) -> str:
    """`text` without what an HTML file cannot hold: control characters, and halves of characters."""
    whole = text.encode("utf-8", "replace").decode().replace("\r\n", "\n")
    return "".join(each if each in "\n\t" or not _is_control(each) else "\ufffd" for each in whole)


def _is_control(character: str) -> bool:
    return ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0


def link_to(file: Path, page_folder: Path) -> str:
    """A URL of `file`, percent-encoded: relative where it lies below the page's folder, so that both can be moved."""
    file, page_folder = file.resolve(), page_folder.resolve()
    if not file.is_relative_to(page_folder):
        return file.as_uri()
    return (Path("/") / file.relative_to(page_folder)).as_uri().removeprefix("file:///")
