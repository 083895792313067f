"""System metrics reach the run, and their faults do not reach the job."""

from __future__ import annotations

import logging
import time

from tbpo_ray.config.loading import load_config
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.workflows import system_metrics as module
from tbpo_ray.workflows.system_metrics import system_metrics


class Nodes:
    def __init__(self):
        self.value = 0.0

    def sample(self):
        self.value += 1
        return {"system/cpu_utilization_percentage": self.value}

    def close(self): ...


class Broken(Nodes):
    def sample(self):
        raise ValueError("not what was expected")


def configured(tmp_path, seconds: float):
    return load_config(None, {"run.output_dir": str(tmp_path), "tracking.system_metrics_seconds": seconds})


def test_samples_are_logged_by_the_second_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NodeMetrics", Nodes)
    config = configured(tmp_path, 0.3)
    with Tracker.start(config.tracking, tmp_path, name="a", kind="train") as tracker:
        with system_metrics(config, tracker.run_id):
            time.sleep(2.5)
        history = tracker._client.get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
    steps = [point.step for point in history]
    assert len(steps) >= 2 and steps == sorted(steps) and history[0].value == 1.0
    assert tracker._client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_fault_is_logged_and_the_job_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "NodeMetrics", Broken)
    config = configured(tmp_path, 0.1)
    tracker = Tracker.start(config.tracking, tmp_path, name="a", kind="train")
    with caplog.at_level(logging.WARNING), system_metrics(config, tracker.run_id):
        time.sleep(1)
    assert "system metrics are no longer logged (ValueError: not what was expected)" in caplog.text
    tracker.finish()


def test_nothing_is_measured_with_zero_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NodeMetrics", None)  # would raise
    with system_metrics(configured(tmp_path, 0), "0" * 32):
        pass
    assert not (tmp_path / "mlflow.db").exists()
