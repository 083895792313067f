"""The evaluated policies as MLflow's logged models, with the metrics of the verdict."""

from __future__ import annotations

import json
from pathlib import Path

from tbpo_ray.evaluation.prompts import PromptSet
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict
from tbpo_ray.tracking.mlflow_model import ModelDescription
from tbpo_ray.tracking.tracker import Tracker

DATASET = "held-out prompts"
"""Name of the dataset that the metrics of an evaluation are linked to."""


def log_evaluated_models(tracker: Tracker, verdict: Verdict, prompts: PromptSet) -> None:
    """Link the metrics of every policy to its logged model, as `evaluation/<metric>`.

    The model of a training run has them in that run too, so that runs can be sorted by them. A policy that no
    run of this experiment has trained, such as a base model, gets a logged model without files.

    Raises:
        RunFailedError: the store does not accept them.
    """
    models = []
    for policy in verdict.policies:
        model = tracker.find_model(policy.model)
        if model is None:
            model = tracker.log_model(policy.model, _description(policy), with_files=False)
        is_own = model.source_run_id == tracker.run_id
        # Several policies without a run share this one: their names keep the metrics apart.
        prefix = f"{policy.name}/" if is_own else "evaluation/"
        metrics = {f"{prefix}{name}": estimate.value for name, estimate in policy.metrics.items()}
        step = int(model.tags.get("tbpo.step", 0))
        tracker.log_model_metrics(model, metrics, dataset=(DATASET, prompts.digest), step=step)
        models.append(model)
    tracker.log_model_inputs(models)


def _description(policy: PolicyVerdict) -> ModelDescription:
    folder = Path(policy.model)
    facts: dict[str, str] = {}
    file = folder / "config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        facts = {"architecture": ", ".join(config.get("architectures") or []) or "unknown"}
    return ModelDescription(policy.name, params={"folder": str(folder), **facts}, model_type="evaluated")
