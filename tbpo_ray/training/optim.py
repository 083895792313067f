"""Optimizers, the learning-rate schedule, and the guard that refuses steps with non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.training.distributed import all_reduce_sum, collective_device, is_distributed, world_size
from tbpo_ray.training.readback import Readback

BAD_GRADIENTS, BAD_HEAD = "bad_gradients", "bad_head"
"""Names under which a readback counts tensors with NaN or infinite values."""


class NonFiniteGradientError(RuntimeError):
    """The loss or a gradient is NaN or infinite; raised on every rank in the same step, before the update."""


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Waits for the device."""
    return bool(nonfinite_count([values], values.device) == 0)


def nonfinite_count(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """How many of the tensors' extremes are NaN or infinite: a scalar on `device`, float64.

    aminmax propagates NaN and takes one pass without a temporary, unlike isfinite().all().
    """
    extremes: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            extremes.setdefault((tensor.device, tensor.dtype), []).extend(tensor.aminmax())
    count = torch.zeros((), dtype=torch.float64, device=device)
    for ends in extremes.values():
        count += (~torch.stack(ends).isfinite()).sum().to(device, non_blocking=True)
    return count


class FiniteGuard:
    """Mixin for a torch optimizer that checks the gradients before each step.

    Under DeepSpeed these are this rank's partition, reduced and clipped. The guarded values of `readback`,
    such as the loss, are checked too. All ranks reach the same verdict.
    """

    on_nonfinite = "stop"
    readback: Readback | None = None
    """What else the step reads from the device; the verdict travels with it. Without it, the guard reads the
    gradients alone."""
    on_read: Callable[[Readback], None] = staticmethod(lambda readback: None)
    """Called before the values are read, to add what is known only then."""
    skipped = 0
    param_groups: list[dict[str, Any]]

    def all_finite(self) -> bool:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        readback = self.readback
        if readback is None or readback.is_read:
            # ZeRO 3 updates a large model in parts, with a call for each of them.
            own = gradients[0].device if gradients else torch.device("cpu")
            readback = Readback(collective_device() if is_distributed() else own)
        else:
            self.on_read(readback)
        # Each rank counts the gradients that it holds.
        readback.add(BAD_GRADIENTS, nonfinite_count(gradients, readback.device))
        return readback[BAD_GRADIENTS] == [0.0] and readback.is_finite

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if not self.all_finite():
            self.refuse()
            return None
        return super().step(closure)  # type: ignore[misc]

    def refuse(self) -> None:
        """Count a skipped step, or raise NonFiniteGradientError with `on_nonfinite=stop`."""
        if self.on_nonfinite == "stop":
            raise NonFiniteGradientError("the loss or a gradient is NaN or infinite")
        self.skipped += 1


class GuardedRMSprop(FiniteGuard, torch.optim.RMSprop):
    """RMSprop with the guard."""


class GuardedAdamW(FiniteGuard, torch.optim.AdamW):
    """AdamW with the guard."""


def build_optimizer(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """The policy's optimizer, on its trainable parameters."""
    trainable = [p for p in parameters if p.requires_grad]
    kind: type[GuardedRMSprop] | type[GuardedAdamW] = {"rmsprop": GuardedRMSprop, "adamw": GuardedAdamW}[
        training.optimizer
    ]
    optimizer = kind(trainable, lr=training.learning_rate, weight_decay=training.weight_decay)
    optimizer.on_nonfinite = training.on_nonfinite
    return optimizer


def learning_rate(step: int, total: int, training: TrainingConfig) -> float:
    """The learning rate of step `step` (0-based) of `total`: linear warm-up, then the scheduler's decay."""
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.scheduler == "constant":
        return training.learning_rate
    progress = (step - warmup) / max(1, total - warmup)
    decay = 1.0 - progress if training.scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.learning_rate * decay


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class HeadOptimizer:
    """AdamW of the learned state baseline.

    The head is small, so every rank holds all of it, and its gradients are averaged over the ranks here. It
    is not part of the policy's engine, whose clipping and partitioning therefore do not depend on it.
    """

    def __init__(self, head: nn.Module, lr: float):
        self.head = head
        self.adamw = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)

    def offer(self, readback: Readback) -> None:
        """Average the gradients over the ranks, and add to what is read whether they are finite."""
        gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
        if gradients and is_distributed():
            _average_over_ranks(gradients)
        readback.add(BAD_HEAD, nonfinite_count(gradients, readback.device))

    def step(self, readback: Readback, *, skip: bool = False) -> None:
        """Update the head unless a gradient is not finite, and clear the gradients.

        Args:
            readback: has what `offer` added.
            skip: do not update: the policy's step was skipped.
        """
        if not skip and readback[BAD_HEAD] == [0.0]:
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Head weights and AdamW state by key, as they are: the next step changes them."""
        out = {f"head.{k}": v.detach().contiguous() for k, v in self.head.state_dict().items()}
        for index, state in self.adamw.state_dict()["state"].items():
            for key, value in state.items():
                out[f"adamw.{index}.{key}"] = torch.as_tensor(value).detach().contiguous()
        return out

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.head.load_state_dict(head_weights(tensors))
        current = self.adamw.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adamw."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        self.adamw.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors with their mean over the ranks, in one collective."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    all_reduce_sum(flat)
    flat /= world_size()
    means = torch.split(flat, [t.numel() for t in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def head_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's own state dict, extracted from what `HeadOptimizer.state_dict` saved."""
    return {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
