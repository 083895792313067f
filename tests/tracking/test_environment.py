"""MLflow's environment variables, one by one; what a run's page says about it."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import TrackingConfig
from tbpo_ray.errors import InputError
from tbpo_ray.tracking import store as store_module
from tbpo_ray.tracking.description import command_line
from tbpo_ray.tracking.environment import system_metrics_seconds, with_environment
from tbpo_ray.tracking.reachability import check_reachable
from tbpo_ray.tracking.store import check_store
from tbpo_ray.tracking.tracker import Tracker

VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    check_reachable.cache_clear()
    store_module._report_credentials.cache_clear()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address that answers as MLflow would, and the authorization of each request that it gets."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(self.headers.get("authorization", ""))
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_address[1]}", seen
    running.shutdown()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_the_tracking_uri(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/theirs.db")
    assert with_environment(load_config(None, [])).tracking.uri == "sqlite:////tmp/theirs.db"
    assert "tracking.uri=sqlite:////tmp/theirs.db from MLFLOW_TRACKING_URI" in capsys.readouterr().err
    ours = load_config(None, ["tracking.uri=sqlite:////tmp/ours.db"])
    assert with_environment(ours).tracking.uri == "sqlite:////tmp/ours.db"
    said = capsys.readouterr().err
    assert "tracking.uri=sqlite:////tmp/ours.db from the configuration, not MLFLOW_TRACKING_URI" in said


def test_the_experiment_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    config = with_environment(load_config(None, [f"run.output_dir={tmp_path}"]))
    with Tracker.from_note(config, tmp_path / "run.json", kind="train") as tracker:
        assert tracker._client.get_experiment(tracker.experiment_id).name == "theirs"
    assert "tracking.experiment=theirs from MLFLOW_EXPERIMENT_NAME" in capsys.readouterr().err
    ours = with_environment(load_config(None, ["tracking.experiment=ours"])).tracking
    assert ours.experiment == "ours"


def test_the_run_id(monkeypatch, tmp_path, capsys):
    config = load_config(None, [f"run.output_dir={tmp_path}"])
    theirs = Tracker.start(config.tracking, tmp_path, name="theirs", kind="orchestrator")
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs.run_id)
    check_store(config)
    with Tracker.from_note(config, tmp_path / "child.json", kind="sft", parent_run_id="p" * 32) as child:
        assert child.run_id != theirs.run_id
    with Tracker.from_note(config, tmp_path / "run.json", kind="train") as tracker:
        assert tracker.run_id == theirs.run_id
    assert f"MLflow run {theirs.run_id} from MLFLOW_RUN_ID" in capsys.readouterr().err
    with Tracker.from_note(config, tmp_path / "second.json", kind="train") as second:
        assert second.run_id != theirs.run_id  # MLflow, too, uses the variable once
    with Tracker.from_note(config, tmp_path / "run.json", kind="train") as resumed:
        assert resumed.run_id == theirs.run_id


def test_a_run_id_that_the_store_does_not_have(monkeypatch, tmp_path):
    config = load_config(None, [f"run.output_dir={tmp_path}"])
    Tracker.start(config.tracking, tmp_path, name="a", kind="train").finish()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(InputError, match=f"MLFLOW_RUN_ID={'0' * 32}: .* unset it"):
        check_store(config)


def test_the_user_name_and_the_password(monkeypatch, server, capsys):
    address, seen = server
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tiger")
    check_store(load_config(None, [f"tracking.uri=http://{address}"]))
    assert seen == [basic("ada", "tiger")]
    said = capsys.readouterr().err
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said and "tiger" not in said


def test_the_token(monkeypatch, server, capsys):
    address, seen = server
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tiger")
    check_store(load_config(None, [f"tracking.uri=http://{address}"]))
    assert seen == ["Bearer tiger"]
    said = capsys.readouterr().err
    assert "MLflow credentials from MLFLOW_TRACKING_TOKEN" in said and "tiger" not in said


def test_credentials_in_the_configured_address_win(monkeypatch, server, capsys):
    address, seen = server
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tiger")
    check_store(load_config(None, [f"tracking.uri=http://bob:lion@{address}"]))
    assert seen == [basic("bob", "lion")]
    said = capsys.readouterr().err
    assert "MLflow credentials from tracking.uri" in said and "lion" not in said


def test_the_system_metrics_variables(monkeypatch):
    assert system_metrics_seconds(TrackingConfig()) == 15
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "2.5")
    assert system_metrics_seconds(TrackingConfig()) == 2.5
    assert system_metrics_seconds(TrackingConfig(system_metrics_seconds=7)) == 7
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert system_metrics_seconds(TrackingConfig()) == 0
    assert system_metrics_seconds(TrackingConfig(system_metrics_seconds=7)) == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "often"),
        ("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "-1"),
        ("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "inf"),
        ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "maybe"),
    ],
)
def test_a_variable_with_an_impossible_value(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}: .*must be"):
        with_environment(load_config(None, []))


def note(tracker: Tracker) -> str:
    return tracker._client.get_run(tracker.run_id).data.tags["mlflow.note.content"]


def test_the_description_has_command_result_and_links(monkeypatch, tmp_path):
    argv = ["jobs/train.py", "--config", "a b.yaml", "generation.engine.hf_token=tiger", "run.name=x"]
    monkeypatch.setattr("sys.argv", argv)
    with Tracker.start(TrackingConfig(), tmp_path, name="all", kind="pipeline") as parent:
        child = Tracker.start(
            TrackingConfig(), tmp_path, name="one", kind="train", parent_run_id=parent.run_id
        )
        child.finish()
        parent.describe("| loss |\n|---|\n| 0.5 |", parent.children())
    text = note(parent)
    assert text.startswith("**Supervised fine-tuning, preference training")
    assert "python jobs/train.py --config 'a b.yaml'" in text and "run.name=x" in text
    assert "tiger" not in text and "| 0.5 |" in text
    assert f"[one](#/experiments/{parent.experiment_id}/runs/{child.run_id})" in text
    assert f"[parent](#/experiments/{parent.experiment_id}/runs/{parent.run_id})" in note(child)


def test_a_description_that_somebody_has_edited_is_left_alone(tmp_path):
    with Tracker.start(TrackingConfig(), tmp_path, name="one", kind="train") as tracker:
        tracker.describe("first")
        assert "first" in note(tracker)
        tracker._client.set_tag(tracker.run_id, "mlflow.note.content", "Mine.")
        tracker.describe("second")
        assert note(tracker) == "Mine."


def test_no_command_is_shown_for_an_interactive_process():
    assert command_line(["-c"]) == command_line([""]) == command_line([]) == ""
    assert command_line(["/home/me/jobs/tune.py", "x=1"]) == "python jobs/tune.py x=1"


def test_dataset_profiles(tmp_path: Path):
    import json

    with Tracker.start(TrackingConfig(), tmp_path, name="one", kind="train") as tracker:
        tracker.log_dataset(
            "train", digest="d", source="x.jsonl", rows=3, context="train", profile={"quarantined": 1.0}
        )
    run: Any = tracker._client.get_run(tracker.run_id)
    profile = run.inputs.dataset_inputs[0].dataset.profile
    assert json.loads(profile) == {"num_rows": 3, "quarantined": 1.0}
