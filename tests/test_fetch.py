"""`models fetch` against a hub on loopback: what is shown and asked, what is kept, and whom it believes."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants
from huggingface_hub.hf_api import RepoSibling
from hypothesis import given
from hypothesis import strategies as st

from hvlite import encode_prompts, open_model
from hvlite.atomic import locked
from hvlite.errors import Busy, ExitCode, OutputError, WeightsError
from hvlite.events import Note
from hvlite.origin import find_origin
from hvlite.weights import fetch as fetching
from hvlite.weights import fetched
from hvlite.weights.fetch import Fetching, accept, fetch, plan_fetch
from hvlite.weights.fetched import RECORD, Plan
from hvlite.weights.published import CONVERSION, CONVERSION_COMMIT, LICENCES, OFFICIAL, VARIANTS, Wanted
from tests import layouts
from tests.command_line import call
from tests.hub_server import Hub, served
from tests.refusal import refusal

BIG = "transformer/diffusion_pytorch_model.safetensors"
SECOND = "vae/diffusion_pytorch_model.safetensors"
COMMAND = ("models", "fetch", "hunyuanvideo")
TOKEN = "hf_never_to_be_printed"


@pytest.fixture(autouse=True)
def own_hub_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody's token, no waiting, and no connection left open."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(fetching, "RETRY_SECONDS", (0.0, 0.0))
    yield
    close_session()


@pytest.fixture
def hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The tiny model, published as the conversion is, with files beside it that nobody needs."""
    files = {str(file.relative_to(tiny_model)): file.read_bytes() for file in tiny_model.rglob("*") if file.is_file()}
    files["README.md"] = b"a model card"
    files["transformer/preview.png"] = b"a picture" * 100
    with served(Hub(files={CONVERSION: files}, commits={CONVERSION: CONVERSION_COMMIT})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(own_home: Path) -> Path:
    """Where `--model hunyuanvideo` looks."""
    return own_home / "models" / "hunyuanvideo"


def run(folder: Path) -> list[Fetching | Note]:
    """Fetch to `folder`, whoever it belongs to having accepted."""
    return list(fetch(accept(plan_fetch(folder, "bf16"))))


def needed(hub: Hub) -> dict[str, bytes]:
    """The published files that belong to the model."""
    unneeded = ("README.md", "hvlite.json", "scheduler/", "transformer/preview.png")
    return {name: content for name, content in hub.files[CONVERSION].items() if not name.startswith(unneeded)}


def content(folder: Path) -> dict[str, bytes]:
    """What lies in a fetched folder, the record aside."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    files.pop(RECORD, None)
    return files


def test_a_fetched_model_opens_by_its_name(hub: Hub, folder: Path) -> None:
    events = run(folder)

    assert content(folder) == needed(hub)
    assert not folder.with_name("hunyuanvideo.partial").exists()
    with open_model("hunyuanvideo", device="cpu") as model:
        assert len(encode_prompts(["a red circle"], model)) == 1
    last = events[-1]
    assert isinstance(last, Fetching)
    assert last.done_bytes == last.total_bytes == sum(map(len, needed(hub).values()))


def test_the_hub_is_asked_for_one_listing_and_the_files_alone(hub: Hub, folder: Path) -> None:
    run(folder)

    listing, *rest = [request.path for request in hub.seen if "/stored/" not in request.path]
    assert listing == f"/api/models/{CONVERSION}/revision/{CONVERSION_COMMIT}?blobs=true"
    assert sorted(rest) == sorted(f"/{CONVERSION}/resolve/{CONVERSION_COMMIT}/{name}" for name in needed(hub))


def test_a_complete_model_needs_no_server(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    asked = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert plan_fetch(folder, "bf16").is_done
    assert len(hub.seen) == asked


def test_the_token_goes_to_the_hub_and_no_further(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = call(capsys, *COMMAND, "--accept-license")

    assert code == ExitCode.DONE, err
    assert TOKEN not in out + err + (folder / RECORD).read_text()
    tokens = {("/stored/" in request.path, request.authorization) for request in hub.seen}
    assert tokens == {(False, f"Bearer {TOKEN}"), (True, None)}


def test_everything_is_shown_before_the_first_byte(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(7_000_000_000))
    code, out, err = call(capsys, *COMMAND, "--dry-run")

    assert (code, out) == (ExitCode.DONE, "")
    flat = " ".join(err.split())
    for word in (CONVERSION, CONVERSION_COMMIT, BIG, "721.66 kB", str(folder), "1.92 MB to download", "7.00 GB free"):
        assert word in flat
    for licence in LICENCES:
        assert f"{licence.name} ({licence.version})" in flat
        assert licence.url in flat
    assert "NOT LICENSED IN THE EUROPEAN UNION, THE UNITED KINGDOM AND SOUTH KOREA" in flat
    assert hub.fetched() == []
    assert not folder.parent.exists()


class Disk:
    """What `shutil.disk_usage` says, as far as it is asked."""

    def __init__(self, free: int) -> None:
        self.free = free


def test_a_small_disk_is_refused_with_both_numbers_before_anything_is_asked_or_written(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(1_000_000))
    code, out, err = call(capsys, *COMMAND, "--accept-license")

    assert (code, out) == (ExitCode.FAILED, "")
    assert "takes 1.92 MB more" in err.splitlines()[-1]
    assert "1.00 MB is free" in err.splitlines()[-1]
    assert hub.fetched() == []
    assert not folder.parent.exists()


def test_what_is_there_takes_no_disk(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status["vae/config.json"] = 404
    with pytest.raises(WeightsError):
        run(folder)
    hub.status.clear()
    left = sum(len(body) for name, body in needed(hub).items() if not name.startswith("transformer/"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(left))

    run(folder)
    assert content(folder) == needed(hub)


def test_without_a_terminal_the_flag_is_needed(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *COMMAND)

    assert (code, out) == (ExitCode.USAGE, "")
    assert "--accept-license" in err.splitlines()[-1]
    assert hub.fetched() == []
    assert not folder.parent.exists()


def test_an_acceptance_by_flag_is_recorded(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *COMMAND, "--accept-license")

    assert code == ExitCode.DONE, err
    assert out == f"{folder}\n"
    assert "models pack hunyuanvideo" in err.splitlines()[-1]
    record = json.loads((folder / RECORD).read_text())
    assert [licence["url"] for licence in record["licences"]] == [licence.url for licence in LICENCES]
    assert record["commits"] == {CONVERSION: CONVERSION_COMMIT}
    assert record["accepted"].endswith("+00:00")
    assert record["hvlite"]
    assert call(capsys, *COMMAND)[0] == ExitCode.DONE


@pytest.mark.parametrize(
    ("answer", "code"),
    [("yes", ExitCode.DONE), ("no", ExitCode.FAILED), ("", ExitCode.FAILED), ("\x04", ExitCode.FAILED)],
)
def test_a_terminal_is_asked(hub: Hub, folder: Path, answer: str, code: ExitCode) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "hvlite.cli", *COMMAND], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE
    ) as process:
        os.close(theirs)
        shown = read_until(ours, b"Type yes to accept")
        os.write(ours, answer.encode() + b"\n")
        shown += read_until(ours, None)
    os.close(ours)

    assert process.returncode == code, shown
    assert b"NOT LICENSED IN THE EUROPEAN UNION" in shown
    assert (folder / RECORD).is_file() == (code == ExitCode.DONE)
    assert bool(hub.fetched()) == (code == ExitCode.DONE)
    assert all(CONVERSION in request.path for request in hub.seen)


def read_until(terminal: int, words: bytes | None) -> bytes:
    """What a terminal shows, up to `words` or its end."""
    shown = b""
    while words is None or words not in shown:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux's end of a terminal
            piece = b""
        if not piece:
            return shown
        shown += piece
    return shown


def test_an_accepted_licence_is_not_asked_for_again(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status[SECOND] = 404
    assert call(capsys, *COMMAND, "--accept-license")[0] == ExitCode.WEIGHTS
    hub.status.clear()
    monkeypatch.setattr(fetched, "LICENCES", (*LICENCES[1:],))
    assert call(capsys, *COMMAND)[0] == ExitCode.USAGE  # another text is another question
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HVLITE_HOME", str(folder.parent.parent))
    code, _, err = call(capsys, *COMMAND)

    assert code == ExitCode.DONE, err
    assert "accepted at 20" in err


def test_a_lost_connection_goes_on_where_it_ended(hub: Hub, folder: Path) -> None:
    hub.cut = {BIG: 300_000, SECOND: 5}
    events = run(folder)

    assert content(folder) == needed(hub)
    assert [name for name in hub.fetched() if name.startswith((BIG, SECOND))] == [
        f"{BIG} whole",
        f"{BIG} bytes=300000-",
        f"{SECOND} whole",
        f"{SECOND} bytes=5-",
    ]
    assert sum(isinstance(event, Note) for event in events) == 2


def test_a_server_that_knows_no_ranges_is_read_from_the_start(hub: Hub, folder: Path) -> None:
    hub.cut, hub.ignores_ranges = {BIG: 300_000}, True
    run(folder)
    assert content(folder) == needed(hub)


def test_a_busy_server_is_asked_again_and_not_for_ever(hub: Hub, folder: Path) -> None:
    hub.status[SECOND] = 503
    refusal(lambda: run(folder), SECOND, "HTTP 503", "run the same command")
    assert sum(name.startswith(SECOND) for name in hub.fetched()) == 3


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_an_interrupted_download_keeps_what_is_whole(hub: Hub, folder: Path, number: signal.Signals, code: int) -> None:
    hub.stall[SECOND] = 500_000
    command = [sys.executable, "-m", "hvlite.cli", *COMMAND, "--accept-license"]
    partial = folder.with_name("hunyuanvideo.partial")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert hub.stalled.wait(60)
        (part,) = partial.glob("*/*.part")
        while part.stat().st_size < 400_000:
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate()
    hub.stall.clear()
    hub.released.set()

    assert process.returncode == code, err
    assert out == ""
    assert not folder.exists()
    if number != signal.SIGKILL:
        assert f"kept in {partial}: 3 of 13 files" in " ".join(err.split())
    assert (partial / BIG).read_bytes() == needed(hub)[BIG]
    before = len(hub.seen)
    run(folder)
    assert content(folder) == needed(hub)
    again = hub.fetched(before)
    assert not any(name.startswith("transformer/") for name in again)
    assert again[0].startswith(f"{SECOND} bytes=")


def test_a_wrong_hash_deletes_that_file_alone(hub: Hub, folder: Path) -> None:
    hub.corrupt.add(SECOND)
    refusal(lambda: run(folder), SECOND, "sha256:", "It alone was deleted")
    partial = folder.with_name("hunyuanvideo.partial")
    assert sorted(content(partial)) == ["transformer/config.json", BIG, "vae/config.json"]

    hub.corrupt.clear()
    before = len(hub.seen)
    run(folder)
    assert content(folder) == needed(hub)
    assert f"{SECOND} whole" in hub.fetched(before)
    assert f"{BIG} whole" not in hub.fetched(before)


def test_small_files_are_held_against_gits_name(hub: Hub, folder: Path) -> None:
    hub.corrupt.add("tokenizer/tokenizer_config.json")
    refusal(lambda: run(folder), "tokenizer/tokenizer_config.json", "git:")


@pytest.mark.parametrize("name", [SECOND, "vae/config.json"])
def test_a_file_damaged_since_is_found_and_fetched_again(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run(folder)
    damaged = bytearray((folder / name).read_bytes())
    damaged[7] ^= 1
    (folder / name).write_bytes(damaged)

    code, _, err = call(capsys, *COMMAND)
    assert code == ExitCode.WEIGHTS
    assert name in err.splitlines()[-1]
    assert not (folder / name).exists()
    before = len(hub.seen)
    assert call(capsys, *COMMAND)[0] == ExitCode.DONE
    assert hub.fetched(before) == [f"{name} whole"]
    assert content(folder) == needed(hub)


def test_a_lost_record_costs_reading_and_no_download(hub: Hub, folder: Path) -> None:
    hub.status[SECOND] = 404
    with pytest.raises(WeightsError):
        run(folder)
    hub.status.clear()
    (folder.with_name("hunyuanvideo.partial") / RECORD).write_text("{")
    before = len(hub.seen)
    events = run(folder)

    assert {event.stage for event in events if isinstance(event, Fetching)} == {"check", "fetch"}
    assert f"{BIG} whole" not in hub.fetched(before)
    assert content(folder) == needed(hub)


def test_two_at_once_do_not_meet(hub: Hub, folder: Path) -> None:
    plan = accept(plan_fetch(folder, "bf16"))
    plan.work.mkdir(parents=True)
    with locked(plan.work):
        refusal(lambda: list(fetch(plan)), "another hvlite", kind=Busy)
    run(folder)
    refusal(lambda: list(fetch(plan)), "has just fetched", kind=Busy)
    assert not plan.work.exists()


def test_a_folder_from_elsewhere_is_left_alone(
    hub: Hub, folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.parent.mkdir()
    folder.symlink_to(tiny_model)
    code, _, err = call(capsys, *COMMAND, "--accept-license")

    assert code == ExitCode.FAILED
    assert "hvlite did not fetch it" in err.splitlines()[-1]
    assert hub.seen == []


def test_a_link_to_an_empty_folder_says_where_the_model_is_to_lie(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "large")
    run(folder)
    assert folder.is_symlink()
    assert content(tmp_path / "large") == needed(hub)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_refused_by_its_name(hub: Hub, variable: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hvlite.cli", *COMMAND, "--accept-license"],
        env={**os.environ, variable: "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitCode.WEIGHTS
    assert f"{variable} forbids" in done.stderr
    assert hub.seen == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", [CONVERSION, BIG])
def test_a_gated_repository_says_where_its_terms_are(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    where: str,
) -> None:
    hub.status[where] = status
    code, _, err = call(capsys, *COMMAND, "--accept-license")
    last = err.splitlines()[-1]
    assert code == ExitCode.WEIGHTS
    for word in (f"{hub.url}/{CONVERSION}", "without a token", f"HTTP {status}", "HF_TOKEN", "hf auth login"):
        assert word in last

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = call(capsys, *COMMAND, "--accept-license")
    assert code == ExitCode.WEIGHTS
    assert "with the token that is set" in err.splitlines()[-1]
    assert TOKEN not in out + err


def test_a_missing_repository_or_file_is_named(hub: Hub, folder: Path) -> None:
    hub.hides.add(SECOND)
    refusal(lambda: run(folder), SECOND, "HTTP 404")
    del hub.files[CONVERSION]
    refusal(lambda: run(folder), CONVERSION, "HTTP 404")


def test_a_server_that_is_not_there_or_no_hub_is_named(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refusal(lambda: run(folder), "cannot be asked", endpoint, "HF_ENDPOINT")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9/")
    with pytest.raises(WeightsError) as caught:
        run(folder)
    assert "secret" not in str(caught.value)
    hub.siblings[CONVERSION] = [{"size": 3}]
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    refusal(lambda: run(folder), "cannot be asked", hub.url)


def test_a_changed_repository_is_refused_before_any_byte(hub: Hub, folder: Path) -> None:
    del hub.files[CONVERSION]["vae/config.json"]
    refusal(lambda: run(folder), "vae/config.json", CONVERSION_COMMIT)
    assert hub.fetched() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"rfilename": "vae/..\\x.safetensors"},
        {"rfilename": "vae/\nx.safetensors"},
        {"rfilename": "vae/x.safetensors", "size": None},
        {"rfilename": "vae/x.safetensors", "size": -1},
        {"rfilename": "vae/x.safetensors", "blobId": "../../x"},
    ],
)
def test_a_listing_that_lies_is_refused(hub: Hub, folder: Path, changes: dict[str, Any]) -> None:
    hub.siblings[CONVERSION] = [{"size": 3, "blobId": "0" * 40, **changes}]
    refusal(lambda: run(folder), CONVERSION, "no file that hvlite takes")
    assert not folder.parent.exists()


names = st.lists(st.sampled_from(["vae", "..", ".", "", "a", "config.json", "b.safetensors", "~", "c\x00.json"]))


@given(st.lists(names.map("/".join), max_size=6))
def test_no_listed_name_leads_out_of_the_folder(listed: list[str]) -> None:
    siblings = [RepoSibling(rfilename=name, size=1) for name in [*listed, "vae/config.json"]]
    wanted = Wanted(
        part="vae", repository="a/b", revision="main", folder="vae", names=("config.json",), optional=("*",)
    )
    try:
        files = fetching._chosen(wanted, "0" * 40, siblings)
    except WeightsError:
        return
    for file in files:
        place = PurePosixPath(file.place)
        assert len(place.parts) == 2
        assert place.parts[0] == "vae"
        assert ".." not in place.parts


def test_the_fp8_variant_is_the_official_pair_beside_the_other_parts(hub: Hub, folder: Path, tmp_path: Path) -> None:
    dims = replace(layouts.WIDE_DIT, text_width=32, pooled_width=24)  # what the tiny model's other parts give
    weights, scales = layouts.scale_fp8(layouts.publish_dit(layouts.random_dit(dims), dims, "A"))
    stem = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states_fp8"
    hub.files[OFFICIAL] = {
        f"{stem}.pt": layouts.write_pickle(tmp_path / "weights.pt", weights).read_bytes(),
        f"{stem}_map.pt": layouts.write_pickle(tmp_path / "map.pt", scales, None).read_bytes(),
        "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt": bytes(1000),
    }
    hub.commits[OFFICIAL] = "a" * 40

    list(fetch(accept(plan_fetch(folder, "fp8"))))

    origin = find_origin("hunyuanvideo", {})
    assert origin.dims.dit == dims
    name, scale = "double_blocks.0.img.attn_proj.weight", scales["double_blocks.0.img_attn_proj"]
    fetched_weight = dict(origin.tensors("dit"))[name]
    assert torch.equal(fetched_weight, layouts.dequantised(weights["double_blocks.0.img_attn_proj.weight"], scale))
    assert json.loads((folder / RECORD).read_text())["commits"] == {OFFICIAL: "a" * 40, CONVERSION: CONVERSION_COMMIT}
    refusal(lambda: plan_fetch(folder, "bf16"), "fp8 variant", "--variant fp8", kind=OutputError)


def test_a_broken_fetch_goes_on_with_the_commit_that_it_began_with(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = tuple(
        Wanted(
            part=w.part, repository=w.repository, revision="main", folder=w.folder, names=w.names, optional=w.optional
        )
        for w in VARIANTS["bf16"]
    )
    monkeypatch.setattr(fetching, "VARIANTS", {"bf16": moving})
    hub.status[SECOND] = 404
    with pytest.raises(WeightsError):
        run(folder)
    hub.status.clear()
    hub.commits[CONVERSION] = "b" * 40
    refusal(lambda: plan_fetch(folder, "bf16"), f"no revision {CONVERSION_COMMIT}")


def test_another_model_is_a_wrong_word(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "models", "fetch", "shapes")
    assert code == ExitCode.USAGE
    assert "hunyuanvideo" in err


def test_every_variant_names_each_part_once() -> None:
    for wanted in VARIANTS.values():
        parts = [one.part for one in wanted]
        assert sorted(parts) == sorted(
            {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
        )


def test_a_plan_counts_what_is_on_the_disk(tmp_path: Path) -> None:
    file = fetched.RemoteFile(repository="a/b", commit="0" * 40, name="n", place="vae/n", size=100, digest="")
    plan = Plan(folder=tmp_path / "m", work=tmp_path / "w", variant="bf16", endpoint="", files=(file,), accepted=None)
    assert plan.needed_bytes == 100
    plan.part(file).parent.mkdir(parents=True)
    plan.part(file).write_bytes(bytes(40))
    assert plan.needed_bytes == 60
    plan.part(file).write_bytes(bytes(101))  # longer than the whole: no beginning of it
    assert plan.needed_bytes == 100
    (tmp_path / "w/vae/n").write_bytes(bytes(100))
    assert plan.needed_bytes == 0
