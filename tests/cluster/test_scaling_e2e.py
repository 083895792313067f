"""The commands of the README on an autoscaling cluster of several Ray nodes, with token authentication."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SMALL = {
    "data.train": "builtin:copyedit?split=train&pairs=40",
    "data.eval": "null",
    "training.pairs_per_step": 8,
    "training.micro_batch_pairs": 4,
    "training.eval_every": "null",
    "cluster.num_workers": 2,
    "cluster.resources_per_worker": "{CPU: 1}",
    "cluster.labels": "{prepare: {pool: cpu}, train: {pool: cpu}, generate: {pool: cpu}}",
}
MESSAGE = "error: training.max_step: unknown key; the nearest known one is training.max_steps"


def command(job: str, **more: object) -> list[str]:
    settings = SMALL | {key.replace("__", "."): value for key, value in more.items()}
    words = ["python", f"jobs/{job}.py", "--config", "jobs/configs/tiny.yaml"]
    return words + [f"{key}={value}" for key, value in settings.items()]


def test_requests_without_the_token_are_rejected(scaling, tmp_path):
    (tmp_path / "token").write_text("f" * 64)
    none = {"RAY_AUTH_MODE": "disabled"}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    mark = tmp_path / "was-run"

    def submit(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return scaling.submit("touch", str(mark), environment=environment)

    def join(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", f"import ray; ray.init('{scaling.gcs_address}'); print('joined')"],
            env=scaling.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    with ThreadPoolExecutor(4) as pool:
        submitted, joined = pool.map(submit, [none, wrong]), pool.map(join, [none, wrong])
        for refused in submitted:
            assert refused.returncode != 0 and "auth" in (refused.stdout + refused.stderr).lower()
        for refused in joined:
            assert refused.returncode != 0 and "joined" not in refused.stdout
    assert not mark.exists()
    assert str(mark) not in json.dumps(scaling.get("/api/jobs/"))
    for token in ("", "f" * 64):
        for path in ("/api/jobs/", "/api/v0/nodes", "/api/v0/logs?node_id=x"):
            with pytest.raises(urllib.error.HTTPError) as answer:
                scaling.get(path, token=token)
            assert answer.value.code in (401, 403)


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    """The error line of a refused job; `ray job submit` repeats the end of the log."""
    (line,) = {line for line in done.stdout.splitlines() if line.startswith(("error: ", "failed: "))}
    return line


def test_a_wrong_configuration_fails_the_job_with_the_same_line(scaling, tmp_path):
    done = scaling.submit(*command("train", training__max_step=3, run__output_dir=tmp_path), job="typo")
    assert done.returncode == 1
    assert MESSAGE in done.stdout.splitlines()
    job = scaling.get("/api/jobs/typo")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    assert "Traceback" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_plan_that_never_fits_starts_no_node(scaling, small_model, tmp_path):
    done = scaling.submit(
        *command("train", cluster__num_workers=3, run__output_dir=tmp_path, model__name_or_path=small_model)
    )
    assert done.returncode == 1
    line = only_error(done)
    words = ("cluster.num_workers=3", "3 x (1 CPU)", "2 x cpu (1 CPU)", "at most 2 worker(s)")
    assert all(word in line for word in words), line
    assert scaling.workers() == []


def test_a_path_that_nodes_do_not_share_is_refused(scaling, small_model):
    # `/proc/self/cwd` is a node's own copy of the working directory: another folder on each node, as a local
    # disk would be.
    own = "/proc/self/cwd/runs"
    done = scaling.submit(*command("train", run__output_dir=own, model__name_or_path=small_model))
    assert done.returncode == 1
    line = only_error(done)
    assert line.startswith(f"error: run.output_dir={own}: node ") and "every node mounts" in line


def test_the_pipeline_scales_from_nothing_and_back_and_leaks_nothing(scaling, small_model, tmp_path):
    canary = f"canary{uuid.uuid4().hex}"
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY")
    words = command(
        "pipeline",
        run__name="scaled",
        run__output_dir=tmp_path,
        model__name_or_path=small_model,
        training__max_steps=2,
        training__reference_scores="live",
        generation__max_tokens=8,
        evaluation__prompts="builtin:copyedit?split=test&pairs=4",
        sft="{data.train: 'builtin:copyedit?split=sft&pairs=40', training.max_steps: 1}",
    )
    scaling.wait_until_given_back()
    most = 0
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(scaling.submit, *words, environment={name: canary for name in names}, job="scaled")
        while not job.done():
            most = max(most, len(scaling.workers()))
            time.sleep(1)
    done = job.result()
    assert done.returncode == 0, done.stdout[-5000:]
    assert scaling.get("/api/jobs/scaled")["status"] == "SUCCEEDED"
    assert most == 2, "two workers of a CPU each stand on two nodes of one CPU"
    assert re.search(r"waits for [12] x \(1 CPU\) on nodes with pool=cpu, \d+ s so far; up: ", done.stdout)
    assert_mlflow_is_complete(tmp_path)
    scaling.wait_until_given_back()

    pages = {p: json.dumps(scaling.get(p)) for p in ("/api/jobs/", "/api/jobs/scaled/logs")}
    for table in ("actors", "tasks", "workers", "nodes", "jobs", "runtime_envs", "placement_groups"):
        pages[table] = json.dumps(scaling.get(f"/api/v0/{table}?detail=1&limit=10000"))
    files = contents(tmp_path, scaling.folder)
    # The search finds what is there: the run's name in metadata, logs and configuration.
    assert "scaled" in pages["/api/jobs/"] and any(b"scaled" in text for text in files.values())
    assert any(f.suffix == ".safetensors" for f in files) and any(f.name == "mlflow.db" for f in files)
    assert [page for page, text in pages.items() if canary in text] == []
    assert [file for file, text in files.items() if canary.encode() in text] == []
    token = scaling.token.encode()
    assert [file for file, text in files.items() if token in text] == [scaling.token_file]
    assert [page for page, text in pages.items() if scaling.token in text] == []


def test_a_node_lost_in_training_is_replaced_and_the_run_finishes(scaling, small_model, tmp_path):
    total = 60
    words = command(
        "train",
        run__name="lost",
        run__output_dir=tmp_path,
        model__name_or_path=small_model,
        objective__name="dpo",
        training__max_steps=total,
        training__checkpoint_every=5,
    )
    folder = tmp_path / "lost"
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(scaling.submit, *words)
        until = time.monotonic() + 240
        while not list((folder / "checkpoints").glob("step-*/manifest.json")):
            assert not job.done(), job.result().stdout[-5000:]
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.2)
        lost = sorted(scaling.workers())[-1]
        scaling.pull_the_plug(lost)
        done = job.result()
    assert done.returncode == 0, done.stdout[-5000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert "continuing from step-" in (folder / "events.log").read_text()
    assert lost not in scaling.workers()
    assert (folder / "DONE").is_file() and (folder / "export" / "model.safetensors").is_file()


def assert_mlflow_is_complete(out: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    kinds = sorted(run.data.tags["tbpo.kind"] for run in runs)
    assert kinds == ["compare", "evaluate", "pipeline", "sft", "train"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    (trained,) = (run for run in runs if run.data.tags["tbpo.kind"] == "train")
    assert [m.step for m in client.get_metric_history(trained.info.run_id, "loss")] == [1, 2]


def contents(*folders: Path) -> dict[Path, bytes]:
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return {p: p.read_bytes() for p in files}
