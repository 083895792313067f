"""The models of a run: logged models, their metrics, registered versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.redaction import redact_text
from tbpo_ray.tracking import logged_models
from tbpo_ray.tracking.mlflow_model import ModelDescription
from tbpo_ray.tracking.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


class ModelLog:
    """The part of a :class:`tbpo_ray.tracking.tracker.Tracker` that logs models."""

    _store: Store
    _client: MlflowClient
    run_id: str

    def log_model(
        self, folder: str | Path, model: ModelDescription, *, with_files: bool = True
    ) -> LoggedModel:
        """Log a model folder as a logged model of the experiment and an output of this run.

        Args:
            with_files: store the model so that MLflow loads it; otherwise its parameters and folder only.

        Raises:
            InputError: the folder is not a model.
            RunFailedError: the store does not accept it.
        """
        log_one = logged_models.log_model if with_files else logged_models.log_external_model
        return log_one(self._store, self.run_id, Path(folder), model)

    def find_model(self, folder: str | Path) -> LoggedModel | None:
        """The logged model of the experiment that was made from exactly the files of this folder."""
        return logged_models.find_logged_model(self._store, Path(folder))

    def log_model_metrics(
        self,
        model: LoggedModel,
        metrics: Mapping[str, float],
        *,
        dataset: tuple[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """Log metrics of a logged model to the run that made it, if it still exists, else to this run.

        Args:
            dataset: name and digest of the data that they were measured on.

        Raises:
            RunFailedError: the store cannot be written to.
        """
        from mlflow.exceptions import MlflowException

        try:
            run_id = model.source_run_id or self.run_id
            if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                run_id = self.run_id
            logged_models.log_model_metrics(self._store, run_id, model, metrics, dataset=dataset, step=step)
        except MlflowException as error:
            raise RunFailedError(
                f"tracking.uri={redact_text(self._store.uri)}: metrics of {model.name} could not be logged: "
                f"{redact_text(str(error))}"
            ) from error

    def log_model_inputs(self, models: Sequence[LoggedModel]) -> None:
        """Log that this run reads these models, so that MLflow's pages link them."""
        from mlflow.entities import LoggedModelInput

        inputs = [LoggedModelInput(model.model_id) for model in models]
        self._client.log_inputs(self.run_id, models=inputs)

    def register_model(
        self,
        folder: str | Path,
        name: str,
        alias: str | None = None,
        model: ModelDescription | None = None,
    ) -> str:
        """Register an exported model folder as a new version of the registered model `name`.

        The version is the logged model of the folder, which is logged now if it is not yet, or without files.

        Args:
            alias: an alias that is moved to the new version.
            model: description of the logged model, if there is none.

        Returns:
            The version.

        Raises:
            InputError: MLflow rejects the name or the alias, or the folder does not contain a model.
            RunFailedError: the store does not accept the model.
        """
        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"{folder}: not an exported model (config.json is missing)")
        logged = self.log_model(folder, model or ModelDescription(Path(folder).resolve().parent.name))
        return logged_models.register_version(self._store, self.run_id, logged, name, alias)
