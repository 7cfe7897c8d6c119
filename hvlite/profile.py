"""Profile: how this machine renders. Read from TOML, laid over one another, checked. No torch.

A profile never changes what is rendered, only with which memory. The file's name is the profile's name. A value comes
from a flag, else from the file, else from the shipped profile that the file names as its `base`, else from the defaults
below; `read_profile` says for each which it was.
"""

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from hvlite import paths
from hvlite.errors import ProfileError
from hvlite.formats import TextWeights, Weights

GIB = 1 << 30
Auto = Literal["auto"]
Dtype = Literal["fp32", "bf16", "fp16"]
Attention = Literal["sdpa", "flash", "sage"]

# Of the host's memory, left to the page cache, to frames and to Python.
HOST_MARGIN = 2 * GIB

BUILT_IN = "built in"
CPU = "cpu"
# What a card of any size loses to its driver and firmware before anybody has asked.
UNUSABLE_BYTES = round(0.3 * GIB)


class Knobs(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan chooses where it says "auto"."""

    token_chunk: Annotated[
        Annotated[int, Meta(ge=64, multiple_of=64)] | Auto, Meta(description='a multiple of 64, or "auto"')
    ] = "auto"
    head_groups: Annotated[Annotated[int, Meta(ge=1)] | Auto, Meta(description='1 or more, or "auto"')] = "auto"
    attention: Annotated[Attention | Auto, Meta(description='"sdpa", "flash", "sage" or "auto"')] = "auto"
    decode_tile: Annotated[Literal["published"] | Auto, Meta(description='"published" or "auto"')] = "auto"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in GiB. `memory_gib` is the card (on CPU, the RAM that a run may use), `reserve_gib` what others get of it.

    `host_gib` is the RAM that weights may take which are not on the card, pinned first; what does not fit in it is read
    from disk at every step. "auto" weights are used as they are stored.
    """

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    """Whether it is of a card; a user's own is of what its base is of."""
    memory_gib: Annotated[float, Meta(gt=0, le=4096, description="a number of GiB above 0")]
    reserve_gib: Annotated[float, Meta(ge=0, le=4096, description="a number of GiB from 0 to below memory_gib")]
    host_gib: Annotated[float, Meta(ge=0, le=65536, description="a number of GiB, 0 or more")] = 0.0
    dtype: Annotated[Dtype, Meta(description='"fp32", "bf16" or "fp16"')]
    weights: Annotated[
        Weights | Auto, Meta(description='one of bf16, fp32, int8, int8-dynamic, nf4, nf4-double, fp8, or "auto"')
    ] = "auto"
    text_weights: Annotated[
        TextWeights | Auto, Meta(description='one of fp16, bf16, fp32, int8, nf4, nf4-double, fp8, or "auto"')
    ] = "auto"
    knobs: Knobs = Knobs()

    @property
    def attention(self) -> Attention | None:
        """The back end that was asked for; None leaves the choice to what is installed."""
        return None if self.knobs.attention == "auto" else self.knobs.attention


OWN = ("name", "kind", "knobs")
_KNOBS = {field.name: field.type for field in msgspec.structs.fields(Knobs)}
_PLAIN = {field.name: field.type for field in msgspec.structs.fields(Profile) if field.name not in OWN}
SETTINGS: Mapping[str, Any] = {**_PLAIN, **_KNOBS}
"""Every key of a profile's file, in order, and its type."""
_REQUIRED = [field.name for field in msgspec.structs.fields(Profile) if field.required and field.name != "name"]
BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProfile:
    """A profile and, for every setting, where its value came from: a flag, a file, or `BUILT_IN`."""

    profile: Profile
    file: Path
    sources: Mapping[str, str]

    def settings(self) -> dict[str, object]:
        """Every setting by its key, as it was read: "auto" stays "auto"."""
        values = msgspec.structs.asdict(self.profile) | msgspec.structs.asdict(self.profile.knobs)
        return {key: values[key] for key in SETTINGS}


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a run lays over its profile: the command line's flags by their names. None: as the profile says."""

    memory: float | None = None
    """GiB of the card, or of RAM on a CPU (by profile)."""
    reserve: float | None = None
    """GiB of it that others get (by profile)."""
    host: float | None = None
    """GiB of RAM for weights that are not on the card (by profile)."""
    dtype: Dtype | None = None
    """What the transformer computes in (by profile)."""
    weights: Weights | None = None
    """Form of the transformer's weights; a checkpoint is packed to it once (by default used as it is)."""
    text_weights: TextWeights | None = None
    """Form of the text encoder's weights."""
    attention: Attention | None = None
    """Attention back end (flash-attn where it is installed, else torch's fused kernels)."""
    token_chunk: int | Auto | None = None
    """Tokens that pass through a projection at once, a multiple of 64, or auto (by plan)."""
    head_groups: int | Auto | None = None
    """Groups of heads that attend one after the other, or auto (by plan)."""

    def overrides(self) -> dict[str, object]:
        """By the keys of a profile, as `load_profile` takes them."""
        fields = Overrides.__dataclass_fields__
        return {key: getattr(self, name) for key in SETTINGS if (name := key.removesuffix("_gib")) in fields}


def flag_of(key: str) -> str:
    """The command line's word for a setting."""
    return "--" + key.removesuffix("_gib").replace("_", "-")


def profile_names() -> list[str]:
    """All names that `load_profile` knows: the shipped ones by size, then the user's own."""
    found = {file.stem for folder in paths.profile_folders() if folder.is_dir() for file in folder.glob("*.toml")}
    return [*card_profiles(), *sorted(found - set(card_profiles()))]


def card_profiles() -> list[str]:
    """The shipped profiles for cards, the smallest first: NUMBERg."""
    folders = [folder for folder in paths.shipped_profile_folders() if folder.is_dir()]
    found = {file.stem for folder in folders for file in folder.glob("*g.toml")}
    return sorted(found, key=lambda name: int(name.removesuffix("g")))


def load_profile(name: str | Path, **overrides: Any) -> Profile:
    """The profile `name`, with settings replaced by `overrides` that are not None; ProfileError says what is wrong."""
    return read_profile(name, **overrides).profile


def read_profile(name: str | Path, **overrides: Any) -> LoadedProfile:
    """As `load_profile`, with sources. `name` is a profile's name, or the path of a file that ends in .toml."""
    file = Path(name).expanduser() if str(name).endswith(".toml") else _find(str(name), paths.profile_folders())
    values, sources, base = _layers(file)
    for key, value in overrides.items():
        if value is not None:
            values[key], sources[key] = value, flag_of(key)
    _check_keys(values, sources)
    return LoadedProfile(
        profile=_checked(file, values, sources, "cpu" if CPU in (file.stem, base) else "cuda"),
        file=file,
        sources={key: sources.get(key, BUILT_IN) for key in SETTINGS},
    )


def _layers(file: Path) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """The values of a file over those of its base, the file that each came from, and the base's name."""
    own = _read_toml(file)
    base = own.pop(BASE, None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str):
            raise ProfileError(f"{file}: {BASE} must be the name of a shipped profile; got {base!r}")
        below = _find(base, paths.shipped_profile_folders(), f"{file}: {BASE}: ")
        values = _read_toml(below)
        sources = dict.fromkeys(values, str(below))
    return values | own, sources | dict.fromkeys(own, str(file)), base


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file}: not valid TOML: {error}") from None


def _find(name: str, folders: list[Path], where: str = "") -> Path:
    for folder in folders:
        candidate = folder / f"{name}.toml"
        if candidate.parent == folder and candidate.is_file():
            return candidate
    known = profile_names()
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" - did you mean {nearest[0]!r}?" if nearest else ""
    raise ProfileError(f"{where}no profile named {name!r}{hint} Known: {', '.join(known) or 'none'}")


def _check_keys(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    for key in values:
        if key not in SETTINGS:
            nearest = difflib.get_close_matches(key, [*SETTINGS, BASE], n=1)
            hint = f" - did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join([*SETTINGS, BASE])}"
            raise ProfileError(f"{sources[key]}: unknown key {key!r}{hint}")


def _checked(
    file: Path, values: Mapping[str, Any], sources: Mapping[str, str], kind: Literal["cuda", "cpu"]
) -> Profile:
    """The Profile of values with known keys; each is checked by itself, so that an error names it."""
    for key in _REQUIRED:
        if key not in values:
            raise ProfileError(f'{file}: {key} is missing; state it, or start from a shipped profile: {BASE} = "24g"')
    converted = {key: _converted(key, value, sources[key]) for key, value in values.items()}
    knobs = Knobs(**{key: value for key, value in converted.items() if key in _KNOBS})
    plain = {key: converted[key] for key in converted if key in _PLAIN}
    profile = Profile(name=file.stem, kind=kind, knobs=knobs, **plain)
    if profile.reserve_gib >= profile.memory_gib:
        where = " with ".join(dict.fromkeys((sources["memory_gib"], sources["reserve_gib"])))
        raise ProfileError(
            f"{where}: reserve_gib must be from 0 to below memory_gib ({profile.memory_gib:g}); "
            f"got {profile.reserve_gib:g}. Change one of them ({flag_of('memory_gib')}, {flag_of('reserve_gib')})"
        )
    return profile


def _converted(key: str, value: object, source: str) -> Any:
    try:
        return msgspec.convert(value, SETTINGS[key])
    except msgspec.ValidationError:
        allowed = next(meta.description for meta in SETTINGS[key].__metadata__ if meta.description)
        what = source if source == flag_of(key) else f"{source}: {key}"
        raise ProfileError(f"{what} must be {allowed}; got {value!r}") from None


# Which profile suits a machine.


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a run finds on its device: `kind` is cuda or cpu; on the CPU, bytes are RAM's.

    `host_bytes` is the RAM that this process can still take beside a card; None: as much as the profile says.
    `disk_bytes` is what an exact decode may put on disk; None: nobody has looked.
    """

    kind: Literal["cuda", "cpu"]
    total_bytes: int
    free_bytes: int
    host_bytes: int | None = None
    disk_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """What a run could take now, before any reserve."""
        return max(0, min(self.total_bytes - UNUSABLE_BYTES, self.free_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a profile suits a machine, and why."""

    name: str
    fits: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `auto` stands for, None if not even the smallest profile fits; and what was said of each, largest first."""

    name: str | None
    verdicts: tuple[Verdict, ...]


def budget_bytes(profile: Profile, room: Room) -> int:
    """What a run may take under `profile` on this machine: min(memory, usable) - reserve."""
    return max(0, min(round(profile.memory_gib * GIB), room.usable_bytes) - round(profile.reserve_gib * GIB))


def host_budget(profile: Profile, room: Room) -> int:
    """What weights may take of the host's memory: the profile's share, or what is free but for a margin, if less."""
    asked = round(profile.host_gib * GIB)
    return asked if room.host_bytes is None else max(0, min(asked, room.host_bytes - HOST_MARGIN))


def choose_profile(room: Room, check: Callable[[Profile, Room], Verdict]) -> Choice:
    """What `--profile auto` stands for: the largest profile for cards that `check` lets pass; without a card, `cpu`.

    A user's own file counts where it has a shipped profile's name.
    """
    if room.kind == CPU:
        why = f"no CUDA device; a run may take {budget_bytes(load_profile(CPU), room) / GIB:.1f} GiB of RAM"
        return Choice(name=CPU, verdicts=(Verdict(name=CPU, fits=True, why=why),))
    verdicts = tuple(check(load_profile(name), room) for name in reversed(card_profiles()))
    return Choice(name=next((verdict.name for verdict in verdicts if verdict.fits), None), verdicts=verdicts)
