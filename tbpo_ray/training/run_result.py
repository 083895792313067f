"""The result of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    run_dir: Path
    export: Path
    mlflow_run_id: str | None
    metrics: dict[str, Any]
    """The last logged row of `metrics.jsonl`."""
    already_finished: bool = False
