"""What every refusal must be: one line of the right class, with the words that help."""

from collections.abc import Callable

import pytest

from hvlite.errors import HvliteError, WeightsError


def refusal(act: Callable[[], object], *words: str, kind: type[HvliteError] = WeightsError) -> None:
    """`act` fails in one line with these words."""
    with pytest.raises(kind) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line
