"""Every folder and file name; nothing is created here. HVLITE_HOME is the root of all that is written but outputs."""

import os
import re
import time
import unicodedata
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


def scratch_folder() -> Path:
    """What an exact decode puts aside, in files without a name."""
    return home() / "scratch"


def queue_file() -> Path:
    """The queue's database."""
    return home() / "queue.db"


def previews_folder() -> Path:
    """Small pictures of queued clips that are not finished."""
    return home() / "previews"


def preview_file(job_id: int) -> Path:
    """The strip of a queued clip; each new one takes its place."""
    return previews_folder() / f"{job_id}.png"


def checkpoint_file(job_id: int) -> Path:
    """The clip of a job between two steps, or its final latents until they are decoded."""
    return home() / "checkpoints" / f"{job_id}.safetensors"


def logs_folder() -> Path:
    """Where tracebacks go that the terminal does not show."""
    return home() / "logs"


def job_log(job_id: int) -> Path:
    """What the worker, and the libraries in it, had to say of a job."""
    return logs_folder() / f"job-{job_id}.log"


def worker_log(lock: str) -> Path:
    """What a device's worker said outside of any job; each new worker begins it anew."""
    return logs_folder() / f"worker-{lock}.log"


def lock_file(lock: str) -> Path:
    """Locked by whoever serves the device of that name; holds who that is."""
    return home() / "locks" / f"{lock}.lock"


def profile_folders() -> list[Path]:
    """Folders with profile TOML files: the user's own, then the shipped ones (wheel or checkout)."""
    return [home() / "profiles", *shipped_profile_folders()]


def shipped_profile_folders() -> list[Path]:
    """Where hvlite's own profiles lie: in a wheel inside the package, in a checkout beside it."""
    return [PACKAGE / "profiles", PACKAGE.parent / "profiles"]


def tui_settings_file() -> Path:
    """What a user wants of the terminal UI: theme, keys, player. Only read."""
    return home() / "tui.toml"


def tui_state_file() -> Path:
    """What the terminal UI remembers: the theme, prompts, templates."""
    return home() / "tui.json"


def rates_file() -> Path:
    """How fast this machine was measured to be, by `hvlite doctor --measure`."""
    return home() / "rates.json"


def default_model() -> str:
    """What is rendered with where nobody says: the real model once it is downloaded, else the embedded one."""
    return "hunyuanvideo" if (models_folder() / "hunyuanvideo").is_dir() else "shapes"


def enclosing_model(file: Path) -> Path | None:
    """The model folder that a checkpoint file lies in, at any depth; None if it lies in none."""
    folders = file.absolute().parents
    return next((folder for folder in folders if any((folder / mark).is_dir() for mark in MODEL_MARKS)), None)


def job_stem(job_id: int, prompt: str, seed: int, created: float) -> str:
    """The file name without suffix of a queued clip; the day it was queued and its number make it one of a kind."""
    return output_stem(prompt, seed, f"{time.strftime('%Y%m%d', time.localtime(created))}-{job_id:04d}")


def output_stem(prompt: str, seed: int, stamp: str) -> str:
    """A file name without suffix: time stamp, first words of the prompt, seed. Safe on every file system.

    Letters lose their accents; those of other scripts are left out.
    """
    plain = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", prompt[:200])).lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return "_".join(part for part in (stamp, words[:60].rstrip("-"), f"seed{seed}") if part)
