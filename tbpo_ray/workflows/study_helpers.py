"""The helper models of a study's objective: trained once, before the trials, which all read the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tbpo_ray.config.loading import is_at_or_below, stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training.estimate import plan_text
from tbpo_ray.workflows.helpers import (
    check_helpers,
    data_description,
    plan_helpers,
    train_helper,
    with_helpers,
)
from tbpo_ray.workflows.pipeline import stages

SHARED = (
    "objective.helpers", "objective.name", "objective.token_weights.source",
    "objective.token_weights.positive", "objective.token_weights.negative", "model.name_or_path",
    "model.reference", "objective.guide.model", "objective.arc.shape",
)  # fmt: skip
"""Keys that decide which helper models there are, or what fits them."""


def check_study_helpers(config: Config, searched: Iterable[str], probes: Sequence[Config]) -> None:
    """Check the helpers of a study, and that no trial would need others.

    Args:
        searched: keys of the search space.
        probes: configurations that represent the trials.

    Raises:
        InputError: naming the key.
    """
    start = stages(config)[1]
    helpers = plan_helpers(start)
    check_helpers(start, helpers, config)
    needing = next((probe.objective.name for probe in probes if plan_helpers(probe)), None)
    varied = [
        key
        for key in searched
        if any(is_at_or_below(key, shared) or is_at_or_below(shared, key) for shared in SHARED)
    ]
    if needing and varied:
        raise InputError(
            f"space: {varied[0]}: the helper models of objective.name={needing} are trained once for all "
            "trials, so that this key must not vary; remove it from the space, or give models of your own in "
            "objective.token_weights.positive and negative, or objective.guide.model"
        )


def study_helper_plan(config: Config) -> tuple[str, list[str]]:
    """The plan of a study's helpers, and which of the compared models they will be."""
    helpers = plan_helpers(config)
    plans = [
        f"\n# helper {helper.name}, once for all trials: {helper.config.objective.name}, "
        f"{data_description(config, helper)}{plan_text(helper.config)}"
        for helper in helpers
    ]
    return "".join(plans), [helper.traits.side for helper in helpers]


def train_study_helpers(start: Config, tracker: Tracker) -> Config:
    """Train the helpers, or find them finished; return the configuration that names their models."""
    helpers = plan_helpers(start)
    for helper in helpers:
        result = train_helper(helper, start, parent_run_id=tracker.run_id)
        tracker.set_tags({f"helper.{helper.name}.run": result.mlflow_run_id})
    return with_helpers(start, helpers)


def with_study_helpers(best: Config, config: Config) -> Config:
    """The best configuration with the models of the study's helpers, which it then does not train again."""
    start = stages(config)[1]
    helpers = plan_helpers(start)
    if not helpers:
        return best
    named = with_helpers(start, helpers).objective
    fixed: dict[str, Any] = {
        f"objective__token_weights__{s}": getattr(named.token_weights, s) for s in ("positive", "negative")
    }
    fixed["objective__guide__model"] = named.guide.model
    return stage_config(best, {}, objective__helpers={}, **fixed)
