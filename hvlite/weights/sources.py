"""Where the parts of a model lie, the dimensions of the whole, and a cheap hash of its files.

A model folder is one of diffusers' (`transformer/ vae/ ...`) or Tencent's `ckpts/`; single files may stand in for
parts of it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hvlite.dims import HUNYUANVIDEO, HUNYUANVIDEO_DEFAULTS, ModelDims
from hvlite.errors import WeightsError
from hvlite.weights.checkpoint import checkpoint_files, opened_file
from hvlite.weights.configs import (
    read_clip_dims,
    read_dit_dims,
    read_folder_settings,
    read_llama_dims,
    read_vae_dims,
)
from hvlite.weights.parts import scale_map

SAMPLED_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """A file or folder for each part, and the model's own folder."""

    folder: Path
    dit: Path
    vae: Path
    text_encoder: Path
    text_encoder_2: Path
    tokenizer: Path
    tokenizer_2: Path


# Part -> where it may lie in a folder of that kind, best first.
_TENCENT_DIT = "hunyuan-video-t2v-720p/transformers"
FOLDER_LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformer": {
        "dit": ("transformer",),
        "vae": ("vae",),
        "text_encoder": ("text_encoder",),
        "text_encoder_2": ("text_encoder_2",),
        "tokenizer": ("tokenizer",),
        "tokenizer_2": ("tokenizer_2",),
    },
    "hunyuan-video-t2v-720p": {
        "dit": (
            f"{_TENCENT_DIT}/mp_rank_00_model_states.pt",
            f"{_TENCENT_DIT}/pytorch_model_module.pt",
            f"{_TENCENT_DIT}/mp_rank_00_model_states_fp8.pt",
        ),
        "vae": ("hunyuan-video-t2v-720p/vae",),
        "text_encoder": ("text_encoder",),
        "text_encoder_2": ("text_encoder_2",),
        "tokenizer": ("text_encoder",),
        "tokenizer_2": ("text_encoder_2",),
    },
}


def find_sources(folder: Path, given: Mapping[str, Path] | None = None) -> Sources:
    """The parts in a model folder; those `given` by field name need not be there."""
    places = dict(given or {})
    wanted = [field.name for field in fields(Sources) if field.name != "folder" and field.name not in places]
    layout = next((parts for mark, parts in FOLDER_LAYOUTS.items() if (folder / mark).is_dir()), None)
    if wanted and layout is None:
        marks = " or ".join(f"{mark}/" for mark in FOLDER_LAYOUTS)
        state = "it does not hold" if folder.is_dir() else "there is no such folder with"
        raise WeightsError(f"{folder}: is no model folder: {state} {marks}; name the folder above it")
    for part in wanted:
        candidates = layout[part] if layout else ()
        found = next((folder / place for place in candidates if (folder / place).exists()), None)
        if found is None:
            looked_for = ", ".join(candidates)
            raise WeightsError(f"{folder}: has no {part}; looked for {looked_for}: get it, or name it by itself")
        places[part] = found
    return Sources(folder=folder, **places)


def fingerprint(sources: Sources) -> str:
    """SHA-256 over each weight file's name, size and first and last MiB, and over the parts' config.json.

    Cheap, and so no proof: it tells apart models, variants, formats and truncated files, and does not notice bytes
    changed in the middle of a file. Names are relative to the part, so that moving a model changes nothing.
    """
    digest = hashlib.sha256()
    for part, files in _weight_files(sources):
        for file in files:
            size = file.stat().st_size
            digest.update(f"{part}/{file.name} {size}\n".encode())
            with opened_file(file) as stream:
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(SAMPLED_BYTES, size - SAMPLED_BYTES))
                digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


def source_bytes(sources: Sources) -> int:
    """The size of all files that `fingerprint` looks at."""
    return sum(file.stat().st_size for _, files in _weight_files(sources) for file in files)


def _weight_files(sources: Sources) -> Iterator[tuple[str, list[Path]]]:
    for part in ("dit", "vae", "text_encoder", "text_encoder_2"):
        source: Path = getattr(sources, part)
        files = checkpoint_files(source)
        extras = (scale_map(files[0]), files[0].with_name("config.json"))
        yield part, files + [extra for extra in extras if extra is not None and extra.is_file()]


def read_dims(sources: Sources, load_key: str = "module") -> ModelDims:
    """The dimensions of all parts, held against nothing but themselves: the loaders compare them with the tensors."""
    dims = ModelDims(
        name=sources.folder.resolve().name,
        dit=read_dit_dims(sources.dit, load_key),
        vae=read_vae_dims(sources.vae),
        llama=read_llama_dims(sources.text_encoder),
        clip=read_clip_dims(sources.text_encoder_2),
        defaults=HUNYUANVIDEO_DEFAULTS,
    )
    settings = read_folder_settings(sources.folder)
    if settings is not None:
        return replace(dims, name=settings[0], defaults=settings[1])
    published = replace(dims, name=HUNYUANVIDEO.name)
    return published if published == HUNYUANVIDEO else dims
