"""Torch's random state of a rank, as tensors in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Copies of the generators' states: `cpu`, and `cuda` of the rank's GPU."""
    states: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_random_states(file: Path) -> None:
    """Restore what a file has of `random_states`."""
    states = load_file(file)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
