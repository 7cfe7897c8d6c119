"""Residents are spread evenly, and slots are as large as what goes through them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvlite.memory.tiers import slot_sizes, spread


@st.composite
def parts_of_a_stack(draw: st.DrawFn) -> tuple[int, int]:
    of = draw(st.integers(1, 120))
    return draw(st.integers(1, of)), of


@given(parts_of_a_stack())
def test_gaps_between_residents_differ_by_one_at_most(part: tuple[int, int]) -> None:
    """Also the gap from the last one of a round to the first one of the next."""
    count, of = part
    chosen = spread(count, of)
    assert len(set(chosen)) == count
    assert all(0 <= index < of for index in chosen)
    gaps = {later - earlier for earlier, later in zip(chosen, (*chosen[1:], chosen[0] + of), strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_none_and_all() -> None:
    assert spread(0, 60) == ()
    assert spread(60, 60) == tuple(range(60))
    assert spread(4, 10) == (0, 2, 5, 7)
    with pytest.raises(AssertionError, match="7 of 6"):
        spread(7, 6)


def test_two_slots_of_the_largest_or_one_for_each() -> None:
    assert slot_sizes([]) == ()
    assert slot_sizes([5]) == (5,)
    assert slot_sizes([5, 9]) == (5, 9)
    assert slot_sizes([5, 9, 2]) == (9, 9)
