"""A trial: training runs of this project's own driver inside a Ray Tune trial.

A trial `t003` is the run `<study>/trials/t003`, and its repeats with other seeds are `t003-s1` and so on.
Under population-based training its further generations are `t003-x1` and so on: each is a run with a new
name whose folder starts with another trial's checkpoint, so it resumes as any interrupted run does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import TbpoError
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.storage.files import atomic_folder
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.run_result import RunResult

TrainRun = Callable[..., RunResult]
EvaluateRun = Callable[..., Verdict]
"""The workflows that a trial runs are passed in as arguments because they belong to a higher layer."""

EVALUATION = "evaluation/"
OBJECTIVE, STEP = "objective", "step"
ORIGIN = "origin.json"
KEEP_ALL = 1_000_000
CHECKPOINT_WAIT_S = 600.0


@dataclass(frozen=True)
class Setup:
    """What all trials of a study share."""

    tree: dict[str, Any]
    """The configuration that trials start from, resolved for the cluster."""
    trials_dir: str
    parent_run_id: str
    every: int
    """Steps between reports."""
    slots: list[int] | None
    """pbt: trial numbers in the order of Tune's own trials. Otherwise None: Tune's config has the number."""
    known: list[int]
    """pbt: the last recorded step of each trial, in the same order."""
    cwd: str

    @property
    def config(self) -> Config:
        return Config.model_validate(self.tree)


@dataclass(frozen=True)
class Marker:
    """What a trial gives Tune in place of a checkpoint: where the real one is, for others to take over."""

    number: int
    step: int
    checkpoint: str


def trial_config(
    base: Config, trials_dir: str | Path, name: str, params: Mapping[str, Any], seed: int
) -> Config:
    """The configuration of one run of a trial.

    Raises:
        InputError: the values are inconsistent.
    """
    fixed = {"run__name": name, "run__output_dir": str(trials_dir), "run__seed": seed}
    return stage_config(base, params, **fixed)


def run_trial(config: dict[str, Any], setup: dict[str, Any], train: TrainRun, evaluate: EvaluateRun) -> None:
    """Run a trial as Tune's function trainable; it reports `step` and `objective`, and `state` at the end.

    Args:
        config: `params` and, without slots, `number` and `since` (the last recorded step).
        setup: a :class:`Setup` as a mapping.
        train: trains one run of a configuration, as `tbpo_ray.workflows.train.train` does.
        evaluate: samples and judges policies, as `tbpo_ray.workflows.evaluate.evaluate` does.
    """
    from ray import tune

    shared = Setup(**setup)
    os.chdir(shared.cwd)
    if shared.slots is None:
        number, since = int(config["number"]), int(config["since"])
    else:
        # An exploited trial carries its donor's config, so only the trial id identifies it.
        slot = int(tune.get_context().get_trial_id().rsplit("_", 1)[1])
        number, since = shared.slots[slot], shared.known[slot]
    trial = _Trial(shared, number, dict(config.get("params") or {}), since)
    try:
        outcome = trial.run(_taken_marker(), train, evaluate)
    except TbpoError as error:
        outcome = {"state": "failed", "reason": str(error)}
    tune.report({OBJECTIVE: math.nan, **outcome, **trial.facts()})


class _Trial:
    def __init__(self, setup: Setup, number: int, params: dict[str, Any], since: int):
        self.setup, self.base = setup, setup.config
        self.number, self.params, self.since = number, params, since
        self.folder = Path(setup.trials_dir)
        self.pbt = setup.slots is not None
        self.generation = 0
        self.lineage: list[dict[str, Any]] = []
        self.metric = self.base.tune.metrics[0]
        self.run_dir = self.folder

    @property
    def name(self) -> str:
        return f"t{self.number:03d}"

    def facts(self) -> dict[str, Any]:
        return {"params": self.params, "generation": self.generation, "lineage": self.lineage}

    def run(self, marker: Marker | None, train: TrainRun, evaluate: EvaluateRun) -> dict[str, Any]:
        """Train all repeats and return the outcome that the study stores.

        Raises:
            InputError, RunFailedError: as the driver does.
        """
        name = self._resolve_generation(marker)
        judged = any(metric.startswith(EVALUATION) for metric in self.base.tune.metrics)
        values = []
        parent: str | None = self.setup.parent_run_id
        for repeat in range(self.base.tune.repeats):
            seed = self.base.run.seed + repeat
            run_name = name if repeat == 0 else f"{self.name}-s{repeat}"
            config = trial_config(self.base, self.folder, run_name, self.params, seed)
            self.run_dir = self.folder / run_name
            if repeat == 0:
                self._replay()
            result = train(
                config,
                kind="trial" if repeat == 0 else "repeat",
                parent_run_id=parent,
                export=judged,
                on_row=self._report if repeat == 0 else None,
                wait=True,  # an earlier session of the trial may not have ended yet
            )
            if repeat == 0:
                parent = result.mlflow_run_id
            values.append(final_metrics(result, config, evaluate if judged else None))
        return {"state": "finished", "repeats": values}

    def _resolve_generation(self, marker: Marker | None) -> str:
        """Find the newest generation, or begin one from a donor's checkpoint; return the run's name."""
        origins = sorted(self.folder.glob(f"{self.name}-x*/{ORIGIN}"), key=lambda f: f.stat().st_mtime_ns)
        self.lineage = [json.loads(file.read_text(encoding="utf-8")) for file in origins]
        self.generation = len(self.lineage)
        if marker is not None:
            self.since = marker.step
            takeover = {"donor": marker.number, "step": marker.step, "checkpoint": marker.checkpoint}
            # After a restart Tune hands out the same marker again.
            begun = bool(self.lineage) and all(self.lineage[-1][k] == v for k, v in takeover.items())
            if marker.number != self.number and not begun:
                self._take_over(takeover)
        if self.lineage:
            self.params = self.lineage[-1]["params"]
            # The rows up to that step are the donor's.
            self.since = max(self.since, int(self.lineage[-1]["step"]))
        return self.name if not self.generation else f"{self.name}-x{self.generation}"

    def _take_over(self, takeover: dict[str, Any]) -> None:
        """Make the next generation's folder: the donor's checkpoint and metrics, this trial's MLflow run."""
        source = Path(takeover["checkpoint"])
        metrics_bytes = json.loads((source / "state.json").read_text(encoding="utf-8"))["metrics_bytes"]
        origin = takeover | {"params": self.params}
        with atomic_folder(self.folder / f"{self.name}-x{self.generation + 1}") as partial:
            shutil.copytree(source, partial / "checkpoints" / source.name)
            # The donor may have trained on since: keep only the rows that its checkpoint includes.
            with (source.parent.parent / "metrics.jsonl").open("rb") as donor:
                (partial / "metrics.jsonl").write_bytes(donor.read(metrics_bytes))
            shutil.copyfile(self.folder / self.name / "run.json", partial / "run.json")
            (partial / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
        self.lineage.append(origin)
        self.generation += 1

    def _replay(self) -> None:
        """Report the rows of earlier sessions that the study has not recorded."""
        reached = ckpt.newest(self.run_dir / "checkpoints", ckpt.find_incompleteness).step
        if (self.run_dir / "DONE").is_file():
            return
        for row in read_metrics(self.run_dir):
            if row["step"] <= reached:
                self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        """Pass a row on to Tune, which may respond by ending this process."""
        from ray import tune
        from ray.tune import Checkpoint

        step = int(row["step"])
        if not self._is_due(row, step):
            return
        self.since = step
        result = {
            STEP: step,
            OBJECTIVE: row[self.metric],
            "row": _numbers(row | {"total": None}),
            **self.facts(),
        }
        if not self.pbt:
            tune.report(result)
            return
        checkpoint = ckpt.step_folder(self.run_dir / "checkpoints", step)
        if not _wait_for_checkpoint(checkpoint):
            return
        with tempfile.TemporaryDirectory() as folder:
            marker = Marker(self.number, step, str(checkpoint))
            (Path(folder) / "marker.json").write_text(json.dumps(asdict(marker)), encoding="utf-8")
            tune.report(result, checkpoint=Checkpoint.from_directory(folder))

    def _is_due(self, row: Mapping[str, Any], step: int) -> bool:
        """Whether a row is at a reporting step, is new, and has the metric; the last step is not reported."""
        is_last = step == row.get("total")
        return step > self.since and step % self.setup.every == 0 and not is_last and self.metric in row


def _wait_for_checkpoint(folder: Path) -> bool:
    """Wait until a checkpoint is complete; False if it was skipped or does not appear in time.

    A row is written before the checkpoint of its step. A checkpoint is skipped when a later one replaces it.
    """
    deadline = time.monotonic() + CHECKPOINT_WAIT_S
    while not (folder / ckpt.MANIFEST).is_file():
        complete = folder.parent.glob(f"step-*/{ckpt.MANIFEST}")
        was_skipped = any(manifest.parent.name > folder.name for manifest in complete)
        if was_skipped or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _taken_marker() -> Marker | None:
    """The marker that Tune restores: the trial's own after a pause, a donor's after an exploit."""
    from ray import tune

    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Marker(**json.loads((Path(folder) / "marker.json").read_text(encoding="utf-8")))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float)}


def final_metrics(result: RunResult, config: Config, evaluate: EvaluateRun | None) -> dict[str, float]:
    """The last logged row of a run and, with `evaluate`, the metrics of its policy's answers."""
    values = _numbers(result.metrics)
    if evaluate is None:
        return values
    policies = {"start": config.model.name_or_path, "trial": str(result.export)}
    judged = stage_config(config, {"evaluation": {"policies": policies, "baseline": "start"}})
    metrics = evaluate(judged, parent_run_id=result.mlflow_run_id)["trial"].metrics
    return values | {f"{EVALUATION}{name}": estimate.value for name, estimate in metrics.items()}
