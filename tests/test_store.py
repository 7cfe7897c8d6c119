"""A store gives back every bit, and says so when one of them has changed; what it is told by an index it checks."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from hvlite.atomic import locked
from hvlite.dims import HUNYUANVIDEO, HUNYUANVIDEO_DEFAULTS, ModelDims
from hvlite.errors import Busy
from hvlite.weights import slab as slabs
from hvlite.weights.layout import ALIGNMENT, PAD, PAGE, Form, place, slab_header
from hvlite.weights.mounts import unfit_file_system
from hvlite.weights.slab import DTYPE_WORDS, LARGE_BYTES, Slab, views, write_slab
from hvlite.weights.store import (
    INDEX,
    JOURNAL,
    CopiedFile,
    Index,
    Store,
    list_stores,
    open_store,
    read_index,
    remove_store,
    write_index,
)
from tests.layouts import TINY_CLIP, TINY_DIT, TINY_LLAMA, TINY_VAE
from tests.refusal import refusal

State = Mapping[str, Tensor]

TINY = ModelDims(
    name="tiny", dit=TINY_DIT, vae=TINY_VAE, llama=TINY_LLAMA, clip=TINY_CLIP, defaults=HUNYUANVIDEO_DEFAULTS
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8)
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits at all, numbers or not."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=generator)
    return flat.to(torch.uint8).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: State, expected: State) -> bool:
    """The same names, in the same order, and the same bits."""
    assert list(found) == list(expected)
    return all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and bits(found[name]) == bits(tensor)
        for name, tensor in expected.items()
    )


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of every dtype; some without axes, some without elements."""
    names = draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
    shapes = st.lists(st.integers(0, 5) | st.just(130), max_size=3).map(tuple)
    return {
        name: random_bits(draw(st.sampled_from(DTYPES)), draw(shapes), seed)
        for seed, name in enumerate(names)
        if name != "__metadata__" and not name.startswith(PAD)
    } or {"only": torch.ones(3)}


def write(folder: Path, name: str, state: State) -> Slab:
    """A slab of these tensors, in this order."""
    forms = (Form(key, DTYPE_WORDS[tensor.dtype], tuple(tensor.shape)) for key, tensor in state.items())
    return write_slab(folder, name, place(forms), state.items(), part="dit", prefix=f"{name}.")


def write_store(folder: Path, contents: Mapping[str, State], **changes: object) -> Path:
    """A store of these slabs at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = tuple(write(folder, name, state) for name, state in contents.items())
    index = Index(
        writer="hvlite test",
        dims=TINY,
        weights="bf16",
        text_weights="fp16",
        dtype="bf16",
        text_dtype="fp16",
        source="0" * 64,
        slabs=written,
    )
    write_index(folder / INDEX, replace(index, **changes))  # type: ignore[arg-type]
    return folder


def small_state(seed: int = 0) -> dict[str, Tensor]:
    """Three tensors with gaps between them."""
    shapes = {"fc.qweight": (torch.int8, (3, 5)), "fc.scales": (torch.float32, (3,)), "norm": (torch.bfloat16, (7,))}
    return {name: random_bits(*kind, seed + number) for number, (name, kind) in enumerate(shapes.items())}


def flip(file: Path, position: int, mask: int = 1) -> None:
    """Change one byte."""
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def read_all(store: Store) -> dict[str, Mapping[str, Tensor]]:
    """Every slab, read into memory of its own."""
    buffers = {name: torch.empty(store.slab_bytes(name), dtype=torch.uint8) for name in store.slabs}
    for name, buffer in buffers.items():
        store.read_slab(name, buffer)
    return {name: store.slab_views(name, buffer) for name, buffer in buffers.items()}


def map_all(store: Store) -> dict[str, Mapping[str, Tensor]]:
    return {name: store.map_slab(name) for name in store.slabs}


def take_all(store: Store) -> dict[str, Mapping[str, Tensor]]:
    """Every slab, tensor by tensor."""
    return {name: dict(store.tensors(name)) for name in store.slabs}


def verify(store: Store) -> None:
    for _ in store.verify():
        pass


READERS: dict[str, Callable[[Store], object]] = {
    "read": read_all,
    "map": map_all,
    "tensors": take_all,
    "verify": verify,
}


# Every bit.


@PROPERTY
@given(contents=st.lists(states(), min_size=1, max_size=3))
def test_every_bit_comes_back(tmp_path_factory: pytest.TempPathFactory, contents: list[State]) -> None:
    named = {f"slab.{number}": state for number, state in enumerate(contents)}
    store = open_store(write_store(tmp_path_factory.mktemp("store"), named))
    for found in (map_all(store), read_all(store)):
        assert found.keys() == named.keys()
        assert all(same(found[name], state) for name, state in named.items())
    verify(store)


@PROPERTY
@given(state=states())
def test_a_slab_is_valid_safetensors(tmp_path_factory: pytest.TempPathFactory, state: State) -> None:
    folder = tmp_path_factory.mktemp("slab")
    slab = write(folder, "slab", state)
    with safe_open(folder / slab.file, framework="pt") as opened:
        names = [name for name in opened.keys() if not name.startswith(PAD)]  # noqa: SIM118  # it is no dict
        found = {name: opened.get_tensor(name) for name in state if name in names}
        pads = [opened.get_tensor(name) for name in opened.keys() if name.startswith(PAD)]  # noqa: SIM118
    assert len(names) == len(state)
    assert same(found, state)
    assert all(pad.dtype == torch.uint8 and not pad.any() for pad in pads)


@PROPERTY
@given(state=states())
def test_every_tensor_is_aligned_in_the_file_and_in_memory(
    tmp_path_factory: pytest.TempPathFactory, state: State
) -> None:
    folder = tmp_path_factory.mktemp("slab")
    slab = write(folder, "slab", state)
    content = (folder / slab.file).read_bytes()
    assert slab.data_offset % PAGE == 0
    assert len(content) == slab.file_bytes
    assert slab.data_bytes % PAGE == 0
    for placed in slab.tensors:
        assert placed.offset % ALIGNMENT == 0
        begin = slab.data_offset + placed.offset
        assert content[begin : begin + placed.nbytes] == bits(state[placed.name])
    mapped = slabs.map_slab(folder, slab)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in mapped.values() if tensor.numel())


def test_a_header_is_padded_with_spaces() -> None:
    header = slab_header(place([Form("a", "F32", (3,)), Form("b", "U8", (1,))]))
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length == PAGE
    assert header.endswith(b"}" + b" " * (length - len(header[8:].rstrip())))
    assert b'"__pad.0":{"dtype":"U8","shape":[244],"data_offsets":[12,256]}' in header
    assert b'"__pad.1":{"dtype":"U8","shape":[3839],"data_offsets":[257,4096]}' in header


def test_a_tensor_is_stored_as_it_looks_not_as_it_lies(tmp_path: Path) -> None:
    """Transposed, cut out, without memory of its own, and a parameter."""
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    state = {
        "transposed": whole.t(),
        "columns": whole[:, 1:3],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(whole * 2),
    }
    store = open_store(write_store(tmp_path / "store", {"slab": state}))
    assert same(store.map_slab("slab"), {name: tensor.detach() for name, tensor in state.items()})


def test_a_slab_is_read_into_the_buffer_it_is_given(tmp_path: Path) -> None:
    """At its beginning, and not a byte behind the slab's data; the tensors are views of it."""
    state = small_state()
    store = open_store(write_store(tmp_path / "store", {"slab": state}))
    needed = store.slabs["slab"].data_bytes
    buffer = torch.full((needed + 1000,), 7, dtype=torch.uint8)
    store.read_slab("slab", buffer)
    found = store.slab_views("slab", buffer)
    assert same(found, state)
    assert bool((buffer[needed:] == 7).all())
    buffer[:needed] = 0
    assert not any(bits(tensor).strip(b"\0") for tensor in found.values())
    with pytest.raises(AssertionError, match=f"needs {needed} bytes"):
        store.read_slab("slab", buffer[: needed - 1])


def test_views_of_a_copy_are_the_same_tensors(tmp_path: Path) -> None:
    """As on a device, where the slab arrives in the middle of something larger."""
    state = small_state()
    store = open_store(write_store(tmp_path / "store", {"slab": state}))
    slab = store.slabs["slab"]
    buffer = torch.empty(slab.data_bytes, dtype=torch.uint8)
    store.read_slab("slab", buffer)
    slots = torch.zeros(3 * slab.data_bytes, dtype=torch.uint8)
    slots[slab.data_bytes : 2 * slab.data_bytes].copy_(buffer)
    assert same(views(slab.placement, slots[slab.data_bytes :]), state)
    on_meta = views(slab.placement, torch.empty(slab.data_bytes, dtype=torch.uint8, device="meta"))
    assert {name: tensor.shape for name, tensor in on_meta.items()} == {n: t.shape for n, t in state.items()}


def test_writing_to_a_mapped_tensor_changes_no_file(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "store", {"slab": small_state()}))
    before = (store.path / "slab.safetensors").read_bytes()
    for tensor in store.map_slab("slab").values():
        tensor.zero_()
    assert (store.path / "slab.safetensors").read_bytes() == before
    assert same(store.map_slab("slab"), small_state())


def test_every_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """So that each goes back when it is dropped, whatever becomes of the others."""
    large = torch.arange(LARGE_BYTES, dtype=torch.float32)
    state = {**small_state(), "large": large, "none": torch.empty(0, 3), "one": torch.tensor(3.0)}
    store = open_store(write_store(tmp_path / "store", {"slab": state}))
    found = dict(store.tensors("slab"))
    assert same({name.removeprefix("slab."): tensor for name, tensor in found.items()}, state)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
    found["slab.large"].zero_()
    assert same(store.map_slab("slab"), state)


def test_a_mapped_slab_takes_no_memory_until_it_is_touched(tmp_path: Path) -> None:
    """Also where mapping it has found its hash right: of the table of embeddings only a prompt's rows count."""
    store = open_store(write_store(tmp_path / "store", {"slab": {"table": torch.ones(1 << 22)}}))
    table = store.map_slab("slab")["table"]
    assert resident_kib(store.path / "slab.safetensors") == 0
    assert table[:1000].sum() == 1000
    assert 0 < resident_kib(store.path / "slab.safetensors") < table.nbytes >> 10


def resident_kib(file: Path) -> int:
    """How much of a mapped file is in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    assert any(line.endswith(f" {file}") for line in lines), "it is not mapped"
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def test_names_in_the_model_are_prefix_and_name(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "store", {"block.0": small_state(), "block.1": small_state(5)}))
    for slab, seed_state in (("block.0", small_state()), ("block.1", small_state(5))):
        named = {f"{slab}.{name}": tensor for name, tensor in seed_state.items()}
        assert same(dict(store.tensors(slab)), named)
        assert same(dict(store.mapped_tensors(slab)), named)


def test_dims_come_back_exactly(tmp_path: Path) -> None:
    for dims in (TINY, HUNYUANVIDEO):
        index = open_store(write_store(tmp_path / dims.name, {"slab": small_state()}, dims=dims)).index
        assert index.dims == dims
        assert type(index.dims.dit.rope_theta) is float
        assert type(index.dims.defaults.known_sizes) is tuple


# Damage.


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("reader", READERS)
def test_any_changed_byte_of_a_slab_is_found(
    tmp_path_factory: pytest.TempPathFactory, reader: str, data: st.DataObject
) -> None:
    """In the header when the store is opened, in the data by the first who reads it, who names the file."""
    path = write_store(tmp_path_factory.mktemp("store"), {"whole": small_state(), "broken": small_state(3)})
    slab = open_store(path).slabs["broken"]
    file = path / slab.file
    flip(file, data.draw(st.integers(0, slab.file_bytes - 1)), data.draw(st.integers(1, 255)))
    refusal(lambda: READERS[reader](open_store(path)), "broken.safetensors", "damaged", "pack the model again")


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_that_changes_after_opening_is_found(tmp_path: Path, reader: str) -> None:
    for position in (20, 5000):
        store = open_store(write_store(tmp_path / f"store{position}", {"slab": small_state()}))
        flip(store.path / "slab.safetensors", position)
        found = hashlib.sha256((store.path / "slab.safetensors").read_bytes()).hexdigest()
        expected = store.slabs["slab"].sha256
        refusal(lambda store=store: READERS[reader](store), "slab.safetensors", found, expected)  # type: ignore[misc]


@PROPERTY
@given(data=st.data())
def test_any_changed_byte_of_the_index_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write_store(tmp_path_factory.mktemp("store"), {"slab": small_state()})
    size = (path / INDEX).stat().st_size
    flip(path / INDEX, data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255)))
    refusal(lambda: open_store(path), INDEX, "damaged")


@PROPERTY
@given(share=st.floats(0, 1, exclude_max=True), file=st.sampled_from(("slab.safetensors", INDEX)))
def test_a_cut_file_is_refused_when_opened(tmp_path_factory: pytest.TempPathFactory, share: float, file: str) -> None:
    path = write_store(tmp_path_factory.mktemp("store"), {"slab": small_state()})
    os.truncate(path / file, int((path / file).stat().st_size * share))
    refusal(lambda: open_store(path), file)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_cut_after_opening_is_refused(tmp_path: Path, reader: str) -> None:
    store = open_store(write_store(tmp_path / "store", {"slab": small_state()}))
    os.truncate(store.path / "slab.safetensors", 4096)
    refusal(lambda: READERS[reader](store), "slab.safetensors", "has 4096 bytes, the index says 8192")


def test_bytes_too_many_and_a_missing_slab_are_refused_when_opened(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", {"slab": small_state()})
    with (path / "slab.safetensors").open("ab") as stream:
        stream.write(b"x")
    refusal(lambda: open_store(path), "slab.safetensors", "has 8193 bytes, the index says 8192")
    (path / "slab.safetensors").unlink()
    refusal(lambda: open_store(path), "slab.safetensors", "No such file")


def test_a_slab_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by another Store of the same folder; a file that has changed since is hashed again, `verify` always does."""
    store = open_store(write_store(tmp_path / "store", {"slab": small_state()}))
    read_all(store)
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.sha256", lambda: pytest.fail("hashed again"))
        assert same(map_all(store)["slab"], small_state())
        assert same(read_all(open_store_without_hash(store))["slab"], small_state())
    flip(store.path / "slab.safetensors", 5000)
    os.utime(store.path / "slab.safetensors", ns=(1, 1))  # the clock of a file system may tick slowly
    refusal(lambda: map_all(store), "slab.safetensors", "damaged")


def open_store_without_hash(store: Store) -> Store:
    """A second Store of the same folder (opening it again would hash the index)."""
    return Store(store.path, store.index)


def test_verify_reports_progress_and_every_damaged_file(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", {f"slab.{number}": small_state(number) for number in range(4)})
    store = open_store(path)
    steps = list(store.verify())
    total = sum(slab.file_bytes for slab in store.index.slabs)
    assert [step.file for step in steps] == [f"slab.{number}.safetensors" for number in range(4)]
    assert [step.done_bytes for step in steps] == [total // 4, total // 2, total // 4 * 3, total]
    assert {step.total_bytes for step in steps} == {total}
    for number in (1, 3):
        flip(path / f"slab.{number}.safetensors", 6000)
    refusal(lambda: verify(store), "2 of the store's files", "slab.1.safetensors", "slab.3.safetensors")


def test_a_changed_tokenizer_is_found_by_verify_and_by_whoever_wants_it(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"{}").hexdigest()
    copied = CopiedFile(folder="tokenizer", name="tokenizer.json", file_bytes=2, sha256=digest)
    path = write_store(tmp_path / "store", {"slab": small_state()}, files=(copied,))
    (path / "tokenizer").mkdir()
    (path / "tokenizer/tokenizer.json").write_bytes(b"{}")
    store = open_store(path)
    verify(store)
    assert store.tokenizer("tokenizer") == path / "tokenizer"
    flip(path / "tokenizer/tokenizer.json", 1)
    refusal(lambda: verify(store), "tokenizer.json", digest)
    refusal(lambda: store.tokenizer("tokenizer"), "tokenizer.json", digest)


# Opening.


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """A store of as many slabs as the published model has, all data wrong: nobody looks."""
    state = {"weight": torch.zeros(3, dtype=torch.bfloat16), "bias": torch.zeros(3, dtype=torch.bfloat16)}
    path = write_store(tmp_path / "store", {f"slab.{number}": state for number in range(154)})
    for file in path.glob("*.safetensors"):
        flip(file, 4096)
    store = open_store(path)
    assert len(store.slabs) == 154
    refusal(lambda: store.map_slab("slab.77"), "slab.77.safetensors")


def spoilt(path: Path, change: Callable[[Index], Index]) -> Path:
    """The store with another index, whose hash is right."""
    write_index(path / INDEX, change(read_index(path / INDEX)))
    return path


def with_slab(**changes: object) -> Callable[[Index], Index]:
    return lambda index: replace(index, slabs=(replace(index.slabs[0], **changes), *index.slabs[1:]))  # type: ignore[arg-type]


def moved(index: Index) -> Index:
    first, *others = index.slabs[0].tensors
    return with_slab(tensors=(replace(first, offset=256), *others))(index)


def copied(folder: str, name: str) -> Callable[[Index], Index]:
    file = CopiedFile(folder=folder, name=name, file_bytes=1, sha256="0" * 64)
    return lambda index: replace(index, files=(file,))


FORGED: dict[str, tuple[Callable[[Index], Index], str]] = {
    "a path": (with_slab(file="../slab.safetensors"), "'../slab.safetensors'"),
    "an absolute path": (with_slab(file="/tmp/slab.safetensors"), "'/tmp/slab.safetensors'"),
    "another kind of file": (with_slab(file="slab.pt"), "'slab.pt'"),
    "sizes": (with_slab(file_bytes=1 << 40), "sizes and offsets of slab 'slab'"),
    "the data's place": (with_slab(data_offset=0), "sizes and offsets of slab 'slab'"),
    "offsets": (moved, "sizes and offsets of slab 'slab'"),
    "a tokenizer elsewhere": (copied("..", "tokenizer.json"), "'..'/'tokenizer.json'"),
    "a tokenizer's path": (copied("tokenizer", "../../x"), "'../../x'"),
    "one slab twice": (lambda index: replace(index, slabs=index.slabs * 2), "two slabs of one name"),
    "another header": (
        lambda index: with_slab(tensors=tuple(replace(t, name=t.name + "x") for t in index.slabs[0].tensors))(index),
        "its header is not the one in the index",
    ),
    "a newer format": (lambda index: replace(index, format=2), "store format 2, this hvlite reads 1"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_an_index_is_checked_even_if_its_hash_is_right(tmp_path: Path, forgery: str) -> None:
    change, words = FORGED[forgery]
    path = spoilt(write_store(tmp_path / "store", {"slab": small_state()}), change)
    refusal(lambda: open_store(path), words)


def test_other_folders_are_no_stores(tmp_path: Path) -> None:
    refusal(lambda: open_store(tmp_path / "nothing"), "is no store")
    refusal(lambda: open_store(tmp_path), "is no store", INDEX)
    path = write_store(tmp_path / "store", {"slab": small_state()})
    (path / INDEX).rename(path / JOURNAL)
    refusal(lambda: open_store(path), "not packed to its end", "pack")


# Where a store may lie.


MOUNTS = r"""
/dev/sda1 / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
nas:/export /mnt/nas nfs4 rw,vers=4.2 0 0
nas:/other /mnt/nas/local\040disk ext4 rw 0 0
C:\134 /mnt/c 9p rw,aname=drvfs;path=C:\;uid=1000 0 0
C:\134 /mnt/old drvfs rw 0 0
//host/share /srv/with\040space cifs rw 0 0
me@host: /home/me/remote fuse.sshfs rw 0 0
/dev/sdb1 /twice nfs rw 0 0
/dev/sdb1 /twice xfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/mnt/nas/models/store", "/mnt/nas, a network file system (nfs4)"),
        ("/mnt/nas", "(nfs4)"),
        ("/mnt/c/Users/me/store", "/mnt/c, a Windows drive or a share of a virtual machine's host (9p)"),
        ("/mnt/old/store", "(drvfs)"),
        ("/srv/with space/store", "/srv/with space, a network file system (cifs)"),
        ("/home/me/remote/store", "(fuse.sshfs)"),
        ("/home/me/remotely", None),
        ("/mnt/nas/local disk/store", None),
        ("/mnt/store", None),
        ("/twice/store", None),
    ],
)
def test_the_mount_that_holds_a_path_decides(path: str, words: str | None) -> None:
    found = unfit_file_system(Path(path), MOUNTS)
    assert (found is None) if words is None else (found is not None and words in found)


def test_without_mounts_every_place_may(tmp_path: Path) -> None:
    assert unfit_file_system(tmp_path, "") is None


def test_a_store_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "store", {"slab": small_state()})
    (tmp_path / "mounts").write_text(f"/dev/sda1 / ext4 rw 0 0\nnas:/x {tmp_path} nfs rw 0 0\n")
    monkeypatch.setattr("hvlite.weights.mounts.MOUNTS", tmp_path / "mounts")
    refusal(lambda: open_store(path), "network file system (nfs)", "local disk")


# Stores as folders.


def test_stores_are_listed_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    assert list_stores(tmp_path / "nothing") == []
    whole = write_store(tmp_path / "b-whole", {"slab": small_state()})
    cut = write_store(tmp_path / "a-cut", {"slab": small_state()})
    os.truncate(cut / "slab.safetensors", 100)
    unfinished = write_store(tmp_path / "c.partial", {"slab": small_state()})
    (unfinished / INDEX).rename(unfinished / JOURNAL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / INDEX).write_text("{}")
    found = list_stores(tmp_path)
    assert [listed.path for listed in found] == [cut, whole, unfinished]
    assert [listed.fault is None for listed in found] == [False, True, False]
    assert "not packed to its end" in str(found[2].fault)
    assert found[1].index == open_store(whole).index
    assert found[1].disk_bytes == sum(file.stat().st_size for file in whole.iterdir())


def test_only_stores_are_removed(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", {"slab": small_state()})
    (path / "notes.txt").write_text("mine")
    refusal(lambda: remove_store(path), "'notes.txt'", "no part of a store")
    (path / "notes.txt").unlink()
    link = tmp_path / "link"
    link.symlink_to(path)
    refusal(lambda: remove_store(link), "is no store")
    refusal(lambda: remove_store(tmp_path), "is no store")
    (path / "link.safetensors").symlink_to(tmp_path)
    refusal(lambda: remove_store(path), "'link.safetensors'")
    (path / "link.safetensors").unlink()
    with locked(path):
        refusal(lambda: remove_store(path), "another hvlite", kind=Busy)
    assert same(open_store(path).map_slab("slab"), small_state())
    remove_store(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link"]


def test_damaged_and_unfinished_stores_are_removed_too(tmp_path: Path) -> None:
    damaged = write_store(tmp_path / "damaged", {"slab": small_state()})
    flip(damaged / INDEX, -5)
    unfinished = write_store(tmp_path / "unfinished.partial", {"slab": small_state()})
    (unfinished / INDEX).rename(unfinished / JOURNAL)
    for path in (damaged, unfinished):
        remove_store(path)
    assert not list(tmp_path.iterdir())


def test_a_removal_that_is_interrupted_leaves_no_half_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is gone at once; what is left is swept by the next removal."""

    class KilledError(BaseException):
        pass

    def die(path: Path, **_: object) -> None:
        raise KilledError

    first, second = (write_store(tmp_path / name, {"slab": small_state()}) for name in ("first", "second"))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", die)
        with pytest.raises(KilledError):
            remove_store(first)
    assert not first.exists()
    assert [listed.path for listed in list_stores(tmp_path)] == [second]
    remove_store(second)
    assert not list(tmp_path.iterdir())


def test_only_what_was_planned_is_written(tmp_path: Path) -> None:
    """Another name, dtype, shape, or count: nothing gets the slab's name."""
    placement = place([Form("a", "F32", (3,))])
    wrong: list[dict[str, Tensor]] = [
        {"b": torch.ones(3)},
        {"a": torch.ones(3, dtype=torch.bfloat16)},
        {"a": torch.ones(4)},
        {"a": torch.ones(3), "b": torch.ones(3)},
    ]
    for state in wrong:
        with pytest.raises(AssertionError):
            write_slab(tmp_path, "slab", placement, state.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_disk_begins_with_a_large_tensor_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """A hint, so that it may be refused."""
    state = {"small": torch.ones(3), "large": torch.randn(1 << 18), "last": torch.ones(2)}
    sizes = []

    def hinted(handle: int, *_: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        if is_refused:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", hinted)
    slab = write(tmp_path, "slab", state)
    assert sizes == [slab.data_offset + 256 + (1 << 20)]
    assert same(slabs.map_slab(tmp_path, slab), state)


def test_a_slab_knows_its_own_sizes(tmp_path: Path) -> None:
    slab = write(tmp_path, "slab", small_state())
    assert (slab.file_bytes, slab.data_offset, slab.data_bytes) == (8192, 4096, 4096)
    assert [placed.offset for placed in slab.tensors] == [0, 256, 512]
