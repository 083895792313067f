"""The numbers of an optimizer step that the host needs, fetched in one reduction and one transfer.

Reading a number from an accelerator makes the host wait for everything that was queued before it, after which
the accelerator waits for the host. A step therefore collects what it needs as tensors and reads all of it
once: verdict on the gradients, gradient norm, loss, metrics, and flags of rank 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbpo_ray.training.distributed import all_reduce_sum


class Readback:
    """Values that are summed over the ranks and read together.

    Args:
        device: where the ranks reduce; with NCCL a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._parts: dict[str, Tensor] = {}
        self._guarded: list[str] = []
        self._values: dict[str, list[float]] | None = None

    def add(self, name: str, values: Tensor | float, *, guarded: bool = False) -> None:
        """Add values to read; collective in that every rank adds the same names and sizes.

        Args:
            values: a number, or a tensor of any shape and device.
            guarded: whether a NaN or infinity among them, on any rank, makes `is_finite` false.
        """
        if self._values is not None:
            raise AssertionError(f"{name}: added after the values were read")
        if not isinstance(values, Tensor):
            # A kernel fills it; `torch.tensor` would copy from the host and wait.
            values = torch.full((1,), float(values), dtype=torch.float64, device=self.device)
        flat = values.detach().reshape(-1).to(torch.float64)
        self._parts[name] = flat.to(self.device, non_blocking=True)
        if guarded:
            self._guarded.append(name)

    @property
    def is_read(self) -> bool:
        return self._values is not None

    def read(self) -> None:
        """Reduce over the ranks and wait for the values. Collective; without effect when repeated."""
        if self._values is not None:
            return
        flat = torch.cat(list(self._parts.values()))
        all_reduce_sum(flat)
        numbers = iter(flat.tolist())
        self._values = {name: [next(numbers) for _ in range(len(part))] for name, part in self._parts.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> list[float]:
        """The values of `name`, summed over the ranks."""
        self.read()
        assert self._values is not None
        return self._values[name]

    @property
    def is_finite(self) -> bool:
        """Whether no guarded value of any rank is NaN or infinite."""
        return all(math.isfinite(value) for name in self._guarded for value in self[name])
