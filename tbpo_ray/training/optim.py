"""Optimizers, the learning-rate schedule, and the guard that keeps a non-finite step from moving weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tbpo_ray.config.schema import TrainingConfig


class NonFiniteGradientError(RuntimeError):
    """Raised on every rank, in the same step, before any weight moves."""


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass and without a copy."""
    return not values.numel() or all(math.isfinite(end) for end in torch.stack(values.aminmax()).tolist())


def collective_device() -> torch.device:
    """Where tensors have to be for the ranks to reduce them: with NCCL on the GPU, also where an offloaded
    optimizer holds its own on the CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class FiniteGuard:
    """Mixed into a torch optimizer: looks at the gradients (in DeepSpeed: this rank's partition, reduced
    and clipped) before the step, and at the numbers that `watched` gives, such as the loss. All ranks
    agree on what to do."""

    on_nonfinite = "stop"
    watched: Callable[[], Iterable[float]] = staticmethod(lambda: ())
    skipped = 0
    param_groups: list[dict[str, Any]]

    def all_finite(self) -> bool:
        bad = torch.zeros(1)
        bad += sum(not math.isfinite(value) for value in self.watched())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not all_finite(p.grad):
                    bad += 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            bad = bad.to(collective_device())
            dist.all_reduce(bad)
        return float(bad) == 0.0

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if not self.all_finite():
            self.refuse()
            return None
        return super().step(closure)  # type: ignore[misc]

    def refuse(self) -> None:
        """Count a step that is left out, or raise NonFiniteGradient with `on_nonfinite=stop`."""
        if self.on_nonfinite == "stop":
            raise NonFiniteGradientError("the loss or a gradient is NaN or infinite")
        self.skipped += 1


class GuardedRMSprop(FiniteGuard, torch.optim.RMSprop):
    """RMSprop behind the guard."""


class GuardedAdamW(FiniteGuard, torch.optim.AdamW):
    """AdamW behind the guard."""


def build_optimizer(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """The policy's optimizer, on trainable parameters only."""
    chosen = [p for p in parameters if p.requires_grad]
    kind = {"rmsprop": GuardedRMSprop, "adamw": GuardedAdamW}[training.optimizer]
    # `foreach` changes no result and saves a loop over the few flat partitions.
    optimizer = kind(chosen, lr=training.learning_rate, weight_decay=training.weight_decay)
    optimizer.on_nonfinite = training.on_nonfinite
    return optimizer


def learning_rate(step: int, total: int, training: TrainingConfig) -> float:
    """The rate of step `step` (0-based) of `total`: linear warm-up, then the scheduler's decay to 0."""
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.scheduler == "constant":
        return training.learning_rate
    share = (step - warmup) / max(1, total - warmup)
    decay = 1.0 - share if training.scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return training.learning_rate * decay


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class HeadOptimizer:
    """AdamW of the learned state baseline. The head is small, so every rank holds all of it and its
    gradients are summed over the ranks by hand: the policy's engine, its clipping and its partitions
    never see it."""

    def __init__(self, head: nn.Module, lr: float):
        self.head = head
        self.adamw = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)

    def step(self) -> None:
        gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
        if not gradients:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            at = 0
            for g in gradients:
                g.copy_(flat[at : at + g.numel()].view_as(g))
                at += g.numel()
        if all(all_finite(g) for g in gradients):
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Head weights and AdamW state as flat tensors, for safetensors."""
        out = {f"head.{k}": v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}
        for index, state in self.adamw.state_dict()["state"].items():
            for key, value in state.items():
                out[f"adamw.{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
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


def head_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's own state dict out of what `HeadOptimizer.state_dict` saved."""
    return {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
