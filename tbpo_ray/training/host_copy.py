"""Copies of tensors in host memory that is allocated once, made while the device continues to compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Files = Mapping[str, Mapping[str, Tensor]]
"""File name to tensors by name."""
_ALIGN = 64


class HostCopy:
    """One copy of changing sets of tensors in host memory; a new one replaces the one before.

    On a GPU the memory is page-locked and a stream of its own copies, so that `take` returns at once:
    `wait` before reading the copy, and `hold_updates` before the tensors change.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_page_locked = False
        """Whether the GPU copies without the host. Where the system refuses it, `take` waits for the copy."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def take(self, files: Files) -> dict[str, dict[str, Tensor]]:
        """Begin to copy tensors from any device.

        Returns:
            The copies, contiguous, valid until the next call.
        """
        pairs = [(file, name, tensor) for file, tensors in files.items() for name, tensor in tensors.items()]
        offsets, end = [], 0
        for _, _, tensor in pairs:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGN) * _ALIGN
        self._reserve(end)
        copies: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for (file, name, tensor), at in zip(pairs, offsets, strict=True):
            place = self._memory[at : at + tensor.nbytes]
            copies[file][name] = place.view(tensor.dtype).view(tensor.shape)
        self._fill([(copies[file][name], tensor.detach()) for file, name, tensor in pairs])
        return copies

    def hold_updates(self) -> None:
        """Let the device finish copying before what is queued from now on. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def wait(self) -> None:
        """Return when the copy is complete; in any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fill(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if self.device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        self._copied = self._stream.record_event()

    def _reserve(self, size: int) -> None:
        """Make sure that the memory has `size` bytes."""
        if self._memory.numel() >= size:
            return
        self.wait()
        if self.is_page_locked:
            _cudart().cudaHostUnregister(self._memory.data_ptr())
            self.is_page_locked = False
        self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is allocated
        self._memory = torch.empty(size, dtype=torch.uint8)
        if self.device.type == "cuda":
            # PyTorch's own page-locked memory is rounded up to a power of two, up to twice what is needed.
            error = _cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            self.is_page_locked = int(error) == 0


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
