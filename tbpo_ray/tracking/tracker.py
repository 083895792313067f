"""MLflow: the only module that knows it.

A :class:`Tracker` writes to one run through `MlflowClient` with an explicit run id; the fluent API's
hidden global run is never used, so several processes may write to one run and a restarted process goes
on with the run it had. By default everything lies in `<output_dir>/mlflow.db` and `mlartifacts`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import yaml

from tbpo_ray.config.loading import flatten, to_tree
from tbpo_ray.config.schema import Config, TrackingConfig
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.redaction import redact, redact_text, redact_tree, without_user
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.paths import output_dir
from tbpo_ray.tracking.provenance import provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

RUN_NOTE = "run.json"
"""File in a run's folder that holds the id of its MLflow run."""

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's page otherwise opens an experiment as one of prompts and agents, without the table of metrics."""

_BAD_METRIC = re.compile(r"[^\w\-. :/]")
_MAX_PARAM, _MAX_TAG, _MAX_DIGEST = 6000, 5000, 36
_METRICS_PER_CALL, _BUFFER, _FLUSH_SECONDS = 1000, 500, 10.0


class Tracker:
    """One MLflow run. Made by :meth:`start` or :meth:`attach`; also a context manager.

    Metrics are buffered: a call costs microseconds, and the store is written every ten seconds, every
    500 values, and at the end.
    """

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, run_id: str, *, continued: bool):
        self._client = client
        self._buffer: list[tuple[str, float, int, int]] = []
        self._flushed_at = time.monotonic()
        self._last_step: dict[str, int] | None = {} if continued else None
        self._warned = False
        self.uri = uri
        """MLflow tracking address."""
        self.experiment_id = experiment_id
        self.run_id = run_id

    @classmethod
    def start(
        cls,
        tracking: TrackingConfig,
        output_dir: str | Path,
        *,
        name: str,
        kind: str,
        config: Config | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
    ) -> Tracker:
        """Open a run, or go on with run `run_id`, and log configuration, git commit and versions.

        Args:
            output_dir: `run.output_dir`, where the default store lies.
            name: the run's display name.
            kind: `pipeline`, `sft`, `train`, `evaluate`, `tune`, `trial` ...; becomes the tag `tbpo.kind`.
            config: the resolved configuration: parameters and the artifact `config.yaml`, secrets redacted.
            parent_run_id: nests this run under another one.
            run_id: an unfinished run to continue; its status goes back to RUNNING, and points that it has
                already at a step are not logged twice.

        Raises:
            InputError: the store cannot be opened, or holds no run `run_id`.
        """
        client, uri, experiment_id = _open(tracking, output_dir)
        tags = {"tbpo.kind": kind, "mlflow.source.name": kind, "mlflow.source.type": "JOB"} | provenance()
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        if run_id is None:
            run = client.create_run(experiment_id, run_name=name, tags=tags)
            tracker = cls(client, uri, experiment_id, run.info.run_id, continued=False)
        else:
            tracker = cls._existing(client, uri, run_id)
            client.update_run(run_id, status="RUNNING")
            tracker.set_tags(tags)
        if config is not None:
            tracker._log_config(config)
        return tracker

    @classmethod
    def noted(
        cls,
        config: Config,
        note: Path,
        *,
        kind: str,
        name: str | None = None,
        parent_run_id: str | None = None,
    ) -> Tracker:
        """Go on with the run whose id the file `note` holds, or open one and note its id there.

        Args:
            name: the run's display name, by default `run.name`.

        Raises:
            InputError: as :meth:`start`.
        """
        tracker = cls.start(
            config.tracking,
            output_dir(config),
            name=name or config.run.name,
            kind=kind,
            config=config,
            parent_run_id=parent_run_id,
            run_id=noted_run(note),
        )
        write_atomic(note, json.dumps({"mlflow_run_id": tracker.run_id}))
        return tracker

    @classmethod
    def attach(cls, tracking: TrackingConfig, output_dir: str | Path, run_id: str) -> Tracker:
        """Write to a run that another process owns, without touching its status or parameters."""
        client, uri, _ = _open(tracking, output_dir)
        return cls._existing(client, uri, run_id)

    @classmethod
    def _existing(cls, client: MlflowClient, uri: str, run_id: str) -> Tracker:
        from mlflow.exceptions import MlflowException

        try:
            info = client.get_run(run_id).info
        except MlflowException as error:
            raise InputError(
                f"tracking.uri={redact_text(uri)}: holds no run {run_id}; was the store moved?"
            ) from error
        if info.lifecycle_stage == "deleted":
            raise InputError(f"run {run_id} was deleted in MLflow; restore it, or use another run.name")
        return cls(client, uri, info.experiment_id, run_id, continued=True)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Buffer metrics (numbers, 0-d tensors, booleans; `nan` and infinities allowed; None is left out).

        Args:
            metrics: name to value; characters that MLflow refuses become `_`.
            step: the optimizer step; None for values of the run as a whole.
        """
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if value is not None:
                self._buffer.append((metric_name(key), float(value), now, step if step is not None else -1))
        if len(self._buffer) >= _BUFFER or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._flush(final=False)

    def flush(self) -> None:
        """Write buffered metrics now.

        Raises:
            RunFailed: the store cannot be written.
        """
        self._flush(final=True)

    def _flush(self, *, final: bool) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self._flushed_at = time.monotonic()
        try:
            while self._buffer:
                chunk = self._buffer[:_METRICS_PER_CALL]
                new = [Metric(k, v, t, max(s, 0)) for k, v, t, s in chunk if not self._known(k, s)]
                if new:
                    self._client.log_batch(self.run_id, metrics=new)
                del self._buffer[:_METRICS_PER_CALL]
        except MlflowException as error:
            # A tracking server may be away for a while: training goes on and the points are kept.
            if final:
                raise RunFailedError(
                    f"MLflow at {redact_text(self.uri)} took no metrics: {redact_text(str(error))}"
                ) from error
            if not self._warned:
                log.warning("MLflow took no metrics, they are kept and tried again: %s", type(error).__name__)
            self._warned = True

    def _known(self, key: str, step: int) -> bool:
        """Whether a continued run holds this metric at this step already."""
        if self._last_step is None or step < 0:
            return False
        if key not in self._last_step:
            history = self._client.get_metric_history(self.run_id, key)
            self._last_step[key] = max((point.step for point in history), default=-1)
        return step <= self._last_step[key]

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters (secrets redacted, long values cut). MLflow never changes a parameter: in a
        continued run a changed value goes to the tag `changed.<key>`."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params if self._last_step is not None else {}
        texts = {key: _cut(redact(key, value), _MAX_PARAM) for key, value in params.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in known]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[start : start + 100])
        self.set_tags({f"changed.{k}": v for k, v in texts.items() if known.get(k, v) != v})

    def _log_config(self, config: Config) -> None:
        tree = to_tree(config)
        self.log_params(flatten(tree))
        self.log_text(yaml.safe_dump(redact_tree(tree), sort_keys=False, allow_unicode=True), "config.yaml")

    def log_dataset(
        self, name: str, *, digest: str, source: str, rows: int, context: str, columns: Mapping[str, str] = {}
    ) -> None:
        """Record a dataset as an MLflow dataset input.

        Args:
            digest: content digest (the first 36 characters count).
            source: where it came from, as in the configuration.
            rows: number of records.
            context: `training`, `evaluation` ...
            columns: column name to type, for the schema.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        schema = {"mlflow_colspec": [{"type": kind, "name": key} for key, kind in columns.items()]}
        dataset = Dataset(
            name=name[:500],
            digest=digest[:_MAX_DIGEST],
            source_type="local" if "://" not in source else urlsplit(source).scheme,
            source=json.dumps({"uri": redact_text(source)}),
            schema=json.dumps(schema) if columns else None,
            profile=json.dumps({"num_rows": rows}),
        )
        inputs = [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])]
        try:
            self._client.log_inputs(self.run_id, datasets=inputs)
        except MlflowException as error:
            # Another run of the experiment noted the same dataset in between; now it is there to be found.
            if "UNIQUE" not in str(error).upper():
                raise
            self._client.log_inputs(self.run_id, datasets=inputs)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file, or a whole folder, below `folder` of the run's artifacts."""
        if Path(path).is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Store text as the artifact `name` (a path inside the run's artifacts)."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(name).name
            file.write_text(text, encoding="utf-8")
            parent = str(Path(name).parent)
            self.log_artifact(file, None if parent == "." else parent)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags (secrets redacted, long values cut)."""
        from mlflow.entities import RunTag

        batch = [RunTag(key, _cut(redact(key, value), _MAX_TAG)) for key, value in tags.items()]
        for start in range(0, len(batch), 100):
            self._client.log_batch(self.run_id, tags=batch[start : start + 100])

    def register_model(self, folder: str | Path, name: str, alias: str | None = None) -> str:
        """Make an exported model folder a version of the registered model `name`.

        With a store on this machine or a database the folder stays where it is; a tracking server gets a
        copy as the run's artifact `model`. Returns the version; `alias` points to it from then on.

        Raises:
            InputError: a name or alias that MLflow refuses, or a folder without a model.
        """
        from mlflow.exceptions import MlflowException

        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"{folder}: no exported model (config.json is missing)")
        try:
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = Path(folder).resolve().as_uri()
            if urlsplit(self.uri).scheme in ("http", "https"):
                self.log_artifact(folder, "model")
                source = f"runs:/{self.run_id}/model"
            version = self._client.create_model_version(name, source, run_id=self.run_id).version
            if alias:
                self._client.set_registered_model_alias(name, alias, version)
        except MlflowException as error:
            raise InputError(f"registered model {name!r}, alias {alias!r}: {error.message}") from error
        return str(version)

    def finish(self, status: str = "FINISHED") -> None:
        """Write what is buffered and end the run: `FINISHED`, `FAILED` or `KILLED`."""
        try:
            self.flush()
        finally:
            self._client.set_terminated(self.run_id, status=status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.finish()
            return
        try:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        except Exception as tracking_error:  # the error on its way says more than this one
            log.warning("the MLflow run could not be closed: %s", type(tracking_error).__name__)

    @property
    def run_page(self) -> str:
        """The run's path in MLflow's page, below the server's address."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def run_link(self, run_id: str) -> str:
        """Address of another run of this experiment on an MLflow server; empty without a server."""
        if urlsplit(self.uri).scheme not in ("http", "https"):
            return ""
        return f"{without_user(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def url_hint(self) -> str:
        """One line: how to look at this run."""
        if urlsplit(self.uri).scheme in ("http", "https"):
            return f"{without_user(self.uri).rstrip('/')}/{self.run_page}"
        uri = self.uri
        here = f"sqlite:///{Path.cwd()}/"
        uri = "sqlite:///" + uri.removeprefix(here) if uri.startswith(here) else redact_text(uri)
        return f"mlflow ui --backend-store-uri {uri}    then http://127.0.0.1:5000/{self.run_page}"


def noted_run(note: Path) -> str | None:
    """The MLflow run id in a file that :meth:`Tracker.noted` wrote; None without the file."""
    return json.loads(note.read_text(encoding="utf-8"))["mlflow_run_id"] if note.is_file() else None


def metric_name(name: str) -> str:
    """`name` as MLflow allows it: letters, digits, `_-. :/`, at most 250, no empty or dotted path part."""
    clean = _BAD_METRIC.sub("_", name)
    parts = ["_" if part in ("", ".", "..") else part for part in clean.split("/")]
    return "/".join(parts)[:250]


def _cut(text: str, limit: int) -> str:
    """`text` within `limit` characters; a cut one says how long it was."""
    if len(text) <= limit:
        return text
    mark = f" ... ({len(text)} characters)"
    return text[: limit - len(mark)] + mark


def store_uri(tracking: TrackingConfig, output_dir: str | Path) -> str:
    """The tracking address in force: `tracking.uri`, or SQLite in `output_dir`.

    Raises:
        InputError: `output_dir` is no local path and no `tracking.uri` is given.
    """
    if tracking.uri:
        return tracking.uri
    if "://" in str(output_dir):
        raise InputError(
            f"tracking.uri: run.output_dir={output_dir} cannot hold SQLite; give an MLflow server's address"
        )
    return f"sqlite:///{Path(output_dir).resolve()}/mlflow.db"


def _open(tracking: TrackingConfig, output_dir: str | Path) -> tuple[MlflowClient, str, str]:
    """Client, address and experiment id; the store and the experiment are made where missing."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("alembic", "mlflow.store", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    uri = store_uri(tracking, output_dir)
    server = urlsplit(uri).scheme in ("http", "https", "databricks")
    artifacts = None if server else (Path(output_dir).resolve() / "mlartifacts").as_uri()
    try:
        with _one_at_a_time(None if server else Path(output_dir)):
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(tracking.experiment)
            if found is None:
                return client, uri, _create_experiment(client, tracking.experiment, artifacts)
            if found.lifecycle_stage == "deleted":
                raise InputError(
                    f"tracking.experiment={tracking.experiment}: was deleted in MLflow; restore it or rename"
                )
            return client, uri, found.experiment_id
    except (MlflowException, OSError) as error:
        raise InputError(
            f"tracking.uri={redact_text(uri)}: {redact_text(str(error)).splitlines()[0]}"
        ) from error


def _create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return found.experiment_id  # another client of the same server was faster


@contextmanager
def _one_at_a_time(folder: Path | None) -> Iterator[None]:
    """Hold a file lock while a store is made: MLflow's migrations of one SQLite file must not overlap."""
    if folder is None:
        yield
        return
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".mlflow.lock", timeout=300):
        yield
