"""The DeepSpeed engine of one worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tbpo_ray.config.deepspeed_options import offloads_to_nvme
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.models.hidden_modules import hide_modules
from tbpo_ray.training.distributed import world_size
from tbpo_ray.training.optim import FiniteGuard, build_optimizer, set_learning_rate
from tbpo_ray.training.readback import Readback

FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
"""bf16 gradients of micro-batches and ranks are summed in fp32: a bf16 sum loses what is 256 times
smaller than it."""
GRAD_NORM = "grad_norm"


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration: this project's settings, overridden by `training.deepspeed`."""
    training = config.training
    overrides = dict(training.deepspeed)
    overrides.pop("stage", None)
    zero = dict(overrides.pop("zero_optimization", None) or {})
    zero["stage"] = training.zero_stage
    # Buckets are filled and reduced in the order of the backward pass either way; on a GPU, the reduction
    # runs on a stream of its own while the next bucket is filled.
    zero.setdefault("overlap_comm", config.cluster.gpus)
    zero.setdefault("round_robin_gradients", False)
    base: dict[str, Any] = {
        # Micro-batches differ in size and number between steps: the loop sets the boundary itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if training.precision == "bf16":
        base |= {"bf16": {"enabled": True}, **FP32_GRADIENTS}
        # Without ZeRO, DeepSpeed can only accumulate in bf16. Stage 1 computes the same, in fp32.
        zero["stage"] = max(1, zero["stage"])
    return base | overrides


def without_partitions(config: Config, world: int) -> Config:
    """Use stage 0 where ZeRO has nothing to partition and would only copy: one worker, fp32, no offload."""
    if world > 1 or config.training.precision != "fp32" or config.training.offloads:
        return config
    kept = {k: v for k, v in config.training.deepspeed.items() if k != "zero_optimization"}
    training = config.training.model_copy(update={"deepspeed": kept | {"stage": 0}})
    return config.model_copy(update={"training": training})


def partitions_weights(config: Config) -> bool:
    """Whether the workers divide the weights themselves among them: ZeRO stage 3, in a process group."""
    if not dist.is_initialized():
        return False
    zero = deepspeed_config(without_partitions(config, world_size()))["zero_optimization"]
    return bool(zero["stage"] == 3)


def check_offload_library(config: Config) -> None:
    """Refuse to offload to a disk where DeepSpeed cannot build what reads and writes there.

    Raises:
        InputError: libaio or its headers are not installed.
    """
    key = offloads_to_nvme(config.training.deepspeed)
    if key is None:
        return
    import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise InputError(
            f"{key}=nvme: DeepSpeed needs libaio and its headers (the package libaio-dev), which are not "
            "installed here; install them on all nodes, or use device: cpu"
        )


def import_deepspeed(device: torch.device) -> Any:
    """The module `deepspeed`, set up for the kind of device."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed compiles a small op on first use. The cache belongs to this Python environment: two
    # environments that share one cache would rebuild it for each other every time.
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    with hide_modules("mlflow"):
        import deepspeed

    return deepspeed


class Engine:
    """A DeepSpeed engine around a module whose forward returns token scores."""

    def __init__(self, module: nn.Module, config: Config, device: torch.device):
        deepspeed = import_deepspeed(device)
        self.device = device
        optimizer = build_optimizer(module.parameters(), config.training)
        self.client_optimizer = optimizer
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self.stage = self.engine.zero_optimization_stage()
        if not self.stage and self.engine.dp_world_size == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients to reduce nothing
        self.names = {id(p): n for n, p in module.named_parameters()}

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the step's last micro-batch, after which they are reduced."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, rate: float, readback: Readback | None = None) -> float:
        """Clip the gradients, check them, update the weights.

        Args:
            readback: what else the step reads from the device, such as the loss, which the guard checks too.

        Returns:
            The gradient norm before clipping.

        Raises:
            NonFiniteGradientError: with `training.on_nonfinite=stop`, on all ranks, before any update.
        """
        readback = readback or Readback(self.device)
        self._guard.readback = readback
        set_learning_rate(self.optimizer, rate)
        if self.optimizer is self.client_optimizer:
            readback.add(GRAD_NORM, self._gradient_norm())
        else:
            self._guard.on_read = self._add_zero_norm
        self.engine.step()
        # With a non-finite gradient norm ZeRO skips the step itself, silently, before it reaches the guard.
        if getattr(self.optimizer, "overflow", False):
            self._guard.refuse()
        if GRAD_NORM in readback:
            norm: Any = readback[GRAD_NORM][0] / world_size()  # the same on every rank
        else:
            norm = self.engine.get_global_grad_norm()
        # DeepSpeed returns -1 for a norm that is not finite, and None where `compute_grad_norm` is off.
        return float(norm) if norm is not None and norm >= 0 else float("nan")

    @property
    def _guard(self) -> FiniteGuard:
        return cast("FiniteGuard", self.client_optimizer)

    def _gradient_norm(self) -> Tensor:
        """The norm of gradients that every rank holds whole: without ZeRO, DeepSpeed does not return it."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _add_zero_norm(self, readback: Readback) -> None:
        # ZeRO knows its norm, on the device, when it calls the optimizer, and hands it out afterwards.
        norm = getattr(self.optimizer, "_global_grad_norm", None)
        if norm is not None:
            readback.add(GRAD_NORM, norm)

    @property
    def skipped(self) -> int:
        return int(getattr(self.client_optimizer, "skipped", 0))
