"""An opened model: where its weights are, what its dims are, and the parts that are loaded now.

The owner of every weight that is in memory. The modules are built empty and stay; their weights come for a stage and
go. Blocks of a packed store are streamed (`memory.streamer`) or stay on the device, as the plan says; the parts of a
checkpoint, which is small, are loaded whole.
"""

import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hvlite.dims import HUNYUANVIDEO, ModelDims
from hvlite.errors import ProfileError, RequestError
from hvlite.events import Note
from hvlite.machine import AUTO, as_of_now, auto_profile, default_profile, room_of
from hvlite.memory.device import cap, check_dtype, choose_device, forget_peak, give_back, make_lanes, used_peak
from hvlite.memory.plan import Plan
from hvlite.memory.pool import Kept, Pool
from hvlite.memory.stages import block_slabs, layer_slabs, modulation_slabs
from hvlite.memory.streamer import Walk, open_streamer
from hvlite.memory.trace import not_counted
from hvlite.model.dit import Dit
from hvlite.model.ops import choose_attention
from hvlite.model.text import (
    Encoders,
    PromptStates,
    TextEncoders,
    build_clip,
    build_llama,
    encode_prompts,
    encode_tokens,
    load_tokenizer,
    longest_prompt,
    text_template,
)
from hvlite.model.vae import USED_BY_DECODE, Vae
from hvlite.model.visit import Visit
from hvlite.origin import REAL, Checkpoint, DimsOnly, Origin, Packed
from hvlite.packing import NOTHING_ASKED, Asked, provide
from hvlite.part import DTYPES, Part, exchange
from hvlite.planning import Setting, Wishes, formats_for, plan_clip, plan_text, text_dtype, vae_dtype
from hvlite.profile import Profile, budget_bytes, host_budget, load_profile
from hvlite.request import ResolvedRequest
from hvlite.weights.layout import Formats
from hvlite.weights.pack import Progress

Value = TypeVar("Value")

# What a step uses of the transformer beside its blocks; all else of it is used once, before the first step.
USED_BY_STEPS = ("img_in.", "final_linear.")
EVERY = ("",)


class Model:
    """See the module's text. Made by `open_model`."""

    def __init__(self, origin: Origin, profile: Profile, device: torch.device) -> None:
        self.origin = origin
        self.profile = profile
        self.device = device
        self.dtype = DTYPES[profile.dtype]
        self.attention = choose_attention(device.type, profile.attention, self.dtype)
        # measured once, before CUDA takes its share: all plans of this model are for the same budget
        self.room = None if device.type == "meta" else room_of(device)
        self.lanes = make_lanes(device)
        pin_bytes = None if self.room is None else host_budget(profile, self.room)
        self.pool = None if origin.slabs is None else Pool(origin.slabs, self.lanes, pin_bytes=pin_bytes)
        self._residents: dict[str, Sequence[str]] = {}
        self._pinned: Sequence[str] = ()
        self._run: weakref.ref[Generator[Any, None, None]] | None = None

    @property
    def dims(self) -> ModelDims:
        return self.origin.dims

    @property
    def text_dtype(self) -> torch.dtype:
        """Of the text encoders."""
        return DTYPES[text_dtype(self.setting.kind, self.profile.dtype)]

    @property
    def vae_dtype(self) -> torch.dtype:
        """Of the VAE."""
        return DTYPES[vae_dtype(self.setting.kind, self.profile.dtype)]

    @cached_property
    def _dit(self) -> Part:
        with not_counted(), torch.device("meta"):
            dit = Dit(self.dims.dit).to(self.dtype)
        formats = self.origin.formats
        if formats is None:
            return Part(dit)
        kind = formats.quantised("dit")
        kind = "int8-dynamic" if self.origin.dynamic and kind == "int8" else kind
        return Part(dit, exchange(dit, kind, formats.dtype))

    @cached_property
    def _llama(self) -> Part:
        with not_counted():
            llama = build_llama(self.dims.llama, self.text_dtype)
        llama.rotary_emb.to(self.device)
        formats = self.origin.formats
        if formats is None:
            return Part(llama)
        return Part(llama, exchange(llama, formats.quantised("text"), formats.text_dtype))

    @cached_property
    def _clip(self) -> Part:
        with not_counted():
            return Part(build_clip(self.dims.clip, self.text_dtype))

    @cached_property
    def _vae(self) -> Part:
        with not_counted(), torch.device("meta"):
            return Part(Vae(self.dims.vae, encodes=False).to(self.vae_dtype))

    @property
    def setting(self) -> Setting:
        """What a plan must know of this model and its device; meta stands for a card."""
        return Setting(
            dims=self.dims,
            formats=self.origin.formats,
            kind="cpu" if self.device.type == "cpu" else "cuda",
            attention=self.attention,
            dynamic=self.origin.dynamic,
            repacks=isinstance(self.origin, Packed) and self.origin.repacks,
        )

    def plan(self, resolved: ResolvedRequest, wishes: Wishes | None = None) -> Plan:
        """How a clip will be made here and now; DoesNotFit if it cannot."""
        plan = plan_clip(resolved, self.profile, self.setting, as_of_now(self.room), wishes or Wishes())
        plan.check()
        return plan

    def text_plan(self, prompts: int) -> Plan:
        """How so many prompts will be encoded in one pass."""
        plan = plan_text(prompts, self.profile, self.setting, self.room)
        plan.check()
        return plan

    def alone(self, run: Generator[Value, None, None]) -> Generator[Value, None, None]:
        """All that `run` yields. A model makes one clip at a time: a run that was left before its end is ended first.

        Whoever goes on with that one gets a RequestError. The peak is counted anew.
        """
        self.end_run()
        self._run = weakref.ref(run)
        forget_peak(self.device)
        yield from run
        if self._running() is not run:
            raise RequestError("this clip was left before its end, and its model went on without it: resume it")

    def end_run(self) -> None:
        """What was left before its end gives back what it holds, and keeps its steps."""
        run, self._run = self._running(), None
        if run is not None:
            run.close()

    def _running(self) -> Generator[Any, None, None] | None:
        return None if self._run is None else self._run()

    def notes(self) -> list[str]:
        """What a user should know of the host's memory; each is given once."""
        if self.pool is None:
            return []
        notes, self.pool.notes = self.pool.notes, []
        return notes

    def encode(self, texts: list[str], template: str, plan: Plan) -> list[PromptStates]:
        """Prompt states of `texts`; every layer is used once for all of them."""
        published = text_template(template)
        with self._encoders(plan) as (encoders, visit):
            if isinstance(encoders, TextEncoders):
                return encode_prompts(texts, encoders, published, visit)
            longest = [longest_prompt(encoders.clip, published) for _ in texts]
            text, pooled = zip(*longest, strict=True)
            return encode_tokens(text, pooled, encoders, visit)

    @contextmanager
    def _encoders(self, plan: Plan) -> Iterator[tuple[Encoders, Visit]]:
        """Both text encoders; Llama's layers are there within their visits."""
        llama = self._loaded(self._llama, "text", "text_embedding")
        clip = self._loaded(self._clip, "clip", "clip")
        names = layer_slabs(self.dims.llama)
        exhaust(self._hold("text", [names[index] for index in plan.text_residents]))
        with self._walk(self._llama, list(zip(names, llama.layers, strict=True)), 1) as walk:
            yield self._with_tokenizers(llama, clip), walk.visit

    def _with_tokenizers(self, llama: Any, clip: Any) -> Encoders:
        origin = self.origin
        if isinstance(origin, DimsOnly):
            return Encoders(llama=llama, clip=clip, device=self.device)
        return TextEncoders(
            llama=llama,
            llama_tokenizer=load_tokenizer(origin.tokenizer("tokenizer")),
            clip=clip,
            clip_tokenizer=load_tokenizer(origin.tokenizer("tokenizer_2")),
            device=self.device,
        )

    @contextmanager
    def modulation(self) -> Iterator[tuple[Dit, Visit]]:
        """The transformer as `prepare_schedule` needs it; modulation i is there within its visit."""
        dit: Dit = self._loaded(self._dit, "dit", "dit_rest")
        blocks = list(zip(modulation_slabs(self.dims.dit), dit.modulations, strict=True))
        with self._walk(self._dit, blocks, 1) as walk:
            yield dit, walk.visit
        if self.pool is not None:
            self._dit.unload(keep=USED_BY_STEPS)

    @contextmanager
    def blocks(self, plan: Plan, rounds: int) -> Iterator[tuple[Dit, Walk]]:
        """The transformer as `rounds` steps need it; block i is there within its visits."""
        needed = EVERY if self.pool is None else USED_BY_STEPS
        dit: Dit = self._loaded(self._dit, "dit", "dit_rest", needed)
        exhaust(self.load_blocks(plan))
        with self._walk(self._dit, list(zip(block_slabs(self.dims.dit), dit.blocks, strict=True)), rounds) as walk:
            yield dit, walk

    def load_blocks(self, plan: Plan) -> Iterator[Kept]:
        """Bring the blocks that stay at hand while `blocks` is open; yields after each, which `blocks` would not."""
        names = block_slabs(self.dims.dit)
        self._pinned = [names[index] for index in plan.pinned]
        yield from self._hold("dit", [names[index] for index in plan.residents])

    def preload(self, plan: Plan) -> None:
        """Load the parts that the plan keeps between clips, as a clip before would have left them."""
        if "text" in plan.warm:
            with self._encoders(plan):
                pass
        if "dit" in plan.warm:
            with self.blocks(plan, 0):
                pass
        if "vae" in plan.warm:
            self.vae()

    def vae(self) -> Vae:
        """The VAE's decoder, on the device."""
        vae: Vae = self._loaded(self._vae, "vae", "vae", USED_BY_DECODE)
        return vae

    def vae_on_cpu(self) -> Vae:
        """Another decoder, in fp32 on the CPU, for a clip that the device has no room to decode."""
        with not_counted(), torch.device("meta"):
            vae = Vae(self.dims.vae, encodes=False)
        Part(vae).fill(self.origin.tensors("vae"), torch.device("cpu"), USED_BY_DECODE)
        return vae

    @contextmanager
    def _walk(self, part: Part, blocks: list[tuple[str, nn.Module]], rounds: int) -> Iterator[Walk]:
        """Blocks whose weights are in place are walked too: what is reported is the same."""
        try:
            if self.pool is None:
                yield Walk(self.lanes, len(blocks), rounds)
                return
            with open_streamer(self.pool, blocks, rounds=rounds) as streamer:
                yield streamer
        finally:
            part.scratch.release()

    def _hold(self, stage: str | None = None, residents: Sequence[str] = ()) -> Iterator[Kept]:
        """Have the slabs at hand that stages have asked for, and no others; yields after each that comes."""
        if stage is not None:
            self._residents[stage] = residents
        if self.pool is not None:
            resident = [name for names in self._residents.values() for name in names]
            yield from self.pool.keep(resident=resident, pinned=self._pinned)

    def _loaded(self, part: Part, name: str, slab: str, needed: tuple[str, ...] = EVERY) -> Any:
        """The module of `part`, with at least the weights whose names begin with one of `needed`."""
        if not part.has(needed):
            tensors = self.origin.tensors(name if self.pool is None else slab)
            part.fill(tensors, self.device, needed)
        return part.module

    def peak_bytes(self) -> int | None:
        """The most that the card has given since the run began; None where there is none."""
        return used_peak(self.device)

    @property
    def held_bytes(self) -> int:
        """What the weights take that are in memory now, on the device and for it on the host."""
        parts = sum(part.nbytes for own in self._built().values() for part in own)
        return parts + (0 if self.pool is None else self.pool.resident_bytes + self.pool.host_bytes)

    @property
    def loaded(self) -> list[str]:
        """The parts (text, dit, vae) of which weights are in memory."""
        return [name for name, parts in self._built().items() if any(part.held for part in parts)]

    def keep_only(self, plan: Plan) -> None:
        """Give back what another plan has left here and this one does not keep between clips."""
        blocks, layers = block_slabs(self.dims.dit), layer_slabs(self.dims.llama)
        kept = {"dit": [blocks[index] for index in plan.residents], "text": [layers[i] for i in plan.text_residents]}
        self._residents = {
            stage: [name for name in names if name in kept[stage]] for stage, names in self._residents.items()
        }
        self._pinned = [name for name in self._pinned if name in {blocks[index] for index in plan.pinned}]
        self.release(keep=plan.warm)

    def release(self, keep: Collection[str] = (), *, pinned: bool = True) -> None:
        """Give back all parts but those named (text, dit, vae); with `pinned` False, what the host keeps, too."""
        if not pinned:
            self._pinned = ()
        for name, parts in self._built().items():
            if name not in keep:
                self._residents.pop(name, None)
                for part in parts:
                    part.unload()
        exhaust(self._hold())
        give_back(self.device)

    def _built(self) -> dict[str, list[Part]]:
        parts = {"text": ("_llama", "_clip"), "dit": ("_dit",), "vae": ("_vae",)}
        return {name: [getattr(self, each) for each in own if each in self.__dict__] for name, own in parts.items()}

    def close(self) -> None:
        """Give everything back."""
        try:
            self.end_run()
        finally:
            self.release()
            if self.pool is not None:
                self.pool.close()


def exhaust(work: Iterator[object]) -> None:
    """Do all of it, and tell nobody how far it is."""
    for _ in work:
        pass


@contextmanager
def open_model(
    model: str | Path,
    profile: Profile | None = None,
    device: str | None = None,
    *,
    asked: Asked = NOTHING_ASKED,
    told: Callable[[Progress | Note], None] = lambda event: None,
    **files: Path | None,
) -> Iterator[Model]:
    """Open `shapes`, `hunyuanvideo`, a checkpoint folder or a packed store; parts are loaded when they are needed.

    `files` replace single parts of a checkpoint: dit, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2. A
    large checkpoint is packed first, once, to the formats of the profile (`packing.provide`); `told` hears of it.
    """
    chosen = choose_device(device)
    if profile is None:
        named = default_profile(chosen)
        profile = load_profile(auto_profile(chosen) if named == AUTO else named)
    check_dtype(chosen, profile.dtype)
    choose_attention(chosen.type, profile.attention, DTYPES[profile.dtype])
    if chosen.type == "cpu" and profile.dtype == "fp16":
        raise ProfileError("dtype fp16 has no fast kernels on a CPU; use --dtype fp32 or bf16, or a CUDA device")
    origin: Origin
    if chosen.type == "meta" and model == REAL:
        formats = formats_for(HUNYUANVIDEO, profile, asked=True) or Formats()
        origin = DimsOnly(HUNYUANVIDEO, formats, profile.weights == "int8-dynamic")
    else:
        origin = _provided(provide(model, profile, files, asked), told)
    opened = Model(origin, profile, chosen)
    if chosen.type == "cuda":
        assert opened.room is not None
        cap(chosen, budget_bytes(profile, opened.room))
    try:
        with closing(opened):
            yield opened
    finally:
        cap(chosen, None)


def _provided(
    packing: Generator[Progress | Note, None, Checkpoint | Packed], told: Callable[[Progress | Note], None]
) -> Checkpoint | Packed:
    while True:
        try:
            told(next(packing))
        except StopIteration as ended:
            origin: Checkpoint | Packed = ended.value
            return origin
