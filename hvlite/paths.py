"""Every folder and file name; nothing is created here. HVLITE_HOME is the root of all that is written but outputs."""

import os
import re
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent
SHAPES_MODEL = PACKAGE / "assets" / "shapes"
DEFAULT_OUTPUT = Path("results")
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


def logs_folder() -> Path:
    """Where tracebacks go that the terminal does not show."""
    return home() / "logs"


def profile_folders() -> list[Path]:
    """Folders with profile TOML files: the user's own, then the shipped ones (wheel or checkout)."""
    return [home() / "profiles", PACKAGE / "profiles", PACKAGE.parent / "profiles"]


def enclosing_model(file: Path) -> Path | None:
    """The model folder that a checkpoint file lies in, at any depth; None if it lies in none."""
    folders = file.absolute().parents
    return next((folder for folder in folders if any((folder / mark).is_dir() for mark in MODEL_MARKS)), None)


def output_stem(prompt: str, seed: int, stamp: str) -> str:
    """A file name without suffix: time stamp, first words of the prompt, seed. Safe on every file system."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()[:200]).strip("-")
    return "_".join(part for part in (stamp, words[:60].rstrip("-"), f"seed{seed}") if part)
