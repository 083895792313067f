"""Load a model for ZeRO stage 3: one rank reads it, and each rank keeps its part of every weight.

Rank 0 reads the model as any other loader does. The other ranks build the same modules without weights. Then
DeepSpeed's `zero.Init` takes one weight at a time: rank 0 broadcasts it, every rank keeps its part, and the
whole weight is freed before the next one. So no rank but the first ever holds a whole model, and what is
trained on is what rank 0 has read and checked, whatever its architecture and format.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tbpo_ray.errors import first_line
from tbpo_ray.training.deepspeed_engine import import_deepspeed
from tbpo_ray.training.distributed import barrier, broadcast_object, rank, world_size

_DONTNEED = 4
"""Linux's MADV_DONTNEED."""
TRIM_BYTES = 8 * 2**20
"""Freed bytes after which the C library is told to return free memory to the system."""


@dataclass(frozen=True)
class _Weight:
    """A parameter of rank 0's model, under the first of its names."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class _Contents:
    """What a model without weights lacks: everything but the values of the parameters."""

    weights: dict[str, _Weight]
    names: dict[str, str]
    """Every name of a parameter, and the first name of the same parameter; they differ for tied weights."""
    tensors: dict[tuple[str, str], Tensor]
    """Buffers, and tensors that are plain attributes, by module and attribute."""


class _InTurn(nn.Module):
    """The parameters of a network for `zero.Init`, which converts what `parameters` yields.

    A rank without weights gets memory for a parameter when its turn comes; rank 0 gives its memory back after
    the turn.
    """

    def __init__(self, network: nn.Module, contents: _Contents, names: Collection[str], device: torch.device):
        super().__init__()
        self.contents, self.names, self.device = contents, names, device
        self.found = dict(network.named_parameters())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        files, freed = _mapped_files(), 0
        for name in self.names:
            parameter = self.found[name]
            _allocate(parameter, self.contents.weights[name], self.device)
            whole = parameter.data
            yield parameter
            _give_back(whole, files)
            freed += whole.numel() * whole.element_size() if whole.device.type == "cpu" else 0
            del whole
            if freed >= TRIM_BYTES:
                freed = 0
                _trim_heap()


def find_difference(network: Any) -> str | None:
    """Why the ranks' models differ in their modules or weights, apart from the values; collective.

    Args:
        network: the whole model on rank 0, and one without weights, or the reason why there is none, on the
            other ranks.
    """
    theirs = broadcast_object(_describe(network).names if rank() == 0 else None)
    problem = None
    if rank() != 0:
        own = network if isinstance(network, str) else {n for n, _ in _parameters(network)}
        if isinstance(own, str):
            problem = own
        elif own != set(theirs):
            other = ", ".join(sorted(own ^ set(theirs))[:3])
            problem = f"the model without weights has other parameters ({other})"
    found: list[Any] = [problem]
    if dist.is_initialized():
        found = [None] * world_size()
        dist.all_gather_object(found, problem)
    return next((text for text in found if text is not None), None)


def fits_whole(model: str, device: torch.device) -> bool:
    """Whether a model can be checked on the device with all of its weights there.

    Args:
        model: folder of safetensors, whose dtype may be narrower than that of training.
    """
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) <= free


def run_from_host(network: Any, device: torch.device) -> Any:
    """Let a model on the host compute on the device, to which a block's weights are copied when it runs."""
    from accelerate import cpu_offload

    inside: set[str] = set()
    for path, names in block_weights(network).items():
        block = network.get_submodule(path)
        # A block that shares a weight with another part stays on the device.
        if len(names) == len(list(block.parameters())):
            cpu_offload(block, execution_device=device)
            inside.update(names)
    for name, parameter in network.named_parameters():
        if name not in inside:
            parameter.data = parameter.data.to(device)
    for path, module in network.named_modules():
        for attribute, value in _tensors(module):
            _set_tensor(network, path, attribute, value.to(device))
    return network


def stop_running_from_host(network: Any) -> None:
    """Undo `run_from_host`; weights outside of the blocks stay on the device."""
    from accelerate.hooks import remove_hook_from_submodules

    for path in _blocks(network):
        remove_hook_from_submodules(network.get_submodule(path))


def build_empty(build: Callable[[], Any]) -> Any:
    """What `build` returns, or the error's message: an architecture may need values to be built."""
    try:
        return build()
    # Each architecture fails in its own way; the ranks then load the whole model.
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def in_turn(load: Callable[[], Any]) -> Any:
    """What `load` returns, one rank after the other; rank 0 is done already and gets None. Collective."""
    result = None
    for turn in range(1, world_size()):
        if rank() == turn:
            result = load()
        barrier()
    return result


def divide_weights(
    network: Any, options: dict[str, Any], device: torch.device, *, names: Collection[str] | None = None
) -> Any:
    """Leave each rank its part of every weight of rank 0's model, on `device`. Collective.

    Args:
        network: the whole model on rank 0, and one without weights on the other ranks.
        options: the DeepSpeed configuration, of stage 3.
        names: of the weights that are divided; every rank keeps the other ones whole. Default: all.

    Returns:
        The network, on every rank with the same weights as rank 0's.
    """
    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed(dist_init_required=False)
    contents: _Contents = broadcast_object(_describe(network) if rank() == 0 else None)
    if rank() != 0:
        _fill(network, contents)
    divided = [name for name in contents.weights if names is None or name in names]
    found = dict(network.named_parameters())
    for name in sorted(contents.weights.keys() - set(divided)):
        _allocate(found[name], contents.weights[name], device)
        found[name].data = found[name].data.to(device)
        dist.broadcast(found[name].data, 0)
    deepspeed.zero.Init(module=_InTurn(network, contents, divided, device), config_dict_or_path=options)
    for path, module in network.named_modules():
        for attribute, value in _tensors(module):
            _set_tensor(network, path, attribute, value.to(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of rank 0's whole weights
    return network


def share_rng_state() -> None:
    """Continue with rank 0's state of torch's CPU generator, which drew the adapter's weights. Collective."""
    torch.set_rng_state(broadcast_object(torch.get_rng_state()))


def block_weights(network: nn.Module) -> dict[str, list[str]]:
    """The blocks of a model by path, such as its decoder layers, and the first names of their weights.

    Weights that something outside of a block shares are not among them.
    """
    owners: dict[int, set[str]] = {}
    blocks = _blocks(network)
    for name, parameter in _parameters(network):
        owner = next((path for path in blocks if name.startswith(f"{path}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
    found: dict[str, list[str]] = {}
    for name, parameter in network.named_parameters():
        if len(owners[id(parameter)]) == 1 and (owner := next(iter(owners[id(parameter)]))):
            found.setdefault(owner, []).append(name)
    return found


def gather_blocks(network: nn.Module, blocks: dict[str, list[str]]) -> None:
    """Gather the divided weights of each block while its forward pass runs; only for frozen models.

    Args:
        blocks: from `block_weights`, before the weights were divided.
    """
    parameters: dict[str, Any] = dict(network.named_parameters())
    for path, names in blocks.items():
        weights = [parameters[name] for name in names]
        block = network.get_submodule(path)
        block.register_forward_pre_hook(lambda *_, weights=weights: _gather(weights))
        block.register_forward_hook(lambda *_, weights=weights: _release(weights), always_call=True)


def _gather(weights: list[Any]) -> None:
    weights[0].all_gather_coalesced(weights).wait()


def _release(weights: list[Any]) -> None:
    for weight in weights:
        weight.partition()


def _blocks(network: nn.Module) -> list[str]:
    """Paths of the modules in the outermost lists of modules."""
    lists: list[str] = []
    for path, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists.append(path)
    return [f"{path}.{name}" for path in lists for name, _ in network.get_submodule(path).named_children()]


def _parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under all of their names."""
    return network.named_parameters(remove_duplicate=False)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers of a module, and tensors that are plain attributes of it, by attribute."""
    plain = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
    return [*module.named_buffers(recurse=False), *plain]


def _describe(network: nn.Module) -> _Contents:
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    return _Contents(
        weights={
            name: _Weight(parameter.shape, parameter.dtype, parameter.requires_grad)
            for name, parameter in network.named_parameters()
        },
        names={name: first[id(parameter)] for name, parameter in _parameters(network)},
        tensors={
            (path, attribute): value.detach().cpu()
            for path, module in network.named_modules()
            for attribute, value in _tensors(module)
        },
    )


def _fill(network: nn.Module, contents: _Contents) -> None:
    """Replace the parameters and buffers of a model without weights; parameters have no memory yet."""
    made = {
        name: nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=weight.requires_grad)
        for name, weight in contents.weights.items()
    }
    for name, first in contents.names.items():
        path, _, attribute = name.rpartition(".")
        network.get_submodule(path).register_parameter(attribute, made[first])
    for (path, attribute), value in contents.tensors.items():
        _set_tensor(network, path, attribute, value)


def _set_tensor(network: nn.Module, path: str, attribute: str, value: Tensor) -> None:
    module = network.get_submodule(path)
    if attribute in module._buffers:
        module._buffers[attribute] = value
    else:
        setattr(module, attribute, value)


def _allocate(parameter: nn.Parameter, weight: _Weight, device: torch.device) -> None:
    if parameter.shape != weight.shape:
        parameter.data = torch.empty(weight.shape, dtype=weight.dtype, device=device)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges that are mappings of safetensors files."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    ranges = (line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors"))
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def _give_back(whole: Tensor, files: list[tuple[int, int]]) -> None:
    """Return the pages of a weight that no one reads again, where they are a file's.

    The mapping itself lives as long as any weight of its file, and so would all pages that were read.
    """
    if whole.device.type != "cpu":
        return
    start, size = whole.data_ptr(), whole.numel() * whole.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and any(low <= first and last <= high for low, high in files):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


def _trim_heap() -> None:
    """Return what has been freed to the system; glibc keeps it, in each of its arenas."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
