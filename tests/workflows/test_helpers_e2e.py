"""Pipelines whose objective needs models of its own: they are trained, reused, resumed, and paid for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.tuning.space import Space
from tbpo_ray.workflows.helpers import plan_helpers, train_helper
from tbpo_ray.workflows.pipeline import run_pipeline

if TYPE_CHECKING:
    from mlflow.entities import Run

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]


def overrides(out: Path, model: str, objective: str, *more: str) -> list[str]:
    settings = {
        "run.name": objective, "run.output_dir": out, "model.name_or_path": model, "sft": "{}",
        "objective.name": objective, "data.train": "builtin:copyedit?split=train&pairs=60",
        "data.eval": "null", "training.max_steps": 3, "training.pairs_per_step": 8,
        "training.micro_batch_pairs": 8, "training.learning_rate": 1e-3, "training.eval_every": "null",
        "training.checkpoint_every": 1, "evaluation.prompts": "builtin:copyedit?split=test&pairs=4",
        "generation.max_tokens": 4, "cluster.use_gpu": "false", "cluster.num_workers": 1,
    }  # fmt: skip
    return [*(f"{key}={value}" for key, value in settings.items()), *more]


def runs_by_name(out: Path) -> dict[str, Run]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    named = {f"{run.data.tags['tbpo.kind']} {run.info.run_name}": run for run in runs}
    assert len(named) == len(runs)
    return named


def check_costs(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The costs in the verdict by name; they must also be in its table and in the report."""
    costs = {
        cost["name"]: cost
        for cost in json.loads((folder / "evaluation" / "verdict.json").read_text())["costs"]
    }
    assert list(costs) == list(names)
    text, report = (
        (folder / "evaluation" / "verdict.txt").read_text(),
        (folder / "report" / "report.md").read_text(),
    )
    for name, cost in costs.items():
        assert cost["seconds"] > 0 and cost["tokens"] > 0 and cost["pairs"] == cost["steps"] * 8
        assert f"{cost['tokens']:,}" in text and f"| {name} |" in report
    return costs


def test_sepo_trains_its_oracle_and_reuses_it(ray_session, tmp_path, small_model):
    config = load_config(
        "jobs/configs/tiny.yaml",
        overrides(tmp_path, small_model, "sepo", "objective.helpers.oracle.data.share=0.5"),
    )
    verdict = run_pipeline(config)
    assert [policy.name for policy in verdict.policies] == ["base", "sepo"]

    folder = tmp_path / "sepo"
    oracle = folder / "helpers" / "oracle"
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["objective"]["token_weights"]["positive"] == str(oracle / "export")
    own = yaml.safe_load((oracle / "config.yaml").read_text())
    assert (own["objective"]["name"], own["data"]["share"], own["training"]["max_steps"]) == ("dpo", 0.5, 2)
    card = json.loads((oracle / "data_card_train.json").read_text())
    assert card["share"] == [0, 0.5] and 15 < card["pairs"] < 45

    costs = check_costs(folder, ["helper oracle", "sepo"])
    assert costs["helper oracle"]["scored_pairs"] == card["pairs"]
    assert costs["sepo"]["scored_pairs"] == 2 * 60  # the oracle and its reference, on all pairs
    assert "all among the run's pairs" in costs["helper oracle"]["data"]

    runs = runs_by_name(tmp_path)
    parent = runs["pipeline sepo"].info.run_id
    assert runs["helper oracle"].data.tags["mlflow.parentRunId"] == parent
    assert runs["helper oracle"].data.params["objective.name"] == "dpo"
    assert runs["pipeline sepo"].data.metrics["cost/helper_oracle/pairs"] == 16

    timings = (oracle / "timings.jsonl").read_bytes()
    (helper,) = plan_helpers(config)
    assert train_helper(helper, config, parent_run_id=parent).already_finished
    assert (oracle / "timings.jsonl").read_bytes() == timings
    changed = load_config(
        "jobs/configs/tiny.yaml",
        overrides(tmp_path, small_model, "sepo", "objective.helpers.oracle.training.learning_rate=1e-4"),
    )
    with pytest.raises(
        InputError, match=r"objective\.helpers\.oracle\.(data\.share|training\.learning_rate)"
    ):
        train_helper(plan_helpers(changed)[0], changed, parent_run_id=parent)


def wait_for_checkpoint(run: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not any(run.glob("checkpoints/step-*/manifest.json")):
        assert job.poll() is None, "the job ended before it wrote a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_tis_dpo_continues_where_its_helper_was_killed(tmp_path, small_model):
    more = [
        "objective.helpers.positive.training.max_steps=60",
        "objective.helpers.negative.training.max_steps=2",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [
        sys.executable, "jobs/pipeline.py", "--config", "jobs/configs/tiny.yaml",
        *overrides(tmp_path, small_model, "tis_dpo", *more),
    ]  # fmt: skip
    helpers = tmp_path / "tis_dpo" / "helpers"
    with open(tmp_path / "first.log", "w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=log, stderr=log)
        wait_for_checkpoint(helpers / "positive", job)
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not (helpers / "positive" / "DONE").exists() and not (helpers / "negative").exists()
    run_id = json.loads((helpers / "positive" / "run.json").read_text())["mlflow_run_id"]

    second = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900)
    assert second.returncode == 0, second.stderr
    assert [row["step"] for row in read_metrics(helpers / "positive")] == list(range(1, 61))
    assert "continuing from step-" in (helpers / "positive" / "events.log").read_text()
    assert json.loads((helpers / "positive" / "run.json").read_text())["mlflow_run_id"] == run_id
    card = json.loads((helpers / "negative" / "data_card_train.json").read_text())
    assert card["answers_swapped"] and card["pairs"] == 60
    costs = check_costs(tmp_path / "tis_dpo", ["helper positive", "helper negative", "tis_dpo"])
    assert costs["helper negative"]["data"].startswith("all records, answers swapped")
    assert costs["helper positive"]["steps"] == 60
    # The model of the reverse direction prefers what was rejected.
    assert read_metrics(helpers / "negative")[-1]["loss"] > 0
    weights = yaml.safe_load((tmp_path / "tis_dpo" / "config.yaml").read_text())["objective"]["token_weights"]
    assert [weights[side] for side in ("positive", "negative")] == [
        str(helpers / name / "export") for name in ("positive", "negative")
    ]


@pytest.mark.slow
def test_t_reg_needs_no_model_of_its_own(ray_session, tmp_path, small_model):
    config = load_config("jobs/configs/tiny.yaml", overrides(tmp_path, small_model, "t_reg"))
    run_pipeline(config)
    assert not (tmp_path / "t_reg" / "helpers").exists()
    costs = check_costs(tmp_path / "t_reg", ["t_reg"])
    assert costs["t_reg"]["scored_pairs"] == 3 * 60  # the reference, and the policy under two instructions


@pytest.mark.slow
def test_a_study_trains_its_helpers_once(ray_session, tmp_path, small_model):
    from tbpo_ray.workflows.tune import tune

    more = [
        "data.eval=builtin:copyedit?split=eval&pairs=6", "tune.algorithm=grid", "tune.scheduler=none",
        "tune.confirm=0", "tune.metric=loss", "tune.mode=min", "objective.select_ratio=0.5",
    ]  # fmt: skip
    config = load_config("jobs/configs/tiny.yaml", overrides(tmp_path, small_model, "sepo", *more))
    result = tune(config, Space.parse({"objective.beta": {"grid": [0.5, 1.0]}}))
    oracle = result.folder / "helpers" / "oracle" / "export"
    for trial in ("t000", "t001"):
        stored = yaml.safe_load((result.folder / "trials" / trial / "config.yaml").read_text())
        assert stored["objective"]["token_weights"]["positive"] == str(oracle)
    best = yaml.safe_load((result.folder / "best.yaml").read_text())
    assert (
        best["objective"]["token_weights"]["positive"] == str(oracle) and best["objective"]["helpers"] == {}
    )
    assert [name for name in runs_by_name(tmp_path) if name.startswith("helper ")] == ["helper oracle"]
