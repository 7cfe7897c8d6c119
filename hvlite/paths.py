"""Every folder and file name; nothing is created here. HVLITE_HOME is the root of all that is written but outputs."""

import os
import re
import time
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent
SHAPES_MODEL = PACKAGE / "assets" / "shapes"
PREVIEW_MAPS = PACKAGE / "assets" / "previews"
DEFAULT_OUTPUT = Path("results")
STDIN = Path("/dev/stdin")
# A folder that holds one of these is a model folder: diffusers' and Tencent's.
MODEL_MARKS = ("transformer", "hunyuan-video-t2v-720p")


def home() -> Path:
    """HVLITE_HOME, else the user's data folder."""
    asked = os.environ.get("HVLITE_HOME")
    return Path(asked).expanduser() if asked else Path(platformdirs.user_data_dir("hvlite"))


def models_folder() -> Path:
    """Where downloaded and packed models live."""
    return home() / "models"


def packed_folder() -> Path:
    """Where packed stores live."""
    return home() / "packed"


def latents_folder() -> Path:
    """Final latents of clips that are being decoded, or whose decode failed."""
    return home() / "latents"


def queue_file() -> Path:
    """The queue's database."""
    return home() / "queue.db"


def previews_folder() -> Path:
    """Small pictures of queued clips that are not finished."""
    return home() / "previews"


def preview_file(job_id: int) -> Path:
    """The strip of a queued clip; each new one takes its place."""
    return previews_folder() / f"{job_id}.png"


def logs_folder() -> Path:
    """Where tracebacks go that the terminal does not show."""
    return home() / "logs"


def profile_folders() -> list[Path]:
    """Folders with profile TOML files: the user's own, then the shipped ones (wheel or checkout)."""
    return [home() / "profiles", *shipped_profile_folders()]


def shipped_profile_folders() -> list[Path]:
    """Where hvlite's own profiles lie: in a wheel inside the package, in a checkout beside it."""
    return [PACKAGE / "profiles", PACKAGE.parent / "profiles"]


def rates_file() -> Path:
    """How fast this machine was measured to be, by `hvlite doctor --measure`."""
    return home() / "rates.json"


def enclosing_model(file: Path) -> Path | None:
    """The model folder that a checkpoint file lies in, at any depth; None if it lies in none."""
    folders = file.absolute().parents
    return next((folder for folder in folders if any((folder / mark).is_dir() for mark in MODEL_MARKS)), None)


def job_stem(job_id: int, prompt: str, seed: int, created: float) -> str:
    """The file name without suffix of a queued clip; the day it was queued and its number make it one of a kind."""
    return output_stem(prompt, seed, f"{time.strftime('%Y%m%d', time.localtime(created))}-{job_id:04d}")


def output_stem(prompt: str, seed: int, stamp: str) -> str:
    """A file name without suffix: time stamp, first words of the prompt, seed. Safe on every file system."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()[:200]).strip("-")
    return "_".join(part for part in (stamp, words[:60].rstrip("-"), f"seed{seed}") if part)
