"""An opened model: where its weights are, what its dims are, and the parts that are loaded now.

The owner of every loaded part. A part is loaded when first asked for and given back by `release`, unless
the whole model is small enough to stay (`keep_warm`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

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
from hvlite.origin import Checkpoint, Origin, Packed
from hvlite.profile import Profile, load_profile
from hvlite.quant.swap import swap
from hvlite.weights import load
from hvlite.weights.sources import Sources, find_sources, read_dims
from hvlite.weights.store import is_store, open_store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEEP_WARM_BYTES = 1 << 30
EMBEDDED = "shapes"
REAL = "hunyuanvideo"


class Model:
    """See the module's text. Made by `open_model`."""

    def __init__(self, origin: Origin | None, dims: ModelDims, profile: Profile, device: torch.device) -> None:
        self.origin = origin
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

    @property
    def fingerprint(self) -> str:
        """Identifies the weights; `none` for a model that has dims only."""
        return self.origin.fingerprint if self.origin else "none"

    @cached_property
    def keep_warm(self) -> bool:
        """Whether all weights together are so small that parts stay loaded between stages and clips."""
        return self.origin is not None and self.origin.nbytes <= KEEP_WARM_BYTES

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
        if self.origin is None:
            llama = build_llama(self.dims.llama, self.text_dtype)
            clip = build_clip(self.dims.clip, self.text_dtype)
            return [meta_prompt_states(llama, clip, text_template(template)) for _ in texts]
        part = self._parts.get("text") or self._load_text(self.origin)
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
        if self.origin:
            self._fill(dit, self.origin, "dit", self.origin.weights)
        self._parts["dit"] = dit
        return dit

    def _load_vae(self) -> Vae:
        with torch.device("meta"):
            vae = Vae(self.dims.vae).to(self.vae_dtype)
        if self.origin:
            self._fill(vae, self.origin, "vae")
        self._parts["vae"] = vae
        return vae

    def _load_text(self, origin: Origin) -> TextEncoders:
        llama = build_llama(self.dims.llama, self.text_dtype)
        clip = build_clip(self.dims.clip, self.text_dtype)
        self._fill(llama, origin, "text", origin.text_weights)
        self._fill(clip, origin, "clip")
        for encoder in (llama, clip):
            nn.Module.to(encoder, self.device)
        encoders = TextEncoders(
            llama=llama,
            llama_tokenizer=load_tokenizer(origin.tokenizer("tokenizer")),
            clip=clip,
            clip_tokenizer=load_tokenizer(origin.tokenizer("tokenizer_2")),
            device=self.device,
        )
        self._parts["text"] = encoders
        return encoders

    def _fill(self, module: nn.Module, origin: Origin, part: str, weights: str | None = None) -> None:
        """Give the empty module its weights, each in the dtype that the module has for it."""
        if weights is not None:
            swap(module, weights)
        dtypes = {name: place.dtype for name, place in module.state_dict(keep_vars=True).items()}
        load.fill(
            module, origin.tensors(part), lambda name, tensor: tensor.to(self.device, dtypes.get(name, tensor.dtype))
        )


@contextmanager
def open_model(
    model: str | Path,
    profile: Profile | None = None,
    device: str | None = None,
    *,
    dynamic: bool = False,
    **files: Path | None,
) -> Iterator[Model]:
    """Open `shapes`, `hunyuanvideo`, a checkpoint folder or a packed store; parts are loaded when they are needed.

    `files` replace single parts of a checkpoint: dit, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2.
    `dynamic` multiplies int8 weights of a store by int8 activations.
    """
    chosen = choose_device(device)
    profile = profile or load_profile("24g" if chosen.type == "cuda" else "cpu")
    check_dtype(chosen, profile.dtype)
    choose_attention(chosen.type, profile.attention, DTYPES[profile.dtype])
    if chosen.type == "cpu" and profile.dtype == "fp16":
        raise ProfileError("dtype fp16 has no fast kernels on a CPU; use --dtype fp32 or bf16, or a CUDA device")
    if chosen.type == "meta" and model == REAL:
        opened = Model(None, HUNYUANVIDEO, profile, chosen)
    else:
        origin = find_origin(model, files, dynamic=dynamic)
        opened = Model(origin, origin.dims, profile, chosen)
    try:
        yield opened
    finally:
        opened.close()


def find_origin(model: str | Path, files: Mapping[str, Path | None], *, dynamic: bool = False) -> Origin:
    """The store, or the checkpoint, that a model's name or folder stands for; checked by headers alone."""
    given = {name: path for name, path in files.items() if path is not None}
    folder = model_folder(model)
    if is_store(folder):
        if given:
            raise WeightsError(
                f"{folder} is a packed store: its parts cannot be replaced (asked for {', '.join(given)})"
            )
        return Packed(open_store(folder), dynamic)
    return open_checkpoint(folder, given)


def open_checkpoint(folder: Path, given: dict[str, Path]) -> Checkpoint:
    """A checkpoint folder with single parts replaced; WeightsError says what does not belong together."""
    for name, path in given.items():
        if not path.exists():
            raise WeightsError(f"{path} (given for {name}) does not exist")
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        own = given.get(encoder)
        if own is not None and tokenizer not in given and has_tokenizer(own):
            given[tokenizer] = own
    sources = find_sources(folder, given)
    checkpoint = Checkpoint(sources, read_dims(sources))
    check_parts(sources, checkpoint.dims)
    for part in ("dit", "vae", "text", "clip"):
        checkpoint.tensors(part)  # held against the headers now: a damaged part must not end a run after hours
    return checkpoint


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
