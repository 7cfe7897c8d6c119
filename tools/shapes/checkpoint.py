"""Training state on disk: a kill at any time costs at most a minute of work."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` under a temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The last saved state, or None for a fresh start."""
    return torch.load(path, weights_only=True) if path.exists() else None


class Average:
    """Exponential moving average of parameters (EMA), held beside the model."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's values; early steps use a shorter window."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)


class Clock:
    """Says when a minute has passed since the last checkpoint."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
