"""Latents to and from disk: what a render resumes from and what `hvlite decode` finishes.

A safetensors file with `latents` (fp32 [1,C,T,H,W], model space: before division by the scaling factor), and the
request that made them as a JSON text in its header. While a clip is unfinished, the file also holds how far it is (a
second text) and the tensors that the remaining steps need. Equal content gives equal bytes.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hvlite.atomic import explained, replaced_file
from hvlite.errors import RequestError

TENSOR = "latents"
FORMAT_KEY = "hvlite_latents"
REQUEST_KEY = "request"
PROGRESS_KEY = "progress"
FORMAT = "1"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedLatents:
    """What such a file holds. `progress` is None in finished latents; else `tensors` are what goes with it."""

    latents: Tensor
    request: str
    progress: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def save_latents(path: Path, saved: SavedLatents) -> None:
    """Write to `path`, in place of what is there; all tensors are on the CPU. Raises OutputError.

    The header is written here, not by the library: its order of metadata keys changes from run to run.
    """
    latents = saved.latents
    assert latents.dtype == torch.float32, f"latents are fp32, got {latents.dtype}"
    assert latents.ndim == 5, f"latents are [1,C,T,H,W], got shape {tuple(latents.shape)}"
    assert latents.shape[0] == 1, f"latents are [1,C,T,H,W], got shape {tuple(latents.shape)}"
    tensors = {TENSOR: latents, **saved.tensors}
    texts = {FORMAT_KEY: FORMAT, REQUEST_KEY: saved.request}
    if saved.progress is not None:
        texts[PROGRESS_KEY] = saved.progress
    with replaced_file(path) as temporary, explained(path), temporary.open("wb") as file:
        header = _header(tensors, texts)
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_latents(path: Path) -> SavedLatents:
    """What `save_latents` wrote. All but a whole file of it raises RequestError."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            texts = _checked_texts(path, file.metadata() or {}, names)
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise RequestError(f"{path} is no whole latents file ({error}). Render the clip again.") from error
    latents = tensors.pop(TENSOR)
    if latents.dtype != torch.float32 or latents.ndim != 5 or latents.shape[0] != 1 or 0 in latents.shape:
        raise RequestError(
            f"{path} holds latents of {latents.dtype} {tuple(latents.shape)}, not float32 (1, C, T, H, W)."
        )
    return SavedLatents(latents=latents, request=texts[REQUEST_KEY], progress=texts.get(PROGRESS_KEY), tensors=tensors)


def _header(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """The JSON header of a safetensors file, padded so that the tensors start at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": texts}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    return encoded + b" " * (-len(encoded) % 8)


def _checked_texts(path: Path, texts: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    found = texts.get(FORMAT_KEY)
    if found is None:
        raise RequestError(f"{path} is no latents file of hvlite: its header has no {FORMAT_KEY!r}.")
    if found != FORMAT:
        raise RequestError(
            f"{path} has latents format {found}, this hvlite reads {FORMAT}. Use the hvlite that wrote it."
        )
    is_whole = REQUEST_KEY in texts and (set(names) == {TENSOR} or (TENSOR in names and PROGRESS_KEY in texts))
    if not is_whole:
        raise RequestError(f"{path} is damaged: it holds {list(names)} and {sorted(texts)}. Render the clip again.")
    return texts
