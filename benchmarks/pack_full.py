"""Packs a transformer of the published size, for real: peak memory, throughput against the disk's own, time to open.

    python benchmarks/pack_full.py [--weights nf4 int8] [--blocks 20,40] [--folder results]

Writes a checkpoint in the published bf16 layout (names of the original release, one safetensors file, 25.6 GB); the
small parts beside it are those of `shapes`. Its weights are one random block of values, repeated: cheap to make, and a
quantiser works no less on them. Everything that is measured runs in a fresh process, with the page cache of the files
it reads dropped; `disk` is what reading the same source bytes and writing the same store bytes costs there, without
doing anything else. All files are deleted at the end, after Ctrl+C too. Prints a table and then a JSON line.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO, DitDims, ModelDims
from hvlite.packing import pack_model
from hvlite.planning import stored_formats
from hvlite.weights.dit_layouts import dit_rules
from hvlite.weights.layout import store_bytes
from hvlite.weights.sources import Sources, find_sources, read_dims
from hvlite.weights.store import open_store

# Of which the file is made, over and over; a prime, so that no two rows of a matrix are alike.
BLOCK_VALUES = 16_777_213
CHUNK_BYTES = 16 << 20
# For what else may grow on that disk meanwhile.
SPARE_BYTES = 1 << 30
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One format. `share` is disk_s / pack_s; `read_bytes` is what the packing got from the disk, not from memory.

    `peak_bytes` is VmHWM of a whole process, of which `start_bytes` were taken before it began to pack.
    """

    weights: str
    source_bytes: int
    store_bytes: int
    peak_bytes: int
    start_bytes: int
    read_bytes: int
    pack_s: float
    disk_s: float
    share: float
    open_s: float
    open_read_bytes: int


def published_dims(double: int, single: int) -> DitDims:
    return replace(HUNYUANVIDEO.dit, double_blocks=double, single_blocks=single)


def published_header(dims: DitDims) -> tuple[bytes, int]:
    """The safetensors header of the transformer, and how many bytes of weights follow."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for rule in dit_rules(dims, "A"):
        for name, shape in rule.sources:
            end = position + 2 * torch.Size(shape).numel()
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (position, end)}
            position = end
    text = json.dumps(entries).encode("ascii")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, position


def write_checkpoint(file: Path, dims: DitDims) -> None:
    """Random bf16 of the spread that trained weights have, in the memory of one block of values."""
    header, left = published_header(dims)
    values = torch.randn(BLOCK_VALUES, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    block = values.view(torch.uint8).numpy().data
    with file.open("wb") as stream:
        stream.write(header)
        while left:
            left -= stream.write(block[:left])
        stream.flush()
        os.fsync(stream.fileno())


def checkpoint_bytes(dims: DitDims) -> int:
    header, data = published_header(dims)
    return len(header) + data


def sources_of(file: Path) -> tuple[Sources, ModelDims]:
    """The file as the transformer of a model whose other parts are those of `shapes`."""
    sources = find_sources(paths.SHAPES_MODEL, {"dit": file})
    return sources, read_dims(sources)


def needed_bytes(blocks: tuple[int, int], weights: list[str]) -> int:
    """The checkpoint, and the largest store (or as much plain writing) beside it."""
    dims = replace(read_dims(find_sources(paths.SHAPES_MODEL)), dit=published_dims(*blocks))
    stores = (store_bytes(dims, stored_formats(each, None).weights, "fp16") for each in weights)
    return checkpoint_bytes(dims.dit) + max(stores) + SPARE_BYTES


def fitting_blocks(free: int, wanted: tuple[int, int], weights: list[str]) -> tuple[int, int]:
    """As many blocks as the disk has room for."""
    blocks = wanted
    while needed_bytes(blocks, weights) > free:
        if blocks == (1, 1):
            sys.exit(f"even one block of each kind needs {needed_bytes(blocks, weights) / 1e9:.1f} GB of free disk")
        blocks = max(1, blocks[0] - 1), max(1, blocks[1] - 2)
    return blocks


# What runs in a fresh process, each with one JSON object as its answer.


def packed(source: Path, out: Path, weights: str) -> dict[str, float]:
    sources, dims = sources_of(source)
    before = peak_bytes()
    began = time.perf_counter()
    for _ in pack_model(sources, dims, out, stored_formats(weights, None)):
        pass
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak_bytes(), "start": before, "read": bytes_from_disk()}


def opened(store: Path) -> dict[str, float]:
    before = bytes_from_disk()
    began = time.perf_counter()
    index = open_store(store).index
    return {
        "seconds": time.perf_counter() - began,
        "read": bytes_from_disk() - before,
        "size": index.store_bytes,
    }


def copied(source: Path, target: Path, size: str) -> dict[str, float]:
    """Read all of `source`, write `size` bytes of it alongside, and wait until they are on the disk."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    total, left = source.stat().st_size, int(size)
    began = time.perf_counter()
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        while found := reader.readinto(buffer):
            left -= writer.write(buffer[: min(left, found, -(-found * int(size) // total))])
        while left:  # the store is larger than the checkpoint
            left -= writer.write(buffer[:left])
        writer.flush()
        os.fsync(writer.fileno())
    return {"seconds": time.perf_counter() - began, "read": bytes_from_disk()}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {"packed": packed, "opened": opened, "copied": copied}


def in_fresh_process(work: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    words = [sys.executable, __file__, "--child", work.__name__, *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def answer_parent(name: str, *arguments: str) -> None:
    given = (Path(word) if os.sep in word else word for word in arguments)
    print(json.dumps(CHILDREN[name](*given)))


def peak_bytes() -> int:
    """The most memory that this process ever held (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def bytes_from_disk() -> int:
    """What this process has had read from the disk, pages found in memory not counted."""
    words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(words["read_bytes"])


def drop_cache(*files: Path) -> None:
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# The measurement.


def measure(source: Path, weights: str, folder: Path) -> Row:
    store, plain = folder / "store", folder / "plain"
    drop_cache(source)
    pack = in_fresh_process(packed, source, store, weights)
    drop_cache(*store.glob("*.safetensors"))
    opening = in_fresh_process(opened, store)
    shutil.rmtree(store)
    drop_cache(source)
    disk = in_fresh_process(copied, source, plain, int(opening["size"]))
    plain.unlink()
    for found in (pack["read"], disk["read"]):
        assert found > 0.9 * source.stat().st_size, f"only {found} bytes came from the disk: is {source} cached?"
    return Row(
        weights=weights,
        source_bytes=source.stat().st_size,
        store_bytes=int(opening["size"]),
        peak_bytes=int(pack["peak"]),
        start_bytes=int(pack["start"]),
        read_bytes=int(pack["read"]),
        pack_s=pack["seconds"],
        disk_s=disk["seconds"],
        share=disk["seconds"] / pack["seconds"],
        open_s=opening["seconds"],
        open_read_bytes=int(opening["read"]),
    )


def print_row(row: Row) -> None:
    print(
        f"| {row.weights} | {row.source_bytes / 1e9:.2f} | {row.store_bytes / 1e9:.2f} | {row.peak_bytes / GIB:.2f} "
        f"| {row.start_bytes / GIB:.2f} | {row.pack_s:.0f} | {row.disk_s:.0f} | {row.share:.0%} | {row.open_s:.3f} "
        f"| {row.open_read_bytes / MIB:.1f} |",
        flush=True,
    )


def run(weights: list[str], wanted: tuple[int, int], place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    blocks = fitting_blocks(free, wanted, weights)
    double, single = blocks
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {double} double and {single} single blocks")
    if blocks != wanted:
        print(f"(not {wanted[0]} and {wanted[1]}: {free / 1e9:.1f} GB is free in {place})")
    print()
    with tempfile.TemporaryDirectory(prefix="pack-full-", dir=place) as name:
        source = Path(name) / "hunyuan_video_720_cfgdistill_bf16.safetensors"
        write_checkpoint(source, published_dims(*blocks))
        print(
            "| weights | source GB | store GB | peak GiB | at start | pack s | disk s | share of disk | open s "
            "| read to open, MiB |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        rows = []
        for each in weights:
            rows.append(measure(source, each, Path(name)))
            print_row(rows[-1])
    print(json.dumps({"benchmark": "pack_full", "blocks": blocks, "rows": [asdict(row) for row in rows]}))


def terminated(*_: object) -> None:
    sys.exit(143)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        answer_parent(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", nargs="+", choices=("bf16", "fp8", "int8", "nf4", "nf4-double"), default=["nf4", "int8"]
    )
    parser.add_argument("--blocks", default="20,40", help="double and single blocks")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="on the disk that is measured")
    arguments = parser.parse_args()
    double, single = (int(word) for word in arguments.blocks.split(","))
    signal.signal(signal.SIGTERM, terminated)
    try:
        run(arguments.weights, (double, single), arguments.folder.resolve())
    except KeyboardInterrupt:
        print("interrupted; every file is deleted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
