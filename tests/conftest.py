"""What many tests share: a tiny model in the published folder layout, and a home of its own for every test."""

from pathlib import Path

import pytest
import torch

from tests.tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HVLITE_HOME in a fresh folder; two threads and one seed, so that numbers repeat."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HVLITE_HOME", str(home))
    torch.manual_seed(0)
    return home


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights at tiny dims; renders 16x16 clips in well under a second."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder
