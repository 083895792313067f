"""Open an MLflow store: its address, its database and artifacts, and the experiment."""

from __future__ import annotations

import functools
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tbpo_ray.config.schema import Config, TrackingConfig
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import redact_text, strip_credentials
from tbpo_ray.storage import paths
from tbpo_ray.storage.files import file_lock
from tbpo_ray.tracking.environment import RUN_ID, credentials_source, from_environment
from tbpo_ray.tracking.reachability import SERVER_SCHEMES, check_reachable, is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow reads the first variable on import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "eval/rewards/accuracy",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}
"""Without the first one MLflow's UI opens an experiment as one of prompts and agents, without metrics; the
others make it a column of the table of runs and what the charts show first."""

_NOISY_LOGGERS = ("alembic", "mlflow.store", "mlflow.store.db.utils")


@dataclass(frozen=True)
class Store:
    """An open MLflow store and one of its experiments."""

    client: MlflowClient
    uri: str
    """MLflow tracking URI."""
    experiment_id: str

    @property
    def is_server(self) -> bool:
        """Whether the store is an MLflow server, and not a database or a folder."""
        return is_server(self.uri)

    def run_url(self, run_id: str) -> str:
        """URL of a run of this experiment; empty if the store is not a server."""
        return f"{strip_credentials(self.uri).rstrip('/')}/{self.run_page(run_id)}" if self.is_server else ""

    def run_page(self, run_id: str) -> str:
        """Path of a run in MLflow's UI, below the server's address."""
        return f"#/experiments/{self.experiment_id}/runs/{run_id}"

    def url_hint(self, run_id: str) -> str:
        """One line that says how to open a run in MLflow's UI."""
        if self.is_server:
            return self.run_url(run_id)
        local = f"sqlite:///{Path.cwd()}/"
        # A path relative to the working directory is shorter, and works on the machine of whoever reads it.
        is_local = self.uri.startswith(local)
        uri = f"sqlite:///{self.uri.removeprefix(local)}" if is_local else redact_text(self.uri)
        return f"mlflow ui --backend-store-uri {uri}    then http://127.0.0.1:5000/{self.run_page(run_id)}"


def store_uri(tracking: TrackingConfig, output_dir: str | Path) -> str:
    """Return `tracking.uri`, else MLFLOW_TRACKING_URI, else a SQLite database in `output_dir`.

    Raises:
        InputError: `output_dir` is not a local path and no `tracking.uri` is given.
    """
    uri = from_environment(tracking).get("uri", tracking.uri)
    if uri:
        return uri
    if "://" in str(output_dir):
        raise InputError(
            f"tracking.uri: run.output_dir={output_dir} cannot hold a SQLite database; give the address of "
            "an MLflow server"
        )
    return f"sqlite:///{Path(output_dir).resolve()}/mlflow.db"


def check_store(config: Config) -> None:
    """Check that the MLflow server of a configuration answers, and that it has the run of MLFLOW_RUN_ID.

    Raises:
        InputError: the server does not answer within half a minute, or it does not have the run.
    """
    uri = store_uri(config.tracking, paths.output_dir(config))
    _report_credentials(uri)
    check_reachable(uri)
    run_id = os.environ.get(RUN_ID)
    if run_id:
        _check_run(uri, run_id)


@functools.lru_cache
def _report_credentials(uri: str) -> None:
    source = credentials_source(uri) if is_server(uri) else None
    if source is not None:
        log_progress(f"MLflow credentials from {source}")


def _check_run(uri: str, run_id: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        stage = MlflowClient(tracking_uri=uri).get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        raise InputError(
            f"{RUN_ID}={run_id}: {redact_text(uri)} does not contain this run; unset it, or give the id of a "
            "run there"
        ) from error
    if stage == "deleted":
        raise InputError(f"{RUN_ID}={run_id}: was deleted in MLflow; restore it, or unset the variable")


def open_store(tracking: TrackingConfig, output_dir: str | Path) -> Store:
    """Open the store and the experiment of `tracking`; both are created if they do not exist.

    Raises:
        InputError: the store cannot be opened, or the experiment was deleted.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = store_uri(tracking, output_dir)
    check_reachable(uri)
    experiment = from_environment(tracking).get("experiment", tracking.experiment)
    is_remote = urlsplit(uri).scheme in (*SERVER_SCHEMES, "databricks")
    artifacts = None if is_remote else (Path(output_dir).resolve() / "mlartifacts").as_uri()
    # Two processes must not migrate one SQLite file at the same time.
    lock_file = Path(output_dir) / ".mlflow.lock"
    lock: AbstractContextManager[None] = nullcontext() if is_remote else file_lock(lock_file)
    try:
        with lock:
            client = MlflowClient(tracking_uri=uri)
            return Store(client, uri, _experiment(client, experiment, artifacts))
    except (MlflowException, OSError) as error:
        raise InputError(f"tracking.uri={redact_text(uri)}: {redact_text(first_line(error))}") from error


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment; create it if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS))
        except MlflowException as error:
            # Another client of the same server may have created it in the meantime.
            experiment = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise InputError(
            f"tracking.experiment={name}: was deleted in MLflow; restore it, or use another experiment"
        )
    return str(experiment.experiment_id)
