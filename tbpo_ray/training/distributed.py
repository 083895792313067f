"""The process group of the ranks, where there is one: every function works without one too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_distributed() -> bool:
    """Whether there are other ranks to communicate with."""
    return world_size() > 1


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Replace `tensor` with its sum over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor)


def barrier() -> None:
    """Wait until every rank has arrived here."""
    if is_distributed():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank; the other ranks' values are ignored."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collective_device() -> torch.device:
    """The device on which the backend reduces tensors.

    With NCCL this is the GPU, also where an offloaded optimizer keeps its own tensors on the CPU.
    """
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
