"""Tests that need a card: `pytest tests/gpu` takes minutes on a machine that has one, and skips them elsewhere."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, and skip it with the reason where torch sees no card."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__} sees none"))


@pytest.fixture
def card() -> torch.device:
    """The first card, with its cache given back, and its peak counted from here on."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return device
