"""Latents to and from disk: what a render resumes from and what `hvlite decode` finishes.

A safetensors file with one tensor, `latents` (fp32 [1,C,T,H,W], model space: before division by the scaling
factor), and the request that made them as a JSON text in its header. Equal content gives equal bytes.
"""

import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hvlite.atomic import explained, replaced_file
from hvlite.errors import RequestError

TENSOR = "latents"
FORMAT_KEY = "hvlite_latents"
REQUEST_KEY = "request"
FORMAT = "1"


def save_latents(path: Path, latents: torch.Tensor, request_json: str) -> None:
    """Write `latents` (CPU, fp32, [1,C,T,H,W]) to `path`, in place of what is there. Raises OutputError.

    The header is written here, not by the library: its order of metadata keys changes from run to run.
    """
    assert latents.dtype == torch.float32, f"latents are fp32, got {latents.dtype}"
    assert latents.ndim == 5, f"latents are [1,C,T,H,W], got shape {tuple(latents.shape)}"
    assert latents.shape[0] == 1, f"latents are [1,C,T,H,W], got shape {tuple(latents.shape)}"
    body = latents.detach().contiguous().numpy()
    header = _header(tuple(body.shape), body.nbytes, request_json)
    with replaced_file(path) as temporary, explained(path), temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        file.write(body.data)


def load_latents(path: Path) -> tuple[torch.Tensor, str]:
    """The latents and the request's JSON text. All but a whole file of `save_latents` raises RequestError."""
    try:
        with safe_open(path, framework="pt") as file:
            request_json = _checked_request(path, file.metadata() or {}, list(file.keys()))
            latents = file.get_tensor(TENSOR).clone()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise RequestError(f"{path} is no whole latents file ({error}). Render the clip again.") from error
    if latents.dtype != torch.float32 or latents.ndim != 5 or latents.shape[0] != 1 or 0 in latents.shape:
        raise RequestError(
            f"{path} holds latents of {latents.dtype} {tuple(latents.shape)}, not float32 (1, C, T, H, W)."
        )
    return latents, request_json


def _header(shape: tuple[int, ...], nbytes: int, request_json: str) -> bytes:
    """The JSON header of a safetensors file, padded so that the tensor starts at a multiple of 8 bytes."""
    header = {
        "__metadata__": {FORMAT_KEY: FORMAT, REQUEST_KEY: request_json},
        TENSOR: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, nbytes]},
    }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    return encoded + b" " * (-len(encoded) % 8)


def _checked_request(path: Path, metadata: dict[str, str], names: list[str]) -> str:
    found = metadata.get(FORMAT_KEY)
    if found is None:
        raise RequestError(f"{path} is no latents file of hvlite: its header has no {FORMAT_KEY!r}.")
    if found != FORMAT:
        raise RequestError(
            f"{path} has latents format {found}, this hvlite reads {FORMAT}. Use the hvlite that wrote it."
        )
    if names != [TENSOR] or REQUEST_KEY not in metadata:
        raise RequestError(f"{path} is damaged: it holds {names} and {sorted(metadata)}. Render the clip again.")
    return metadata[REQUEST_KEY]
