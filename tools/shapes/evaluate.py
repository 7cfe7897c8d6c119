"""Does the embedded model draw what a prompt says? Held-out prompts, fresh seeds, measured from the mp4s' pixels.

    python tools/shapes/evaluate.py [--model hvlite/assets/shapes] [--seeds 3] [--clips results/evaluation]

Every combination of the held-out fifth (43, never trained on) x seeds goes through `generate` into a file; the file
is decoded again and measured. Prints a table with 95 % intervals (Wilson) and, last, one JSON line.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from data import split_scenes
from measure import look_at

from hvlite import Outputs, Request, encode_prompts, generate, load_profile, open_model
from hvlite.events import Finished
from hvlite.video.mp4 import read_frames

FIRST_SEED = 1000
GOALS = {"colour": 0.93, "shape": 0.93, "direction": 0.93, "background": 0.93, "all four": 0.90}


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score)."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model_folder: Path, seeds: range, clips: Path, dtype: str | None = None, *, dynamic: bool = False
) -> tuple[Counter[str], int, list[str]]:
    """-> hits per attribute, clips, one line for each clip that shows something else."""
    scenes = split_scenes()[1]
    hits: Counter[str] = Counter()
    misses: list[str] = []
    weights = "int8-dynamic" if dynamic else None
    with open_model(model_folder, load_profile("cpu", dtype=dtype, weights=weights), "cpu") as model:
        states = encode_prompts([scene.caption for scene in scenes], model)
        for seed in seeds:
            for number, (scene, prompt) in enumerate(zip(scenes, states, strict=True)):
                target = clips / f"{number:02d}-seed{seed}.mp4"
                target.unlink(missing_ok=True)
                *_, last = generate(
                    Request(scene.caption, seed=seed), model, outputs=Outputs(file=target), prompts=[prompt]
                )
                assert isinstance(last, Finished)
                seen = look_at(np.stack(list(read_frames(target))))
                matches = seen.matches(scene)
                hits.update(name for name, right in matches.items() if right)
                hits["all four"] += all(matches.values())
                if not all(matches.values()):
                    misses.append(f"{target.name}: {scene.caption} -> {seen}")
    return hits, len(scenes) * len(seeds), misses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("hvlite/assets/shapes"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--clips", type=Path, default=Path("results/evaluation"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    arguments = parser.parse_args()
    arguments.clips.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    began = time.monotonic()
    hits, count, misses = evaluate(arguments.model, seeds, arguments.clips, arguments.dtype)
    print("\n".join(misses))
    print(f"\n| attribute | right of {count} | share | 95 % interval | goal |\n|---|---|---|---|---|")
    rows = {}
    for name, goal in GOALS.items():
        low, high = wilson(hits[name], count)
        rows[name] = {"hits": hits[name], "share": hits[name] / count, "low": low, "high": high}
        print(f"| {name} | {hits[name]} | {hits[name] / count:.1%} | {low:.1%} to {high:.1%} | {goal:.0%} |")
    print(json.dumps({"clips": count, "seconds": round(time.monotonic() - began), "attributes": rows}))
    return 0 if all(hits[name] / count >= goal for name, goal in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
