"""Metric sums over micro-batches and ranks, and the files that a run's metrics are written to.

metrics.jsonl     what the run computed, independent of the clock: a resumed run writes an identical file
timings.jsonl     what depends on the clock
validation.jsonl  scores of checkpoints that were sampled
events.log        one sentence per event, such as a resumption or a failed worker
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbpo_ray.storage.json_lines import dumps, loads_numbers
from tbpo_ray.storage.ownership import WriteLease
from tbpo_ray.training.distributed import all_reduce_sum

VALIDATION = "validation.jsonl"


class MetricSums:
    """Pair-weighted sums of metrics. They stay tensors until `reduce`, to avoid waiting for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.pairs = 0

    def add(self, loss_sum: Tensor, metrics: Mapping[str, Tensor], pairs: int) -> None:
        """Add a micro-batch: its summed loss, and metrics that are means over its `pairs`."""
        values = {"loss": loss_sum.detach().float()} | {
            k: v.detach().float() * pairs for k, v in metrics.items()
        }
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.pairs += pairs

    @property
    def loss(self) -> float:
        """The sum of the losses so far, on this rank; 0 before the first micro-batch."""
        return float(self.sums.get("loss", 0.0))

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Means over all pairs of all ranks. Collective: every rank must have added the same metric names."""
        names = sorted(self.sums)
        flat = torch.stack(
            [*(self.sums[n].double() for n in names), torch.tensor(float(self.pairs)).double()]
        )
        flat = flat.to(device)
        all_reduce_sum(flat)
        values = flat.tolist()
        return {n: v / max(1.0, values[-1]) for n, v in zip(names, values[:-1], strict=True)}


class MetricsFile:
    """Metrics, timings and events of a run. Writes nothing unless `enabled`, which is set on rank 0.

    Every write raises LeaseLostError once another driver or worker group has taken over the run.
    """

    def __init__(self, run_dir: Path, lease: WriteLease, *, enabled: bool = True):
        self.lease, self.enabled = lease, enabled
        self.metrics_path = run_dir / "metrics.jsonl"
        self.timings_path = run_dir / "timings.jsonl"
        self.events_path = run_dir / "events.log"

    def write(self, row: Mapping[str, float], timing: Mapping[str, float]) -> None:
        if self.enabled:
            self.lease.check()
            # Timings first: a reader that follows the metrics then finds the timing of each of their lines.
            append_line(self.timings_path, dumps(timing))
            append_line(self.metrics_path, dumps(row))

    def log_event(self, sentence: str) -> None:
        if self.enabled:
            self.lease.check()
            append_line(self.events_path, sentence)

    def offset(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def rewind(self, offset: int) -> None:
        """Truncate the metrics to `offset` bytes: the steps after it will be repeated."""
        if self.enabled and self.metrics_path.exists():
            self.lease.check()
            os.truncate(self.metrics_path, min(offset, self.offset()))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, without an incomplete last line; null is read as NaN."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [loads_numbers(line) for line in lines[:-1] if line]


def append_line(file: Path, line: str) -> None:
    """Append a line in one write, since others may be reading the file."""
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
