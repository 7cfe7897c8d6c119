"""Profile: how this machine renders. Loaded from TOML, merged with overrides, checked. No torch.

A profile never changes what is rendered, only with which memory. The file's name is the profile's name.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from hvlite import paths
from hvlite.errors import ProfileError

Dtype = Literal["fp32", "bf16", "fp16"]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes in GiB. `token_chunk` is a multiple of 64."""

    name: str
    memory_gib: float
    reserve_gib: float
    dtype: Dtype
    token_chunk: int = 2048
    head_groups: int = 1
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.token_chunk < 64 or self.token_chunk % 64:
            raise ValueError(f"token_chunk must be a multiple of 64; got {self.token_chunk}")
        if self.head_groups < 1:
            raise ValueError(f"head_groups must be at least 1; got {self.head_groups}")
        if not 0 <= self.reserve_gib < self.memory_gib:
            raise ValueError(
                f"reserve_gib must be from 0 to below memory_gib ({self.memory_gib:g}); got {self.reserve_gib:g}"
            )


def profile_names() -> list[str]:
    """All names that `load_profile` knows, sorted."""
    found = {file.stem for folder in paths.profile_folders() if folder.is_dir() for file in folder.glob("*.toml")}
    return sorted(found)


def load_profile(name: str, **overrides: Any) -> Profile:
    """The profile `name`, with fields replaced by `overrides` that are not None; ProfileError says what is wrong."""
    path = _find(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not valid TOML: {error}") from None
    given = {key: value for key, value in overrides.items() if value is not None}
    return _checked(path, {**values, **given, "name": path.stem})


def _find(name: str) -> Path:
    for folder in paths.profile_folders():
        candidate = folder / f"{name}.toml"
        if candidate.parent == folder and candidate.is_file():
            return candidate
    known = profile_names()
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" - did you mean {nearest[0]!r}?" if nearest else ""
    raise ProfileError(f"no profile named {name!r}{hint} Known: {', '.join(known) or 'none'}")


def _checked(path: Path, values: dict[str, Any]) -> Profile:
    fields = Profile.__struct_fields__
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1)
            hint = f" - did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(fields)}"
            raise ProfileError(f"{path}: unknown key {key!r}{hint}")
    try:
        return msgspec.convert(values, Profile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path}: {error}") from None
