"""Log the policies of a training run as MLflow's logged models, with the metrics measured on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tbpo_ray.config.loading import flatten, to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.json_lines import loads_numbers
from tbpo_ray.storage.paths import run_dir
from tbpo_ray.tracking.mlflow_model import ModelDescription
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.metrics_file import VALIDATION, read_metrics

_SECTIONS = ("model", "data", "objective", "training", "run.seed")
"""Keys that determine a policy, and thereby the parameters of its logged model."""
_RESULTS = ("loss", "rewards/margin", "rewards/accuracy", "eval/loss", "eval/rewards/accuracy", "kl/k3")
"""Metrics in the description of a run."""
_EVAL, _VALIDATION = "eval/", "validation/"


def describe_policy(config: Config, step: int, *, model_type: str = "policy") -> ModelDescription:
    """The logged model of a policy of this run: parameters, generation settings and origin."""
    flat = flatten(to_tree(config))
    return ModelDescription(
        config.run.name if model_type == "policy" else f"{config.run.name}-step-{step}",
        params={key: value for key, value in flat.items() if key.startswith(_SECTIONS)},
        metadata={
            "run": config.run.name,
            "step": step,
            "base_model": config.model.name_or_path,
            "objective": config.objective.name,
        },
        max_tokens=config.generation.max_tokens,
        template_kwargs=config.data.template_kwargs,
        step=step,
        model_type=model_type,
    )


def log_policies(
    config: Config, tracker: Tracker, step: int, held_out: PreparedPairs | None, *, export: bool
) -> None:
    """Log the export, and the checkpoints that are kept and have metrics, as outputs of the run.

    Args:
        step: the last optimizer step.
        export: whether the run has an `export/`.

    Raises:
        RunFailedError: the store does not accept them.
    """
    folder = run_dir(config)
    tracker.flush()
    metrics = measured(folder)
    dataset = ("eval", held_out.fingerprint) if held_out is not None else None
    if export:
        with_files = config.tracking.log_models == "weights"
        step = _exported_step(config, step)
        model = tracker.log_model(folder / "export", describe_policy(config, step), with_files=with_files)
        log_progress(f"MLflow: logged model {model.name} ({model.model_id})")
        _log_metrics(tracker, model, metrics.get(step, {}), dataset, step)
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        at = int(checkpoint.name.removeprefix("step-"))
        if at in metrics and (checkpoint / ckpt.MANIFEST).is_file():
            description = describe_policy(config, at, model_type="checkpoint")
            model = tracker.log_model(checkpoint, description, with_files=False)
            _log_metrics(tracker, model, metrics[at], dataset, at)


def result_table(row: Mapping[str, Any]) -> str:
    """The last row of metrics as a Markdown table, for the description of the run."""
    shown = {name: row[name] for name in _RESULTS if name in row}
    if not shown:
        return ""
    head = f"| step | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}"
    return f"{head}\n| {int(row['step'])} | {' | '.join(f'{value:.4g}' for value in shown.values())} |"


def measured(folder: Path) -> dict[int, dict[str, float]]:
    """The metrics that belong to the policy of a step: of held-out pairs, and of its samples."""
    found: dict[int, dict[str, float]] = {}
    rows = read_metrics(folder)
    file = folder / VALIDATION
    if file.is_file():
        rows += [loads_numbers(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    for row in rows:
        metrics = {key: value for key, value in row.items() if key.startswith((_EVAL, _VALIDATION))}
        if metrics:
            found.setdefault(int(row["step"]), {}).update(metrics)
    return found


def _log_metrics(
    tracker: Tracker,
    model: Any,
    metrics: Mapping[str, float],
    dataset: tuple[str, str] | None,
    step: int,
) -> None:
    """Link metrics to a model; those of samples were not measured on the pairs of `dataset`."""
    for prefix, data in ((_EVAL, dataset), (_VALIDATION, None)):
        chosen = {key: value for key, value in metrics.items() if key.startswith(prefix)}
        if chosen:
            tracker.log_model_metrics(model, chosen, dataset=data, step=step)


def _exported_step(config: Config, last: int) -> int:
    """The step whose weights `export/` has."""
    if config.training.export != "best":
        return last
    training = config.training
    best = ckpt.best(run_dir(config) / "checkpoints", training.best_metric, training.best_mode, 1)
    return int(json.loads((best[0] / "state.json").read_text())["step"]) if best else last
