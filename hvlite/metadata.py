"""What a finished clip and kept latents say of themselves: one JSON object, written and read here alone. No torch."""

from typing import Any

import msgspec

from hvlite.errors import RequestError
from hvlite.request import ResolvedRequest, check_stored

FORMAT = 1


class ModelMade(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The model that something was made with. `folder` and `vae` are local: they are in kept latents, in no clip."""

    name: str
    fingerprint: str
    folder: str | None = None
    vae: str | None = None


class MemoryUsed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run was given, what its plan predicted, what it took, and where it had to become leaner."""

    budget_bytes: int
    predicted_bytes: int
    actual_bytes: int | None = None
    descents: tuple[str, ...] = ()


class _Envelope(msgspec.Struct, frozen=True):
    """What every format has."""

    format: int = FORMAT


class Metadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole resolved Request, the model, and how this machine rendered it."""

    request: ResolvedRequest
    model: ModelMade
    format: int = FORMAT
    versions: dict[str, str] = {}
    device: str = ""
    dtype: str = ""
    attention: str = ""
    profile: str = ""
    decode_tile: str = ""
    decoded_volume: float | None = None
    bit_exact: bool = True
    """False where it went on with other knobs than it began with: rendered anew, its last bits may differ."""
    memory: MemoryUsed | None = None
    created: str = ""
    timings: dict[str, float] = {}


def encode(metadata: Metadata) -> str:
    """As JSON text."""
    return msgspec.json.encode(metadata).decode()


def decode(text: str, source: object) -> Metadata:
    """From JSON text that was found in `source`; RequestError names the field that is missing or wrong."""
    try:
        found = msgspec.json.decode(text, type=_Envelope).format
        if found > FORMAT:
            raise RequestError(f"it is of format {found}, this hvlite reads up to {FORMAT}: update hvlite")
        metadata = msgspec.json.decode(text, type=Metadata)
        check_stored(metadata.request)
    except (msgspec.DecodeError, RequestError) as error:
        raise RequestError(f"{source}: its metadata cannot be read: {error}") from None
    return metadata


def as_json(metadata: Metadata) -> dict[str, Any]:
    """Plain values, for printing."""
    values: dict[str, Any] = msgspec.to_builtins(metadata)
    return values
