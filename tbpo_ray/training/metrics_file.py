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
from tbpo_ray.training.readback import Readback

VALIDATION = "validation.jsonl"


class MetricSums:
    """Pair-weighted sums of metrics. They stay on the device until a `Readback` fetches them."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.pairs = 0
        self._loss: Tensor | None = None
        self._sums: Tensor | None = None
        """[names] float32"""

    def add(self, loss_sum: Tensor, metrics: Mapping[str, Tensor], pairs: int) -> None:
        """Add a micro-batch: its summed loss, and metrics that are means over its `pairs`.

        Raises:
            ValueError: other metrics than in the micro-batch before.
        """
        names = tuple(metrics)
        loss = loss_sum.detach().float()
        if self._loss is None:
            self.names, self._loss = names, loss
            self._sums = _stack(metrics, like=loss) * pairs
        elif names != self.names:
            raise ValueError(f"metrics differ between micro-batches: {sorted({*names} ^ {*self.names})}")
        else:
            assert self._sums is not None
            self._loss = self._loss + loss
            self._sums = self._sums + _stack(metrics, like=loss) * pairs
        self.pairs += pairs

    def offer(self, readback: Readback) -> None:
        """Add the sums to what is read from the device; the loss is guarded."""
        device = readback.device
        readback.add("loss", self._loss if self._loss is not None else 0.0, guarded=True)
        readback.add("metrics", self._sums if self._sums is not None else torch.zeros(0, device=device))
        readback.add("pairs", self.pairs)

    def means(self, readback: Readback) -> dict[str, float]:
        """Means over all pairs of all ranks, by sorted name. Reads what `offer` added."""
        pairs = max(1.0, readback["pairs"][0])
        sums = dict(zip(self.names, readback["metrics"], strict=True)) | {"loss": readback["loss"][0]}
        return {name: sums[name] / pairs for name in sorted(sums)}

    def reduce(self, device: torch.device) -> dict[str, float]:
        """`means` of these sums alone. Collective: every rank must have added the same metric names."""
        readback = Readback(device)
        self.offer(readback)
        return self.means(readback)


def _stack(metrics: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """[names] float32"""
    if not metrics:
        return like.new_zeros(0)
    return torch.stack([value.detach().float() for value in metrics.values()])


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
