"""The champion: the best policy enters the model registry, but only through the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tbpo_ray.config.schema import PromotionConfig
from tbpo_ray.evaluation.collect import Entry
from tbpo_ray.tracking.tracker import Tracker

ALIAS = "champion"


@dataclass(frozen=True)
class Gate:
    """What the gate said."""

    promoted: bool
    sentence: str
    version: str | None = None


def check_gate(promote: PromotionConfig, entries: Sequence[Entry], tracker: Tracker) -> Gate | None:
    """Register the policy that leads in `metric` as champion if its interval's low end reaches `at_least`.

    Returns:
        None where no `model_name` is configured.

    Raises:
        InputError: MLflow refuses the name, or the winner's folder is gone.
    """
    if promote.model_name is None:
        return None
    known = [entry for entry in entries if promote.metric in entry.policy.metrics]
    if not known:
        return Gate(False, f"Nobody is promoted: no policy has the metric {promote.metric}.")
    best = max(known, key=lambda entry: entry.policy.metrics[promote.metric].value)
    estimate = best.policy.metrics[promote.metric]
    low = estimate.low if estimate.low is not None else estimate.value
    claim = f"{best.label} leads in {promote.metric} with {estimate.value:.3f}, lower end {low:.3f}"
    if low < promote.at_least:
        return Gate(False, f"Nobody is promoted: {claim}, and the gate asks for {promote.at_least}.")
    version = tracker.register_model(best.policy.model, promote.model_name, ALIAS)
    tracker.set_tags({"promoted": f"{promote.model_name} version {version}"})
    return Gate(
        True,
        f"{claim}, at or above {promote.at_least}: registered as {promote.model_name} version {version}, "
        f"alias {ALIAS}.",
        version,
    )
