"""MLflow's environment variables, which count where the configuration is silent."""

from __future__ import annotations

import math
import os

from tbpo_ray.config.schema import Config, TrackingConfig
from tbpo_ray.errors import InputError
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import redact_text

URI, EXPERIMENT, RUN_ID = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"
USERNAME, PASSWORD, TOKEN = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
SYSTEM_METRICS, SYSTEM_METRICS_SECONDS = (
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL",
)
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


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
    system_metrics_seconds(config.tracking)
    found = from_environment(config.tracking)
    for field, value in found.items():
        variable = URI if field == "uri" else EXPERIMENT
        log_progress(f"tracking.{field}={redact_text(value)} from {variable}")
    _report_overruled(config.tracking)
    if not found:
        return config
    tracking = config.tracking.model_copy(update=found)
    return config.model_copy(update={"tracking": tracking})


def credentials_source(uri: str) -> str | None:
    """Where MLflow's client takes the credentials for a server from; None if it has none.

    A user name in the address wins over the environment, and there a user name over a token.
    """
    if "@" in uri.partition("://")[2].partition("/")[0]:
        return "tracking.uri"
    if os.environ.get(USERNAME) and os.environ.get(PASSWORD):
        return f"{USERNAME} and {PASSWORD}"
    return TOKEN if os.environ.get(TOKEN) else None


def take_run_id() -> str | None:
    """The run that `MLFLOW_RUN_ID` names, once per process, as in MLflow itself: later runs are new ones."""
    run_id = os.environ.pop(RUN_ID, None)
    if run_id:
        log_progress(f"MLflow run {run_id} from {RUN_ID}")
    return run_id or None


def system_metrics_seconds(tracking: TrackingConfig) -> float:
    """Seconds between two samples of the nodes' metrics; 0: none.

    Raises:
        InputError: a variable of the environment is neither a switch nor a number of seconds.
    """
    if "system_metrics_seconds" in tracking.model_fields_set:
        return tracking.system_metrics_seconds
    switch = os.environ.get(SYSTEM_METRICS, "")
    if switch and switch.lower() not in _SWITCH:
        raise InputError(f"{SYSTEM_METRICS}={switch}: not a switch; must be true or false")
    if switch and not _SWITCH[switch.lower()]:
        return 0.0
    text = os.environ.get(SYSTEM_METRICS_SECONDS)
    if not text:
        return tracking.system_metrics_seconds
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{SYSTEM_METRICS_SECONDS}={text}: must be a positive number of seconds")
    return seconds


def _report_overruled(tracking: TrackingConfig) -> None:
    """Say which variables the configuration overrides."""
    pairs = ((URI, "uri", tracking.uri), (EXPERIMENT, "experiment", tracking.experiment))
    for variable, field, value in pairs:
        given = os.environ.get(variable)
        if given and field in tracking.model_fields_set and value not in (None, given):
            log_progress(f"tracking.{field}={redact_text(str(value))} from the configuration, not {variable}")
