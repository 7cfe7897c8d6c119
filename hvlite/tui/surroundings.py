"""What the terminal UI takes from outside: clocks, the machine, chance, how long it waits."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from textual.widget import Widget

from hvlite.tui.device_strip import Machine, probe

LOOK_SECONDS = 0.5
PROBE_SECONDS = 1.0
# So long after a key press the plan is made anew.
TYPING_SECONDS = 0.15


def _drawn_seed() -> int:
    return random.SystemRandom().randrange(2**31)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the app takes from outside, so that tests can give it other things."""

    clock: Callable[[], float] = time.time
    steady: Callable[[], float] = time.monotonic
    probe: Callable[[frozenset[int]], Machine] = probe
    graphic: type[Widget] | None = None
    draw_seed: Callable[[], int] = _drawn_seed
    look_seconds: float = LOOK_SECONDS
    probe_seconds: float = PROBE_SECONDS
    typing_seconds: float = TYPING_SECONDS
