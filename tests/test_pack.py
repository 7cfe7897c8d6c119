"""Whatever a checkpoint's layout, its store is the same; whenever packing is killed, the next run ends in it."""

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvlite.atomic import locked
from hvlite.dims import HUNYUANVIDEO, HUNYUANVIDEO_DEFAULTS, ModelDims
from hvlite.errors import Busy, OutputError
from hvlite.events import Note
from hvlite.model.dit import Dit
from hvlite.model.text import build_clip, build_llama, load_tokenizer
from hvlite.model.vae import Vae
from hvlite.quant.swap import plan_swap, swap
from hvlite.weights.layout import (
    DTYPE_BYTES,
    PLAIN,
    QUANTISED,
    Formats,
    SlabPlan,
    plan_slabs,
    slab_placements,
    store_bytes,
    stored_forms,
)
from hvlite.weights.load import clip_tensors, dit_tensors, fill, llama_tensors, vae_tensors
from hvlite.weights.pack import Packed, Progress, Recipe, cast_in_place, delete_source, pack
from hvlite.weights.parts import Loaded, Opened, plain
from hvlite.weights.slab import DTYPE_WORDS
from hvlite.weights.sources import Sources, find_sources, read_dims
from hvlite.weights.store import INDEX, JOURNAL, Store, open_store
from tests.layouts import (
    TINY_CLIP,
    TINY_DIT,
    TINY_LLAMA,
    TINY_VAE,
    WIDE_DIT,
    publish_llama,
    random_dit,
    random_llama,
    write_diffusers_folder,
    write_dit,
    write_shards,
)
from tests.refusal import refusal

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelDims(
    name="tiny", dit=TINY_DIT, vae=TINY_VAE, llama=TINY_LLAMA, clip=TINY_CLIP, defaults=HUNYUANVIDEO_DEFAULTS
)
WIDE_LLAMA = replace(TINY_LLAMA, hidden=64, mlp_hidden=128, layers=3)
WIDE = replace(TINY, dit=replace(WIDE_DIT, single_blocks=2), llama=WIDE_LLAMA)

# Slabs of TINY, in the order in which they are packed.
TINY_SLABS = [
    *("dit_rest", "double_mods.0", "double_mods.1", "double_blocks.0", "double_blocks.1"),
    *("single_mods.0", "single_mods.1", "single_mods.2", "single_blocks.0", "single_blocks.1", "single_blocks.2"),
    *("text_embedding", "text_layers.0", "text_layers.1", "clip", "vae"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Sources:
    """TINY in the diffusers layout, with the tokenizers of the tiny model."""
    folder = write_diffusers_folder(tmp_path_factory.mktemp("checkpoint"))
    tokenizers = {name: tiny_model / name for name in ("tokenizer", "tokenizer_2")}
    return find_sources(folder, tokenizers)


def copy_of(sources: Sources, folder: Path) -> Sources:
    """The same checkpoint somewhere else."""
    folder.mkdir()
    fresh = write_diffusers_folder(folder)
    return find_sources(fresh, {"tokenizer": sources.tokenizer, "tokenizer_2": sources.tokenizer_2})


def run(steps: Iterator[Progress]) -> list[Progress]:
    return list(steps)


def part_tensors(store: Store, part: str) -> Iterator[tuple[str, Tensor]]:
    """All of dit, text, clip or vae, under the names that its module has."""
    for slab in store.index.slabs:
        if slab.part == part:
            yield from store.tensors(slab.name)


def packed(sources: Sources, out: Path, recipe: Recipe | None = None, dims: ModelDims = TINY) -> Store:
    """The finished store."""
    run(pack(sources, dims, out, recipe))
    return open_store(out)


def slabs_done(steps: list[Progress]) -> list[str]:
    return [step.slab for step in steps if isinstance(step, Packed)]


def notes(steps: list[Progress]) -> list[str]:
    return [step.text for step in steps if isinstance(step, Note)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fake_int8(name: str, loaded: Loaded) -> Mapping[str, Tensor]:
    """Something of the shapes and dtypes of int8."""
    tensor = plain(loaded)
    if tensor.dim() != 2 or not name.startswith(("double_", "single_", "layers.")):
        return {name: tensor}
    stem = name.removesuffix("weight")
    return {f"{stem}qweight": (tensor * 40).to(torch.int8), f"{stem}scales": tensor.float().amax(1)}


INT8 = Recipe(formats=Formats(weights="int8", text_weights="int8"), dit=fake_int8, text=fake_int8)


# What is in a store.


def test_a_slab_for_each_thing_that_travels() -> None:
    plans = plan_slabs(TINY)
    assert [plan.name for plan in plans] == TINY_SLABS
    mods = {plan.name: [name for name, _ in plan.parameters] for plan in plans}
    assert mods["double_mods.1"] == [
        f"double_mods.1.{half}.{leaf}" for half in ("img", "txt") for leaf in ("weight", "bias")
    ]
    assert mods["single_mods.2"] == ["single_mods.2.weight", "single_mods.2.bias"]
    assert mods["text_embedding"] == ["embed_tokens.weight"]
    assert not any("mod" in name for block in ("double_blocks.0", "single_blocks.2") for name in mods[block])
    assert {name.split(".")[0] for name in mods["dit_rest"]} == {
        *("img_in", "time_in", "vector_in", "guidance_in", "txt_in", "final_mod", "final_linear")
    }
    assert len(plan_slabs(HUNYUANVIDEO)) == 1 + 2 * 60 + 1 + 30 + 2


def test_blocks_of_a_kind_are_laid_out_alike() -> None:
    """So that a slot fits them all, and one set of views serves them."""
    placements = slab_placements(TINY, Formats(weights="nf4", text_weights="int8"))
    for kind in ("double_blocks", "single_blocks", "double_mods", "single_mods", "text_layers"):
        same = [placement for name, placement in placements.items() if name.startswith(kind)]
        assert len(same) > 1
        assert all(placement == same[0] for placement in same)


@pytest.mark.parametrize(("weights", "text_weights"), [("fp32", "fp32"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_plain_stores_hold_what_the_loaders_give(
    tmp_path: Path, checkpoint: Sources, weights: str, text_weights: str
) -> None:
    recipe = Recipe(formats=Formats(weights=weights, text_weights=text_weights))
    store = packed(checkpoint, tmp_path / "store", recipe)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    expected = {
        "dit": (dit_tensors(checkpoint.dit, TINY_DIT), dtypes[weights]),
        "text": (llama_tensors(checkpoint.text_encoder, TINY_LLAMA), dtypes[text_weights]),
        "clip": (clip_tensors(checkpoint.text_encoder_2, TINY_CLIP), torch.float32),
        "vae": (vae_tensors(checkpoint.vae, TINY_VAE), torch.float32),
    }
    assert list(store.slabs) == TINY_SLABS
    for part, (tensors, dtype) in expected.items():
        found = dict(part_tensors(store, part))
        wanted = {name: tensor.to(dtype) for name, tensor in tensors}
        assert list(found) == list(wanted)
        assert all(found[name].dtype == dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items())
    index = store.index
    assert (index.weights, index.text_weights, index.dtype, index.text_dtype) == (
        weights,
        text_weights,
        weights,
        text_weights,
    )
    assert index.dims == TINY


def test_a_store_fills_the_modules(tmp_path: Path, checkpoint: Sources) -> None:
    store = packed(checkpoint, tmp_path / "store")
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"dit": Dit(TINY_DIT), "vae": Vae(TINY_VAE)}
    modules |= {"text": build_llama(TINY_LLAMA), "clip": build_clip(TINY_CLIP)}
    for part, module in modules.items():
        fill(module, part_tensors(store, part))
        assert not any(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("container", ["shards", "pickle"])
def test_every_layout_gives_the_same_slabs(tmp_path: Path, checkpoint: Sources, container: str) -> None:
    stores = []
    for layout in "ABC":
        path = write_dit(tmp_path / layout, random_dit(), layout=layout, container=container)
        stores.append(packed(replace(checkpoint, dit=path), tmp_path / f"store-{layout}"))
    assert stores[0].index.slabs == stores[1].index.slabs == stores[2].index.slabs
    assert len({store.index.source for store in stores}) == 3


def test_a_transform_decides_what_is_stored(tmp_path: Path, checkpoint: Sources) -> None:
    """Under the tensor's own name it is cast to the part's dtype; under others it is stored as it comes."""
    seen: list[str] = []

    def transform(name: str, loaded: Loaded) -> Tensor | Mapping[str, Tensor]:
        seen.append(name)
        return plain(loaded).float() if plain(loaded).dim() == 1 else fake_int8(name, loaded)

    store = packed(checkpoint, tmp_path / "store", replace(INT8, dit=transform))
    source = dict(dit_tensors(checkpoint.dit, TINY_DIT))
    assert seen == list(source)
    found = store.map_slab("single_blocks.1")
    for name in ("linear1", "linear2_attn", "linear2_mlp"):
        assert torch.equal(found[f"{name}.qweight"], (source[f"single_blocks.1.{name}.weight"] * 40).to(torch.int8))
        assert found[f"{name}.scales"].dtype == torch.float32
        assert f"{name}.weight" not in found
    assert found["linear1.bias"].dtype == torch.bfloat16
    assert store.map_slab("dit_rest")["img_in.weight"].dtype == torch.bfloat16
    assert store.map_slab("text_layers.0")["self_attn.q_proj.qweight"].dtype == torch.int8
    assert store.map_slab("text_layers.0")["input_layernorm.weight"].dtype == torch.float16
    assert store.map_slab("text_embedding")["weight"].dtype == torch.float16


@settings(deadline=None)
@given(
    values=st.lists(st.floats(width=16, allow_nan=False), min_size=0, max_size=40),
    old=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    new=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_casting_in_place_is_casting(values: list[float], old: torch.dtype, new: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hvlite.weights.pack.CAST_ELEMENTS", 7)
        tensor = torch.tensor(values, dtype=old).view(-1, 1)
        expected = tensor.to(new).clone()
        memory = tensor.data_ptr()
        found = cast_in_place(tensor, new)
    assert found.dtype == new
    assert torch.equal(found, expected)
    assert old.itemsize != new.itemsize or found.data_ptr() == memory


def test_tokenizers_go_with_the_store(tmp_path: Path, checkpoint: Sources) -> None:
    """Only their own files, whatever lies beside them, and they read a prompt as before."""
    crowded = tmp_path / "crowded"
    crowded.mkdir()
    for file in checkpoint.tokenizer.iterdir():
        (crowded / file.name).write_bytes(file.read_bytes())
    (crowded / "model.safetensors").write_bytes(b"x" * 1000)
    store = packed(replace(checkpoint, tokenizer=crowded), tmp_path / "store")
    for name, source in (("tokenizer", checkpoint.tokenizer), ("tokenizer_2", checkpoint.tokenizer_2)):
        found, expected = load_tokenizer(store.tokenizer(name)), load_tokenizer(source)
        for prompt in ("a cat walks on the grass", "<|eot_id|> Ünïcode 12345"):
            assert found(prompt)["input_ids"] == expected(prompt)["input_ids"]
    assert not (store.path / "tokenizer/model.safetensors").exists()


def test_a_store_knows_the_folders_own_defaults(tmp_path: Path, tiny_model: Path) -> None:
    sources = find_sources(tiny_model)
    dims = read_dims(sources)
    store = packed(sources, tmp_path / "store", dims=dims)
    assert store.dims == dims
    assert (store.dims.name, store.dims.defaults.size) == ("tiny", (32, 32))


# Sizes.


@pytest.mark.parametrize("weights", [*PLAIN, *QUANTISED])
@pytest.mark.parametrize("dims", [TINY, WIDE], ids=["tiny", "wide"])
def test_forms_are_the_parameters_of_the_modules(dims: ModelDims, weights: str) -> None:
    """The arithmetic against the modules themselves, with their Linears exchanged."""
    formats = Formats(weights=weights, text_weights=weights)
    with torch.device("meta"):
        dit: nn.Module = Dit(dims.dit)
    modules = {"dit": dit, "text": build_llama(dims.llama)}
    for part, module in modules.items():
        module.to(
            {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[PLAIN[formats.plain_dtype(part)]]
        )
        if weights in QUANTISED:
            swap(module, weights)
        expected = {
            name: (DTYPE_WORDS[parameter.dtype], tuple(parameter.shape))
            for name, parameter in module.named_parameters()
        }
        assert forms_of(dims, formats, part) == expected


def forms_of(dims: ModelDims, formats: Formats, part: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a part by its name in the model."""

    def forms(plan: SlabPlan) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {plan.prefix + form.name: (form.dtype, form.shape) for form in stored_forms(plan, formats)}

    return {name: form for plan in plan_slabs(dims) if plan.part == part for name, form in forms(plan).items()}


def quantising(weights: str, dims: ModelDims) -> Recipe:
    """The recipe of a format of `quant`."""
    with torch.device("meta"):
        dit_plan, text_plan = plan_swap(Dit(dims.dit), weights), plan_swap(build_llama(dims.llama), weights)
    return Recipe(
        formats=Formats(weights=weights, text_weights=weights),
        dit=lambda name, loaded: dict(dit_plan.tensors(name, plain(loaded))),
        text=lambda name, loaded: dict(text_plan.tensors(name, plain(loaded))),
    )


@pytest.mark.parametrize("weights", [*PLAIN, *QUANTISED])
def test_the_sizes_are_known_beforehand(tmp_path: Path, checkpoint: Sources, weights: str) -> None:
    """To the byte, for each slab."""
    sources = wide_checkpoint(checkpoint, tmp_path)
    recipe = quantising(weights, WIDE) if weights in QUANTISED else plain_recipe(weights)
    steps = run(pack(sources, WIDE, tmp_path / "store", recipe))
    store = open_store(tmp_path / "store")
    found = {name: (tmp_path / "store" / slab.file).stat().st_size for name, slab in store.slabs.items()}
    expected = {name: placement.slab_bytes for name, placement in slab_placements(WIDE, recipe.formats).items()}
    assert found == expected
    assert sum(found.values()) == store_bytes(WIDE, weights, weights) == store.index.store_bytes
    last = steps[-1]
    assert isinstance(last, Packed)
    assert last.done_bytes == last.total_bytes == sum(found.values())


def plain_recipe(weights: str) -> Recipe:
    return Recipe(formats=Formats(weights=weights, text_weights=weights))


def wide_checkpoint(sources: Sources, folder: Path) -> Sources:
    """WIDE: widths that nf4's groups divide."""
    return replace(
        sources,
        dit=write_dit(folder / "dit", random_dit(WIDE.dit), WIDE.dit),
        text_encoder=write_shards(
            folder / "text", publish_llama(random_llama(WIDE_LLAMA), WIDE_LLAMA, "base"), "model"
        ),
    )


def test_the_published_model_in_bytes() -> None:
    """Against the parameter counts of spec 6.1: nothing is lost, and slabs, headers and gaps cost next to nothing."""
    counts = {"dit": 12_821_012_544, "text": 7_068_958_720, "clip": 123_060_480, "vae": 246_478_803}
    width = {"dit": 2, "text": 2, "clip": 4, "vae": 4}
    placements = slab_placements(HUNYUANVIDEO, Formats(weights="bf16", text_weights="fp16"))
    parts = {plan.name: plan.part for plan in plan_slabs(HUNYUANVIDEO)}
    for part, count in counts.items():
        mine = [placement for name, placement in placements.items() if parts[name] == part]
        assert sum(tensor.nbytes for placement in mine for tensor in placement.tensors) == count * width[part]
        assert 0 <= sum(placement.slab_bytes for placement in mine) - count * width[part] < 2 * 2**20
    blocks = [name for name in placements if name.startswith(("double_blocks", "single_blocks"))]
    assert round(sum(placements[name].data_bytes for name in blocks) / 1e9, 1) == 18.1  # design.md 4


def test_quantised_sizes_of_the_published_model() -> None:
    """Spec 6.1 and 6.2: what is quantised are the matrices in the blocks, modulation included."""
    matrices, others = 12_457_082_880, 363_929_664
    linears = 20 * 10 + 40 * 4  # the two halves of linear2 are two of ours
    expected = {
        "int8": matrices + 4 * channels(),
        "fp8": matrices + 4 * linears,
        "nf4": matrices // 2 + 4 * (matrices // 64),
        "nf4-double": matrices // 2 + matrices // 64 + 4 * (matrices // 64 // 256) + 4 * linears * (1 + 256),
    }
    for weights, size in expected.items():
        placements = slab_placements(HUNYUANVIDEO, Formats(weights=weights))
        mine = [placements[plan.name] for plan in plan_slabs(HUNYUANVIDEO) if plan.part == "dit"]
        assert sum(tensor.nbytes for placement in mine for tensor in placement.tensors) == size + 2 * others
    published = {"fp8": 13.18, "nf4": 7.73}
    assert {weights: round((expected[weights] + 2 * others) / 1e9, 2) for weights in published} == published


def channels() -> int:
    """Output features of all matrices in the published blocks."""
    hidden = HUNYUANVIDEO.dit.hidden
    return (20 * 2 * (6 + 3 + 1 + 4 + 1) + 40 * (3 + 7 + 1 + 1)) * hidden


def test_the_arithmetic_needs_no_torch() -> None:
    """Whoever plans may ask for sizes, and whoever keeps files for a file system, in a fraction of a second."""
    script = (
        "import sys, hvlite.weights.layout, hvlite.weights.mounts;"
        "sys.exit(' '.join({'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_formats_are_refused() -> None:
    refusal(lambda: Formats(weights="int4"), "'int4'", "nf4")
    refusal(lambda: Formats(text_weights="fp4"), "text weights", "'fp4'")
    assert set(PLAIN.values()) <= set(DTYPE_BYTES)


# Memory.


class Watch:
    """Counts the bytes of all tensors that went in and out of a transform and are still there."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = self.total = 0

    def __call__(self, name: str, loaded: Loaded) -> Mapping[str, Tensor]:
        tensor = plain(loaded)
        made = fake_int8(name, tensor)
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.alive += [weakref.ref(value) for value in (tensor, *made.values()) if value is not tensor]
        self.alive.append(weakref.ref(tensor))
        self.total += sum(value.nbytes for value in made.values())
        self.most = max(self.most, sum(kept.nbytes for reference in self.alive if (kept := reference()) is not None))
        return made


@pytest.mark.parametrize("layout", ["A", "C"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, checkpoint: Sources, layout: str) -> None:
    """One, and what is made of it: far less than a block."""
    path = write_dit(tmp_path / "dit", random_dit(), layout=layout)
    watch = Watch()
    packed(replace(checkpoint, dit=path), tmp_path / "store", replace(INT8, dit=watch))
    largest = max(tensor.nbytes for _, tensor in dit_tensors(path, TINY_DIT))
    assert watch.most <= 2 * largest
    assert watch.total > 5 * watch.most


# Killed, and run again.


def test_a_kill_at_any_event_costs_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """SIGKILL between any two changes of the disk; the next run ends in the same bytes."""
    script = [sys.executable, "-m", "tests.kill_pack", str(tiny_model), str(tmp_path), "16"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = contents(tmp_path / "undisturbed")
    assert answer["events"] > 100
    assert len(answer["stores"]) > 25
    for name in answer["stores"]:
        assert contents(tmp_path / name) == expected, name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(answer["stores"])


def interrupted(sources: Sources, out: Path, recipe: Recipe | None = None, after: int = 5) -> None:
    """A packing that ends after so many slabs."""
    steps = pack(sources, TINY, out, recipe)
    for _ in range(after):
        next(steps)
    steps.close()


def test_what_is_packed_is_kept_and_not_read_again(tmp_path: Path, checkpoint: Sources) -> None:
    out = tmp_path / "store"
    interrupted(checkpoint, out, INT8, after=5)
    assert not out.exists()
    refusal(lambda: open_store(tmp_path / "store.partial"), "not packed to its end")
    partial = {path.name: path.stat().st_ino for path in (tmp_path / "store.partial").glob("*.safetensors")}
    seen: list[str] = []

    def watched(name: str, loaded: Loaded) -> Mapping[str, Tensor]:
        seen.append(name)
        return fake_int8(name, loaded)

    steps = run(pack(checkpoint, TINY, out, replace(INT8, dit=watched)))
    assert len(partial) == 5
    assert all((out / name).stat().st_ino == inode for name, inode in partial.items())
    assert slabs_done(steps) == TINY_SLABS
    assert not any(name.startswith(("double_", "img_in")) for name in seen)
    assert "single_mods.0.weight" in seen
    (note,) = notes(steps)
    assert "5 of 16 slabs" in note
    done = [step for step in steps if isinstance(step, Packed)]
    assert [step.kept_bytes == step.done_bytes for step in done] == [True] * 5 + [False] * 11
    assert contents(out) == contents(packed(checkpoint, tmp_path / "other", INT8).path)


def test_the_checkpoint_is_not_read_for_slabs_that_are_there(
    tmp_path: Path, checkpoint: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(checkpoint, tmp_path / "store", after=15)
    read: list[str] = []
    original = Opened.read

    def recorded(self: Opened, name: str) -> Loaded:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Opened, "read", recorded)
    run(pack(checkpoint, TINY, tmp_path / "store"))
    assert read
    assert all(name.startswith(("encoder.", "decoder.", "quant_conv", "post_quant_conv")) for name in read)


def test_a_slab_that_was_damaged_meanwhile_is_made_again(tmp_path: Path, checkpoint: Sources) -> None:
    out, partial = tmp_path / "store", tmp_path / "store.partial"
    interrupted(checkpoint, out)
    spoilt = partial / "double_mods.1.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    (partial / "double_blocks.0.safetensors").write_bytes(b"cut")
    steps = run(pack(checkpoint, TINY, out))
    assert any("double_mods.1.safetensors was damaged" in note for note in notes(steps))
    assert contents(out) == contents(packed(checkpoint, tmp_path / "other").path)


@pytest.mark.parametrize("change", ["format", "checkpoint", "journal", "load key"])
def test_another_packing_begins_anew(tmp_path: Path, checkpoint: Sources, change: str) -> None:
    out, partial = tmp_path / "store", tmp_path / "store.partial"
    interrupted(checkpoint, out)
    sources, recipe, load_key = checkpoint, Recipe(), "module"
    if change == "format":
        recipe = INT8
    elif change == "checkpoint":
        sources = replace(checkpoint, dit=write_dit(tmp_path / "dit", random_dit(seed=7)))
    elif change == "load key":
        load_key = "ema"
    else:
        (partial / JOURNAL).write_bytes((partial / JOURNAL).read_bytes()[:-9])
    steps = run(pack(sources, TINY, out, recipe, load_key))
    (note,) = notes(steps)
    assert "begins anew" in note
    assert not any(step.kept_bytes for step in steps if isinstance(step, Packed))
    run(pack(sources, TINY, tmp_path / "other", recipe, load_key))
    assert contents(out) == contents(tmp_path / "other")


# Refusals.


def test_nothing_is_overwritten(tmp_path: Path, checkpoint: Sources) -> None:
    out = tmp_path / "store"
    out.mkdir()
    refusal(lambda: run(pack(checkpoint, TINY, out)), str(out), "exists", kind=OutputError)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_two_at_once_do_not_meet(tmp_path: Path, checkpoint: Sources) -> None:
    (tmp_path / "store.partial").mkdir()
    with locked(tmp_path / "store.partial"):
        refusal(lambda: run(pack(checkpoint, TINY, tmp_path / "store")), "another hvlite", kind=Busy)
    packed(checkpoint, tmp_path / "store")


def test_a_file_of_somebody_else_stays(tmp_path: Path, checkpoint: Sources) -> None:
    interrupted(checkpoint, tmp_path / "store")
    mine = tmp_path / "store.partial/notes.txt"
    mine.write_text("mine")
    refusal(lambda: run(pack(checkpoint, TINY, tmp_path / "store")), "'notes.txt'", kind=OutputError)
    assert mine.read_text() == "mine"
    mine.unlink()
    assert "5 of 16" in notes(run(pack(checkpoint, TINY, tmp_path / "store")))[0]


def test_a_disk_that_is_too_small_is_known_beforehand(
    tmp_path: Path, checkpoint: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already counts; what is missing is named beside what is free."""
    mib = 2**20

    def with_free(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))

    with_free(5 * mib)
    steps = pack(checkpoint, TINY, tmp_path / "store")
    refusal(lambda: next(steps), "MiB more in", "5.0 MiB is free", "bf16", kind=OutputError)
    assert not list(tmp_path.iterdir())
    with_free(1 << 40)
    interrupted(checkpoint, tmp_path / "store", after=10)
    whole = store_bytes(TINY, "bf16", "fp16")
    there = sum(file.stat().st_size for file in (tmp_path / "store.partial").glob("*.safetensors"))
    tokenizers = 0
    for folder in (checkpoint.tokenizer, checkpoint.tokenizer_2):
        tokenizers += sum(file.stat().st_size for file in folder.iterdir())
    with_free(whole - there + tokenizers + 8 * mib - 1)
    refusal(lambda: run(pack(checkpoint, TINY, tmp_path / "store")), "MiB is free", kind=OutputError)
    with_free(whole - there + tokenizers + 8 * mib)
    run(pack(checkpoint, TINY, tmp_path / "store"))


def test_a_network_file_system_is_refused(tmp_path: Path, checkpoint: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(f"/dev/sda1 / ext4 rw 0 0\nnas:/x {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr("hvlite.weights.mounts.MOUNTS", tmp_path / "mounts")
    refusal(lambda: run(pack(checkpoint, TINY, tmp_path / "store")), "nfs4", "local disk")


def test_an_unfit_checkpoint_leaves_no_trace(tmp_path: Path, checkpoint: Sources) -> None:
    other = replace(TINY, vae=replace(TINY_VAE, layers_per_block=2))
    refusal(lambda: run(pack(checkpoint, other, tmp_path / "store")), "is missing")
    (tmp_path / "empty").mkdir()
    nameless = replace(checkpoint, tokenizer_2=tmp_path / "empty")
    refusal(lambda: run(pack(nameless, TINY, tmp_path / "store")), "empty", "no tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_recipe_needs_what_its_formats_need() -> None:
    with pytest.raises(AssertionError, match="dit transform"):
        Recipe(formats=Formats(weights="int8"))
    with pytest.raises(AssertionError, match="text transform"):
        Recipe(text=fake_int8)


# The source, once it is no longer needed.


def test_the_source_goes_only_when_the_store_is_whole(tmp_path: Path, checkpoint: Sources) -> None:
    sources = copy_of(checkpoint, tmp_path / "copy")
    store = packed(sources, tmp_path / "store")
    before = contents(tmp_path / "copy")

    stranger = replace(sources, dit=write_dit(tmp_path / "dit", random_dit(seed=3)))
    refusal(lambda: list(delete_source(stranger, store)), "is not what", "nothing is deleted")

    file = store.path / "vae.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    refusal(lambda: list(delete_source(sources, store)), "vae.safetensors")
    assert contents(tmp_path / "copy") == before

    file.write_bytes(whole)
    *_, note = delete_source(sources, store)
    assert isinstance(note, Note)
    left = contents(tmp_path / "copy")
    assert all(name.endswith("config.json") for name in left)
    gone = before.keys() - left.keys()
    assert f"deleted {len(gone)} files" in note.text
    assert len(gone) == 2 * 4 + 2  # two parts of three shards and an index, two of one file


def test_two_formats_of_one_model_lie_side_by_side(tmp_path: Path, checkpoint: Sources) -> None:
    first = packed(checkpoint, tmp_path / "bf16")
    second = packed(checkpoint, tmp_path / "int8", INT8)
    assert first.index.source == second.index.source
    assert first.index.slabs != second.index.slabs
    assert not list(tmp_path.glob("*.partial"))
    assert (first.path / INDEX).is_file()
