"""Training in one process with plain PyTorch, without Ray and DeepSpeed.

It shares batches, scores and objective with the worker loop. The platform's overhead is measured against it,
and it runs where neither Ray nor DeepSpeed is installed.
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
from tbpo_ray.training.prefetch import BatchPrefetcher
from tbpo_ray.training.readback import Readback


def train_local(
    config: Config,
    components: TrainingComponents,
    micro_batches: Iterable[MicroBatch],
    total: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, row: None,
) -> None:
    """Train `components.scorer`, and the baseline head if there is one, in place.

    Args:
        micro_batches: those of a single rank, from `tbpo_ray.data.stream.local_micro_batches`.
        total: the number of optimizer steps, for the learning-rate schedule.
        on_step: called after each step with its 1-based number and its metrics.
    """
    scorer, step = components.scorer, components.step
    device = next(scorer.parameters()).device
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, config.training)
    head = None
    if components.head is not None:
        head = HeadOptimizer(components.head, config.objective.state_baseline.lr)
    batches = BatchPrefetcher(
        iter(micro_batches), lambda micro: collate_columns(micro.columns(), components.layout), device
    )
    sums, readback = MetricSums(), Readback(device)
    for micro, batch in batches:
        loss_sum, metrics = step(scorer, batch, micro.step)
        (loss_sum / micro.pairs_in_step).backward()  # type: ignore[no-untyped-call]
        sums.add(loss_sum, metrics, len(micro.pair_ids))
        if micro.index < micro.count - 1:
            continue
        sums.offer(readback)
        set_learning_rate(optimizer, learning_rate(micro.step, total, config.training))
        if config.training.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(trained, config.training.max_grad_norm)
            readback.add("grad_norm", norm, guarded=True)
        if head is not None:
            head.offer(readback)
        optimizer.readback = readback  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if head is not None:
            head.step(readback)
        on_step(micro.step + 1, sums.means(readback))
        sums, readback = MetricSums(), Readback(device)
