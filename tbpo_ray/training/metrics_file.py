"""Metric sums over micro-batches and ranks, and the files a run's metrics are written to.

`metrics.jsonl` holds what the run computed and nothing that depends on the clock, so that a resumed
run writes the very same file; `timings.jsonl` holds what depends on the clock; `validation.jsonl`
scores of sampled checkpoints; `events.log` sentences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tbpo_ray.storage.ownership import WriteLease

VALIDATION = "validation.jsonl"


class MetricSums:
    """Pair-weighted sums of metrics; tensors stay tensors until `reduce`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.pairs = 0

    def add(self, loss_sum: Tensor, metrics: Mapping[str, Tensor], pairs: int) -> None:
        """`metrics` are means over the `pairs` of a micro-batch; `loss_sum` is a sum."""
        values = {"loss": loss_sum.detach().float()} | {
            k: v.detach().float() * pairs for k, v in metrics.items()
        }
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.pairs += pairs

    @property
    def loss(self) -> float:
        """Sum of the losses so far, on this rank; 0 before the first."""
        return float(self.sums.get("loss", 0.0))

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Means over all pairs of all ranks. Every rank must have seen the same metric names."""
        names = sorted(self.sums)
        flat = torch.stack(
            [*(self.sums[n].double() for n in names), torch.tensor(float(self.pairs)).double()]
        )
        flat = flat.to(device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        values = flat.tolist()
        return {n: v / max(1.0, values[-1]) for n, v in zip(names, values[:-1], strict=True)}


class MetricsFile:
    """The three files of a run, written by rank 0.

    Writing raises NotOursError once the run has passed to others than the holder of `permit`.
    """

    def __init__(self, run_dir: Path, lease: WriteLease, *, enabled: bool = True):
        self.lease, self.enabled = lease, enabled
        self.metrics_path = run_dir / "metrics.jsonl"
        self.timings_path = run_dir / "timings.jsonl"
        self.events_path = run_dir / "events.log"

    def write(self, row: Mapping[str, float], timing: Mapping[str, float]) -> None:
        if self.enabled:
            self.lease.check()
            # Timings first: whoever follows the metrics finds the timing of each of its lines.
            append_line(self.timings_path, json.dumps(timing))
            append_line(self.metrics_path, json.dumps(row))

    def log_event(self, sentence: str) -> None:
        if self.enabled:
            self.lease.check()
            append_line(self.events_path, sentence)

    def offset(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def rewind(self, offset: int) -> None:
        """Drop the lines behind `offset` bytes: steps that will be done again."""
        if self.enabled and self.metrics_path.exists():
            self.lease.check()
            os.truncate(self.metrics_path, min(offset, self.offset()))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that is cut off is left out."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_line(file: Path, line: str) -> None:
    """Add a line to a file that others may be reading."""
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
