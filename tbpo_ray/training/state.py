"""The optimizer's view of the weights, cut into named fragments that do not depend on who holds them.

Whatever the ZeRO stage and the number of workers, each rank holds the fp32 master copy of some slices
of some parameters, and the optimizer state of the same slices. A checkpoint stores each slice under
`NAME@START` with its state, in safetensors; loading puts together whatever slices the present layout
asks for. So a run resumes with another number of workers, or another stage, from the same files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tbpo_ray.training.deepspeed_engine import Engine

MASTER = "master"
STEP = "step"


@dataclass
class Fragment:
    """Slice `[start, start + length)` of a flattened parameter, living at `at` in a flat fp32 tensor."""

    name: str
    start: int
    length: int
    flat: Tensor
    at: int

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1).narrow(0, self.at, self.length)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """The slices whose master weights and optimizer state this rank holds."""
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        name = engine.names[id(parameter)]
        if engine.stage == 3:
            zero = engine.optimizer
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * numel
            length = min(numel, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if length > 0:
                yield Fragment(name, start, length, zero.fp32_partitioned_groups_flat[group], offset)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = _flat_of(engine, mapping.hp_fragment)
                yield Fragment(name, lp.start, hp.numel, flat, hp.start)
        else:
            yield Fragment(name, 0, parameter.numel(), parameter, 0)


def copy_fragments(engine: Engine) -> dict[str, Tensor]:
    """Copies on the CPU of this rank's slices, by key. In stage 0 every rank holds all; rank 0 has them."""
    tensors: dict[str, Tensor] = {}
    if engine.stage > 0 or _rank() == 0 or _has_mapping(engine):
        for part in fragments(engine):
            key = f"{part.name}@{part.start}"
            tensors[f"{key}@{MASTER}"] = part.view(part.flat).cpu().clone()
            for name, value in engine.client_optimizer.state.get(part.flat, {}).items():
                sliced = value if name == STEP else part.view(value)
                tensors[f"{key}@{name}"] = sliced.detach().cpu().clone()
    return tensors


def load_fragments(engine: Engine, files: Sequence[Path]) -> None:
    """Fill this rank's slices from any number of files, and bring the model's own weights in line.

    Raises:
        ValueError: where the files do not cover a slice.
    """
    index = _Index(files)
    for part in fragments(engine):
        part.view(part.flat).copy_(index.read(part.name, part.start, part.length, MASTER))
        for name in index.state_names(part.name):
            state = engine.client_optimizer.state[part.flat]
            if name == STEP:
                state[STEP] = index.scalar(part.name, STEP)
                continue
            if name not in state:
                state[name] = torch.zeros_like(part.flat, memory_format=torch.preserve_format)
            part.view(state[name]).copy_(index.read(part.name, part.start, part.length, name))
    _publish(engine)


@torch.no_grad()
def fill_module(module: nn.Module, files: Sequence[Path]) -> None:
    """Put the master weights of a checkpoint into a module on this process, whole.

    Raises:
        ValueError: where the files do not cover a trainable parameter.
    """
    index = _Index(files)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = index.read(name, 0, parameter.numel(), MASTER)
            parameter.copy_(value.view(parameter.shape))


class _Index:
    """Where each slice lies in the files."""

    def __init__(self, files: Sequence[Path]):
        self.handles = [safe_open(file, framework="pt") for file in files]
        self.where: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for handle in self.handles:
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                name, start, state = key.rsplit("@", 2)
                shape = handle.get_slice(key).get_shape()
                length = shape[0] if shape else 1
                self.where.setdefault((name, state), []).append((int(start), length, handle, key))

    def state_names(self, name: str) -> list[str]:
        return [state for (owner, state) in self.where if owner == name and state != MASTER]

    def scalar(self, name: str, state: str) -> Tensor:
        _, _, handle, key = self.where[(name, state)][0]
        return handle.get_tensor(key)

    def read(self, name: str, start: int, length: int, state: str) -> Tensor:
        out = torch.empty(length)
        covered = 0
        for at, size, handle, key in self.where.get((name, state), ()):
            low, high = max(start, at), min(start + length, at + size)
            if low < high:
                out[low - start : high - start] = handle.get_slice(key)[low - at : high - at]
                covered += high - low
        if covered != length:
            raise ValueError(f"checkpoint covers {covered} of {length} values of {name} ({state})")
        return out


def _publish(engine: Engine) -> None:
    """Copy master weights into the weights that the model computes with, on all ranks."""
    zero = engine.optimizer
    if engine.stage == 3:
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _flat_of(engine: Engine, view: Tensor) -> Tensor:
    """The flat optimizer parameter that `view` is a window of."""
    storage = view.untyped_storage().data_ptr()
    for group in engine.client_optimizer.param_groups:
        for flat in group["params"]:
            if flat.untyped_storage().data_ptr() == storage:
                return flat
    raise AssertionError("a master fragment belongs to no optimizer group")


def _has_mapping(engine: Engine) -> bool:
    return any(getattr(p, "_hp_mapping", None) is not None for p in engine.module.parameters())


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
