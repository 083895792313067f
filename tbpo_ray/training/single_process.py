"""The same training in one process: plain PyTorch, no Ray, no DeepSpeed.

The very same batches, scores and objective as the worker loop; what the platform's overhead is measured
against, and what runs where neither Ray nor DeepSpeed is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tbpo_ray.config.schema import Config
from tbpo_ray.data.reader import MicroBatch
from tbpo_ray.training.batch import collate_columns
from tbpo_ray.training.components import TrainingComponents
from tbpo_ray.training.metrics_file import MetricSums
from tbpo_ray.training.optim import HeadOptimizer, build_optimizer, learning_rate, set_learning_rate


def train_local(
    config: Config,
    parts: TrainingComponents,
    micro_batches: Iterable[MicroBatch],
    total: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, row: None,
) -> None:
    """Train `parts.scorer` (and its head) in place.

    Args:
        micro_batches: of one rank, from `tbpo_ray.data.stream.local_micro_batches`.
        total: optimizer steps, for the schedule.
        on_step: called after each step with its 1-based number and its metrics.
    """
    device = next(parts.scorer.parameters()).device
    trained = [p for p in parts.scorer.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, config.training)
    head = HeadOptimizer(parts.head, config.objective.state_baseline.lr) if parts.head is not None else None
    watched: list[float] = []
    optimizer.watched = lambda: watched  # type: ignore[attr-defined]
    sums = MetricSums()
    for micro in micro_batches:
        batch = collate_columns(
            micro.columns(), sides=parts.step.sides, pad_id=parts.pad_id, shared=parts.shared, cut=parts.cut
        ).to(device)
        loss_sum, metrics = parts.step(parts.scorer, batch, micro.step)
        (loss_sum / micro.pairs_in_step).backward()
        sums.add(loss_sum, metrics, len(micro.pair_ids))
        if micro.index < micro.count - 1:
            continue
        watched[:] = [sums.loss]
        set_learning_rate(optimizer, learning_rate(micro.step, total, config.training))
        if config.training.max_grad_norm is not None:
            norm = float(torch.nn.utils.clip_grad_norm_(trained, config.training.max_grad_norm))
            watched.append(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if head is not None:
            head.step()
        on_step(micro.step + 1, sums.reduce(device))
        sums = MetricSums()
