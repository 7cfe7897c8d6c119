"""Steps of the same transformer, timed: hvlite's line and diffusers' forward pass, in memory and streamed from disk.

Each function here is called in a process of its own (`cold.in_fresh_process`). Before a block is read the page cache of
its file is dropped, and what the kernel fetches from the device is counted.
"""

import logging
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cold import drop_from_cache, fetched_bytes, peak_bytes
from random_store import SPREAD
from torch import Tensor

from hvlite.dims import DitDims, ModelDims, latent_shape
from hvlite.events import BlockDone, StepDone
from hvlite.line import Between, denoise
from hvlite.memory.predict import predict
from hvlite.memory.rates import Rates
from hvlite.memory.stages import block_slabs
from hvlite.model.dit import Conditioning
from hvlite.opened import Model
from hvlite.origin import Packed
from hvlite.part import DTYPES
from hvlite.planning import Wishes
from hvlite.profile import load_profile
from hvlite.request import Request
from hvlite.run import Outputs, Run
from hvlite.weights.store import Store, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process measures; `groups` is diffusers' folder. After a first step `steps` are measured.

    `size` is height and width in pixels.
    """

    store: Path
    groups: Path
    dtype: str
    steps: int
    size: tuple[int, int] = (16, 16)
    frames: int = 1
    text_tokens: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of a step, but the peak, which is of the process. `reader_s`: what reading took of a core; `predicted_s`: a step
    by the plan, where rates were given."""

    step_s: float
    predicted_s: float = 0.0
    waited_s: float = 0.0
    reader_s: float = 0.0
    read_bytes: float = 0.0
    fetched_bytes: float = 0.0
    peak_bytes: int = 0


@dataclass(slots=True)
class ReadBlock:
    """One reading of a slab, dropping its cache included, as the kernel does it where memory is full.

    `cpu_s` is of the thread that read it.
    """

    nbytes: int
    fetched: int
    seconds: float
    cpu_s: float


class ColdStore(Store):
    """A store that reads every slab from the disk, and keeps count."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.path, store.index)
        self.reads: list[ReadBlock] = []

    def read_slab(self, name: str, buffer: Tensor) -> None:
        fetched, cpu_s, began = fetched_bytes("thread-self"), time.thread_time(), time.perf_counter()
        drop_from_cache([self.path / self.slabs[name].file])
        super().read_slab(name, buffer)
        seconds, cpu_s = time.perf_counter() - began, time.thread_time() - cpu_s
        fetched = fetched_bytes("thread-self") - fetched
        self.reads.append(ReadBlock(self.slab_bytes(name), fetched, seconds, cpu_s))


# hvlite.


@contextmanager
def opened(job: Job) -> Iterator[tuple[Model, ColdStore]]:
    store = ColdStore(open_store(job.store))
    profile = load_profile("cpu", dtype=job.dtype, token_chunk=2048, head_groups=1)
    model = Model(Packed(store), profile, torch.device("cpu"))
    try:
        yield model, store
    finally:
        model.close()


def run_hvlite(job: Job, resident: bool, rates: Rates | None = None) -> Result:
    """Steps of the line with all blocks in memory, or all streamed."""
    with opened(job) as (model, store):
        resolved = Request("random", size=job.size, frames=job.frames, steps=job.steps + 1).resolve(model.dims)
        plan = model.plan(resolved, Wishes(stages=("denoise",)))
        blocks = model.dims.dit.blocks
        plan = replace(plan, residents=tuple(range(blocks)) if resident else ())
        run = Run(model, resolved, Outputs(), plan)
        seconds, waited = [], [0.0]
        for event in denoise(run, random_clip(job, model.dims, resolved.steps)):
            if isinstance(event, BlockDone):
                waited[-1] += event.waited_s
            if isinstance(event, StepDone):
                seconds.append(event.seconds)
                waited.append(0.0)
        reads = [] if resident else store.reads[blocks:]
        return Result(
            step_s=statistics.median(seconds[1:]),
            predicted_s=predict(plan, rates).step.seconds if rates else 0.0,
            waited_s=statistics.median(waited[1:-1]),
            reader_s=sum(read.cpu_s for read in reads) / job.steps,
            read_bytes=sum(read.nbytes for read in reads) / job.steps,
            fetched_bytes=sum(read.fetched for read in reads) / job.steps,
            peak_bytes=peak_bytes(),
        )


def random_clip(job: Job, dims: ModelDims, steps: int) -> Between:
    """Noise, and vectors and text as a schedule would have given them."""
    dit, dtype = dims.dit, DTYPES[job.dtype]
    shape = latent_shape(job.size, job.frames, dims.vae)
    conditioning = Conditioning(
        double=torch.randn(steps, dit.double_blocks, 2, 6, dit.hidden).mul_(0.1).to(dtype),
        single=torch.randn(steps, dit.single_blocks, 3, dit.hidden).mul_(0.1).to(dtype),
        final=torch.randn(steps, 2, dit.hidden).mul_(0.1).to(dtype),
        text=torch.randn(steps, job.text_tokens, dit.hidden).to(dtype),
    )
    return Between(0, torch.randn(1, dit.latent_channels, shape.frames, shape.height, shape.width), [conditioning])


def measure_reading(job: Job) -> ReadBlock:
    """All blocks, one after the other, with nothing else at work; their hashes are checked before."""
    with opened(job) as (model, store):
        names = block_slabs(model.dims.dit)
        buffer = torch.empty(max(store.slab_bytes(name) for name in names), dtype=torch.uint8)
        for name in (*names, *names):
            store.read_slab(name, buffer)
        reads = store.reads[len(names) :]
    return ReadBlock(
        nbytes=sum(read.nbytes for read in reads),
        fetched=sum(read.fetched for read in reads),
        seconds=sum(read.seconds for read in reads),
        cpu_s=sum(read.cpu_s for read in reads),
    )


# diffusers.


def make_peer(dims: DitDims, dtype: torch.dtype) -> Any:
    """diffusers' transformer of these dims; its weights have memory, but were never touched."""
    logging.disable(logging.WARNING)  # of kernels for quantised weights, which it has none of
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        peer: Any = HunyuanVideoTransformer3DModel(
            num_attention_heads=dims.heads,
            attention_head_dim=dims.head_dim,
            num_layers=dims.double_blocks,
            num_single_layers=dims.single_blocks,
            num_refiner_layers=dims.refiner_blocks,
            mlp_ratio=float(dims.mlp_ratio),
            text_embed_dim=dims.text_width,
            pooled_projection_dim=dims.pooled_width,
            rope_axes_dim=dims.rope_axes,
        )
    return peer.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)


def randomise(peer: Any) -> None:
    for parameter in peer.parameters():
        parameter.normal_(0.0, SPREAD)


def offload(peer: Any, groups: Path) -> None:
    """Its group offloading to disk, block by block; files that are there already are not written again."""
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(
        peer,
        onload_device=cpu,
        offload_device=cpu,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(groups),
    )


def write_groups(job: Job) -> int:
    """What group offloading writes before its first step, to the disk; all its bytes."""
    peer = make_peer(open_store(job.store).dims.dit, DTYPES[job.dtype])
    randomise(peer)
    offload(peer, job.groups)
    os.sync()
    return sum(file.stat().st_size for file in job.groups.iterdir())


@dataclass(slots=True)
class Dropping:
    """Drops the cache of all groups that are not in use, before a block reads its own; keeps the time."""

    files: list[Path]
    seconds: float = field(default=0.0)

    def __call__(self, *_: object) -> None:
        began = time.perf_counter()
        drop_from_cache(self.files)
        self.seconds += time.perf_counter() - began


@torch.no_grad()
def run_diffusers(job: Job, resident: bool) -> Result:
    """Forward passes with all weights in memory, or with group offloading to disk."""
    dims, dtype = open_store(job.store).dims, DTYPES[job.dtype]
    peer = make_peer(dims.dit, dtype)
    dropping = Dropping([] if resident else sorted(job.groups.iterdir()))
    if resident:
        randomise(peer)
    else:
        offload(peer, job.groups)
        for module in (peer, *peer.transformer_blocks, *peer.single_transformer_blocks):
            module.register_forward_pre_hook(dropping)
    shape = latent_shape(job.size, job.frames, dims.vae)
    given = {
        "hidden_states": torch.randn(1, dims.dit.latent_channels, shape.frames, shape.height, shape.width).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, job.text_tokens, dims.dit.text_width).to(dtype),
        "encoder_attention_mask": torch.ones(1, job.text_tokens, dtype=torch.long),
        "pooled_projections": torch.randn(1, dims.dit.pooled_width).to(dtype),
        "guidance": torch.tensor([6000.0], dtype=dtype),
    }
    seconds, fetched = [], []
    for _ in range(job.steps + 1):
        dropping.seconds, began, before = 0.0, time.perf_counter(), fetched_bytes()
        peer(**given, return_dict=False)
        seconds.append(time.perf_counter() - began - dropping.seconds)
        fetched.append(fetched_bytes() - before)
    return Result(
        step_s=statistics.median(seconds[1:]),
        read_bytes=sum(file.stat().st_size for file in dropping.files),
        fetched_bytes=statistics.median(fetched[1:]),
        peak_bytes=peak_bytes(),
    )
