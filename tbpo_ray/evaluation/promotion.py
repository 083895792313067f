"""Promotion: the best policy is registered as the champion if it passes the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tbpo_ray.config.schema import PromotionConfig
from tbpo_ray.evaluation.collect import Entry
from tbpo_ray.tracking.mlflow_model import ModelDescription
from tbpo_ray.tracking.tracker import Tracker

ALIAS = "champion"


@dataclass(frozen=True)
class Gate:
    """The gate's decision."""

    promoted: bool
    sentence: str
    version: str | None = None


def check_gate(promote: PromotionConfig, entries: Sequence[Entry], tracker: Tracker) -> Gate | None:
    """Register the policy with the highest `metric` as champion if the lower end of its interval is at least
    `at_least`.

    Returns:
        None if no `model_name` is configured.

    Raises:
        InputError: MLflow rejects the name, or the best policy's folder no longer exists.
        RunFailedError: the store does not accept the model.
    """
    if promote.model_name is None:
        return None
    candidates = [entry for entry in entries if promote.metric in entry.policy.metrics]
    if not candidates:
        return Gate(False, f"No policy is promoted: none has the metric {promote.metric}.")
    best = max(candidates, key=lambda entry: entry.policy.metrics[promote.metric].value)
    estimate = best.policy.metrics[promote.metric]
    low = estimate.low if estimate.low is not None else estimate.value
    result = (
        f"{best.label} has the highest {promote.metric}, {estimate.value:.3f} "
        f"(lower end of its interval {low:.3f})"
    )
    if low < promote.at_least:
        return Gate(
            False, f"No policy is promoted: {result}, below compare.promote.at_least={promote.at_least}."
        )
    description = ModelDescription(best.label, params=best.settings)
    version = tracker.register_model(best.policy.model, promote.model_name, ALIAS, description)
    tracker.set_tags({"promoted": f"{promote.model_name} version {version}"})
    return Gate(
        True,
        f"{result}, at least {promote.at_least}: registered as {promote.model_name} version {version}, "
        f"alias {ALIAS}.",
        version,
    )
