"""What a plan predicts of a step, and what the step takes: clips of five shapes on this CPU.

    python benchmarks/predictions.py [--dtype bf16|fp32] [--double 2] [--single 4] [--steps 3] [--folder .]

The rates are measured first, as `hvlite doctor --measure` does it. Then a transformer of the published width with few
blocks and random weights makes steps of each clip, in a fresh process, with all its blocks in memory and with all of
them streamed from the disk; their page cache is dropped before each is read. Prints a table and then a JSON line.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import torch
from cold import free_bytes, in_fresh_process, working_folder
from random_store import small_model, write_random_store
from streaming_runs import Job, run_hvlite

from hvlite.measure import ON_CPU, measure_rates
from hvlite.memory.needs import TEXT_TOKENS
from hvlite.memory.rates import Rates
from hvlite.weights.layout import Formats, store_bytes

# Height, width, frames: 256 to 3,840 tokens.
SHAPES = ((256, 256, 1), (192, 320, 5), (192, 336, 13), (320, 512, 9), (384, 640, 13))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One shape; seconds of a step, and of the core that reads for it."""

    shape: tuple[int, int, int]
    resident: bool
    measured_s: float
    predicted_s: float
    reader_s: float

    @property
    def error(self) -> float:
        """How much of the measured time the prediction is off by."""
        return self.predicted_s / self.measured_s - 1


def measured_rates(folder: Path) -> Rates:
    return measure_rates(torch.device("cpu"), folder, ON_CPU, lambda what: print(what, file=sys.stderr))


def measure(job: Job, rates: Rates) -> Iterator[Row]:
    for height, width, frames in SHAPES:
        clip = replace(job, size=(height, width), frames=frames)
        for resident in (True, False):
            result = in_fresh_process(run_hvlite, clip, resident, rates)
            yield Row(
                shape=(height, width, frames),
                resident=resident,
                measured_s=result.step_s,
                predicted_s=result.predicted_s,
                reader_s=result.reader_s,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of weights and products")
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the weights are written, on a real disk")
    arguments = parser.parse_args()
    dims, formats = small_model(arguments.double, arguments.single), Formats(weights=arguments.dtype)
    needed, free = store_bytes(dims, formats.weights, formats.text_weights), free_bytes(arguments.folder)
    if needed > free:
        sys.exit(f"{needed / 1e9:.1f} GB are needed in {arguments.folder}, {free / 1e9:.1f} may be used: try --folder")
    with working_folder(arguments.folder) as folder:
        store = write_random_store(folder / "store", dims, formats)
        os.sync()  # or its writing would still be going on
        rates = in_fresh_process(measured_rates, folder)
        print(
            f"{rates.made_by}; the disk reads {(rates.disk_read or 0) / 1e9:.2f} GB/s; others took "
            f"{rates.others_cores:.1f} cores meanwhile; {arguments.dtype}\n"
        )
        print("| clip | blocks | measured s | predicted s | error |\n|---|---|---|---|---|")
        rows = []
        # a plan is for the longest prompt
        job = Job(store=store, groups=folder, dtype=arguments.dtype, steps=arguments.steps, text_tokens=TEXT_TOKENS)
        for row in measure(job, rates):
            rows.append(asdict(row))
            where = "in memory" if row.resident else "from disk"
            clip = "x".join(str(each) for each in row.shape)
            print(f"| {clip} | {where} | {row.measured_s:.2f} | {row.predicted_s:.2f} | {row.error:+.1%} |", flush=True)
    measured = msgspec.to_builtins(rates)
    print(json.dumps({"benchmark": "predictions", **vars(arguments), "rates": measured, "rows": rows}, default=str))


if __name__ == "__main__":
    main()
