"""Tracking with a real SQLite store and, in one test, a real MLflow server."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from tbpo_ray.cluster.session import free_port
from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import Config, TrackingConfig
from tbpo_ray.errors import InputError
from tbpo_ray.redaction import REDACTED, redact, redact_tree
from tbpo_ray.tracking.limits import metric_name
from tbpo_ray.tracking.model_uris import model_folder
from tbpo_ray.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


def start(store: Path, **overrides) -> Tracker:
    arguments = {"name": "run", "kind": "train"} | overrides
    return Tracker.start(TrackingConfig(), store, **arguments)


def data(tracker: Tracker):
    return tracker._client.get_run(tracker.run_id)


@pytest.mark.heavy
def test_a_run_holds_configuration_metrics_dataset_and_versions(store):
    config = load_config(None, ["run.name=first", "generation.max_tokens=17"])
    with start(store, config=config) as tracker:
        tracker.log_metrics({"loss": 0.5, "rewards/margin": 1, "eval/rewards/accuracy": True}, step=3)
        tracker.log_metrics({"bad": math.nan, "worse": math.inf, "none": None}, step=3)
        tracker.log_dataset(
            "train",
            digest="d" * 64,
            source="builtin:copyedit",
            rows=12,
            context="training",
            columns={"prompt": "string"},
        )
        tracker.log_text("hello", "notes/a.txt")
    run = data(tracker)
    assert run.info.status == "FINISHED"
    assert run.data.params["generation.max_tokens"] == "17"
    assert run.data.params["run.name"] == "first"
    assert run.data.metrics["eval/rewards/accuracy"] == 1.0
    assert math.isnan(run.data.metrics["bad"]) and run.data.metrics["worse"] > 1e300
    assert "none" not in run.data.metrics
    point = tracker._client.get_metric_history(tracker.run_id, "rewards/margin")[0]
    assert (point.step, point.value) == (3, 1.0)
    dataset = run.inputs.dataset_inputs[0]
    assert dataset.dataset.digest == "d" * 36 and '"num_rows": 12' in dataset.dataset.profile
    assert dataset.tags[0].value == "training"
    assert run.data.tags["version.torch"] and run.data.tags["tbpo.kind"] == "train"
    artifacts = {item.path for item in tracker._client.list_artifacts(tracker.run_id)}
    assert artifacts == {"config.yaml", "notes"}
    assert (store / "mlartifacts").is_dir()
    assert tracker.run_id in tracker.url_hint() and "mlflow.db" in tracker.url_hint()


def test_the_ui_opens_the_experiment_as_model_training(store):
    with start(store) as tracker:
        experiment = tracker._client.get_experiment(tracker.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_nothing_about_the_machine_or_its_environment_is_logged(store, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "tiger-in-the-environment")
    with start(store, config=Config()) as tracker:
        pass
    run = data(tracker)
    logged = str(run.data.tags) + str(run.data.params)
    assert "tiger" not in logged and socket.gethostname() not in logged


def test_secrets_are_redacted_by_key_and_by_pattern(store):
    config = load_config(
        None,
        [
            "evaluation.judge={kind: llm, api_key_env: OPENAI_API_KEY, url: 'http://me:tiger@host/v1'}",
            "generation.engine={hf_token: tiger, max_num_seqs: 4}",
        ],
    )
    with start(store, config=config) as tracker:
        tracker.set_tags({"note": "Authorization: Bearer tiger-tiger-tiger-tiger", "x.password": "tiger"})
    run = data(tracker)
    text = Path(tracker._client.download_artifacts(tracker.run_id, "config.yaml")).read_text()
    assert "tiger" not in text + str(run.data.params) + str(run.data.tags)
    assert run.data.params["evaluation.judge.api_key_env"] == "OPENAI_API_KEY"
    assert run.data.params["evaluation.judge.url"] == "http://host/v1"
    assert run.data.params["generation.engine.max_num_seqs"] == "4"
    assert run.data.params["generation.max_tokens"] == "256"


def test_redaction_keeps_other_values():
    assert redact("max_tokens", 3) == "3"
    assert redact("data.card_column", "token") == "token"
    assert redact_tree({"a": [{"token": "x"}], "password": ""}) == {
        "a": [{"token": REDACTED}],
        "password": "",
    }


def test_a_failed_run_has_status_failed_and_the_error_propagates(store):
    with pytest.raises(ValueError, match="boom"), start(store) as tracker:
        tracker.log_metrics({"loss": 1.0}, step=1)
        raise ValueError("boom")
    assert data(tracker).info.status == "FAILED"
    assert data(tracker).data.metrics["loss"] == 1.0


def test_a_resumed_run_is_the_same_run_and_repeats_no_metric(store):
    with start(store, config=Config()) as first:
        first.log_metrics({"loss": 2.0}, step=1)
        first.log_metrics({"loss": 1.5}, step=2)
    longer = load_config(None, ["training.max_steps=9"])
    second = start(store, config=longer, run_id=first.run_id)
    assert data(second).info.status == "RUNNING"
    for step, loss in ((2, 1.5), (3, 1.2)):
        second.log_metrics({"loss": loss}, step=step)
    second.finish()
    points = second._client.get_metric_history(first.run_id, "loss")
    assert [(p.step, p.value) for p in points] == [(1, 2.0), (2, 1.5), (3, 1.2)]
    assert data(second).data.params["training.max_steps"] == "None"
    assert data(second).data.tags["changed.training.max_steps"] == "9"


def test_runs_nest_and_another_process_can_log_to_a_run(store):
    parent = start(store, name="pipeline", kind="pipeline")
    child = start(store, name="sft", kind="sft", parent_run_id=parent.run_id)
    assert data(child).data.tags["mlflow.parentRunId"] == parent.run_id
    other = Tracker.attach(TrackingConfig(), store, child.run_id)
    other.log_metrics({"loss": 4.0}, step=7)
    other.flush()
    assert data(child).data.metrics["loss"] == 4.0
    assert data(child).info.status == "RUNNING"
    child.finish()
    parent.finish("KILLED")
    assert data(parent).info.status == "KILLED"


def test_logging_is_cheap_in_a_loop(store):
    tracker = start(store)
    begin = time.perf_counter()
    for step in range(400):
        tracker.log_metrics({"loss": 1.0}, step=step)
    assert time.perf_counter() - begin < 0.5
    tracker.finish()
    assert len(tracker._client.get_metric_history(tracker.run_id, "loss")) == 400


def test_long_values_are_truncated_with_their_length(store):
    with start(store) as tracker:
        tracker.log_params({"long": "x" * 9000})
        tracker.set_tags({"long": "y" * 9000})
    assert data(tracker).data.params["long"].endswith("(9000 characters)")
    assert data(tracker).data.tags["long"].endswith("(9000 characters)")


def test_metric_names_are_sanitized():
    assert metric_name("eval/rewards/accuracy") == "eval/rewards/accuracy"
    assert metric_name("KL(ref||policy)") == "KL_ref__policy_"
    assert metric_name("/a//../b") == "_/a/_/_/b"


def test_an_alias_points_to_the_latest_version(store, tmp_path, small_model):
    with start(store) as tracker:
        assert tracker.register_model(small_model, "tbpo", "champion") == "1"
        assert tracker.register_model(small_model, "tbpo", "champion") == "2"
        champion = tracker._client.get_model_version_by_alias("tbpo", "champion")
        assert (str(champion.version), champion.run_id) == ("2", tracker.run_id)
        with pytest.raises(InputError, match=r"config\.json"):
            tracker.register_model(tmp_path / "none", "tbpo")
        with pytest.raises(InputError, match="a/b"):
            tracker.register_model(small_model, "a/b")


@pytest.mark.parametrize(
    ("uri", "output"),
    [("nonsense://x", None), ("sqlite:////proc/none/x.db", None), (None, "s3://bucket/runs")],
)
def test_an_invalid_store_is_rejected(tmp_path, uri, output):
    with pytest.raises(InputError, match=r"tracking\.uri") as caught:
        Tracker.start(TrackingConfig(uri=uri), output or tmp_path, name="a", kind="train")
    assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]


def test_an_unknown_run_is_rejected(store):
    with pytest.raises(InputError, match=f"tracking.uri=.*{'0' * 32}"):
        start(store, run_id="0" * 32)


@pytest.mark.heavy
def test_processes_that_start_at_the_same_time_share_a_new_store(tmp_path):
    code = textwrap.dedent(
        """
        import sys
        from tbpo_ray.config.schema import TrackingConfig
        from tbpo_ray.tracking.tracker import Tracker
        with Tracker.start(TrackingConfig(), sys.argv[1], name=sys.argv[2], kind="trial") as tracker:
            for step in range(50):
                tracker.log_metrics({"loss": 1.0}, step=step)
                tracker.flush()
        """
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), f"p{i}"], stderr=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    reader = start(tmp_path)
    runs = reader._client.search_runs([reader.experiment_id], "attributes.status = 'FINISHED'")
    assert len(runs) == 3 and all(run.data.metrics["loss"] == 1.0 for run in runs)
    reader.finish()


@pytest.mark.e2e
def test_a_tracking_server(tmp_path, small_model):
    port = free_port()
    mlflow = Path(sys.executable).with_name("mlflow")
    address = f"http://127.0.0.1:{port}"
    command = [
        str(mlflow),
        "server",
        "--port",
        str(port),
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
    ]
    command += ["--artifacts-destination", str(tmp_path / "store"), "--workers", "1"]
    server = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        wait_for(f"{address}/health", server)
        tracking = TrackingConfig(uri=address, experiment="served")
        with Tracker.start(tracking, tmp_path, name="a", kind="train", config=Config()) as tracker:
            tracker.log_metrics({"rewards/margin": math.nan}, step=1)
            assert tracker.register_model(small_model, "served", "champion") == "1"
        config = Config.model_validate({"run": {"output_dir": str(tmp_path)}, "tracking": tracking})
        folder = Path(model_folder(config, "models:/served@champion", "evaluation.policies.a"))
        weights = (folder / "model.safetensors").read_bytes()
        assert weights == (Path(small_model) / "model.safetensors").read_bytes()
        assert not list(Path(small_model).parent.glob(".mlflow-*"))  # the staged upload is gone
        assert math.isnan(data(tracker).data.metrics["rewards/margin"])
        assert tracker.url_hint().startswith(f"{address}/#/experiments/")
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not respond")
