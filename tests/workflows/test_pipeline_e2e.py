"""The whole pipeline with the real Ray Data, Ray Train, DeepSpeed, vLLM and MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.generation.samples import Samples
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
        "generation.temperature": 0,
        "evaluation.traces": 2,
        "tracking.system_metrics_seconds": 1,
        "compare.promote.model_name": "small",
        "compare.promote.at_least": 0,
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
    assert trained.data.metrics["speed/tokens_per_second"] > 0


def test_the_same_command_again_changes_nothing(done, capsys):
    from tbpo_ray.config.loading import read_yaml, validate

    out, _verdict = done
    before = {f: f.stat().st_mtime_ns for f in (out / "small" / "export").rglob("*") if f.is_file()}
    config = validate(read_yaml(out / "small" / "config.yaml"))
    from tbpo_ray.workflows.train import train

    result = train(config)
    assert result.already_finished
    assert {f: f.stat().st_mtime_ns for f in (out / "small" / "export").rglob("*") if f.is_file()} == before


READER = """
import json, sys
sys.modules["tbpo_ray"] = None  # importing it raises ImportError
import mlflow
pipe = mlflow.transformers.load_model("models:/small@champion")
chats = [[{"role": "user", "content": prompt}] for prompt in json.loads(sys.argv[1])]
answers = [pipe(chat, do_sample=False, max_new_tokens=8)[0]["generated_text"] for chat in chats]
print(json.dumps([answer[-1]["content"] for answer in answers]))
"""


def test_the_champion_answers_as_vllm_does(done, tmp_path):
    out, verdict = done
    samples = list(Samples(out / "small" / "evaluation" / verdict["tbpo_q"].samples))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", READER, json.dumps([sample.prompt_text for sample in samples])],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == [sample.answer for sample in samples]
    # After three steps the answers may be empty; `test_logged_models.py` compares longer ones.
    assert len(samples) == 6


def test_mlflow_has_models_metrics_samples_and_links(done):
    from mlflow import MlflowClient

    out, verdict = done
    client: Any = MlflowClient(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbpo"]
    runs = {run.data.tags["tbpo.kind"]: run for run in client.search_runs([experiment.experiment_id])}
    trained, evaluated, pipeline = (runs[kind] for kind in ("train", "evaluate", "pipeline"))
    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    assert {model.model_type for model in models.values()} == {"policy", "checkpoint"}
    policy = models["small"]
    assert policy.source_run_id == trained.info.run_id and policy.params["objective.name"] == "tbpo_q"
    linked = {metric.key: metric for metric in policy.metrics}
    assert linked["evaluation/win_rate"].dataset_digest == verdict.prompts["digest"][:36]
    assert linked["eval/loss"].dataset_name == "eval"
    assert trained.data.metrics["evaluation/win_rate"] == verdict["tbpo_q"].metrics["win_rate"].value
    for point in ("eval/loss", "eval/rewards/accuracy"):
        steps = [item.step for item in client.get_metric_history(trained.info.run_id, point)]
        assert steps == [2, 3]
    assert any(name.startswith("system/") for name in trained.data.metrics)
    assert not any(name.startswith("data/") for name in trained.data.metrics)
    assert trained.data.tags["data.train.pairs"] == "40"
    weights = [*(out / "mlartifacts").rglob("model.safetensors")]
    assert len(weights) == 2 and all(file.stat().st_nlink == 2 for file in weights)
    assert client.get_model_version_by_alias("small", "champion").run_id == runs["compare"].info.run_id
    note = pipeline.data.tags["mlflow.note.content"]
    assert trained.info.run_id in note and evaluated.info.run_id in note and "exact match" in note
    table = pd.read_json(
        Path(client.download_artifacts(evaluated.info.run_id, "samples.json")), orient="split"
    )
    assert len(table) == 12 and set(table["policy"]) == {"sft", "tbpo_q"}
    traces = client.search_traces(locations=[experiment.experiment_id], run_id=evaluated.info.run_id)
    assert len(traces) == 4
    scored = [trace for trace in traces if trace.info.tags["tbpo.policy"] == "tbpo_q"]
    assert {a.name for trace in scored for a in trace.info.assessments} == {"score", "preference"}
