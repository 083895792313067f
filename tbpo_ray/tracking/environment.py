"""MLflow's environment variables, which count where the configuration is silent."""

from __future__ import annotations

import os

from tbpo_ray.config.schema import Config, TrackingConfig
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import redact_text

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"


def from_environment(tracking: TrackingConfig) -> dict[str, str]:
    """The fields of `tracking` that the configuration does not set and the environment does."""
    found = {}
    if tracking.uri is None and os.environ.get(URI):
        found["uri"] = os.environ[URI]
    if "experiment" not in tracking.model_fields_set and os.environ.get(EXPERIMENT):
        found["experiment"] = os.environ[EXPERIMENT]
    return found


def with_environment(config: Config) -> Config:
    """The configuration with these fields filled in, so that processes on other nodes have them too."""
    found = from_environment(config.tracking)
    if not found:
        return config
    for field, value in found.items():
        variable = URI if field == "uri" else EXPERIMENT
        log_progress(f"tracking.{field}={redact_text(value)} from {variable}")
    tracking = config.tracking.model_copy(update=found)
    return config.model_copy(update={"tracking": tracking})
