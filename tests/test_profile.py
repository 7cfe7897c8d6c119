"""Profiles: shipped ones load, wrong ones are named, every value says where it came from, and one is chosen."""

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import ProfileError
from hvlite.memory import needs
from hvlite.memory.tiles import PUBLISHED_TILES
from hvlite.planning import Wishes, fits_by_plan, plan_clip, setting_of
from hvlite.profile import (
    BUILT_IN,
    SETTINGS,
    Knobs,
    Overrides,
    Profile,
    Room,
    Verdict,
    budget_bytes,
    card_profiles,
    choose_profile,
    host_budget,
    load_profile,
    profile_names,
    read_profile,
)
from hvlite.request import Request
from hvlite.weights.layout import Formats, slab_placements
from tests.refusal import refusal

GIB = 1 << 30
NEEDED = 'memory_gib = 3\nreserve_gib = 1\ndtype = "bf16"\n'


@pytest.fixture
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HVLITE_HOME with an empty profile folder."""
    monkeypatch.setenv("HVLITE_HOME", str(tmp_path))
    folder = tmp_path / "profiles"
    folder.mkdir()
    return folder


def test_every_shipped_profile_loads() -> None:
    assert profile_names() == ["6g", "8g", "12g", "16g", "24g", "45g", "60g", "cpu"]
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.memory_gib > profile.reserve_gib
        assert profile.knobs == Knobs()
        assert profile.attention is None


def test_the_shipped_profiles_are_the_designs() -> None:
    reserves = {name: load_profile(name).reserve_gib for name in card_profiles()}
    assert reserves == {"6g": 0.8, "8g": 1.0, "12g": 1.2, "16g": 1.5, "24g": 2.0, "45g": 3.0, "60g": 3.0}
    formats = {name: (load_profile(name).weights, load_profile(name).text_weights) for name in card_profiles()}
    small = dict.fromkeys(("6g", "8g", "12g", "16g", "24g"), ("int8", "nf4"))
    assert formats == {**small, "45g": ("bf16", "int8"), "60g": ("bf16", "fp16")}
    for name in card_profiles():
        assert load_profile(name).memory_gib == int(name.removesuffix("g"))


def test_every_shipped_value_has_a_comment() -> None:
    for folder in paths.shipped_profile_folders():
        for file in folder.glob("*.toml"):
            lines = [line for line in file.read_text().splitlines() if "=" in line.partition("#")[0]]
            assert [line.partition(" = ")[0] for line in lines] == list(SETTINGS)
            assert all(line.partition("# ")[2] for line in lines)


@pytest.mark.parametrize("name", ["6g", "8g", "12g", "16g", "24g", "45g", "60g"])
def test_host_memory_is_that_of_the_blocks_and_the_30_layers(name: str) -> None:
    profile = load_profile(name)
    placements = slab_placements(HUNYUANVIDEO, Formats(weights=profile.weights, text_weights=profile.text_weights))
    layers = {f"text_layers.{index}" for index in range(30)}
    kept = sum(
        placement.data_bytes
        for slab, placement in placements.items()
        if slab.startswith(("double_blocks", "single_blocks")) or slab in layers
    )
    assert profile.host_gib == math.ceil(kept / GIB)


def test_overrides_win_and_none_is_no_override() -> None:
    assert load_profile("cpu", dtype="bf16", attention=None).dtype == "bf16"
    assert load_profile("cpu", dtype=None).dtype == load_profile("cpu").dtype
    assert load_profile("24g", token_chunk=128, attention="sdpa").knobs.token_chunk == 128


def test_own_profiles_come_first(own_profiles: Path) -> None:
    (own_profiles / "cpu.toml").write_text(NEEDED)
    assert load_profile("cpu").memory_gib == 3


def test_a_profile_is_a_frozen_value() -> None:
    profile = load_profile("24g")
    assert profile == load_profile("24g")
    assert hash(profile) == hash(load_profile("24g"))
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile
    with pytest.raises(AttributeError):
        profile.memory_gib = 3.0  # type: ignore[misc]


# Where values come from.


def test_every_value_says_where_it_came_from(own_profiles: Path) -> None:
    file = own_profiles / "mine.toml"
    file.write_text('base = "24g"\nmemory_gib = 20\nhead_groups = 4\n')
    loaded = read_profile("mine", memory_gib=10, attention="sdpa")
    assert loaded.profile.name == "mine"
    assert loaded.settings()["memory_gib"] == 10
    assert loaded.settings()["reserve_gib"] == 2.0
    assert loaded.settings()["token_chunk"] == "auto"
    assert set(loaded.sources) == set(SETTINGS)
    assert (loaded.sources["memory_gib"], loaded.sources["attention"]) == ("--memory", "--attention")
    assert loaded.sources["head_groups"] == str(file)
    assert loaded.sources["reserve_gib"].endswith("24g.toml")


def test_what_nobody_says_is_built_in(own_profiles: Path) -> None:
    (own_profiles / "mine.toml").write_text(NEEDED)
    loaded = read_profile("mine")
    assert {key for key, source in loaded.sources.items() if source == BUILT_IN} == {
        *("host_gib", "weights", "text_weights"),
        *("token_chunk", "head_groups", "attention", "decode_tile"),
    }


def test_a_path_is_a_profile_and_its_name(tmp_path: Path) -> None:
    file = tmp_path / "laptop.toml"
    file.write_text('base = "8g"\n')
    assert load_profile(file) == load_profile(str(file)) == msgspec.structs.replace(load_profile("8g"), name="laptop")
    refusal(lambda: load_profile(tmp_path / "none.toml"), "none.toml cannot be read", kind=ProfileError)


def test_a_base_is_a_shipped_one(own_profiles: Path) -> None:
    (own_profiles / "24g.toml").write_text('base = "24g"\nreserve_gib = 5\n')  # the same name: still the shipped one
    assert load_profile("24g").reserve_gib == 5
    assert load_profile("24g").memory_gib == 24
    file = own_profiles / "mine.toml"
    file.write_text(NEEDED)
    (own_profiles / "child.toml").write_text('base = "mine"\n')
    refusal(lambda: load_profile("child"), "child.toml: base: no profile named 'mine'", kind=ProfileError)
    file.write_text("base = 24\n")
    refusal(lambda: load_profile("mine"), "base must be the name of a shipped profile; got 24", kind=ProfileError)


def test_flags_become_overrides() -> None:
    assert {key for key, value in Overrides().overrides().items() if value is not None} == set()
    given = Overrides(memory=10, host=3, weights="nf4", head_groups=2).overrides()
    assert read_profile("24g", **given).settings() == {
        **read_profile("24g").settings(),
        **{"memory_gib": 10, "host_gib": 3, "weights": "nf4", "head_groups": 2},
    }


# What is wrong.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NEEDED + "head_group = 2\n", "did you mean 'head_groups'?"),
        (NEEDED + "zebra = 2\n", "unknown key 'zebra'; known: memory_gib, reserve_gib, host_gib,"),
        (NEEDED + "[table]\nx = 2\n", "unknown key 'table'"),
        ("memory_gib = 3\nreserve_gib = 1\n", "dtype is missing"),
        ("memory_gib = '3'\nreserve_gib = 1\ndtype = 'bf16'\n", "memory_gib must be a number of GiB above 0; got '3'"),
        (
            "memory_gib = true\nreserve_gib = 1\ndtype = 'bf16'\n",
            "memory_gib must be a number of GiB above 0; got True",
        ),
        ("memory_gib = nan\nreserve_gib = 1\ndtype = 'bf16'\n", "memory_gib must be a number of GiB above 0; got nan"),
        (
            "memory_gib = 3\nreserve_gib = 4\ndtype = 'bf16'\n",
            "reserve_gib must be from 0 to below memory_gib (3); got 4",
        ),
        (NEEDED + "token_chunk = 65\n", 'token_chunk must be a multiple of 64, or "auto"; got 65'),
        (NEEDED + "token_chunk = 0\n", 'token_chunk must be a multiple of 64, or "auto"; got 0'),
        (NEEDED + "head_groups = 'many'\n", "head_groups must be 1 or more, or \"auto\"; got 'many'"),
        (NEEDED + "weights = 'int9'\n", "weights must be one of bf16, fp32, int8"),
        (NEEDED + "text_weights = 'int9'\n", "text_weights must be one of fp16, bf16"),
        (NEEDED + "host_gib = -1\n", "host_gib must be a number of GiB, 0 or more; got -1"),
        (NEEDED + "attention = 'math'\n", "attention must be"),
        (NEEDED + "decode_tile = 64\n", "decode_tile must be"),
        ("memory_gib = \n", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(own_profiles: Path, text: str, words: str) -> None:
    (own_profiles / "mine.toml").write_text(text)
    refusal(lambda: load_profile("mine"), words, str(own_profiles / "mine.toml"), kind=ProfileError)


def test_a_file_that_is_no_text_is_named(own_profiles: Path) -> None:
    (own_profiles / "mine.toml").write_bytes(b"\xff\xfe")
    refusal(lambda: load_profile("mine"), "mine.toml: not valid TOML", kind=ProfileError)


def test_a_wrong_flag_is_named_as_the_flag() -> None:
    refusal(
        lambda: load_profile("24g", memory_gib=-3),
        "--memory must be a number of GiB above 0; got -3",
        kind=ProfileError,
    )
    refusal(
        lambda: load_profile("24g", memory_gib=1),
        "--memory with",
        "24g.toml: reserve_gib must be from 0 to below memory_gib (1); got 2",
        "--reserve",
        kind=ProfileError,
    )


@pytest.mark.parametrize("name", ["24", "../cpu", "nothing", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    refusal(lambda: load_profile(name), "no profile named", "24g", kind=ProfileError)


# Which one is chosen.


def card(total: float, free: float) -> Room:
    return Room(kind="cuda", total_bytes=round(total * GIB), free_bytes=round(free * GIB))


@pytest.mark.parametrize(
    ("name", "total", "free", "chosen"),
    [
        ("H100", 79.6, 79.1, "60g"),
        ("L40S", 44.99, 44.5, "45g"),
        ("RTX 4090 with a desktop", 23.99, 23.0, "24g"),
        ("L4", 22.49, 22.4, "24g"),
        ("RTX 4090 beside another program", 23.99, 14.6, "16g"),
        ("RTX 4060 Ti", 15.99, 15.2, "16g"),
        ("RTX 3060", 12.0, 11.5, "12g"),
        ("RTX 3080", 10.0, 9.6, "8g"),
        ("RTX 4060", 8.0, 7.5, "8g"),
        ("RTX A2000", 6.0, 5.6, "6g"),
        ("RTX 4090 in use", 23.99, 3.0, None),
    ],
)
def test_auto_is_the_largest_that_fits(name: str, total: float, free: float, chosen: str | None) -> None:
    choice = choose_profile(card(total, free), fits_by_plan)
    assert choice.name == chosen, name
    assert [verdict.name for verdict in choice.verdicts] == list(reversed(card_profiles()))
    assert f"{min(total - 0.3, free):.1f} GiB is free" in choice.verdicts[0].why


def test_without_a_card_auto_is_cpu() -> None:
    choice = choose_profile(Room(kind="cpu", total_bytes=32 * GIB, free_bytes=16 * GIB), fits_by_plan)
    assert choice.name == "cpu"
    assert "15.0 GiB of RAM" in choice.verdicts[0].why


def test_another_check_can_be_given() -> None:
    """The plan's: a profile for which the room is large may still not fit a clip."""
    asked: list[str] = []

    def check(profile: Profile, room: Room) -> Verdict:
        asked.append(profile.name)
        return Verdict(name=profile.name, fits=profile.memory_gib < 10, why="by plan")

    assert choose_profile(card(80, 80), check).name == "8g"
    assert asked[0] == "60g"


def by_memory(profile: Profile, room: Room) -> Verdict:
    """Whether the memory that a profile leaves to a run is free."""
    return Verdict(name=profile.name, fits=(profile.memory_gib - profile.reserve_gib) * GIB <= room.free_bytes, why="")


def test_own_files_take_the_place_of_shipped_ones(own_profiles: Path) -> None:
    (own_profiles / "24g.toml").write_text('base = "24g"\nreserve_gib = 12\n')
    assert choose_profile(card(24, 14.9), by_memory).name == "24g"


def test_the_budget_is_the_least_of_three() -> None:
    profile = load_profile("24g")
    assert budget_bytes(profile, card(48, 47)) == 22 * GIB  # the profile's
    assert budget_bytes(profile, card(24, 24)) == round(23.7 * GIB) - 2 * GIB  # the card's
    assert budget_bytes(profile, card(24, 12)) == 10 * GIB  # what is free
    assert budget_bytes(profile, card(24, 1)) == 0


def test_output_names_are_safe_on_every_file_system() -> None:
    stem = paths.output_stem("../../A cat: walks / on \\ \u732b the 'grass'!" * 9, 7, "20260101-000000")
    assert set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    assert stem.startswith("20260101-000000_a-cat-walks-on-the-grass")
    assert stem.endswith("_seed7")
    assert len(stem) < 120
    french = "Une danseuse s'\N{LATIN SMALL LETTER E WITH ACUTE}lance"
    assert paths.output_stem(french, 7, "now") == "now_une-danseuse-s-elance_seed7"


def test_the_hosts_share_is_what_the_profile_says_or_what_is_free() -> None:
    profile = load_profile("24g")
    room = card(24, 24)
    assert host_budget(profile, room) == 12 * GIB
    assert host_budget(profile, replace(room, host_bytes=64 * GIB)) == 12 * GIB
    assert host_budget(profile, replace(room, host_bytes=8 * GIB)) == 6 * GIB
    assert host_budget(profile, replace(room, host_bytes=GIB)) == 0


def test_a_profiles_decode_tile_is_kept_to() -> None:
    resolved = Request("any").resolve(HUNYUANVIDEO)
    for tile, is_published in (("auto", False), ("published", True)):
        profile = load_profile("6g", memory_gib=3.9, decode_tile=tile)
        plan = plan_clip(resolved, profile, setting_of(HUNYUANVIDEO, profile, asked=True))
        assert (plan.tiles == PUBLISHED_TILES) is is_published


def test_knobs_that_a_clip_began_with_are_kept_where_they_fit() -> None:
    resolved = Request("any", size=(720, 1280), frames=129).resolve(HUNYUANVIDEO)
    began = Wishes(knobs=needs.Knobs(head_groups=1, token_chunk=512), stages=("denoise", "decode"))
    found = []
    for memory in (12.0, 4.0):  # one group of heads takes 3.6 GiB of activations alone
        profile = load_profile("12g", memory_gib=memory, reserve_gib=0.5)
        plan = plan_clip(resolved, profile, setting_of(HUNYUANVIDEO, profile, asked=True), wishes=began)
        assert plan.fits
        found.append((plan.token_chunk, plan.head_groups))
    assert found[0] == (512, 1)
    assert found[1][1] > 1


def test_knobs_that_are_asked_for_win_over_those_that_a_clip_began_with() -> None:
    resolved = Request("any").resolve(HUNYUANVIDEO)
    began = Wishes(knobs=needs.Knobs(head_groups=1, token_chunk=2048), stages=("denoise", "decode"))
    profile = load_profile("24g", head_groups=2)
    plan = plan_clip(resolved, profile, setting_of(HUNYUANVIDEO, profile, asked=True), wishes=began)
    assert (plan.head_groups, plan.token_chunk) == (2, 2048)
