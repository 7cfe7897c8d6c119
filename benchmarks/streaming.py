"""What streaming from disk costs a step: all blocks streamed against all resident, and diffusers doing the same.

    python benchmarks/streaming.py [--dtype bf16|fp32] [--double 2] [--single 4] [--repeats 3] [--steps 2] [--folder .]

A transformer of the published width with few blocks and random weights, stored and multiplied in bf16 or fp32, by
default in what this CPU multiplies faster. Each figure is from a fresh process; the page cache is dropped before
every block is read, and the kernel's count of bytes fetched from the device proves the reading. Numbers of tokens are
searched at which reading all blocks takes 0.25, 0.5 and 0.9 of computing them. The peer is diffusers' transformer of
the same dims with its group offloading to disk, one block a group, without streams, which need a GPU; what dropping
the cache costs is not counted in its time, and its weights are on disk before its process starts. Ratios are medians
over pairs of runs. Prints a table and then a JSON line."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cold import free_bytes, in_fresh_process, working_folder
from random_store import small_model, write_random_store
from streaming_runs import Job, Result, measure_reading, run_diffusers, run_hvlite, write_groups

from hvlite.dims import HUNYUANVIDEO, ModelDims
from hvlite.memory.stages import block_slabs
from hvlite.memory.tiers import RING
from hvlite.part import DTYPES
from hvlite.weights.layout import Formats, slab_placements

SHARES = (0.25, 0.5, 0.9)
FIRST_GUESSES = (256, 1024)
TOLERANCE = 0.05
# A clip is one frame of this many tokens in height.
ROWS = 16


def frame_of(tokens: int) -> tuple[int, int]:
    """Height and width of a frame of so many tokens, in pixels."""
    return 16 * ROWS, 16 * tokens // ROWS


def find_tokens(wanted_s: float, step_s: Callable[[int], float]) -> int:
    """How many tokens a step of so many seconds has: along the line through the two measurements nearest to it."""
    times = {tokens: step_s(tokens) for tokens in FIRST_GUESSES}
    while True:
        near = sorted(times, key=lambda tokens: abs(times[tokens] - wanted_s))
        if abs(times[near[0]] - wanted_s) <= TOLERANCE * wanted_s or len(times) == 6:
            return near[0]
        slope = (times[near[1]] - times[near[0]]) / (near[1] - near[0])
        guess = near[0] + (wanted_s - times[near[0]]) / max(slope, 1e-6)
        tokens = max(1, min(512, round(guess / ROWS))) * ROWS
        if tokens in times:
            return tokens
        times[tokens] = step_s(tokens)


MODES: dict[str, tuple[Callable[[Job, bool], Result], bool]] = {
    "resident": (run_hvlite, True),
    "streamed": (run_hvlite, False),
    "diffusers_resident": (run_diffusers, True),
    "diffusers_disk": (run_diffusers, False),
}


def compare(job: Job, repeats: int) -> dict[str, Any]:
    """Every mode `repeats` times, in turn; medians, and the medians of the ratios of pairs."""
    runs: dict[str, list[Result]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode, (act, resident) in MODES.items():
            runs[mode].append(in_fresh_process(act, job, resident))
    row: dict[str, Any] = {mode: _median(results) for mode, results in runs.items()}
    for over, under in (("streamed", "resident"), ("diffusers_disk", "diffusers_resident")):
        pairs = zip(runs[over], runs[under], strict=True)
        row[f"{over}_ratio"] = statistics.median(one.step_s / other.step_s for one, other in pairs)
    return row


def _median(results: list[Result]) -> dict[str, float]:
    fields = [asdict(result) for result in results]
    return {name: statistics.median(each[name] for each in fields) for name in fields[0]}


def check_proof(row: dict[str, Any]) -> None:
    """End where blocks did not come from the disk: then the figures mean nothing."""
    for mode in ("streamed", "diffusers_disk"):
        result = row[mode]
        if not 0 < result["read_bytes"] <= 1.01 * result["fetched_bytes"]:
            sys.exit(
                f"{mode}: of {result['read_bytes'] / 1e9:.2f} GB a step only {result['fetched_bytes'] / 1e9:.2f} came "
                "from the device: is this a file system in memory, or one that ignores posix_fadvise? Try --folder"
            )


def measure(job: Job, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each share of reading in computing."""
    reading = in_fresh_process(measure_reading, job)
    print(
        f"reading {reading.nbytes / 1e9:.2f} GB of blocks: {reading.seconds:.2f} s "
        f"({reading.nbytes / reading.seconds / 1e9:.2f} GB/s), {reading.cpu_s:.2f} s of a core\n",
        flush=True,
    )
    known: dict[int, float] = {}

    def step_s(tokens: int) -> float:
        if tokens not in known:
            known[tokens] = in_fresh_process(run_hvlite, replace(job, size=frame_of(tokens)), True).step_s
        return known[tokens]

    for share in SHARES:
        tokens = find_tokens(reading.seconds / share, step_s)
        row = compare(replace(job, size=frame_of(tokens)), repeats)
        check_proof(row)
        computing = row["resident"]["step_s"]
        yield {"share": share, "found_share": reading.seconds / computing, "tokens": tokens, **row}


HEAD = (
    "| reading / computing | tokens | resident s | streamed s | ratio | waited s | reader, share of a core | peak GiB "
    "| diffusers resident s | from disk s | ratio | peak GiB | bytes / diffusers' |\n|" + "---|" * 13
)


def print_row(row: dict[str, Any]) -> None:
    ours, theirs = row["streamed"], row["diffusers_disk"]
    print(
        f"| {row['found_share']:.2f} | {row['tokens']} | {row['resident']['step_s']:.2f} | {ours['step_s']:.2f} "
        f"| {row['streamed_ratio']:.3f} | {ours['waited_s']:.2f} | {ours['reader_s'] / ours['step_s']:.2f} "
        f"| {ours['peak_bytes'] / 2**30:.2f} | {row['diffusers_resident']['step_s']:.2f} | {theirs['step_s']:.2f} "
        f"| {row['diffusers_disk_ratio']:.3f} | {theirs['peak_bytes'] / 2**30:.2f} "
        f"| {ours['fetched_bytes'] / theirs['fetched_bytes']:.3f} |",
        flush=True,
    )


def published_bytes_ratio() -> float:
    """The same of the published model: its blocks against all of it, in bf16; arithmetic."""
    placements = slab_placements(HUNYUANVIDEO, Formats())
    blocks = sum(placements[name].data_bytes for name in block_slabs(HUNYUANVIDEO.dit))
    whole = (name for name in placements if name.startswith(("double_", "single_", "dit_rest")))
    return blocks / sum(placements[name].data_bytes for name in whole)


def faster_dtype() -> str:
    """In which of the two this CPU multiplies faster."""
    seconds = {}
    for name in ("bf16", "fp32"):
        x, weight = torch.randn(512, 3072).to(DTYPES[name]), torch.randn(3072, 3072).to(DTYPES[name])
        tries = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            tries.append(time.perf_counter() - began)
        seconds[name] = min(tries)
    return min(seconds, key=lambda name: seconds[name])


def needed_bytes(dims: ModelDims, dtype: str) -> int:
    """The store, and what diffusers writes."""
    return 2 * sum(each.slab_bytes for each in slab_placements(dims, Formats(weights=dtype)).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of weights and products")
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the weights are written, on a real disk")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or faster_dtype()
    if arguments.double + arguments.single <= RING:
        parser.error(f"{RING} blocks stay in the ring's slots: more are needed for one to be streamed")
    dims = small_model(arguments.double, arguments.single)
    needed, free = needed_bytes(dims, arguments.dtype), free_bytes(arguments.folder)
    if needed > free:
        sys.exit(f"{needed / 1e9:.1f} GB are needed in {arguments.folder}, {free / 1e9:.1f} may be used: try --folder")
    with working_folder(arguments.folder) as folder:
        store = write_random_store(folder / "store", dims, Formats(weights=arguments.dtype, text_weights="fp32"))
        job = Job(store=store, groups=folder / "groups", dtype=arguments.dtype, steps=arguments.steps)
        written = in_fresh_process(write_groups, job)
        policy = os.environ.get("OMP_WAIT_POLICY", "default")
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, wait policy {policy}, {arguments.dtype}; "
            f"{arguments.double} double and {arguments.single} single blocks, {written / 1e9:.2f} GB in diffusers"
        )
        rows: list[dict[str, Any]] = []
        for row in measure(job, arguments.repeats):
            if not rows:
                print(HEAD)
            rows.append(row)
            print_row(row)
    published = published_bytes_ratio()
    print(f"\nbytes per step of the published 60 blocks, ours / diffusers': {published:.3f}")
    print(json.dumps({"benchmark": "streaming", **vars(arguments), "published": published, "rows": rows}, default=str))


if __name__ == "__main__":
    main()
