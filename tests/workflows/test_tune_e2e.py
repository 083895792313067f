"""The search on the real parts: Ray Tune over Ray Train, Optuna, MLflow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.training.reference_scores import scorings
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import StudyState, Trial
from tbpo_ray.workflows.tune import tune

if TYPE_CHECKING:
    from mlflow.entities import Run
    from torch import Tensor

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent.parent
RATE = "training.learning_rate"


def overrides(out: Path, model: str, name: str, **more: object) -> list[str]:
    settings = {
        "run.name": name, "run.output_dir": out, "model.name_or_path": model,
        "data.train": "builtin:copyedit?split=train&pairs=100",
        "data.eval": "builtin:copyedit?split=eval&pairs=12", "data.max_length": 64,
        "objective.bregman.generator": "logistic", "objective.state_baseline.hidden": 8,
        "training.max_steps": 12, "training.pairs_per_step": 8, "training.micro_batch_pairs": 8,
        "training.precision": "fp32", "training.eval_every": 3, "training.checkpoint_every": 3,
        "cluster.use_gpu": "false", "cluster.threads_per_worker": 1, "tune.confirm": 0,
        "tune.metric": "eval/kl/k3", "tune.grace_steps": 3, "tune.reduction_factor": 2,
    } | {key.replace("__", "."): value for key, value in more.items()}  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


def children(out: Path, folder: Path) -> tuple[list[Run], dict[str, Run]]:
    """All runs of kind `tune`, and the study's direct children by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parent = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    names = [run.info.run_name for run in below]
    assert len(set(names)) == len(names), names
    return [r for r in runs if r.data.tags["tbpo.kind"] == "tune"], {r.info.run_name: r for r in below}


def wait_for(what: Callable[[], bool], seconds: float = 90) -> bool:
    """Whether `what` becomes true in time; Ray cleans up asynchronously."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def leftovers() -> list[str]:
    """Actors and placement groups that still exist, except those of Ray Data: private ones
    (`_Stats...`), and the one tracker of the cluster, which ends with the driver."""
    from ray.util.state import list_actors, list_placement_groups

    actors = [a.class_name for a in list_actors(limit=1000) if a.state != "DEAD"]
    groups = [g.placement_group_id for g in list_placement_groups(limit=1000) if g.state != "REMOVED"]
    if "ActorLocationTracker" in actors:
        actors.remove("ActorLocationTracker")
    return [name for name in actors if not name.startswith("_")] + groups


@pytest.fixture(scope="module")
def out(tmp_path_factory, ray_session) -> Path:
    return tmp_path_factory.mktemp("studies")


GRID = {RATE: {"grid": [1.0e-3, 1.0e38, 0.0]}}


@pytest.fixture(scope="module")
def halved(out, small_model):
    """One trial that finishes, one that fails, one that is stopped."""
    settings = overrides(out, small_model, "halved", tune__algorithm="grid", tune__max_concurrent=2,
                         tune__repeats=2, tune__confirm=1)  # fmt: skip
    config = load_config(None, settings)
    return config, tune(config, Space.parse(GRID))


def test_trials_finish_fail_and_stop(halved):
    _, result = halved
    trials = StudyState.open(result.folder / "study.json").trials
    assert [t.state for t in trials] == ["finished", "failed", "stopped"]
    assert "training.on_nonfinite=stop" in trials[1].reason
    assert 3 <= trials[2].step < 12
    assert trials[0].values["eval/kl/k3"] > 1e-6 > trials[2].values["eval/kl/k3"]
    assert [r["step"] for r in trials[0].reports] == [3, 6, 9]
    seeds = [row["eval/kl/k3"] for row in trials[0].repeats]
    assert len(set(seeds)) == 2 and trials[0].values["eval/kl/k3"] == sum(seeds) / 2
    assert result.best.number == 0
    assert all(t.seconds > 0 for t in trials)


def test_nothing_is_left_behind(halved):
    import ray

    assert wait_for(lambda: not leftovers()), leftovers()
    assert wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_reference_scores_are_computed_once(halved):
    config, result = halved
    done = scorings(Path(config.run.output_dir) / ".prepared")
    assert sorted(item["pairs"] for item in done) == [12, 100]
    assert StudyState.open(result.folder / "study.json").facts["reference_scorings"] == 2


def test_the_mlflow_tree_of_a_study(out, halved):
    from mlflow import MlflowClient

    _, result = halved
    studies, below = children(out, result.folder)
    assert [run.info.run_name for run in studies] == ["halved"]
    statuses = {name: run.info.status for name, run in below.items()}
    assert statuses == {"t000": "FINISHED", "t001": "FAILED", "t002": "KILLED"}
    assert below["t002"].data.params[f"sampled.{RATE}"] == "0.0"
    assert below["t000"].data.metrics["mean/eval/kl/k3"] > 0
    assert {"mean/eval/kl/k3/low", "mean/eval/kl/k3/high"} <= below["t000"].data.metrics.keys()
    parent = studies[0]
    assert parent.data.params[f"best.{RATE}"] == "0.001"
    assert parent.data.tags["best.trial"] == "t000"
    artifacts = {
        a.path for a in MlflowClient(f"sqlite:///{out}/mlflow.db").list_artifacts(parent.info.run_id)
    }
    assert artifacts >= {"model", "best.yaml", "report.html", "trials.csv", "trials.json", "study.json"}


def test_the_files_of_a_study(halved):
    _, result = halved
    best = load_config(result.folder / "best.yaml")
    assert (best.training.learning_rate, best.run.name) == (1e-3, "halved-best")
    assert (result.folder / "trials" / "t000" / "export" / "model.safetensors").is_file()
    assert not (result.folder / "trials" / "t002" / "export").exists()
    assert not (result.folder / ".tune").exists()
    page = (result.folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not re.search(r"(src|href)=.?(http|//)|@import|url\(", page)
    assert "eval/kl/k3" in page and "t001 failed" in page
    assert result.note.startswith("With 1 new seed(s) the best configuration")
    assert [t["state"] for t in json.loads((result.folder / "trials.json").read_text())] == [
        "finished", "failed", "stopped"]  # fmt: skip


def test_a_finished_study_does_nothing(halved):
    config, result = halved
    before = {f: f.stat().st_mtime_ns for f in result.folder.rglob("*") if f.is_file() and f.name != ".lock"}
    again = tune(config, Space.parse(GRID))
    assert again.already_finished and again.best.number == 0
    assert {
        f: f.stat().st_mtime_ns for f in result.folder.rglob("*") if f.is_file() and f.name != ".lock"
    } == before


def test_a_failed_trial_resumes_on_request(out, small_model):
    """The storage of one trial fails, and is repaired afterwards."""
    space = Space.parse({RATE: {"grid": [1.0e-3, 5.0e-4]}})
    settings = overrides(out, small_model, "mended", tune__algorithm="grid", tune__max_concurrent=2,
                         tune__scheduler="none")  # fmt: skip
    obstacle = out / "mended" / "trials" / "t001" / "checkpoints"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    result = tune(load_config(None, settings), space)
    first, second = StudyState.open(result.folder / "study.json").trials
    assert (first.state, second.state) == ("finished", "failed") and second.reason
    kept = (result.folder / "trials" / "t000" / "metrics.jsonl").stat().st_mtime_ns

    assert tune(load_config(None, settings), space).already_finished
    obstacle.unlink()
    again = load_config(None, [*settings, "tune.resume_errored=true"])
    assert not tune(again, space).already_finished
    assert tune(again, space).already_finished
    trials = StudyState.open(result.folder / "study.json").trials
    assert [(t.state, t.reason) for t in trials] == [("finished", "")] * 2
    assert (result.folder / "trials" / "t000" / "metrics.jsonl").stat().st_mtime_ns == kept
    _, below = children(out, result.folder)
    assert {name: run.info.status for name, run in below.items()} == {"t000": "FINISHED", "t001": "FINISHED"}
    assert below["t001"].data.tags["tune.state"] == "finished"
    assert below["t001"].data.tags["tune.reason"] == ""


def test_more_concurrent_trials_than_the_cluster_holds(out, small_model):
    config = load_config(None, overrides(out, small_model, "wide", tune__max_concurrent=9))
    with pytest.raises(
        InputError,
        match=r"max_concurrent=9: the cluster holds 4 .*4 CPU.* hold 4 x \(1 CPU\), a trial takes 1",
    ):
        tune(config, Space.parse(GRID))
    assert not (out / "wide" / "run.json").exists()


def test_pbt_takes_over_the_weights_of_the_better_trial(out, small_model):
    """One trial learns; the other has a learning rate of 0 and does not change until it takes over."""
    from safetensors.torch import load_file

    settings = overrides(out, small_model, "pbt", tune__algorithm="grid", tune__scheduler="pbt",
                         tune__trials=2, tune__max_concurrent=1, tune__grace_steps=4,
                         tune__keep_checkpoints="all")  # fmt: skip
    result = tune(load_config(None, settings), Space.parse({RATE: {"grid": [1.0e-3, 0.0]}}))
    trials = StudyState.open(result.folder / "study.json").trials
    assert [t.state for t in trials] == ["finished", "finished"]
    first = trials[1].lineage[0]
    assert (first["donor"], first["step"]) == (0, 4)

    def weights(run: str, step: int) -> dict[str, Tensor]:
        folder = result.folder / "trials" / run / "checkpoints" / f"step-{step:08d}"
        tensors = load_file(folder / "optimizer-0000.safetensors")
        return {name: value for name, value in tensors.items() if name.endswith("@master")}

    donor, own, taken = weights("t000", 4), weights("t001", 4), weights("t001-x1", 4)
    assert all((donor[name] == taken[name]).all() for name in donor)
    assert any((donor[name] != own[name]).any() for name in donor)
    # After the takeover, metrics and the distance from the reference are the donor's too.
    assert trials[1].values["eval/kl/k3"] > 1e-6
    rows = [
        json.loads(line) for line in (result.folder / "trials/t001-x1/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows][:5] == [1, 2, 3, 4, 5]
    _, below = children(out, result.folder)
    assert sorted(below) == ["t000", "t001"]
    assert below["t001"].data.tags["tune.took_over_at_4"] == "t000"


def job(tmp_path: Path, space: Path, settings: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command of a study in a separate process, and its environment."""
    config = tmp_path / "empty.yaml"
    config.write_text("")
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "--config", str(config), "--space", str(space)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    return command + settings, environment | {"PYTHONPATH": str(ROOT)}


def kill_when(reached: Callable[[], bool], command: list[str], environment: dict[str, str]) -> None:
    """Start the study, and kill -9 its whole process group once `reached` is true."""
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        assert wait_for(lambda: reached() or process.poll() is not None, 300)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
    finally:
        # Also when the study never gets there, or it would keep running after the test.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_study_resumes(tmp_path, small_model):
    """Kill -9 the driver while the second of three trials runs; the same command finishes the study."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({RATE: {"loguniform": [1.0e-5, 1.0e-3]}}))
    settings = overrides(tmp_path, small_model, "killed", tune__trials=3, tune__scheduler="none",
                         tune__max_concurrent=1, training__max_steps=24,
                         tune__keep_checkpoints="all")  # fmt: skip
    command, environment = job(tmp_path, space, settings)
    folder = tmp_path / "killed"
    running = folder / "trials" / "t001" / "checkpoints" / "step-00000003" / "manifest.json"
    kill_when(running.is_file, command, environment)
    known = StudyState.open(folder / "study.json").trials
    assert [t.state for t in known] == ["finished", "running"]
    done = {
        f: f.stat().st_mtime_ns for f in (folder / "trials" / "t000" / "checkpoints").rglob("*.safetensors")
    }
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    trials = StudyState.open(folder / "study.json").trials
    assert [t.state for t in trials] == ["finished"] * 3
    assert [t.params for t in trials[:2]] == [t.params for t in known]
    assert {f: f.stat().st_mtime_ns for f in done} == done
    assert "from step-" in (folder / "trials" / "t001" / "events.log").read_text()
    studies, below = children(tmp_path, folder)
    assert len(studies) == 1
    assert {name: run.info.status for name, run in below.items()} == dict.fromkeys(
        ("t000", "t001", "t002"), "FINISHED"
    )
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (third.returncode, "is finished" in third.stderr) == (0, True)


def test_a_killed_population_resumes(tmp_path, small_model):
    """Takeovers before the kill are not repeated, and no trial falls back behind them."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({RATE: {"grid": [1.0e-3, 0.0]}}))
    settings = overrides(tmp_path, small_model, "killed", tune__algorithm="grid", tune__scheduler="pbt",
                         tune__trials=2, tune__max_concurrent=1, tune__grace_steps=4,
                         training__max_steps=16)  # fmt: skip
    command, environment = job(tmp_path, space, settings)
    folder = tmp_path / "killed"

    def trials() -> list[Trial]:
        return StudyState.open(folder / "study.json").trials

    kill_when(lambda: len(known := trials()) == 2 and min(t.step for t in known) >= 8, command, environment)
    before = trials()
    assert before[1].lineage
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    for known, trial in zip(before, trials(), strict=True):
        assert (trial.state, trial.step) == ("finished", 16)
        assert trial.lineage[: len(known.lineage)] == known.lineage
        steps = [take_over["step"] for take_over in trial.lineage]
        assert steps == sorted(set(steps)), steps
        assert all(step >= known.step for step in steps[len(known.lineage) :])
        assert trial.reports[: len(known.reports)] == known.reports
