"""A process that is killed in the middle of a decode: the next start makes the clip from the latents."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvlite import Outputs, Request, generate, open_model
from hvlite.clip import decode_file
from hvlite.events import Stage
from hvlite.memory.geometry import parse_tiles
from hvlite.video.mp4 import read_frames
from tests.command_line import call

REQUEST = Request("a red circle", size=(64, 96), frames=13, steps=1)
# Renders REQUEST, and is gone at the piece of the decode that is named.
DIES = """
import os, signal, sys
from pathlib import Path
from hvlite import Outputs, generate, open_model
from hvlite.events import TileDone
from hvlite.memory.geometry import parse_tiles
from tests.test_decode_killed import REQUEST

model, folder, tiles, piece = sys.argv[1:]
with open_model(model) as opened:
    for event in generate(REQUEST, opened, outputs=Outputs(folder=Path(folder), decode_tile=parse_tiles(tiles))):
        if isinstance(event, TileDone) and event.tile == int(piece):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("tiles", "piece"), [("9x32", 9), ("exact", 20)])
def test_the_next_start_decodes_from_the_latents(
    tiny_model: Path, tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str], tiles: str, piece: int
) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", DIES, str(tiny_model), str(folder), tiles, str(piece)]
    root = str(Path(__file__).parent.parent)
    died = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": root}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert list(folder.glob("*.mp4")) == []
    (kept,) = (own_home / "latents").iterdir()
    assert list((own_home / "scratch").glob("*")) == []

    with open_model(tiny_model) as model:
        outputs = Outputs(folder=folder, decode_tile=parse_tiles(tiles))
        whole = tmp_path / "whole.mp4"
        for _ in generate(REQUEST, model, outputs=Outputs(file=whole, decode_tile=outputs.decode_tile)):
            pass
        elsewhere = tmp_path / "elsewhere"
        kept = kept.rename(tmp_path / "moved")
        stages = [event.name for event in decode_file(kept, model, outputs) if isinstance(event, Stage)]
    assert stages == ["decode"]
    (finished,) = folder.glob("*.mp4")
    assert np.array_equal(list(read_frames(finished)), list(read_frames(whole)))

    code, out, _ = call(
        capsys, "decode", str(kept), "--model", str(tiny_model), "--decode-tile", "5x64", "--save-path", str(elsewhere)
    )
    assert code == 0
    assert len(list(read_frames(Path(out.strip())))) == 13
