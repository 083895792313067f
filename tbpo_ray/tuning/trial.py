"""A trial: training runs of the project's own driver, inside a Ray Tune trial.

A trial `t003` is the run `<study>/trials/t003`, its repeats with other seeds `t003-s1` ..., and under
population-based training its further generations `t003-x1` ...: a run with a new name that starts with
another trial's checkpoint in its folder, so that it goes on from there as any interrupted run does.
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
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.run_result import RunResult

TrainRun = Callable[..., RunResult]
EvaluateRun = Callable[..., Verdict]
"""A trial gets the workflows that it runs as arguments: they are a layer above the search."""

EVALUATION = "evaluation/"
OBJECTIVE, STEP = "objective", "step"
ORIGIN = "origin.json"
KEEP_ALL = 1_000_000
CHECKPOINT_WAIT_S = 600.0


@dataclass(frozen=True)
class Setup:
    """What all trials of a study share."""

    tree: dict[str, Any]
    """The study's configuration: where trials start from, settled on the cluster."""
    trials_dir: str
    parent_run_id: str
    every: int
    """Steps between reports."""
    slots: list[int] | None
    """pbt: trial numbers in the order of Tune's own trials; otherwise a trial is told its number."""
    known: list[int]
    """pbt: the last step of each that the study knows of, in the same order."""
    cwd: str

    @property
    def config(self) -> Config:
        return Config.model_validate(self.tree)


@dataclass(frozen=True)
class Marker:
    """What a trial leaves with Tune for others to take over: where its checkpoint lies."""

    number: int
    step: int
    checkpoint: str


def trial_config(
    base: Config, trials_dir: str | Path, name: str, params: Mapping[str, Any], seed: int
) -> Config:
    """The configuration of one run of a trial.

    Raises:
        InputError: values that do not go together.
    """
    fixed = {"run__name": name, "run__output_dir": str(trials_dir), "run__seed": seed}
    return stage_config(base, params, **fixed)


def run_trial(config: dict[str, Any], setup: dict[str, Any], train: TrainRun, evaluate: EvaluateRun) -> None:
    """Tune's function trainable. Reports `step` and `objective` during the trial, `state` at the end.

    Args:
        config: `params` and, without slots, `number` and `since` (the last step known to the study).
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
        # An exploited trial carries its donor's config; who it is, only its id still tells.
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
        self.setup, self.base, self.number, self.params, self.since = (
            setup,
            setup.config,
            number,
            params,
            since,
        )
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
        """Train all repeats. Returns what the study keeps.

        Raises:
            InputError, RunFailed: as the driver does.
        """
        name = self._settle_generation(marker)
        values = []
        parent: str | None = self.setup.parent_run_id
        for repeat in range(self.base.tune.repeats):
            seed = self.base.run.seed + repeat
            run_name = name if repeat == 0 else f"{self.name}-s{repeat}"
            config = trial_config(self.base, self.folder, run_name, self.params, seed)
            self.run_dir = self.folder / run_name
            judged = any(metric.startswith(EVALUATION) for metric in self.base.tune.metrics)
            if repeat == 0:
                self._replay()
            result = train(
                config,
                kind="trial" if repeat == 0 else "repeat",
                parent_run_id=parent,
                export=judged,
                on_row=self._report if repeat == 0 else None,
                wait=True,  # an earlier session of the trial may be just ending
            )
            if repeat == 0:
                parent = result.mlflow_run_id
            values.append(measured(result, config, evaluate if judged else None))
        return {"state": "finished", "repeats": values}

    def _settle_generation(self, marker: Marker | None) -> str:
        """Find the newest generation, or begin one from a donor's checkpoint. Returns the run's name."""
        origins = sorted(self.folder.glob(f"{self.name}-x*/{ORIGIN}"), key=lambda f: f.stat().st_mtime_ns)
        self.lineage = [json.loads(file.read_text(encoding="utf-8")) for file in origins]
        self.generation = len(self.lineage)
        if marker is not None:
            own = marker.number == self.number
            self.since = marker.step
            taken = {"donor": marker.number, "step": marker.step, "checkpoint": marker.checkpoint}
            begun = bool(self.lineage) and all(self.lineage[-1][k] == v for k, v in taken.items())
            if not own and not begun:
                self._take_over(taken)
        if self.lineage:
            self.params = self.lineage[-1]["params"]
            # Rows up to there are the donor's.
            self.since = max(self.since, int(self.lineage[-1]["step"]))
        return self.name if not self.generation else f"{self.name}-x{self.generation}"

    def _take_over(self, taken: dict[str, Any]) -> None:
        """Make the next generation's folder: the donor's checkpoint and metrics, this trial's MLflow run."""
        target = self.folder / f"{self.name}-x{self.generation + 1}"
        partial = self.folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        source = Path(taken["checkpoint"])
        shutil.copytree(source, partial / "checkpoints" / source.name)
        upto = json.loads((source / "state.json").read_text(encoding="utf-8"))["metrics_bytes"]
        with (source.parent.parent / "metrics.jsonl").open("rb") as donor:
            (partial / "metrics.jsonl").write_bytes(donor.read(upto))
        shutil.copyfile(self.folder / self.name / "run.json", partial / "run.json")
        origin = taken | {"params": self.params}
        write_atomic(partial / ORIGIN, json.dumps(origin))
        os.rename(partial, target)
        self.lineage.append(origin)
        self.generation += 1

    def _replay(self) -> None:
        """Report what earlier sessions computed and the study does not know of."""
        reached = ckpt.newest(self.run_dir / "checkpoints").step
        if (self.run_dir / "DONE").is_file():
            return
        for row in read_metrics(self.run_dir):
            if row["step"] <= reached:
                self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        """Pass a row on to Tune, which may answer by ending this process."""
        from ray import tune
        from ray.tune import Checkpoint

        step = int(row["step"])
        if step <= self.since or step % self.setup.every or step == row.get("total"):
            return
        if self.metric not in row:
            return
        self.since = step
        told = {
            STEP: step,
            OBJECTIVE: row[self.metric],
            "row": _numbers(row | {"total": None}),
            **self.facts(),
        }
        if not self.pbt:
            tune.report(told)
            return
        checkpoint = ckpt.step_folder(self.run_dir / "checkpoints", step)
        waited, whole = time.monotonic() + CHECKPOINT_WAIT_S, f"step-*/{ckpt.MANIFEST}"
        while not (checkpoint / ckpt.MANIFEST).is_file():
            # The row is written before the checkpoint of the same step; one that is passed over never comes.
            later = any(other.parent.name > checkpoint.name for other in checkpoint.parent.glob(whole))
            if later or time.monotonic() > waited:
                return
            time.sleep(0.05)
        with tempfile.TemporaryDirectory() as folder:
            marker = Marker(self.number, step, str(checkpoint))
            (Path(folder) / "marker.json").write_text(json.dumps(asdict(marker)), encoding="utf-8")
            tune.report(told, checkpoint=Checkpoint.from_directory(folder))


def _taken_marker() -> Marker | None:
    """What Tune hands over: the trial's own marker after a pause, a donor's after an exploit."""
    from ray import tune

    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Marker(**json.loads((Path(folder) / "marker.json").read_text(encoding="utf-8")))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float)}


def measured(result: RunResult, config: Config, evaluate: EvaluateRun | None) -> dict[str, float]:
    """The last logged row of a run and, with `evaluate`, the measures of its policy's answers."""
    values = _numbers(result.metrics)
    if evaluate is None:
        return values
    policies = {"start": config.model.name_or_path, "trial": str(result.export)}
    settled = stage_config(config, {"evaluation": {"policies": policies, "baseline": "start"}})
    metrics = evaluate(settled, parent_run_id=result.mlflow_run_id)["trial"].metrics
    return values | {f"{EVALUATION}{name}": estimate.value for name, estimate in metrics.items()}
