"""Folders of the models that MLflow's addresses name: `models:/NAME@ALIAS`, `models:/NAME/VERSION`,
`models:/MODEL_ID`, `runs:/RUN_ID` and `runs:/RUN_ID/PATH`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import redact_text
from tbpo_ray.storage.files import atomic_folder, file_lock
from tbpo_ray.storage.paths import cache_dir, output_dir
from tbpo_ray.tracking.logged_models import is_external, local_path
from tbpo_ray.tracking.mlflow_model import BINARY, COMPONENTS
from tbpo_ray.tracking.reachability import check_reachable
from tbpo_ray.tracking.store import store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMES = ("models:/", "runs:/")
_FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/MODEL_ID, runs:/RUN_ID or runs:/RUN_ID/PATH"


def is_model_uri(text: str) -> bool:
    """Whether the text is one of MLflow's addresses of a model."""
    return text.startswith(SCHEMES)


def model_folder(config: Config, uri: str, key: str) -> str:
    """The folder with the weights and the tokenizer of a model in the store of `tracking`.

    Models of another machine are downloaded to `data.cache_dir` once.

    Args:
        key: the configuration key that holds the address, for messages.

    Raises:
        InputError: there is no such model, or it is not one of transformers.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    tracking = store_uri(config.tracking, output_dir(config))
    check_reachable(tracking)
    client = MlflowClient(tracking_uri=tracking)
    try:
        location = _location(client, uri)
        folder = local_path(location)
        if folder is None:
            folder = _download(location, tracking, cache_dir(config) / "mlflow")
    except (MlflowException, OSError) as error:
        hint = _hint(client, uri)
        raise InputError(f"{key}={uri}: {redact_text(first_line(error))}{hint}") from error
    except ValueError as error:
        raise InputError(f"{key}={uri}: {error}; must be {_FORMS}") from error
    return str(_transformers_folder(folder, cache_dir(config) / "mlflow", f"{key}={uri}"))


def _location(client: MlflowClient, uri: str) -> str:
    """Where the store keeps the files of a model.

    Raises:
        ValueError: the address is incomplete, or names something without files.
    """
    scheme, _, rest = uri.partition(":/")
    rest = rest.strip("/")
    if scheme == "runs":
        run_id, _, path = rest.partition("/")
        return _location_in_run(client, run_id, path)
    if "@" in rest:
        name, _, alias = rest.rpartition("@")
        version = client.get_model_version_by_alias(name, alias).version
        return str(client.get_model_version_download_uri(name, str(version)))
    name, _, number = rest.partition("/")
    if number:
        return str(client.get_model_version_download_uri(name, number))
    if not name:
        raise ValueError("names no model")
    return _location_of_logged_model(client, name)


def _location_in_run(client: MlflowClient, run_id: str, path: str) -> str:
    if not run_id:
        raise ValueError("names no run")
    run = client.get_run(run_id)
    if path:
        if any(item.path.startswith(path) for item in client.list_artifacts(run_id)):
            return f"{run.info.artifact_uri}/{path}"
        raise ValueError(f"the run has no artifact {path}")
    outputs = sorted(run.outputs.model_outputs if run.outputs else [], key=lambda output: -output.step)
    models = [client.get_logged_model(output.model_id) for output in outputs]
    with_files = [model for model in models if not is_external(model)]
    if not with_files:
        raise ValueError("the run has no logged model with weights")
    return str(with_files[0].artifact_location)


def _location_of_logged_model(client: MlflowClient, model_id: str) -> str:
    model = client.get_logged_model(model_id)
    if is_external(model):
        raise ValueError("MLflow has the metrics of this model, but not its weights")
    return str(model.artifact_location)


def _hint(client: MlflowClient, uri: str) -> str:
    """What the registry has instead, for an address in it."""
    from mlflow.exceptions import MlflowException

    name = uri.removeprefix("models:/").rpartition("@")[0] if "@" in uri else ""
    if not name:
        return f"; must be {_FORMS}"
    try:
        aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
        return f"; aliases of {name}: {aliases}"
    except (MlflowException, OSError):
        pass
    try:
        names = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
    except (MlflowException, OSError):
        return ""
    return f"; registered models: {names}"


def _download(location: str, tracking: str, cache: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    target = cache / hashlib.sha256(f"{tracking} {location}".encode()).hexdigest()[:16]
    with file_lock(cache / f".{target.name}.lock"):
        if not target.is_dir():
            log_progress(f"downloading {location} to {target}")
            with atomic_folder(target) as partial:
                download_artifacts(artifact_uri=location, dst_path=str(partial), tracking_uri=tracking)
    if (target / "MLmodel").is_file() or (target / "config.json").is_file():
        return target
    inner = [folder for folder in target.iterdir() if folder.is_dir()]
    return inner[0] if len(inner) == 1 else target


def _transformers_folder(folder: Path, cache: Path, what: str) -> Path:
    """The folder that transformers loads, within an MLflow model or as it is."""
    model = folder if (folder / "config.json").is_file() else folder / BINARY
    if not (model / "config.json").is_file():
        raise InputError(f"{what}: {folder} does not contain a transformers model (config.json is missing)")
    tokenizer = folder / COMPONENTS / "tokenizer"
    if (model / "tokenizer_config.json").is_file() or not tokenizer.is_dir():
        return model.absolute()
    # Models that others have logged have their tokenizer in a folder of its own.
    joined = cache / f"joined-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}"
    with file_lock(cache / f".{joined.name}.lock"), atomic_folder(joined, replace=True) as partial:
        for file in (*tokenizer.iterdir(), *model.iterdir()):
            if file.is_file() and not (partial / file.name).exists():
                (partial / file.name).symlink_to(file.absolute())
    return joined.absolute()
