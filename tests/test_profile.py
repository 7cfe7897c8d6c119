"""Profiles: shipped ones load, wrong ones are named with the nearest right word."""

from pathlib import Path

import pytest

from hvlite import paths
from hvlite.errors import ProfileError
from hvlite.profile import load_profile, profile_names


@pytest.fixture
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HVLITE_HOME with an empty profile folder."""
    monkeypatch.setenv("HVLITE_HOME", str(tmp_path))
    folder = tmp_path / "profiles"
    folder.mkdir()
    return folder


def test_every_shipped_profile_loads() -> None:
    assert {"cpu", "24g"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.memory_gib > profile.reserve_gib


def test_overrides_win_and_none_is_no_override() -> None:
    assert load_profile("cpu", dtype="bf16", attention=None).dtype == "bf16"
    assert load_profile("cpu", dtype=None).dtype == load_profile("cpu").dtype


def test_own_profiles_come_first(own_profiles: Path) -> None:
    (own_profiles / "cpu.toml").write_text('memory_gib = 3\nreserve_gib = 1\ndtype = "bf16"\n')
    assert load_profile("cpu").memory_gib == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory_gib = 3\nreserve_gib = 1\ndtype = 'bf16'\nhead_group = 2\n", "did you mean 'head_groups'?"),
        ("memory_gib = 3\nreserve_gib = 1\n", "missing required field `dtype`"),
        ("memory_gib = '3'\nreserve_gib = 1\ndtype = 'bf16'\n", "Expected `float`, got `str`"),
        (
            "memory_gib = 3\nreserve_gib = 4\ndtype = 'bf16'\n",
            "reserve_gib must be from 0 to below memory_gib (3); got 4",
        ),
        ("memory_gib = 3\nreserve_gib = 1\ndtype = 'bf16'\ntoken_chunk = 65\n", "multiple of 64; got 65"),
        ("memory_gib = \n", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(own_profiles: Path, text: str, words: str) -> None:
    (own_profiles / "mine.toml").write_text(text)
    with pytest.raises(ProfileError) as caught:
        load_profile("mine")
    assert words in str(caught.value)
    assert str(own_profiles / "mine.toml") in str(caught.value)


@pytest.mark.parametrize("name", ["24", "../cpu", "nothing"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ProfileError, match="no profile named") as caught:
        load_profile(name)
    assert "24g" in str(caught.value)


def test_output_names_are_safe_on_every_file_system() -> None:
    stem = paths.output_stem("../../A cat: walks / on \\ \u732b the 'grass'!" * 9, 7, "20260101-000000")
    assert set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    assert stem.startswith("20260101-000000_a-cat-walks-on-the-grass")
    assert stem.endswith("_seed7")
    assert len(stem) < 120
