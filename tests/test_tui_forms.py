"""The composer's form without a screen: what is typed, and the jobs or faults that come of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from hvlite.errors import WeightsError
from hvlite.jobs.job import How, Job
from hvlite.profile import Room
from hvlite.tui.forms import FIELDS, HOW, REQUEST, Filled, form_of, read_form
from hvlite.tui.planner import plan_words
from hvlite.tui.words import command_of
from tests.refusal import refusal
from tests.tui_hands import jobs, queue

GIB = 1 << 30
CARD = Room(kind="cuda", total_bytes=12 * GIB, free_bytes=12 * GIB)


def filled(prompt: str = "an apple", **form: str) -> Filled:
    return read_form(form, prompt, lambda: 4711)


def test_every_field_of_a_request_can_be_typed() -> None:
    typed = {field.name for field in FIELDS}
    assert typed >= set(REQUEST) | set(HOW)
    assert set(REQUEST) == {"size", "frames", "steps", "guidance", "flow_shift", "cfg_scale", "template"} | {
        "flow_reverse",
        "negative_prompt",
    }


def test_an_empty_form_leaves_everything_to_the_model() -> None:
    (request,) = filled().requests
    assert (request.prompt, request.size, request.frames, request.seed) == ("an apple", None, None, 0)


def test_paragraphs_and_seeds_make_a_clip_each() -> None:
    found = filled("an apple\nin the rain\n\n\na car\n", seeds="5-6").requests
    assert [(request.prompt, request.seed) for request in found] == [
        ("an apple\nin the rain", 5),
        ("an apple\nin the rain", 6),
        ("a car", 5),
        ("a car", 6),
    ]


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("1,9", [1, 9]), ("3x", [0, 1, 2]), ("-1", [4711])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert [request.seed for request in filled(seeds=text).requests] == seeds


@pytest.mark.parametrize("text", ["64x96", "64 96", "64, 96", "64X96"])
def test_sizes(text: str) -> None:
    assert filled(size=text).requests[0].size == (64, 96)


@pytest.mark.parametrize(
    ("field", "text", "word"),
    [
        ("size", "65x96", "Nearest: 64"),
        ("size", "64", "size is height x width"),
        ("frames", "16", "Nearest: 17"),
        ("frames", "many", "frames: 'many' is no whole number"),
        ("steps", "0", "steps must be 1 to 1000"),
        ("guidance", "nan", "guidance must be"),
        ("guidance", "strong", "guidance: 'strong' is no number"),
        ("template", "poem", "template must be video or image"),
        ("flow_reverse", "maybe", "reverse is yes or no"),
        ("seeds", "one", "'one' are no seeds"),
        ("weights", "int3", "'int3' is none of"),
        ("profile", "99g", "no profile named '99g'"),
        ("model", "/no/such/folder", "there is no model folder"),
        ("stop_after", "x", "is no whole number"),
        ("stop_after", "0", "--stop-after-step must be at least 1"),
        ("stop_after", "-1", "--stop-after-step must be at least 1"),
        ("device", "banana", "runs on cpu, cuda or cuda:N"),
        ("folder", "~nobody-of-that-name/x", "a user who is not known here"),
        ("profile", "/no/such.toml", "/no/such.toml"),
    ],
)
def test_each_fault_is_told_at_its_field(field: str, text: str, word: str) -> None:
    found = filled(**{field: text})
    assert list(found.faults) == [field]
    assert word in found.faults[field]
    assert found.requests == ()


def test_several_faults_are_told_at_once_and_a_contradiction_too() -> None:
    assert set(filled("", size="7", frames="2").faults) == {"prompt", "size", "frames"}
    assert "must be below --steps" in filled(steps="4", stop_after="4").faults["stop_after"]


def test_a_job_comes_back_as_the_form_that_asked_for_it(tmp_path: Path) -> None:
    queue("an apple", size=(64, 96), frames=17, guidance=4.5, seed=9, flow_reverse=False, stop_after=3)
    (job,) = jobs()
    prompt, form = form_of(job)
    again = read_form(form, prompt, lambda: 0)
    assert again.faults == {}
    assert again.requests == (job.request,)
    assert (again.how, again.folder, again.stop_after) == (job.how, job.folder, job.stop_after)
    assert isinstance(job, Job)


@pytest.mark.parametrize("guidance", [6.0, 6.1234567, 0.1, 1e-05])
def test_a_number_comes_back_as_it_was(guidance: float) -> None:
    queue("an apple", guidance=guidance)
    (job,) = jobs()
    assert read_form(form_of(job)[1], "an apple", lambda: 0).requests[0].guidance == guidance
    assert job.request is not None
    assert job.how is not None
    assert f"--guidance {form_of(job)[1]['guidance']}" in command_of(job.request, job.how)


def test_jobs_are_checked_as_the_command_line_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text('base = "12g"\n')
    (tmp_path / "model").mkdir()
    (job,) = filled(profile="own.toml", model="model", folder="clips").jobs()
    assert (job.how.profile, job.how.model) == (str(tmp_path / "own.toml"), str(tmp_path / "model"))
    assert job.folder == tmp_path / "clips"
    assert filled().jobs()[0].how.model == "shapes"
    refusal(lambda: filled(model="hunyuanvideo").jobs(), "is not on this machine", "models fetch", kind=WeightsError)


def test_what_the_form_has_no_field_for_is_kept() -> None:
    source = How(model="shapes", dit=Path("/w/dit.safetensors"), attention="sage", weights="nf4")
    (job,) = filled(weights="int8").jobs(source)
    assert job.how == replace(source, weights="int8")


def test_the_plan_says_what_fits_and_what_would() -> None:
    fits = filled(model="hunyuanvideo", profile="12g", weights="int8", size="544x960")
    found = plan_words(fits.requests[0], fits.how, CARD)
    assert found.fits is True
    assert found.lines[0].startswith("fits: ")
    assert "profile 12g, int8 weights" in found.lines[0]
    assert any(line.startswith("peaks in GiB: text ") for line in found.lines)
    wide = filled(model="hunyuanvideo", profile="6g", size="1280x2560", frames="257", cfg_scale="2")
    found = plan_words(wide.requests[0], wide.how, CARD)
    assert found.fits is False
    assert "DOES NOT FIT" in found.lines[0]
    assert found.lines[1].startswith(("to make it fit: --", "no smaller clip"))


def test_a_card_gets_the_profile_of_its_size_and_shapes_fits_everywhere() -> None:
    auto = filled(model="hunyuanvideo")
    assert "profile 12g" in plan_words(auto.requests[0], auto.how, CARD).lines[0]
    shapes = filled(model="shapes")
    assert plan_words(shapes.requests[0], shapes.how, CARD).fits is True
