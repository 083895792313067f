"""Master weights and optimizer state as named fragments, independent of how ranks hold them.

At any ZeRO stage and number of workers, each rank holds the fp32 master copy of some slices of some
parameters, and the optimizer state of the same slices. A checkpoint stores each slice in safetensors under
`NAME@START@STATE`; loading assembles the slices that the present layout needs. So a run can resume from the
same files with another number of workers or at another stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tbpo_ray.training.deepspeed_engine import Engine
from tbpo_ray.training.distributed import rank

MASTER = "master"
STEP = "step"


@dataclass
class Fragment:
    """Slice `[start, start + length)` of a flattened parameter, stored from `at` in a flat fp32 tensor."""

    name: str
    start: int
    length: int
    flat: Tensor
    at: int

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1).narrow(0, self.at, self.length)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """The slices whose master weights and optimizer state this rank holds."""
    # ZeRO 3, ZeRO 1 and 2 or bf16, and a plain optimizer each keep them in another private structure.
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


def fragment_tensors(engine: Engine) -> dict[str, Tensor]:
    """This rank's slices by key, as they are: the next step changes them.

    Where every rank holds everything, only rank 0 returns it.
    """
    tensors: dict[str, Tensor] = {}
    if engine.stage > 0 or rank() == 0 or _has_mapping(engine):
        for part in fragments(engine):
            key = f"{part.name}@{part.start}"
            tensors[f"{key}@{MASTER}"] = part.view(part.flat)
            for name, value in engine.client_optimizer.state.get(part.flat, {}).items():
                tensors[f"{key}@{name}"] = value if name == STEP else part.view(value)
    return tensors


def load_fragments(engine: Engine, files: Sequence[Path], meet: Callable[[], None] = lambda: None) -> None:
    """Fill this rank's slices from any number of files, and update the model's own weights from them.

    Args:
        meet: waits for the other ranks before the first collective, which has a timeout, while reading takes
            as long as storage takes.

    Raises:
        ValueError: the files do not cover a slice.
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
    meet()
    _publish(engine)


@torch.no_grad()
def fill_module(module: nn.Module, files: Sequence[Path]) -> None:
    """Copy the master weights of a checkpoint into an unpartitioned module.

    Raises:
        ValueError: the files do not cover a trainable parameter.
    """
    index = _Index(files)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = index.read(name, 0, parameter.numel(), MASTER)
            parameter.copy_(value.view(parameter.shape))


class _Index:
    """Finds slices in a checkpoint's files."""

    def __init__(self, files: Sequence[Path]):
        handles: list[Any] = [safe_open(file, framework="pt") for file in files]
        self.slices: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        """(parameter, state) to (start, length, file, key) of each of its slices"""
        for handle in handles:
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                name, start, state = key.rsplit("@", 2)
                shape = handle.get_slice(key).get_shape()
                length = shape[0] if shape else 1
                self.slices.setdefault((name, state), []).append((int(start), length, handle, key))

    def state_names(self, name: str) -> list[str]:
        return [state for (owner, state) in self.slices if owner == name and state != MASTER]

    def scalar(self, name: str, state: str) -> Tensor:
        _, _, handle, key = self.slices[(name, state)][0]
        value: Tensor = handle.get_tensor(key)
        return value

    def read(self, name: str, start: int, length: int, state: str) -> Tensor:
        out = torch.empty(length)
        covered = 0
        for at, size, handle, key in self.slices.get((name, state), ()):
            low, high = max(start, at), min(start + length, at + size)
            if low < high:
                out[low - start : high - start] = handle.get_slice(key)[low - at : high - at]
                covered += high - low
        if covered != length:
            raise ValueError(f"checkpoint covers {covered} of {length} values of {name} ({state})")
        return out


def _publish(engine: Engine) -> None:
    """Copy the master weights into the weights that the model computes with. Collective."""
    zero = engine.optimizer
    if engine.stage == 3:
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _flat_of(engine: Engine, view: Tensor) -> Tensor:
    """The flat optimizer parameter that `view` is a view of."""
    storage = view.untyped_storage().data_ptr()
    for group in engine.client_optimizer.param_groups:
        flats: list[Tensor] = group["params"]
        for flat in flats:
            if flat.untyped_storage().data_ptr() == storage:
                return flat
    raise AssertionError("a master fragment belongs to no optimizer group")


def _has_mapping(engine: Engine) -> bool:
    return any(getattr(p, "_hp_mapping", None) is not None for p in engine.module.parameters())
