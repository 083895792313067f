"""A second device for tests on a machine without an accelerator.

Its tensors compute on the CPU inside, but PyTorch takes them for tensors of another device: what an
accelerator would refuse is refused (tensors of two devices in one operation), and what would make the host
wait for an accelerator is recorded (reading a value, an operation whose result has a data-dependent shape, a
blocking copy in either direction).

    with SecondDevice() as device:
        model = device.move(model)
        with device.recording() as syncs:
            train_step(model)
        assert not syncs
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "second"
ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
MASK_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# Not tagged as elementwise, but a number in a CPU tensor is accepted as their value.
SCALAR_FRIENDLY = {aten.copy_.default, aten.index_put.default, aten.index_put_.default, aten.fill_.Tensor}


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices, as on an accelerator."""


class _Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[name-defined, misc]
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, device: int) -> bool:
        return False

    def is_built(self) -> bool:
        return True


class _Module:
    """What PyTorch asks the module of a device for."""

    def is_initialized(self) -> bool:
        return True

    # Unavailable, so that `torch.accelerator` does not offer this device to any other test of the process.
    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    # Its tensors compute on the CPU, whose generator `torch.random.fork_rng` restores by itself.
    def get_rng_state(self, device: int = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: int = 0) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def register() -> torch.device:
    """Make PyTorch know the device; possible once in a process, and without effect on other devices."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
    return torch.device(NAME, 0)


class DeviceTensor(Tensor):
    """A tensor of the second device; `host` has its values, on the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        wrapper: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=register(),
        )
        wrapper.host = host
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert a tensor on {NAME} to numpy; use Tensor.cpu() first")
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {}, None)


@dataclass(frozen=True)
class Sync:
    """A point where the host would wait for the device."""

    what: str
    where: str
    """`file:line function` of the innermost frame in the project."""

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class SecondDevice(TorchDispatchMode):
    """While active, factories and `.to` reach the device, and synchronizations can be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.device = register()
        self.syncs: list[Sync] | None = None
        self._constructors = _Constructors()
        self._generator = torch.Generator

    def __enter__(self) -> SecondDevice:
        super().__enter__()
        self._constructors.__enter__()
        torch.Generator = _Generator  # type: ignore[misc, assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.Generator = self._generator  # type: ignore[misc]
        self._constructors.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, self)

    @contextmanager
    def recording(self) -> Iterator[list[Sync]]:
        """Record the synchronizations of the block."""
        outer, self.syncs = self.syncs, []
        try:
            yield self.syncs
        finally:
            self.syncs = outer

    def record(self, what: str) -> None:
        if self.syncs is not None:
            self.syncs.append(Sync(what, _project_frame()))

    def move(self, module: nn.Module) -> nn.Module:
        """The module on this device, in place; tied parameters stay tied."""
        moved: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if id(parameter) not in moved:
                        inner = parameter.detach().clone()
                        moved[id(parameter)] = nn.Parameter(DeviceTensor(inner), parameter.requires_grad)
                    part._parameters[name] = moved[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = DeviceTensor(buffer.detach().clone())
        return module


class _Constructors(TorchFunctionMode):
    """`torch.tensor` fills a CPU tensor and copies it, which the dispatcher does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (
            func in (torch.tensor, torch.as_tensor)
            and device is not None
            and torch.device(device).type == NAME
        ):
            return func(*args, **(kwargs | {"device": "cpu"})).to(device)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """A generator of the device draws on the CPU, where the operations compute."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        place = "cpu" if torch.device(device).type == NAME else device
        return super().__new__(cls, place)  # type: ignore[call-arg]


def dispatch(func: Any, args: Any, kwargs: Any, mode: SecondDevice | None) -> Any:
    """Run an operation on the tensors of the host, after the checks that an accelerator makes."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    to_ours = target is not None and target.type == NAME
    if not ours and not to_ours:
        return func(*args, **kwargs)
    _check_devices(func, args, tensors, ours)
    if mode is not None and (what := _sync(func, args, kwargs, ours, target)):
        mode.record(what)
    if to_ours:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = pytree.tree_map_only(DeviceTensor, lambda t: t.host, (args, kwargs))
    leaves_device = target is not None and not to_ours
    if leaves_device and func is aten._to_copy.default:
        return func(*inner_args, **inner_kwargs).clone()
    out = func(*inner_args, **inner_kwargs)
    return out if leaves_device else _wrap(func, out, args)


def _wrap(func: Any, out: Any, args: Any) -> Any:
    """The results as tensors of the device; an operation in place returns the tensor that it got."""
    if func._schema.is_mutable and func not in {aten.resize_.default}:
        known = {id(t.host): t for t in pytree.tree_leaves(args) if isinstance(t, DeviceTensor)}
    else:
        known = {}
    if func is aten.copy_.default and not isinstance(args[0], DeviceTensor):
        return args[0]
    return pytree.tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else DeviceTensor(t), out)


def _check_devices(func: Any, args: Any, tensors: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
    others = [t for t in tensors if not isinstance(t, DeviceTensor)]
    if not others or not ours or func in COPIES:
        return
    # An accelerator takes a number in a CPU tensor as the operand of an elementwise operation only.
    is_elementwise = torch.Tag.pointwise in func.tags or func in SCALAR_FRIENDLY
    if is_elementwise and all(t.dim() == 0 for t in others) and not _writes_to_host(func, args):
        return
    raise MixedDevicesError(f"{func}: tensors on {NAME} and cpu at {_project_frame()}")


def _writes_to_host(func: Any, args: Any) -> bool:
    return bool(func._schema.is_mutable and args and not isinstance(args[0], DeviceTensor))


def _sync(
    func: Any, args: Any, kwargs: Any, ours: Sequence[Tensor], target: torch.device | None
) -> str | None:
    """Why the host would wait for the device in this operation, if it would."""
    if ours and func in READS:
        return f"reading a value ({func})"
    if ours and (torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags):
        # Indexing has the tag for masks.
        if func not in MASK_INDEXING or _indexes_by_mask(args):
            return f"a result that depends on values ({func})"
        return None
    if func in MASK_INDEXING and _indexes_by_mask(args):
        return f"indexing by a mask ({func})"
    if func is aten._to_copy.default and target is not None:
        return _copy_sync(
            source=args[0], to_ours=target.type == NAME, blocking=not kwargs.get("non_blocking")
        )
    if func is aten.copy_.default:
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return _copy_sync(source=args[1], to_ours=isinstance(args[0], DeviceTensor), blocking=blocking)
    return None


def _copy_sync(source: Tensor, *, to_ours: bool, blocking: bool) -> str | None:
    from_ours = isinstance(source, DeviceTensor)
    if from_ours and not to_ours:
        return "copying to the host"
    if not from_ours and to_ours and blocking:
        return "a blocking copy to the device"
    return None


def _indexes_by_mask(args: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def _project_frame() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if ROOT in path.parents and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "?"
