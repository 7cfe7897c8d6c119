"""Checkpoint -> packed store -> clip: the commands, the formats, and how far quantised clips are from plain ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hvlite import Outputs, Request, generate, load_profile, open_model
from hvlite.errors import ExitCode, WeightsError
from hvlite.events import Finished, Note
from hvlite.origin import Checkpoint, Packed, find_origin
from hvlite.packing import Asked, check_formats, pack_model, provide
from hvlite.planning import stored_formats
from hvlite.video.mp4 import read_frames
from hvlite.weights.pack import Progress
from tests.command_line import call
from tests.test_cli import CLIP

PROMPT = "a red circle moving left on a black background"


def packed(model: str | Path, out: Path, weights: str | None, text_weights: str | None) -> Path:
    """A store made of a checkpoint."""
    origin = find_origin(model, {})
    assert isinstance(origin, Checkpoint)
    list(pack_model(origin.sources, origin.dims, out, stored_formats(weights, text_weights)))
    return out


def clip_of(model: str | Path, folder: Path, *, dynamic: bool = False) -> NDArray[np.uint8]:
    """The frames of one clip."""
    profile = load_profile("cpu", weights="int8-dynamic" if dynamic else None)
    with open_model(model, profile) as opened:
        *_, last = generate(Request(PROMPT, seed=3), opened, outputs=Outputs(folder=folder))
    assert isinstance(last, Finished)
    assert last.path is not None
    return np.stack(list(read_frames(last.path)))


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """In dB."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-9))


def test_a_plain_store_gives_the_checkpoints_clip_bit_for_bit(tmp_path: Path) -> None:
    store = packed("shapes", tmp_path / "store", "fp32", "fp32")
    assert np.array_equal(clip_of(store, tmp_path), clip_of("shapes", tmp_path))


@pytest.mark.parametrize(
    ("weights", "text_weights", "least_db"),
    [("int8", "int8", 30.0), ("fp8", "fp16", 22.0), ("nf4", "nf4", 18.0), ("nf4-double", "nf4-double", 18.0)],
)
def test_a_quantised_clip_is_near_the_plain_one(
    tmp_path: Path, weights: str, text_weights: str, least_db: float
) -> None:
    store = packed("shapes", tmp_path / "store", weights, text_weights)
    assert psnr(clip_of(store, tmp_path), clip_of("shapes", tmp_path)) > least_db


def test_int8_activations_take_the_same_store(tmp_path: Path) -> None:
    store = packed("shapes", tmp_path / "store", "int8-dynamic", None)
    assert psnr(clip_of(store, tmp_path, dynamic=True), clip_of(store, tmp_path)) > 22


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    origin = find_origin(packed("shapes", tmp_path / "store", "int8", None), {})
    assert isinstance(origin, Packed)
    check_formats(origin.store, "int8-dynamic", None)
    check_formats(origin.store, None, "fp16")
    with pytest.raises(WeightsError, match="holds int8, --weights asks for nf4"):
        check_formats(origin.store, "nf4", None)
    with pytest.raises(WeightsError, match="cannot be replaced"):
        find_origin(origin.folder, {"vae": tmp_path})


def test_the_commands_pack_list_verify_use_and_remove(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, own_home: Path
) -> None:
    code, out, err = call(capsys, "models", "pack", str(tiny_model), "--weights", "int8", "--text-weights", "int8")
    assert code == ExitCode.DONE, err
    store = Path(out.strip())
    assert store.parent == own_home / "packed"
    _, out, _ = call(capsys, "models", "ls", "--json")
    (row,) = json.loads(out)["stores"]
    assert (row["path"], row["weights"], row["fault"]) == (str(store), "int8", None)
    assert call(capsys, "models", "verify", str(store))[0] == ExitCode.DONE
    code, out, err = call(capsys, "gen", "a red circle", *CLIP, "--model", str(store), "--save-path", str(tmp_path))
    assert code == ExitCode.DONE, err
    code, _, err = call(capsys, "gen", "a", *CLIP, "--model", str(store), "--weights", "nf4")
    assert code == ExitCode.WEIGHTS
    assert "holds int8" in err
    assert call(capsys, "models", "rm", str(store))[0] == ExitCode.DONE
    assert not store.exists()
    assert call(capsys, "models", "rm", str(tmp_path))[0] == ExitCode.WEIGHTS


def test_gen_packs_a_checkpoint_once(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, own_home: Path
) -> None:
    flags = (*CLIP, "--model", str(tiny_model), "--weights", "nf4", "--save-path", str(tmp_path))
    code, _, err = call(capsys, "gen", "a red circle", *flags)
    assert code == ExitCode.DONE, err
    assert "packing" in err
    assert len(list((own_home / "packed").iterdir())) == 1
    code, _, err = call(capsys, "gen", "a red circle", *flags)
    assert code == ExitCode.DONE, err
    assert "packing" not in err


def test_a_large_checkpoint_is_packed_once_to_the_profiles_formats(
    tmp_path: Path, tiny_model: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvlite.planning.SMALL_BYTES", 0)
    profile = load_profile("cpu", weights="int8", text_weights="nf4")
    told: list[Progress | Note] = []
    for _ in range(2):
        with open_model(tiny_model, profile, told=told.append) as model:
            assert isinstance(model.origin, Packed)
            assert (model.origin.formats.weights, model.origin.formats.text_weights) == ("int8", "nf4")
    notes = [event.text for event in told if isinstance(event, Note) and event.text.startswith("packing")]
    assert len(notes) == 1
    assert "GB of int8 weights and nf4 text weights, to" in notes[0]
    (packed_to,) = (own_home / "packed").iterdir()
    with pytest.raises(WeightsError, match="holds int8, --weights asks for nf4"):
        list(provide(packed_to, profile, {}, Asked(weights="nf4")))


def test_a_plan_is_for_what_a_store_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = packed("shapes", tmp_path / "store", "nf4", "int8")
    code, out, err = call(capsys, "plan", "--model", str(store), "--profile", "24g")
    assert code == ExitCode.DONE, err
    assert "nf4 weights, int8 text weights" in out
    code, _, err = call(capsys, "plan", "--model", str(store), "--profile", "24g", "--weights", "int8")
    assert code == ExitCode.WEIGHTS
    assert "holds nf4, --weights asks for int8" in err
