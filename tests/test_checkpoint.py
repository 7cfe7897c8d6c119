"""Containers: what they hold from headers alone, one tensor at a time, and every way in which a file can be bad."""

import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hvlite.errors import WeightsError
from hvlite.weights.checkpoint import checkpoint_files, find_checkpoint, open_checkpoint, read_json
from tests.layouts import CONTAINERS, State, write_pickle, write_safetensors, write_shards

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
)


def some_tensors() -> State:
    """One tensor of each dtype, a scalar and an empty one."""
    state = {str(dtype): (torch.randn(3, 5) * 4).abs().to(dtype) for dtype in DTYPES}
    return state | {"scalar": torch.tensor(0.25), "empty": torch.empty(0, 4)}


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    return torch.equal(*flat)


def refused(path: Path, *words: str) -> str:
    """Opening `path` fails in one line that holds `words`; the line."""
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path.parent))
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_back_every_bit(tmp_path: Path, container: str) -> None:
    state = some_tensors()
    catalog = open_checkpoint(CONTAINERS[container](tmp_path / "part", state))
    assert {name: (stored.dtype, stored.shape) for name, stored in catalog.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()
    }
    assert all(same_bits(catalog[name].read(), tensor) for name, tensor in state.items())


def test_reading_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    count, size = 16, 2**20
    for path in (
        write_safetensors(tmp_path / "a.safetensors", {str(i): torch.ones(size // 4) for i in range(count)}),
        write_pickle(tmp_path / "b.pt", {str(i): torch.ones(size // 4) for i in range(count)}),
    ):
        open_checkpoint(path)  # what torch imports on first use is not counted
        tracemalloc.start()
        for stored in open_checkpoint(path).values():
            stored.read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size <= peak < 3 * size


def test_views_in_a_pickle_are_read_in_their_order(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    state = {
        "transposed": whole.t(),
        "columns": whole[:, 2:5],
        "rows": whole[1:3],
        "parameter": torch.nn.Parameter(whole),
    }
    catalog = open_checkpoint(write_pickle(tmp_path / "views.pt", state, None))
    assert all(torch.equal(catalog[name].read(), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("wrapper", ["module", "state_dict", None])
def test_wrappers_of_a_pickle(tmp_path: Path, wrapper: str | None) -> None:
    path = write_pickle(tmp_path / "model.pt", {"a": torch.ones(2)}, wrapper)
    assert list(open_checkpoint(path)) == ["a"]


def test_load_key_chooses_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "both.pt"
    torch.save({"module": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, path)
    assert open_checkpoint(path)["a"].read().tolist() == [0, 0]
    assert open_checkpoint(path, "ema")["a"].read().tolist() == [1, 1]


def test_a_missing_load_key_names_what_there_is(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "ema.pt", {"a": torch.ones(2)}, "ema")
    refused(path, "'module'", "'ema'", "load_key")


def test_an_index_goes_before_its_shards_and_variants_come_last(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {str(i): torch.ones(1) for i in range(6)}, "model")
    (folder / "model.fp16.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert find_checkpoint(folder) == folder / "model.safetensors.index.json"
    assert [file.name for file in checkpoint_files(folder)][1:] == sorted(f.name for f in folder.glob("*.safetensors"))


def test_a_folder_without_or_with_several_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        write_safetensors(tmp_path / name, {"a": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"holds 2 checkpoints \(one\.safetensors, two\.safetensors\)"):
        find_checkpoint(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {name: torch.ones(1) for name in "abc"}, "model")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00003\.safetensors without \*\.safetensors\.index\.json"):
        find_checkpoint(folder)


def test_the_bf16_release_is_taken_where_fp8_lies_beside_it(tmp_path: Path) -> None:
    for name in ("mp_rank_00_model_states.pt", "mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"):
        write_pickle(tmp_path / name, {"a": torch.ones(1)})
    assert find_checkpoint(tmp_path).name == "mp_rank_00_model_states.pt"


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    refused(path, "'.gguf'", ".safetensors")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})

    def forbidden(self: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    refused(path, "Permission denied")


# Safetensors.


def header_file(path: Path, header: object, data: bytes = bytes(64), length: int | None = None) -> Path:
    """A file with this header (raw bytes, or a value to be written as JSON) and these data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: object = (4, 4), offsets: object = (0, 64), dtype: object = "F32") -> dict[str, object]:
    """A header's entry, right by default."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_header_files_of_these_tests_are_right_by_default(tmp_path: Path) -> None:
    path = header_file(tmp_path / "a.safetensors", {"a": entry(), "__metadata__": {"format": "pt"}})
    assert torch.equal(open_checkpoint(path)["a"].read(), torch.zeros(4, 4))


BAD_HEADERS: dict[str, tuple[object, str]] = {
    "no JSON": (b"{'a': 1}", "JSON"),
    "cut JSON": (b'{"a": {"dtype": "F32", "sha', "JSON"),
    "no UTF-8": (b'{"\xff": 1}', "JSON"),
    "list": ([], "list"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", "JSON"),
    "twice": (b'{"a": {}, "a": {}}', "'a' stands in it twice"),
    "entry is a number": ({"a": 3}, "'a'"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "'None'"),
    "unknown dtype": ({"a": entry(dtype="F4")}, "'F4'"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, "dtype"),
    "negative size": ({"a": entry(shape=[-4, -4])}, "[-4, -4]"),
    "size is true": ({"a": entry(shape=[True, 16])}, "True"),
    "size is a fraction": ({"a": entry(shape=[4.0, 4.0])}, "4.0"),
    "many axes": ({"a": entry(shape=[1] * 99)}, "shape"),
    "huge size": ({"a": entry(shape=[2**40, 2**40], offsets=[0, 2**48])}, "offsets"),
    "endless size": ({"a": entry(shape=[2**400])}, "shape"),
    "three offsets": ({"a": entry(offsets=[0, 64, 64])}, "offsets"),
    "backward offsets": ({"a": entry(offsets=[64, 0])}, "-64"),
    "negative offset": ({"a": entry(offsets=[-64, 0])}, "offsets"),
    "shape and offsets differ": ({"a": entry(shape=[4, 5])}, "takes 80 bytes"),
    "overlap": ({"a": entry(), "b": entry(offsets=[32, 96])}, "overlaps"),
    "gap": ({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[2], offsets=[16, 24])}, "gap after 'a'"),
    "cut data": ({"a": entry(shape=[4, 40], offsets=[0, 640])}, "cut off"),
    "more data": ({"a": entry(shape=[4], offsets=[0, 16])}, "too many"),
    "newline in a name": ({"a\nb": entry(dtype="F4")}, r"'a\nb'"),
    "very long name": ({"a" * 5000: entry(dtype="F4")}, "aaa..."),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_one_line(tmp_path: Path, case: str) -> None:
    header, word = BAD_HEADERS[case]
    assert len(refused(header_file(tmp_path / "bad.safetensors", header), "bad.safetensors", word)) < 1500


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 200])
def test_a_header_longer_than_its_file_is_not_read(tmp_path: Path, length: int) -> None:
    path = header_file(tmp_path / "long.safetensors", {"a": entry()}, length=length)
    refused(path, str(length), str(path.stat().st_size))


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_file_without_a_header_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\x7f" * size)
    refused(path, str(size))


def test_a_truncated_file_is_known_from_its_header(tmp_path: Path) -> None:
    """Both numbers are named, and the tensors' bytes are not looked at: the file is sparse and would take hours."""
    path = tmp_path / "cut.safetensors"
    length = 2**42
    header_file(path, {"a": entry(shape=[length // 2], offsets=[0, 2 * length])}, data=b"")
    os.truncate(path, path.stat().st_size + length)
    refused(path, str(path.stat().st_size), str(path.stat().st_size + length), "'a'", "cut off")


def test_a_file_that_is_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(8)})
    stored = open_checkpoint(path)["a"]
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(WeightsError, match=r"ends 5 bytes inside tensor 'a'"):
        stored.read()


VALID = save({"a.weight": torch.randn(4, 6), "b.weight": torch.zeros(3, dtype=torch.bfloat16)})


def complaint(path: Path) -> str:
    """Reads every tensor; the WeightsError's line if there is one."""
    try:
        for stored in open_checkpoint(path).values():
            stored.read()
    except WeightsError as error:
        return str(error)
    return ""


def open_or_refuse(path: Path, content: bytes) -> None:
    """Whatever the bytes: all tensors come, or one WeightsError; and memory stays in the order of the file's size."""
    path.write_bytes(content)
    tracemalloc.start()
    line = complaint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in line
    assert peak < 2**20


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bytes_in_a_header_never_do_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = 8 + int.from_bytes(VALID[:8], "little")
    changed = bytearray(VALID)
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        changed[position] = data.draw(st.integers(0, 255))
    open_or_refuse(tmp_path_factory.getbasetemp() / "flipped.safetensors", bytes(changed))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, len(VALID)), tail=st.binary(max_size=40))
def test_truncated_and_extended_files_never_do_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, size: int, tail: bytes
) -> None:
    open_or_refuse(tmp_path_factory.getbasetemp() / "cut.safetensors", VALID[:size] + tail)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@settings(max_examples=80, deadline=None)
@given(header=json_values | st.dictionaries(st.text(max_size=8), entries, max_size=3))
def test_any_json_header_never_does_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, header: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    header_file(path, header)
    open_or_refuse(path, path.read_bytes())


# Shards.


def sharded(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Three good shards, with an index that `change` has spoilt in place."""
    write_shards(folder, {name: torch.ones(2) for name in "abcdef"}, "model")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    change(values["weight_map"])
    index.write_text(json.dumps(values), encoding="utf-8")
    return index


BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing shard": (lambda table: table.update(a="model-00009.safetensors"), "not there"),
    "path that leaves the folder": (lambda table: table.update(a="../model.safetensors"), "own folder"),
    "absolute path": (lambda table: table.update(a="/etc/passwd"), "own folder"),
    "parent": (lambda table: table.update(a=".."), "own folder"),
    "empty name": (lambda table: table.update(a=""), "own folder"),
    "nul": (lambda table: table.update(a="x\0y"), "own folder"),
    "very long name": (lambda table: table.update(a="x" * 5000), "own folder"),
    "no name": (lambda table: table.update(a=3), "own folder"),
    "tensor in no shard": (lambda table: table.update(z=table["a"]), "'z' should be in"),
    "tensor not in the index": (lambda table: table.pop("a"), "'a' is in"),
    "tensor in another shard": (lambda table: table.update(a=table["b"]), "'a' is in"),
    "nothing": (lambda table: table.clear(), "weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_one_line(tmp_path: Path, case: str) -> None:
    change, word = BAD_INDEXES[case]
    refused(sharded(tmp_path, change), "model.safetensors.index.json", word)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {name: torch.ones(2) for name in "abcdef"}, "model")
    write_safetensors(folder / "model-00002-of-00003.safetensors", {name: torch.ones(2) for name in "abe"})
    refused(folder / "model.safetensors.index.json", "'a' is in two shards")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content, encoding="utf-8")
    refused(index, index.name)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {name: torch.ones(2) for name in "abcdef"}, "model")
    shard = folder / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    refused(folder / "model.safetensors.index.json", shard.name, "cut off")


def test_a_huge_settings_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{")
    os.truncate(path, 2**40)
    with pytest.raises(WeightsError, match="larger than"):
        read_json(path)


# Pickles.


class Malicious:
    """Unpickles to the result of a call."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_holds_code_does_not_run_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"module": {"a": torch.ones(2), "b": Malicious(trace)}}, path)
    refused(path, "mkdir", "could run code")
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_plain_pickle_is_refused_unread(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Malicious(trace), protocol))
    refused(path, "zip format")
    assert not trace.exists()


def test_the_old_torch_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "torch.save")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.97])
def test_a_truncated_pickle_is_refused(tmp_path: Path, kept: float) -> None:
    path = write_pickle(tmp_path / "cut.pt", {str(i): torch.ones(64) for i in range(8)})
    os.truncate(path, int(path.stat().st_size * kept))
    refused(path, "cut off or damaged")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with every record put through `change(name, content)`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "bomb.pt", {"a": torch.zeros(4096)})
    refused(rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED), "compressed")


def test_a_pickle_with_a_short_record_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "short.pt", {"a": torch.zeros(4096)})
    rewritten(path, lambda name, content: content[:64] if name.endswith("data/0") else content)
    refused(path, "short.pt")


def test_a_pickle_whose_tensor_is_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    """The size (4096,) is in the pickle as a two-byte integer; nothing of the larger one is allocated."""
    path = write_pickle(tmp_path / "large.pt", {"a": torch.zeros(4096)})
    grown = struct.pack("<H", 8192)
    rewritten(
        path, lambda _, content: re.sub(rb"M" + struct.pack("<H", 4096) + rb"\x85", b"M" + grown + b"\x85", content)
    )
    refused(path, "'a'", "[8192]", "32768")


def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "expanded.pt", {"a": torch.ones(1).expand(2**40)})
    refused(path, "'a'", str(2**40))


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        {},
        {"module": {}},
        {"a": 3},
        {3: torch.ones(2)},
        {"a": torch.ones(2).to_sparse()},
    ],
    ids=["tensor", "list", "empty", "empty module", "number", "number as name", "sparse"],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    refused(path, "other.pt")


def test_a_pickle_without_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.pt"
    torch.save({"a": torch.ones(2, device="meta")}, path)
    refused(path, "'a'")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_flipped_bytes_in_a_pickle_never_do_worse_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    write_pickle(path, {"a": torch.ones(4), "b": torch.ones(2, 2)})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    assert "\n" not in complaint(path)
