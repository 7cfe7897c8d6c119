"""A model as flags or a job ask for it: its profile with their settings laid over it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hvlite.events import Note
from hvlite.jobs.job import How
from hvlite.machine import AUTO, auto_profile, default_profile
from hvlite.opened import Model, open_model
from hvlite.packing import Asked
from hvlite.profile import load_profile
from hvlite.weights.pack import Progress


@contextmanager
def open_asked(name: str, how: How, device: torch.device, told: Callable[[Progress | Note], None]) -> Iterator[Model]:
    """The model `name` on `device`; `told` hears which profile `auto` meant, and how far a packing is."""
    name_of_profile = how.profile or default_profile(device)
    if name_of_profile == AUTO:
        name_of_profile = auto_profile(device)
        told(Note(f"profile {name_of_profile} (why: hvlite profiles detect)"))
    profile = load_profile(name_of_profile, **how.overrides())
    asked = Asked(how.weights, how.text_weights)
    with open_model(name, profile, str(device), asked=asked, told=told, **how.files()) as model:
        yield model
