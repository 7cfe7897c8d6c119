"""An opened model: where its weights are, what its dims are, and the parts that are loaded now.

The owner of every loaded part. A part is loaded when first asked for and given back by `release`, unless
the whole model is small enough to stay (`keep_warm`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO, ModelDims
from hvlite.errors import ProfileError, WeightsError
from hvlite.memory.device import check_dtype, choose_device, give_back
from hvlite.model.dit import Dit
from hvlite.model.ops import choose_attention
from hvlite.model.text import (
    PromptStates,
    TextEncoders,
    build_clip,
    build_llama,
    encode_prompts,
    has_tokenizer,
    load_tokenizer,
    meta_prompt_states,
    text_template,
)
from hvlite.model.vae import Vae
from hvlite.profile import Profile, load_profile
from hvlite.weights import load
from hvlite.weights.sources import Sources, find_sources, fingerprint, read_dims, source_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEEP_WARM_BYTES = 1 << 30
EMBEDDED = "shapes"
REAL = "hunyuanvideo"


class Model:
    """See the module's text. Made by `open_model`."""

    def __init__(self, sources: Sources | None, dims: ModelDims, profile: Profile, device: torch.device) -> None:
        self.sources = sources
        self.dims = dims
        self.profile = profile
        self.device = device
        self.dtype = DTYPES[profile.dtype]
        self.attention = choose_attention(device.type, profile.attention, self.dtype)
        self._parts: dict[str, nn.Module | TextEncoders] = {}

    @property
    def text_dtype(self) -> torch.dtype:
        """fp16 as published on a GPU; on the CPU the profile's dtype."""
        return torch.float16 if self.device.type != "cpu" and self.dtype != torch.float32 else self.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """fp16 as published on a GPU; on the CPU fp32, the only one its convolutions are fast in."""
        return torch.float16 if self.device.type != "cpu" and self.dtype != torch.float32 else torch.float32

    @property
    def head_groups(self) -> int:
        """The profile's groups of heads, or the next smaller number that divides this model's heads."""
        heads = self.dims.dit.heads
        return next(n for n in range(min(self.profile.head_groups, heads), 0, -1) if heads % n == 0)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weight files (see `weights.sources.fingerprint`)."""
        return fingerprint(self.sources) if self.sources else "none"

    @cached_property
    def keep_warm(self) -> bool:
        """Whether all weight files together are so small that parts stay loaded between stages and clips."""
        return self.sources is not None and source_bytes(self.sources) <= KEEP_WARM_BYTES

    def dit(self) -> Dit:
        """The transformer, on the device."""
        part = self._parts.get("dit") or self._load_dit()
        assert isinstance(part, Dit)
        return part

    def vae(self) -> Vae:
        """The VAE, on the device."""
        part = self._parts.get("vae") or self._load_vae()
        assert isinstance(part, Vae)
        return part

    def encode(self, texts: list[str], template: str) -> list[PromptStates]:
        """Prompt states of `texts`, by encoders that are loaded if they are not."""
        if self.sources is None:
            llama = build_llama(self.dims.llama, self.text_dtype)
            clip = build_clip(self.dims.clip, self.text_dtype)
            return [meta_prompt_states(llama, clip, text_template(template)) for _ in texts]
        part = self._parts.get("text") or self._load_text(self.sources)
        assert isinstance(part, TextEncoders)
        return encode_prompts(texts, part, text_template(template))

    def release(self, name: str) -> None:
        """Give a part back, unless it stays warm."""
        if not self.keep_warm:
            self._parts.pop(name, None)
            give_back(self.device)

    def release_cold(self) -> None:
        """Give back every part that does not stay warm; also after a failure or an abandoned generator."""
        for name in list(self._parts):
            self.release(name)

    def close(self) -> None:
        """Give everything back."""
        self._parts.clear()
        give_back(self.device)

    def _load_dit(self) -> Dit:
        with torch.device("meta"):
            dit = Dit(self.dims.dit).to(self.dtype)
        if self.sources:
            self._fill(dit, load.dit_tensors(self.sources.dit, self.dims.dit), self.dtype)
        self._parts["dit"] = dit
        return dit

    def _load_vae(self) -> Vae:
        with torch.device("meta"):
            vae = Vae(self.dims.vae).to(self.vae_dtype)
        if self.sources:
            self._fill(vae, load.vae_tensors(self.sources.vae, self.dims.vae), self.vae_dtype)
        self._parts["vae"] = vae
        return vae

    def _load_text(self, sources: Sources) -> TextEncoders:
        llama = build_llama(self.dims.llama, self.text_dtype)
        clip = build_clip(self.dims.clip, self.text_dtype)
        self._fill(llama, load.llama_tensors(sources.text_encoder, self.dims.llama), self.text_dtype)
        self._fill(clip, load.clip_tensors(sources.text_encoder_2, self.dims.clip), self.text_dtype)
        for encoder in (llama, clip):
            nn.Module.to(encoder, self.device)
        encoders = TextEncoders(
            llama=llama,
            llama_tokenizer=load_tokenizer(sources.tokenizer),
            clip=clip,
            clip_tokenizer=load_tokenizer(sources.tokenizer_2),
            device=self.device,
        )
        self._parts["text"] = encoders
        return encoders

    def _fill(self, module: nn.Module, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        load.fill(module, tensors, lambda _name, tensor: tensor.to(self.device, dtype))


@contextmanager
def open_model(
    model: str | Path,
    profile: Profile | None = None,
    device: str | None = None,
    **files: Path | None,
) -> Iterator[Model]:
    """Open `shapes`, `hunyuanvideo` or a model folder; parts are loaded when they are needed.

    `files` replace single parts: dit, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2.
    """
    chosen = choose_device(device)
    profile = profile or load_profile("24g" if chosen.type == "cuda" else "cpu")
    check_dtype(chosen, profile.dtype)
    choose_attention(chosen.type, profile.attention, DTYPES[profile.dtype])
    if chosen.type == "cpu" and profile.dtype == "fp16":
        raise ProfileError("dtype fp16 has no fast kernels on a CPU; use --dtype fp32 or bf16, or a CUDA device")
    opened = _open(model, files, profile, chosen)
    try:
        yield opened
    finally:
        opened.close()


def _open(model: str | Path, files: dict[str, Path | None], profile: Profile, device: torch.device) -> Model:
    if device.type == "meta" and model == REAL:
        return Model(None, HUNYUANVIDEO, profile, device)
    given = {name: path for name, path in files.items() if path is not None}
    for name, path in given.items():
        if not path.exists():
            raise WeightsError(f"{path} (given for {name}) does not exist")
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        folder = given.get(encoder)
        if folder is not None and tokenizer not in given and has_tokenizer(folder):
            given[tokenizer] = folder
    sources = find_sources(model_folder(model), given)
    dims = read_dims(sources)
    check_parts(sources, dims)
    # held against their headers now: a damaged part must not end a run that has already taken hours
    load.dit_tensors(sources.dit, dims.dit)
    load.vae_tensors(sources.vae, dims.vae)
    load.llama_tensors(sources.text_encoder, dims.llama)
    load.clip_tensors(sources.text_encoder_2, dims.clip)
    return Model(sources, dims, profile, device)


def check_parts(sources: Sources, dims: ModelDims) -> None:
    """Parts of different models are refused, with the two numbers that do not meet."""
    meetings = (
        ("text states", sources.dit, dims.dit.text_width, sources.text_encoder, dims.llama.hidden),
        ("the pooled text", sources.dit, dims.dit.pooled_width, sources.text_encoder_2, dims.clip.hidden),
        ("latents", sources.dit, dims.dit.latent_channels, sources.vae, dims.vae.latent_channels),
    )
    for what, dit, wanted, part, found in meetings:
        if wanted != found:
            raise WeightsError(
                f"{dit} takes {what} of width {wanted}, {part} gives {found}: they belong to different models"
            )


def model_folder(model: str | Path) -> Path:
    """The folder that a model's name stands for."""
    if model == EMBEDDED:
        return paths.SHAPES_MODEL
    if model == REAL:
        folder = paths.models_folder() / REAL
        if not folder.is_dir():
            raise WeightsError(
                f"{REAL} is not on this machine (looked in {folder}). Put its checkpoint folder there, or name "
                "it: --model FOLDER. The embedded model needs nothing: --model shapes."
            )
        return folder
    return Path(model)
