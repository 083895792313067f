"""Logged models and the model registry of an MLflow store."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tbpo_ray.errors import InputError, RunFailedError, first_line
from tbpo_ray.redaction import redact, redact_text
from tbpo_ray.tracking.limits import MAX_DATASET_NAME, MAX_DIGEST, MAX_PARAM, MAX_TAG, metric_name, truncate
from tbpo_ray.tracking.mlflow_model import ModelDescription, write_mlflow_model
from tbpo_ray.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

FILES_TAG, FOLDER_TAG = "tbpo.files", "tbpo.folder"
"""Tags of a logged model: the digest that identifies its files, and where they were logged from."""
EXTERNAL_TAG = "mlflow.model.isExternal"
"""MLflow's tag of a logged model without files."""
VERSIONS_TAG = "mlflow.modelVersions"
"""MLflow's tag of a logged model that links its registered versions."""
_ILLEGAL_IN_NAME = re.compile(r"[/:.%\"'\s]")


def files_digest(folder: Path) -> str:
    """Identify a model folder by name, size and modification time of its files; hashing takes minutes."""
    facts = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json") and file.is_file()
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def find_logged_model(store: Store, folder: Path) -> LoggedModel | None:
    """The logged model of the experiment that was made from exactly these files, if there is one."""
    found = store.client.search_logged_models(
        [store.experiment_id], filter_string=f"tags.`{FILES_TAG}` = '{files_digest(folder)}'"
    )
    ready = [model for model in found if str(model.status) == "READY"]
    return ready[0] if ready else None


def log_model(store: Store, run_id: str, folder: Path, description: ModelDescription) -> LoggedModel:
    """Log an exported policy as an output of the run, unless these files are logged already.

    A store whose artifacts are local gets hard links to the weights, any other one an upload.

    Raises:
        InputError: the folder is not a model.
        RunFailedError: the store does not accept it; nothing is left of the logged model.
    """
    found = find_logged_model(store, folder)
    if found is not None and not is_external(found):
        return found
    model = found or _create(store, run_id, folder, description, external=False)
    with _or_nothing(store, model, folder, is_new=found is None):
        local = local_path(model.artifact_location)
        if local is not None:
            write_mlflow_model(folder, local, description, model.model_id)
        else:
            _upload(store, model, folder, description)
        if found is not None:
            store.client.delete_logged_model_tag(model.model_id, EXTERNAL_TAG)
        else:
            _finalize(store, run_id, model, description)
    return store.client.get_logged_model(model.model_id)


def log_external_model(store: Store, run_id: str, folder: Path, description: ModelDescription) -> LoggedModel:
    """Log a model by its name, parameters and folder, without its files.

    Raises:
        RunFailedError: the store does not accept it.
    """
    found = find_logged_model(store, folder)
    if found is not None:
        return found
    model = _create(store, run_id, folder, description, external=True)
    with _or_nothing(store, model, folder, is_new=True):
        _finalize(store, run_id, model, description)
    return model


def is_external(model: LoggedModel) -> bool:
    """Whether MLflow has the model's name and metrics, but not its files."""
    return str(model.tags.get(EXTERNAL_TAG, "false")).lower() == "true"


def log_model_metrics(
    store: Store,
    run_id: str,
    model: LoggedModel,
    metrics: Mapping[str, float],
    *,
    dataset: tuple[str, str] | None,
    step: int = 0,
) -> None:
    """Log metrics that are linked to the model, and to the run.

    Args:
        dataset: name and digest of the data that they were measured on.
    """
    from mlflow.entities import Metric

    times = _logged_at(store, run_id, metrics, step)
    name, digest = (dataset[0][:MAX_DATASET_NAME], dataset[1][:MAX_DIGEST]) if dataset else (None, None)
    batch = [
        Metric(metric_name(key), float(value), times[key], step, model.model_id, name, digest, run_id)
        for key, value in metrics.items()
    ]
    store.client.log_batch(run_id, metrics=batch)


def _logged_at(store: Store, run_id: str, metrics: Mapping[str, float], step: int) -> dict[str, int]:
    """The time at which the run logged each value, else now: MLflow keeps the same point once."""
    times = dict.fromkeys(metrics, int(time.time() * 1000))
    known = store.client.get_run(run_id).data.metrics
    for key, value in metrics.items():
        if metric_name(key) in known:
            for point in store.client.get_metric_history(run_id, metric_name(key)):
                if (point.step, point.value) == (step, float(value)):
                    times[key] = point.timestamp
    return times


def register_version(store: Store, run_id: str, model: LoggedModel, name: str, alias: str | None) -> str:
    """Register a logged model as a new version of `name`, and move the alias to it.

    Raises:
        InputError: MLflow rejects the name or the alias; nothing is registered then.
    """
    from mlflow.exceptions import MlflowException

    client, version, is_new = store.client, None, False
    try:
        is_new = _create_registered_model(store, name)
        version = client.create_model_version(
            name, model.artifact_location, run_id=run_id, model_id=model.model_id
        ).version
        if alias:
            client.set_registered_model_alias(name, alias, str(version))
        versions = [*json.loads(model.tags.get(VERSIONS_TAG, "[]")), {"name": name, "version": str(version)}]
        client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps(versions)})
    except MlflowException as error:
        _unregister(store, name, version, is_new)
        raise InputError(
            f"registered model {name!r}, alias {alias!r}: {redact_text(first_line(error))}"
        ) from error
    return str(version)


def local_path(uri: str) -> Path | None:
    """The folder of an artifact address on this machine; None for any other store."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if not parts.scheme else None


def _create(
    store: Store, run_id: str, folder: Path, description: ModelDescription, *, external: bool
) -> LoggedModel:
    from mlflow.exceptions import MlflowException

    tags = {FILES_TAG: files_digest(folder), FOLDER_TAG: str(folder), "tbpo.step": str(description.step)}
    if external:
        tags[EXTERNAL_TAG] = "true"
    try:
        return store.client.create_logged_model(
            store.experiment_id,
            name=_ILLEGAL_IN_NAME.sub("-", description.name),
            source_run_id=run_id,
            tags={key: truncate(redact(key, value), MAX_TAG) for key, value in tags.items()},
            params={
                key: truncate(redact(key, value), MAX_PARAM) for key, value in description.params.items()
            },
            model_type=description.model_type,
        )
    except MlflowException as error:
        raise RunFailedError(
            f"tracking.uri={redact_text(store.uri)}: does not accept a logged model: "
            f"{redact_text(first_line(error))}"
        ) from error


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Values as MLflow stores them, with secrets redacted."""
    return {key: truncate(redact(key, value), limit) for key, value in values.items()}


def _finalize(store: Store, run_id: str, model: LoggedModel, description: ModelDescription) -> None:
    from mlflow.entities import LoggedModelOutput

    store.client.finalize_logged_model(model.model_id, "READY")
    store.client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, description.step)])


def _upload(store: Store, model: LoggedModel, folder: Path, description: ModelDescription) -> None:
    # Beside the export, so that the weights are linked and not copied before they are sent.
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=folder.resolve().parent) as staging:
        target = Path(staging) / "model"
        write_mlflow_model(folder, target, description, model.model_id)
        store.client.log_model_artifacts(model.model_id, str(target))


@contextmanager
def _or_nothing(store: Store, model: LoggedModel, folder: Path, *, is_new: bool) -> Iterator[None]:
    """Remove what the block has stored if it fails, and the logged model if it is new.

    Raises:
        RunFailedError: instead of errors of MLflow, of its HTTP client and of the file system.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        left = _remove(store, model, is_new)
        if not isinstance(error, (MlflowException, OSError)):  # requests' errors are OSErrors
            raise
        raise RunFailedError(
            f"tracking.uri={redact_text(store.uri)}: {folder} could not be stored as a logged model: "
            f"{redact_text(first_line(error))}{left}; give the server an artifact store, or set "
            "tracking.log_models=metadata"
        ) from error


def _remove(store: Store, model: LoggedModel, is_new: bool) -> str:
    """Delete the files of a logged model, and the model if it is new; return what could not be deleted."""
    from mlflow.exceptions import MlflowException

    local = local_path(model.artifact_location)
    if local is not None:
        shutil.rmtree(local, ignore_errors=True)
    if not is_new:
        return ""
    try:
        store.client.delete_logged_model(model.model_id)
    except (MlflowException, OSError):
        return f" (the unfinished logged model {model.model_id} is left there)"
    return ""


def _create_registered_model(store: Store, name: str) -> bool:
    """Create the registered model; return whether it is new."""
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _unregister(store: Store, name: str, version: Any, is_new: bool) -> None:
    """Undo a registration that failed halfway."""
    from mlflow.exceptions import MlflowException

    try:
        if version is not None:
            store.client.delete_model_version(name, str(version))
        if is_new:
            store.client.delete_registered_model(name)
    except MlflowException:
        return  # the error that is being reported is the first one
