"""The whole pipeline with the real Ray Data, Ray Train, DeepSpeed, vLLM and MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.workflows.pipeline import run_pipeline

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def done(tmp_path_factory, ray_session, small_model) -> tuple[Path, object]:
    out = tmp_path_factory.mktemp("pipeline")
    overrides = {
        "run.name": "small",
        "run.output_dir": out,
        "model.name_or_path": small_model,
        "data.train": "builtin:copyedit?split=train&pairs=40",
        "data.eval": "builtin:copyedit?split=eval&pairs=11",
        "training.max_steps": 3,
        "training.pairs_per_step": 8,
        "training.micro_batch_pairs": 4,
        "training.eval_every": 2,
        "evaluation.prompts": "builtin:copyedit?split=test&pairs=6",
        "generation.max_tokens": 8,
        "cluster.use_gpu": "false",
        "sft.training.max_steps": 2,
        "sft.training.pairs_per_step": 8,
    }
    config = load_config("jobs/configs/tiny.yaml", [f"{key}={value}" for key, value in overrides.items()])
    return out, run_pipeline(config)


def test_verdict_before_and_after(done):
    out, verdict = done
    assert [policy.name for policy in verdict.policies] == ["sft", "tbpo_q"]
    for policy in verdict.policies:
        assert policy.prompts == 6
        rate = policy.metrics["exact_match"]
        assert 0 <= rate.low <= rate.value <= rate.high <= 1
        assert "distinct_1" in policy.metrics
    table = verdict.table()
    assert "exact match" in table and "win rate" in table and "KL from reference" in table
    assert (out / "small" / "report" / "report.html").stat().st_size > 10_000
    assert (out / "small" / "DONE").is_file()


def test_held_out_pairs_are_all_counted(done):
    out, _ = done
    rows = [json.loads(line) for line in (out / "small" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 3]
    assert {"rewards/margin", "rewards/accuracy", "kl/k3", "grad_norm", "learning_rate"} <= rows[-1].keys()


def test_mlflow_tree(done):
    from mlflow import MlflowClient

    out, _ = done
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    kinds = {run.data.tags["tbpo.kind"]: run for run in runs}
    assert sorted(kinds) == ["compare", "evaluate", "pipeline", "sft", "train"]
    parent = kinds["pipeline"].info.run_id
    for kind in ("sft", "train", "evaluate", "compare"):
        assert kinds[kind].data.tags["mlflow.parentRunId"] == parent
        assert kinds[kind].info.status == "FINISHED"
    trained = kinds["train"]
    assert trained.data.params["objective.name"] == "tbpo_q"
    assert trained.inputs is not None
    assert [d.dataset.name for d in trained.inputs.dataset_inputs] == ["train", "eval"]
    assert any(tag.startswith("version.") or "torch" in tag for tag in trained.data.tags)
    assert {a.path for a in client.list_artifacts(parent)} >= {"config.yaml", "verdict.txt", "report.html"}
    assert any("samples" in a.path for a in client.list_artifacts(kinds["evaluate"].info.run_id))
    assert "small/tokens_per_second" not in trained.data.metrics
    assert trained.data.metrics["tokens_per_second"] > 0


def test_the_same_command_again_changes_nothing(done, capsys):
    from tbpo_ray.config.loading import read_yaml, validate

    out, _verdict = done
    before = {f: f.stat().st_mtime_ns for f in (out / "small" / "export").rglob("*") if f.is_file()}
    config = validate(read_yaml(out / "small" / "config.yaml"))
    from tbpo_ray.workflows.train import train

    result = train(config)
    assert result.already_finished
    assert {f: f.stat().st_mtime_ns for f in (out / "small" / "export").rglob("*") if f.is_file()} == before
