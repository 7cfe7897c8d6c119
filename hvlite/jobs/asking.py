"""What is asked for a job, checked now, since nobody watches when it runs: model, profile, device, files.

For every front end alike. Nothing is loaded and no torch is imported; paths come out absolute.
"""

import re
from os.path import abspath
from pathlib import Path
from typing import Any

from hvlite import paths
from hvlite.dims import HUNYUANVIDEO
from hvlite.errors import RequestError, WeightsError
from hvlite.jobs.job import How
from hvlite.memory.geometry import parse_tiles
from hvlite.profile import Overrides, load_profile

DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,4})?")
EMBEDDED = "shapes"
AUTO = "auto"


def given_how(how: How) -> dict[str, Any]:
    """The fields of `how` that are not None, checked as far as that goes without loading anything."""
    given = {name: value for name, value in vars(how).items() if value is not None}
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = absolute(value)
            if not given[name].exists():
                raise WeightsError(f"--{name.replace('_', '-')} {given[name]} is not there")
    if how.model is not None:
        given["model"] = known_model(how.model)
    if how.device is not None:
        given["device"] = known_device(how.device)
    if how.profile is not None:
        given["profile"] = known_profile(how.profile, how)
    parse_tiles(how.decode_tile or AUTO)
    return given


def model_of(how: How) -> str:
    """The model that is asked for; else that of the folder in which --dit lies; else the default."""
    if how.model is not None:
        return how.model
    folder = None if how.dit is None else paths.enclosing_model(how.dit)
    return paths.default_model() if folder is None else str(folder)


def known_model(name: str) -> str:
    """A name as it is, a folder as an absolute path; WeightsError where there is no such model."""
    if name == EMBEDDED:
        return name
    if name == HUNYUANVIDEO.name:
        folder = paths.models_folder() / name
        if not folder.is_dir():
            raise WeightsError(f"{name} is not on this machine (looked in {folder}); hvlite models fetch gets it")
        return name
    folder = absolute(Path(name))
    if not folder.is_dir():
        raise WeightsError(f"there is no model folder {folder}; known names: {EMBEDDED}, {HUNYUANVIDEO.name}")
    return str(folder)


def known_device(name: str) -> str:
    """RequestError for what no queued clip runs on."""
    if not DEVICE.fullmatch(name):
        raise RequestError(f"a queued clip runs on cpu, cuda or cuda:N, not on {name!r}")
    return name


def known_profile(name: str, settings: Overrides) -> str:
    """A name as it is, a file as an absolute path; ProfileError where it cannot be read, or not with these settings."""
    if name != AUTO:
        load_profile(name, **settings.overrides())
    return str(absolute(Path(name))) if name.endswith(".toml") else name


def absolute(path: Path) -> Path:
    """From here, without `..`; RequestError for a name that no database could hold, or the home of nobody."""
    try:
        plain = Path(abspath(path.expanduser()))
        str(plain).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{str(path)!a} is no UTF-8 file name") from None
    except RuntimeError:
        raise RequestError(f"{str(path)!r} begins with the home folder of a user who is not known here") from None
    return plain
