"""A tracker logs one run to MLflow.

A :class:`Tracker` uses `MlflowClient` with an explicit run id, never the fluent API with its hidden global
run: several processes can log to one run, and a restarted process can resume the run it had. By default
everything is stored in `<output_dir>/mlflow.db` and `<output_dir>/mlartifacts`.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from tbpo_ray.config.loading import flatten, to_tree
from tbpo_ray.config.schema import Config, TrackingConfig
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.redaction import redact, redact_text, redact_tree
from tbpo_ray.storage.paths import output_dir
from tbpo_ray.tracking import description
from tbpo_ray.tracking.datasets import dataset_input
from tbpo_ray.tracking.description import DIGEST_TAG, NOTE_TAG, command_line
from tbpo_ray.tracking.environment import take_run_id
from tbpo_ray.tracking.limits import (
    MAX_ENTITIES_PER_CALL,
    MAX_METRICS_PER_CALL,
    MAX_PARAM,
    MAX_TAG,
    metric_name,
    truncate,
)
from tbpo_ray.tracking.model_log import ModelLog
from tbpo_ray.tracking.provenance import provenance
from tbpo_ray.tracking.run_note import read_run_note, write_run_note
from tbpo_ray.tracking.store import Store, open_store
from tbpo_ray.tracking.traces import JudgedAnswer, log_traces

log = logging.getLogger(__name__)

_BUFFER_SIZE, _FLUSH_SECONDS = 500, 10.0


class Tracker(ModelLog):
    """One MLflow run. Made by :meth:`start`, :meth:`from_note` or :meth:`attach`; also a context manager.

    Metrics are buffered, so that logging one takes microseconds: they are sent to the store every ten
    seconds, every 500 values, and at the end.
    """

    def __init__(self, store: Store, run_id: str, *, resumed: bool):
        self._store, self._client = store, store.client
        self._buffer: list[tuple[str, float, int, int]] = []
        self._flushed_at = time.monotonic()
        self._last_step: dict[str, int] | None = {} if resumed else None
        self._warned = False
        self.run_id = run_id
        self.kind = ""
        """The tag `tbpo.kind` of a run that this process owns."""

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
        """Start a run, or resume the run `run_id`, and log configuration, git commit and versions.

        Args:
            output_dir: `run.output_dir`, which holds the default store.
            name: the run's display name.
            kind: `pipeline`, `sft`, `train`, `evaluate`, `tune`, `trial` ...; becomes the tag `tbpo.kind`.
            config: the resolved configuration: parameters and the artifact `config.yaml`, with secrets
                redacted.
            parent_run_id: nests this run under another one.
            run_id: a run to resume; its status becomes RUNNING again, and metrics that it already has at a
                step are not logged twice.

        Raises:
            InputError: the store cannot be opened, or does not contain the run `run_id`.
        """
        store = open_store(tracking, output_dir)
        tags = {"tbpo.kind": kind, "mlflow.source.name": kind, "mlflow.source.type": "JOB"} | provenance()
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        if run_id is None:
            run = store.client.create_run(store.experiment_id, run_name=name, tags=tags)
            tracker = cls(store, run.info.run_id, resumed=False)
        else:
            tracker = cls._existing(store, run_id)
            store.client.update_run(run_id, status="RUNNING")
            tracker.set_tags(tags)
        if config is not None:
            tracker._log_config(config)
        tracker.kind = kind
        tracker.describe(links={"parent": parent_run_id} if parent_run_id else {})
        return tracker

    @classmethod
    def from_note(
        cls,
        config: Config,
        note: Path,
        *,
        kind: str,
        name: str | None = None,
        parent_run_id: str | None = None,
    ) -> Tracker:
        """Resume the run whose id is in the file `note`, or start a run and write its id there.

        A run without a parent is the one that the environment variable MLFLOW_RUN_ID names, if it is set.

        Args:
            name: the run's display name, by default `run.name`.

        Raises:
            InputError: as :meth:`start`.
        """
        run_id = read_run_note(note)
        if run_id is None and parent_run_id is None:
            run_id = take_run_id()
        tracker = cls.start(
            config.tracking,
            output_dir(config),
            name=name or config.run.name,
            kind=kind,
            config=config,
            parent_run_id=parent_run_id,
            run_id=run_id,
        )
        write_run_note(note, tracker.run_id)
        return tracker

    @classmethod
    def attach(cls, tracking: TrackingConfig, output_dir: str | Path, run_id: str) -> Tracker:
        """Log to a run that another process owns, without changing its status or parameters."""
        return cls._existing(open_store(tracking, output_dir), run_id)

    @classmethod
    def _existing(cls, store: Store, run_id: str) -> Tracker:
        from mlflow.exceptions import MlflowException

        try:
            info = store.client.get_run(run_id).info
        except MlflowException as error:
            raise InputError(
                f"tracking.uri={redact_text(store.uri)}: does not contain run {run_id}; was the store moved?"
            ) from error
        if info.lifecycle_stage == "deleted":
            raise InputError(f"run {run_id} was deleted in MLflow; restore it, or use another run.name")
        # The run may belong to another experiment than the one that is configured now.
        return cls(Store(store.client, store.uri, info.experiment_id), run_id, resumed=True)

    @property
    def uri(self) -> str:
        """MLflow tracking URI."""
        return self._store.uri

    @property
    def experiment_id(self) -> str:
        return self._store.experiment_id

    @property
    def started_at(self) -> float:
        """When the run began, in seconds since the epoch; a resumed run began when it was first started."""
        return float(self._client.get_run(self.run_id).info.start_time) / 1000

    def describe(self, result: str = "", links: Mapping[str, str] | None = None) -> None:
        """Write the run's description: what it does, its command, the result, links to related runs.

        A description that somebody has edited in MLflow is left alone.

        Args:
            result: Markdown.
            links: text to run id.
        """
        tags = self._client.get_run(self.run_id).data.tags
        present = tags.get(NOTE_TAG, "")
        if present and description.digest(present) != tags.get(DIGEST_TAG):
            return
        pages = {text: self._store.run_page(run_id) for text, run_id in (links or {}).items()}
        note = description.describe(self.kind, command=command_line(), result=result, links=pages)
        note = truncate(note, MAX_TAG)
        self.set_tags({NOTE_TAG: note, DIGEST_TAG: description.digest(note)})

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Buffer metrics.

        Args:
            metrics: name to value: a number (`nan` and infinities included), a 0-d tensor or a bool; None is
                skipped. Characters that MLflow does not accept in a name become `_`.
            step: the optimizer step; None for values of the run as a whole.
        """
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if value is not None:
                self._buffer.append((metric_name(key), float(value), now, step if step is not None else -1))
        if len(self._buffer) >= _BUFFER_SIZE or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._flush(final=False)

    def flush(self) -> None:
        """Send buffered metrics now.

        Raises:
            RunFailedError: the store cannot be written to.
        """
        self._flush(final=True)

    def _flush(self, *, final: bool) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self._flushed_at = time.monotonic()
        try:
            while self._buffer:
                chunk = self._buffer[:MAX_METRICS_PER_CALL]
                new = [Metric(k, v, t, max(s, 0)) for k, v, t, s in chunk if not self._is_logged(k, s)]
                if new:
                    self._client.log_batch(self.run_id, metrics=new)
                del self._buffer[:MAX_METRICS_PER_CALL]
        except MlflowException as error:
            # A tracking server may be unavailable for a while: training continues and the metrics are kept.
            if final:
                raise RunFailedError(
                    f"tracking.uri={redact_text(self.uri)}: metrics could not be logged: "
                    f"{redact_text(str(error))}"
                ) from error
            if not self._warned:
                log.warning("metrics could not be logged to MLflow, will retry (%s)", type(error).__name__)
            self._warned = True

    def _is_logged(self, key: str, step: int) -> bool:
        """Whether a resumed run already has this metric at this step."""
        if self._last_step is None or step < 0:
            return False
        if key not in self._last_step:
            history = self._client.get_metric_history(self.run_id, key)
            self._last_step[key] = max((point.step for point in history), default=-1)
        return step <= self._last_step[key]

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters, with secrets redacted and long values truncated.

        MLflow never changes a parameter: a value that is different in a resumed run is logged as the tag
        `changed.<key>`.
        """
        from mlflow.entities import Param

        logged = self._client.get_run(self.run_id).data.params if self._last_step is not None else {}
        texts = {key: truncate(redact(key, value), MAX_PARAM) for key, value in params.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in logged]
        for start in range(0, len(new), MAX_ENTITIES_PER_CALL):
            self._client.log_batch(self.run_id, params=new[start : start + MAX_ENTITIES_PER_CALL])
        self.set_tags({f"changed.{k}": v for k, v in texts.items() if logged.get(k, v) != v})

    def _log_config(self, config: Config) -> None:
        tree = to_tree(config)
        self.log_params(flatten(tree))
        self.log_text(yaml.safe_dump(redact_tree(tree), sort_keys=False, allow_unicode=True), "config.yaml")

    def log_dataset(
        self,
        name: str,
        *,
        digest: str,
        source: str,
        rows: int,
        context: str,
        columns: Mapping[str, str] = {},
        profile: Mapping[str, Any] = {},
    ) -> None:
        """Log a dataset as an input of the run.

        Args:
            digest: content digest, of which the first 36 characters are logged.
            source: where the data comes from, as in the configuration.
            rows: number of records.
            context: `training`, `evaluation` ...
            columns: column name to type, for the schema.
            profile: further facts about the data.
        """
        from mlflow.exceptions import MlflowException

        facts = {"num_rows": rows, **profile}
        inputs = [dataset_input(name, digest, source, context, columns=columns, profile=facts)]
        try:
            self._client.log_inputs(self.run_id, datasets=inputs)
        except MlflowException as error:
            # Another run of the experiment logged the same dataset at the same moment; now MLflow finds it.
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
        """Store text as the artifact `name` (a path below the run's artifacts)."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(name).name
            file.write_text(text, encoding="utf-8")
            parent = str(Path(name).parent)
            self.log_artifact(file, None if parent == "." else parent)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows with the same keys as a table that MLflow's evaluation page shows; replaces `name`."""
        columns = list(rows[0]) if rows else []
        table = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
        self.log_text(json.dumps(table, ensure_ascii=False), name)
        self.set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])})

    def log_traces(self, answers: Sequence[JudgedAnswer], *, judge_is_model: bool) -> None:
        """Log judged answers as traces with assessments, once per run.

        Raises:
            RunFailedError: the store does not accept traces.
        """
        log_traces(self._store, self.run_id, answers, judge_is_model)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, with secrets redacted and long values truncated."""
        from mlflow.entities import RunTag

        batch = [RunTag(key, truncate(redact(key, value), MAX_TAG)) for key, value in tags.items()]
        for start in range(0, len(batch), MAX_ENTITIES_PER_CALL):
            self._client.log_batch(self.run_id, tags=batch[start : start + MAX_ENTITIES_PER_CALL])

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is buffered and end the run: `FINISHED`, `FAILED` or `KILLED`."""
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
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED")
        except Exception as tracking_error:  # must not replace the error that ended the run
            log.warning("the MLflow run could not be ended (%s)", type(tracking_error).__name__)

    def children(self) -> dict[str, str]:
        """Name to id of the runs that are nested under this one, in the order in which they began."""
        found = self._client.search_runs(
            [self.experiment_id],
            f"tags.`mlflow.parentRunId` = '{self.run_id}'",
            order_by=["attributes.start_time ASC"],
        )
        return {run.info.run_name: run.info.run_id for run in found}

    def run_link(self, run_id: str) -> str:
        """URL of another run of this experiment; empty if the store is not an MLflow server."""
        return self._store.run_url(run_id)

    def url_hint(self) -> str:
        """One line that says how to open this run in MLflow's UI."""
        return self._store.url_hint(self.run_id)
