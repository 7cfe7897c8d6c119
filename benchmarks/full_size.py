"""The 13 B model and its 8 B text encoder at their full size, from disk, in a few GiB of memory: how many, how fast.

    PYTHONPATH=. python benchmarks/full_size.py [--dtype bf16|fp32] [--text-weights fp16] [--folder .]

Weights are random, 43 GB of them; with less room on the disk the model gets fewer blocks, and that is said. Two runs of
the real command line follow, each in a fresh process that finds none of the weights in the page cache: a step that goes
on from a saved clip, under a budget of 4 GiB, and a clip from its prompt, under one of 6. Decode is part of both. The
peak is VmHWM of the whole process, imports included. Prints a table and then a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from cold import drop_from_cache, free_bytes, peak_bytes, working_folder
from random_store import write_random_store

from hvlite.clip import model_made
from hvlite.dims import HUNYUANVIDEO, ModelDims, latent_shape
from hvlite.metadata import Metadata
from hvlite.model.dit import Conditioning
from hvlite.opened import open_model
from hvlite.planning import Wishes
from hvlite.profile import load_profile
from hvlite.request import Request
from hvlite.run import Outputs, Run
from hvlite.sampler import make_noise
from hvlite.unfinished import Progress, Unfinished, save_unfinished
from hvlite.weights.layout import Formats, slab_placements, store_bytes
from tests.tokenizers_for_tests import write_clip_tokenizer, write_llama_tokenizer

PROMPT = "a cat walks on the grass, realistic style"
TEXT_TOKENS = 64
STEP_GIB, CLIP_GIB = 4, 6
# Slabs that a step which goes on from a saved clip never reads.
NOT_IN_A_STEP = ("text_", "clip", "double_mods", "single_mods")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A store, and the clip that is made with it."""

    store: Path
    work: Path
    dims: ModelDims
    formats: Formats
    dtype: str
    size: tuple[int, int]
    frames: int
    steps: int


@dataclass(slots=True, kw_only=True)
class Result:
    """What one run took. `peaks`: the most until the end of each stage. Of `expected_bytes` all must be read once."""

    run: str
    goal_gib: int
    expected_bytes: int
    peaks: dict[str, int] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    waited_s: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    fetched_bytes: int = 0


def affordable(dims: ModelDims, formats: Formats, free: int) -> ModelDims:
    """The model, or as many of its blocks as the disk has room for, one double to two single ones."""
    for double in range(dims.dit.double_blocks, 0, -1):
        single = min(2 * double, dims.dit.single_blocks)
        smaller = replace(dims, dit=replace(dims.dit, double_blocks=double, single_blocks=single))
        if store_bytes(smaller, formats.weights, formats.text_weights) <= free:
            return smaller
    sys.exit(f"{free / 1e9:.1f} GB of disk may be used: too little for even three blocks. Try --folder")


def make_store(folder: Path, dims: ModelDims, formats: Formats) -> tuple[Path, ModelDims]:
    """Its tokenizers are a test's, so that its CLIP has their end token."""
    write_llama_tokenizer(folder / "tokenizer")
    words = write_clip_tokenizer(folder / "tokenizer_2")
    dims = replace(dims, clip=replace(dims.clip, eos_token=words - 1))
    return write_random_store(folder, dims, formats), dims


def save_begun(task: Task) -> Path:
    """A clip before its first step, with vectors and text as the schedule would have left them."""
    file, dit = task.work / "begun.safetensors", task.dims.dit
    profile = load_profile("cpu", memory_gib=float(STEP_GIB), dtype=task.dtype)
    request = Request(PROMPT, size=task.size, frames=task.frames, steps=task.steps)
    shape = latent_shape(task.size, task.frames, task.dims.vae)

    def vectors(*size: int) -> torch.Tensor:
        return torch.randn(task.steps, *size, dit.hidden).mul_(0.1)

    with open_model(task.store, profile, "cpu") as model:
        resolved = request.resolve(model.dims)
        run = Run(model, resolved, Outputs(), model.plan(resolved, Wishes(stages=("denoise", "decode"))))
        made = Conditioning(
            vectors(dit.double_blocks, 2, 6), vectors(dit.single_blocks, 3), vectors(2), vectors(TEXT_TOKENS)
        )
        unfinished = Unfinished(
            made=Metadata(request=resolved, model=model_made(model, with_folder=True)),
            latents=make_noise(shape, dit.latent_channels, 0),
            progress=Progress(done=0, branches=1, knobs=run.knobs),
            conditionings=[Conditioning(*(getattr(made, name).to(model.dtype) for name in made.__slots__))],
        )
        save_unfinished(file, unfinished)
    return file


def run_step(task: Task) -> Result:
    """`hvlite gen --resume`: no text encoder, no schedule."""
    bytes_of = {name: each.data_bytes for name, each in slab_placements(task.dims, task.formats).items()}
    expected = sum(count for name, count in bytes_of.items() if not name.startswith(NOT_IN_A_STEP))
    result = Result(run="one step, resumed", goal_gib=STEP_GIB, expected_bytes=expected)
    return follow(task, result, "--resume", str(save_begun(task)), "--model", str(task.store))


def run_clip(task: Task) -> Result:
    """`hvlite gen PROMPT`."""
    expected = sum(each.data_bytes for each in slab_placements(task.dims, task.formats).values())
    result = Result(run="prompt to clip", goal_gib=CLIP_GIB, expected_bytes=expected)
    size = [str(pixels) for pixels in task.size]
    what = ("--size", *size, "--frames", str(task.frames), "--steps", str(task.steps))
    return follow(task, result, PROMPT, "--model", str(task.store), *what)


def follow(task: Task, result: Result, *arguments: str) -> Result:
    """The command in a process of its own; its events are read as they come."""
    drop_from_cache(task.store.rglob("*.safetensors"))
    report, clip = task.work / "report.json", task.work / f"{result.goal_gib}.mp4"
    how = ("--profile", "cpu", "--memory", str(result.goal_gib), "--dtype", task.dtype, "--json", "-o", str(clip))
    script = Path(__file__).with_name("measured.py")
    command = [sys.executable, str(script), str(report), "gen", *arguments, *how]
    print(f"hvlite {' '.join(command[3:])}", file=sys.stderr)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "HVLITE_HOME": str(task.work)}) as run:
        try:
            note_events(result, run)
        except BaseException:
            run.terminate()
            raise
    if run.returncode:
        sys.exit(f"{result.run}: hvlite ended with exit code {run.returncode}")
    took = json.loads(report.read_text())
    result.peak_bytes, result.fetched_bytes = took["peak_bytes"], took["fetched_bytes"]
    if result.fetched_bytes < 0.99 * result.expected_bytes:
        sys.exit(
            f"{result.run}: only {result.fetched_bytes / 1e9:.1f} GB came from the device: the cache was not empty"
        )
    return result


def note_events(result: Result, run: "subprocess.Popen[bytes]") -> None:
    """What the events tell, and the peak so far whenever a stage ends."""
    stage = "start"
    for event in _events(run):
        match event:
            case {"event": "Stage", "name": str(name)}:
                result.peaks[stage], stage = peak_bytes(run.pid), name
            case {"event": "BlockDone", "waited_s": float(waited)}:
                result.waited_s += waited
            case {"event": "StepDone", "seconds": float(seconds)}:
                result.steps_s.append(seconds)
            case {"event": "Finished", "timings": dict(timings)}:
                result.peaks[stage], result.timings = peak_bytes(run.pid), timings


def _events(run: "subprocess.Popen[bytes]") -> Iterator[dict[str, object]]:
    assert run.stdout is not None
    for line in run.stdout:
        yield json.loads(line)


def print_result(result: Result) -> None:
    stages = ", ".join(f"{stage} {nbytes / 2**30:.2f}" for stage, nbytes in result.peaks.items())
    seconds = ", ".join(f"{each:.1f}" for each in result.steps_s)
    print(
        f"| {result.run} | {result.peak_bytes / 2**30:.2f} | {result.goal_gib} | {stages} | {seconds} "
        f"| {result.waited_s:.1f} | {result.fetched_bytes / 1e9:.2f} of {result.expected_bytes / 1e9:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the products")
    parser.add_argument("--text-weights", default="fp16", help="form of the text encoder's weights")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 336))
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--double", type=int, default=HUNYUANVIDEO.dit.double_blocks, help="blocks, to try it out")
    parser.add_argument("--layers", type=int, default=HUNYUANVIDEO.llama.layers, help="of the text encoder, likewise")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the weights are written, on a real disk")
    arguments = parser.parse_args()
    formats = Formats(weights="bf16", text_weights=arguments.text_weights)
    wanted = replace(
        HUNYUANVIDEO,
        dit=replace(HUNYUANVIDEO.dit, double_blocks=arguments.double, single_blocks=2 * arguments.double),
        llama=replace(HUNYUANVIDEO.llama, layers=arguments.layers),
    )
    dims = affordable(wanted, formats, free_bytes(arguments.folder))
    if dims.dit != HUNYUANVIDEO.dit or dims.llama != HUNYUANVIDEO.llama:
        print(f"not the full size: {dims.dit.blocks} of 60 blocks, {dims.llama.used_layers} of 30 layers")
    with working_folder(arguments.folder) as folder:
        store, dims = make_store(folder / "store", dims, formats)
        task = Task(
            store=store,
            work=folder,
            dims=dims,
            formats=formats,
            dtype=arguments.dtype,
            size=tuple(arguments.size),
            frames=arguments.frames,
            steps=arguments.steps,
        )
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}\n")
        print("| run | peak GiB | goal | until the end of | s per step | waited s | GB from the device |")
        print("|---|---|---|---|---|---|---|")
        results = []
        for act in (run_step, run_clip):
            results.append(act(task))
            print_result(results[-1])
    rows = [asdict(result) for result in results]
    print(json.dumps({"benchmark": "full_size", **vars(arguments), "dims": asdict(dims), "rows": rows}, default=str))


if __name__ == "__main__":
    main()
