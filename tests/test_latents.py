"""Latents come back bit for bit, or one clear line says why not."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hvlite.errors import OutputError, RequestError
from hvlite.video.latents import SavedLatents, load_latents, save_latents

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
REQUEST = json.dumps({"prompt": "a cat \U0001f408", "seed": 2**62}, ensure_ascii=False)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path, latents: torch.Tensor) -> Path:
    path = tmp_path / "job.latents"
    save_latents(path, SavedLatents(latents=latents, request=REQUEST))
    return path


def test_what_is_saved_is_loaded(saved: Path, latents: torch.Tensor) -> None:
    loaded = load_latents(saved)
    assert torch.equal(loaded.latents, latents)
    assert loaded.latents.dtype == torch.float32
    assert (loaded.request, loaded.progress, loaded.tensors) == (REQUEST, None, {})
    assert [path.name for path in saved.parent.iterdir()] == ["job.latents"]


def test_odd_numbers_and_strides_survive(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, torch.inf, -torch.inf, torch.nan, 1 / 3])
    latents = odd.reshape(1, 2, 1, 2, 2).transpose(1, 3)
    save_latents(tmp_path / "odd", SavedLatents(latents=latents, request="{}"))
    loaded = load_latents(tmp_path / "odd").latents
    assert torch.equal(loaded.view(torch.int32), latents.contiguous().view(torch.int32))


@SHARED_FOLDER
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    request_text=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_shape_and_text_survive(tmp_path: Path, shape: tuple[int, ...], request_text: str) -> None:
    latents = torch.rand(1, *shape)
    save_latents(tmp_path / "any", SavedLatents(latents=latents, request=request_text))
    loaded = load_latents(tmp_path / "any")
    assert torch.equal(loaded.latents, latents)
    assert loaded.request == request_text


def test_a_stray_surrogate_costs_no_checkpoint(tmp_path: Path, latents: torch.Tensor) -> None:
    save_latents(tmp_path / "stray", SavedLatents(latents=latents, request='{"prompt": "\udc80"}'))
    assert load_latents(tmp_path / "stray").request == '{"prompt": "?"}'


def test_an_unfinished_clip_brings_what_its_steps_need(tmp_path: Path, latents: torch.Tensor) -> None:
    tensors = {"0.text": torch.rand(3, 5).bfloat16(), "0.odd": torch.rand(3).half(), "1.text": torch.rand(2, 7)[:, ::2]}
    path = tmp_path / "unfinished"
    save_latents(path, SavedLatents(latents=latents, request=REQUEST, progress='{"done": 2}', tensors=tensors))
    loaded = load_latents(path)
    assert loaded.progress == '{"done": 2}'
    assert torch.equal(loaded.latents, latents)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_the_library_reads_it_and_its_tensor_is_aligned(saved: Path, latents: torch.Tensor) -> None:
    with safe_open(saved, framework="pt") as file:
        assert list(file.keys()) == ["latents"]
        assert torch.equal(file.get_tensor("latents"), latents)
        assert file.metadata() == {"hvlite_latents": "1", "request": REQUEST}
    assert int.from_bytes(saved.read_bytes()[:8], "little") % 8 == 0


def test_equal_content_gives_equal_bytes(saved: Path, latents: torch.Tensor) -> None:
    again = saved.with_name("again")
    save_latents(again, SavedLatents(latents=latents, request=REQUEST))
    assert again.read_bytes() == saved.read_bytes()


def test_a_checkpoint_replaces_itself(saved: Path, latents: torch.Tensor) -> None:
    save_latents(saved, SavedLatents(latents=latents + 1, request=REQUEST))
    assert torch.equal(load_latents(saved).latents, latents + 1)


def test_a_full_disk_keeps_the_last_checkpoint(
    saved: Path, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device, .* MiB free"):
        save_latents(saved, SavedLatents(latents=latents + 1, request=REQUEST))
    assert torch.equal(load_latents(saved).latents, latents)
    assert [path.name for path in saved.parent.iterdir()] == ["job.latents"]


def test_what_was_loaded_outlives_its_file(saved: Path, latents: torch.Tensor) -> None:
    loaded = load_latents(saved).latents
    with saved.open("r+b") as file:
        file.write(bytes(saved.stat().st_size))
    assert torch.equal(loaded, latents)


def test_every_truncation_is_told(saved: Path) -> None:
    whole = saved.read_bytes()
    cut = saved.with_name("cut")
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(RequestError, match="cut is no whole latents file"):
            load_latents(cut)


@SHARED_FOLDER
@given(position=st.integers(0, 300), value=st.integers(0, 255))
def test_a_damaged_header_is_never_a_traceback(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "broken"
    save_latents(path, SavedLatents(latents=torch.zeros(1, 1, 1, 1, 1), request='{"seed": 1}'))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    told = ""
    try:
        loaded = load_latents(path)
        assert loaded.latents.shape == (1, 1, 1, 1, 1)
        assert isinstance(loaded.request, str)
    except RequestError as error:
        told = str(error)
    assert not told or str(path) in told


@pytest.mark.parametrize(
    ("tensors", "metadata", "why"),
    [
        ({"latents": torch.zeros(1, 2, 3, 4, 5)}, None, "no latents file of hvlite"),
        ({"latents": torch.zeros(1, 2, 3, 4, 5)}, {"format": "pt"}, "no latents file of hvlite"),
        (
            {"latents": torch.zeros(1, 2, 3, 4, 5)},
            {"hvlite_latents": "2", "request": "{}"},
            "format 2, this hvlite reads 1",
        ),
        ({"latents": torch.zeros(1, 2, 3, 4, 5)}, {"hvlite_latents": "1"}, "is damaged"),
        ({"noise": torch.zeros(1, 2, 3, 4, 5)}, {"hvlite_latents": "1", "request": "{}"}, "is damaged"),
        ({"latents": torch.zeros(2, 3, 4, 5)}, {"hvlite_latents": "1", "request": "{}"}, r"\(2, 3, 4, 5\)"),
        ({"latents": torch.zeros(2, 2, 3, 4, 5)}, {"hvlite_latents": "1", "request": "{}"}, r"\(2, 2, 3"),
        ({"latents": torch.zeros(1, 2, 0, 4, 5)}, {"hvlite_latents": "1", "request": "{}"}, r"\(1, 2, 0"),
        (
            {"latents": torch.zeros(1, 2, 3, 4, 5, dtype=torch.float16)},
            {"hvlite_latents": "1", "request": "{}"},
            "torch.float16",
        ),
    ],
)
def test_other_safetensors_files_are_told(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, why: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(RequestError, match=why):
        load_latents(path)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path, latents: torch.Tensor) -> None:
    path = tmp_path / "latents.pt"
    torch.save({"latents": latents}, path)
    with pytest.raises(RequestError, match="no whole latents file"):
        load_latents(path)


def test_missing_files_and_folders_are_told(tmp_path: Path, latents: torch.Tensor) -> None:
    with pytest.raises(RequestError, match="nowhere cannot be read: No such file"):
        load_latents(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="cannot be read"):
        load_latents(tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        save_latents(tmp_path / "nowhere" / "job.latents", SavedLatents(latents=latents, request=REQUEST))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 2, 3, 4), torch.zeros(2, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1).half()]
)
def test_saving_anything_else_is_a_mistake(tmp_path: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="latents are"):
        save_latents(tmp_path / "wrong", SavedLatents(latents=wrong, request=REQUEST))
    assert list(tmp_path.iterdir()) == []
