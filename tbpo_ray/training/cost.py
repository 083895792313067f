"""What a training run cost: pairs, tokens and seconds, stored in its folder when it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tbpo_ray.storage.files import write_atomic
from tbpo_ray.training import token_weight_cache
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.reference_scores import scorings

COST = "cost.json"
_TIMINGS = "timings.jsonl"


@dataclass(frozen=True)
class RunCost:
    """The cost of a finished run."""

    steps: int
    pairs: int
    """Pairs trained on, over all steps."""
    tokens: int
    """Tokens that went through the model in training, without padding."""
    seconds: float
    """Duration of the training steps, without starting workers, evaluations and checkpoints."""
    scored_pairs: int | None = None
    """Pairs whose log-probs were computed before training, once for each frozen model and instruction; None
    if it is not known."""
    scoring_seconds: float | None = None
    """Duration of that, also if another run with the same pairs had it done."""

    def save(self, run_dir: Path) -> None:
        """Write `cost.json`."""
        write_atomic(run_dir / COST, json.dumps(asdict(self), indent=1))


def measure_cost(run_dir: Path, cache: Path, folders: Iterable[str], *, steps: int, pairs: int) -> RunCost:
    """The cost of a run that has reached its last step.

    Args:
        cache: the folder of reference scores and token weights.
        folders: folders of the reference scores and token weights that the run reads.
        steps: steps of the run. Steps that a failure made it repeat count as often as they were computed.
        pairs: pairs that it was trained on.
    """
    read: set[str] = set().union(*map(_score_folders, folders))
    scored = [scoring for scoring in scorings(cache) if scoring["folder"] in read]
    return replace(
        _training_cost(run_dir, steps, pairs),
        scored_pairs=sum(scoring["pairs"] for scoring in scored),
        scoring_seconds=sum(scoring["seconds"] for scoring in scored),
    )


def read_cost(run_dir: Path) -> RunCost | None:
    """The cost of a finished run, for one that an older version trained without that of scoring.

    None if the run has left no metrics.
    """
    file = run_dir / COST
    if file.is_file():
        return RunCost(**json.loads(file.read_text(encoding="utf-8")))
    rows = read_metrics(run_dir)
    return _training_cost(run_dir, rows[-1]["step"], rows[-1]["pairs_seen"]) if rows else None


def _training_cost(run_dir: Path, steps: int, pairs: int) -> RunCost:
    rows = _timings(run_dir)
    seconds = sum(row["step_seconds"] for row in rows)
    tokens = sum(row["step_seconds"] * row["tokens_per_second"] for row in rows)
    # With training.log_every above 1, each row stands for that many steps.
    scale = steps / max(1, len({row["step"] for row in rows}))
    return RunCost(steps, pairs, tokens=round(tokens * scale), seconds=seconds * scale)


def _timings(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / _TIMINGS
    if not file.is_file():
        return []
    # Without the part behind the last line break, which a killed process left incomplete.
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _score_folders(folder: str) -> set[str]:
    """The names of the reference scores in a folder, or of those that its token weights come from."""
    manifest = Path(folder) / token_weight_cache.MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return {Path(folder).name, *content.get("scores", [])}
