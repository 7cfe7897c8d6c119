"""A Request's rules and wording: what every front end relies on."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvlite import metadata
from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import ExitCode, RequestError
from hvlite.metadata import Metadata, ModelMade
from hvlite.request import (
    DEFAULT_NEGATIVE_PROMPT,
    MAX_SEED,
    Request,
    request_notes,
    unusual_size_note,
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frames": 120}, "got 120. Nearest: 121."),
        ({"frames": 0}, "Nearest: 1."),
        ({"size": (720, 1281)}, "width must be a multiple of 16; got 1281. Nearest: 1280."),
        ({"size": (0, 64)}, "height must be a multiple of 16; got 0. Nearest: 16."),
        ({"size": (64, 16000)}, "at most 8192"),
        ({"steps": 0}, "steps must be 1 to 1000; got 0"),
        ({"guidance": float("nan")}, "guidance must be 0 to 100; got nan"),
        ({"flow_shift": 0.0}, "flow_shift must be 0.01 to 100"),
        ({"seed": -1}, "--seed -1 draws one"),
        ({"seed": MAX_SEED + 1}, "seed must be 0 to"),
        ({"template": "poem"}, "template must be video or image"),
        ({"prompt": "a\0b"}, "no NUL"),
        ({"prompt": "a\ud800b"}, "character 2 is half of one"),
        ({"negative_prompt": "a\0b"}, "a negative prompt has"),
    ],
)
def test_a_wrong_field_is_named_with_both_numbers(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**{"prompt": "x", **fields})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE


def test_none_means_the_models_default() -> None:
    resolved = Request("  a cat  ").resolve(HUNYUANVIDEO)
    assert resolved.prompt == "a cat"
    assert (resolved.size, resolved.frames, resolved.steps) == ((720, 1280), 129, 50)
    assert (resolved.guidance, resolved.flow_shift, resolved.flow_reverse) == (6.0, 7.0, True)
    assert (resolved.cfg_scale, resolved.negative_prompt, resolved.uses_cfg) == (1.0, "", False)
    assert (resolved.seed, resolved.template) == (0, "video")


def test_true_guidance_brings_the_published_negative_prompt() -> None:
    resolved = Request("a cat", cfg_scale=6.0).resolve(HUNYUANVIDEO)
    assert resolved.uses_cfg
    assert resolved.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    assert Request("a", cfg_scale=6.0, negative_prompt="").resolve(HUNYUANVIDEO).negative_prompt == ""


def test_what_has_no_effect_is_noted() -> None:
    (note,) = request_notes(Request("a", negative_prompt="blur"), HUNYUANVIDEO)
    assert "--cfg-scale" in note
    assert request_notes(Request("a", negative_prompt="blur", cfg_scale=2.0), HUNYUANVIDEO) == []
    assert Request("a", negative_prompt="blur").resolve(HUNYUANVIDEO).negative_prompt == ""
    (note,) = request_notes(Request("a", flow_reverse=False), HUNYUANVIDEO)
    assert "--no-flow-reverse" in note


def test_one_frame_takes_the_image_template_unless_told_otherwise() -> None:
    assert Request("a", frames=1).resolve(HUNYUANVIDEO).template == "image"
    assert Request("a", frames=1, template="video").resolve(HUNYUANVIDEO).template == "video"


requests = st.builds(
    Request,
    prompt=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=50),
    size=st.none() | st.tuples(st.integers(1, 100).map(lambda n: 16 * n), st.just(64)),
    frames=st.none() | st.integers(0, 50).map(lambda n: 4 * n + 1),
    steps=st.none() | st.integers(1, 100),
    guidance=st.none() | st.floats(0, 100),
    cfg_scale=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, MAX_SEED),
)


@given(requests)
def test_a_resolved_request_survives_json_and_is_its_own_resolution(request: Request) -> None:
    resolved = request.resolve(HUNYUANVIDEO)
    made = Metadata(request=resolved, model=ModelMade(name="m", fingerprint="f"))
    assert metadata.decode(metadata.encode(made), "a file") == made
    assert resolved.as_request().resolve(HUNYUANVIDEO) == resolved
    assert replace(resolved, seed=1).seed == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request": {}}, "missing required field `prompt`"),
        ({"request": []}, "Expected `object`"),
        ({"model": "tiny"}, "Expected `object`, got `str`"),
        ({"format": 99}, "it is of format 99, this hvlite reads up to 1"),
        ({"frames": 6}, "Nearest: 5"),
        ({"prompt": 3}, "Expected `str`, got `int`"),
    ],
)
def test_broken_metadata_is_one_line_that_names_the_field(changes: dict[str, object], words: str) -> None:
    whole = metadata.as_json(
        Metadata(request=Request("a").resolve(HUNYUANVIDEO), model=ModelMade(name="m", fingerprint="f"))
    )
    for name, value in changes.items():
        (whole["request"] if name in whole["request"] else whole)[name] = value
    with pytest.raises(RequestError, match=r"clip\.mp4") as caught:
        metadata.decode(json.dumps(whole), "clip.mp4")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_metadata_is_refused() -> None:
    for text in ("", "[]", "{", '"x"'):
        with pytest.raises(RequestError, match="cannot be read"):
            metadata.decode(text, "clip.mp4")


def test_sizes_outside_the_published_table_get_a_note() -> None:
    assert unusual_size_note((720, 1280), HUNYUANVIDEO.defaults) is None
    note = unusual_size_note((64, 64), HUNYUANVIDEO.defaults)
    assert note is not None
    assert "64x64" in note
    assert "720x1280" in note
