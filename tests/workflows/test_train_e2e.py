"""The training job on the real parts: Ray Data, Ray Train, DeepSpeed, MLflow."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.workflows.train import train

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 20


def overrides(out: Path, model: str, name: str, **more: object) -> list[str]:
    settings = {
        "run.name": name, "run.output_dir": out, "model.name_or_path": model,
        "data.train": "builtin:copyedit?split=train&pairs=200", "data.eval": "null", "data.max_length": 64,
        "objective.name": "tbpo_q", "objective.bregman.generator": "logistic", "training.max_steps": STEPS,
        "training.pairs_per_step": 10, "training.micro_batch_pairs": 4, "training.learning_rate": 1e-4,
        "training.precision": "fp32", "training.checkpoint_every": 5, "cluster.use_gpu": "false",
        "cluster.threads_per_worker": 1,
    } | {key.replace("__", "."): value for key, value in more.items()}  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


def run(out: Path, model: str, name: str, **more: object) -> Path:
    return train(load_config(None, overrides(out, model, name, **more))).run_dir


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def final_state(folder: Path) -> dict[str, bytes]:
    """Weights, optimizer state and head of the last checkpoint, byte for byte."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert last.name == f"step-{STEPS:08d}"
    return {
        f.name: f.read_bytes() for f in sorted(last.glob("*.safetensors")) if not f.name.startswith("rng")
    }


def until_step(folder: Path, step: int, job: subprocess.Popen[str]) -> None:
    """Wait for the checkpoint of a step."""
    end = time.monotonic() + 400
    while not (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists():
        assert job.poll() is None, job.stderr.read() if job.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def out(tmp_path_factory, ray_session) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(out, small_model) -> Path:
    """An uninterrupted run of two workers."""
    return run(out, small_model, "whole", cluster__num_workers=2)


def test_one_worker_and_two_give_the_same_curve(out, small_model, whole):
    one = run(out, small_model, "one", cluster__num_workers=1)
    assert len(losses(one)) == STEPS
    assert losses(one) == pytest.approx(losses(whole), abs=1e-4)
    assert losses(one)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(whole)[0] == pytest.approx(math.log(2), abs=1e-5)
    # Every pair once: 200 pairs are one epoch of 20 steps of 10.
    assert rows(whole)[-1]["pairs_seen"] == 200


def test_dpo_starts_at_ln2(out, small_model):
    """On two workers; on one, where live and cached reference scores are compared."""
    folder = run(
        out, small_model, "dpo", cluster__num_workers=2, objective__name="dpo", training__max_steps=2
    )
    assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_killed_worker_changes_nothing(out, small_model, whole):
    """Kill -9 a worker during training: same weights, optimizer, head and metrics, bit for bit.

    It writes its checkpoints in the background, unlike the uninterrupted run.
    """
    folder = out / "killed"
    killed = []

    def assassin() -> None:
        while not (folder / "checkpoints" / "step-00000010" / "manifest.json").exists():
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                return

    hunter = threading.Thread(target=assassin, daemon=True)
    hunter.start()
    run(out, small_model, "killed", cluster__num_workers=2, training__async_checkpoints="true")
    assert killed
    assert "failed" in (folder / "events.log").read_text()
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert final_state(folder) == final_state(whole)


KEEPER = """
import ctypes, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
driver = subprocess.Popen(sys.argv[1:], process_group=0, stdout=subprocess.DEVNULL)
print(driver.pid, flush=True)
if driver.wait() > 0:
    sys.exit("the driver failed")
sys.stdin.read()
"""
"""Starts a driver and outlives its kill. With the driver dies its raylet (Ray sees to that), and a frozen
worker whose group is left without a parent in its session is woken by the kernel; this is that parent."""


def test_a_killed_driver_is_resumed_by_the_same_command(out, small_model, whole):
    """Kill -9 the job, run it again: bit for bit the same; a third time does nothing.

    The workers of the first run are suspended before the driver dies, and resumed when those of the second
    are past that step: they find that another driver holds the run, and write nothing.
    """
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(whole / "config.yaml")]
    command += ["run.name=driver"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    folder = out / "driver"
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert keeper.stdout is not None
    cluster: list[psutil.Process] = []
    first = psutil.Process(int(keeper.stdout.readline()))
    try:
        until_step(folder, 5, keeper)
        cluster = first.children(recursive=True)
        orphans = [process for process in cluster if "RayTrainWorker" in " ".join(process.cmdline())]
        assert len(orphans) == 2
        for process in cluster:  # Ray's own processes too, or they may end the workers that lost their driver
            process.suspend()
        first.kill()
        first.wait()
        known = json.loads((folder / "run.json").read_text())
        second = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        until_step(folder, 10, second)
        assert [process.status() for process in orphans] == [psutil.STATUS_STOPPED] * 2
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):  # the end of one can end the other
                process.resume()
        said = second.communicate(timeout=400)[1]
    finally:
        for process in (first, *cluster):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        keeper.kill()
    assert second.returncode == 0, said
    assert "continuing from step-" in said
    assert json.loads((folder / "run.json").read_text()) == known
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert final_state(folder) == final_state(whole)
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (third.returncode, "is finished" in third.stderr) == (0, True)


def test_a_finished_run_can_only_be_extended(out, small_model, whole):
    with pytest.raises(InputError, match=r"objective\.beta=0\.5: run whole was started with None"):
        run(out, small_model, "whole", cluster__num_workers=2, objective__beta=0.5)
    with pytest.raises(InputError, match=r"training\.max_steps=10.*started with 20"):
        run(out, small_model, "whole", cluster__num_workers=2, training__max_steps=10)


def test_the_export_loads_in_transformers(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "export")
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    assert tokenizer.chat_template
    assert model.get_output_embeddings().weight.shape[0] >= len(tokenizer)
    assert (whole / "DONE").is_file()


def test_the_export_keeps_the_learned_baseline_separately(whole):
    import torch
    from safetensors.torch import load_file

    from tbpo_ray.models.baseline_head import load_state_baseline

    head = load_state_baseline(whole / "export")
    assert head is not None
    stored = load_file(sorted(whole.glob("checkpoints/step-*"))[-1] / "head.safetensors")
    for name, value in head.state_dict().items():
        assert torch.equal(value, stored[f"head.{name}"]), name
    assert any(
        value.abs().max() > 0 for name, value in head.state_dict().items() if name.startswith("head.2")
    )


def test_mlflow_records_the_run(out, whole):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    run_id = json.loads((whole / "run.json").read_text())["mlflow_run_id"]
    logged = client.get_run(run_id)
    history = client.get_metric_history(run_id, "loss")
    assert [point.step for point in sorted(history, key=lambda p: p.step)] == list(range(1, STEPS + 1))
    assert logged.data.params["objective.name"] == "tbpo_q"
    assert logged.inputs is not None and logged.inputs.dataset_inputs
    assert logged.info.status == "FINISHED"


BAD = [
    ("data.train", "missing.jsonl", "missing.jsonl"),
    ("data.train", "EMPTY.jsonl", "empty"),
    ("data.train", "NO_CHOSEN.jsonl", "no preference pair"),
    ("model.name_or_path", "./nowhere", "no such model folder"),
    ("model.name_or_path", "./NOT_A_MODEL", "not a model folder"),
    ("data.max_length", "3", "data.max_length=3"),
    ("objective.nmae", "dpo", "objective.name"),
]


def test_bad_input_is_one_line_and_exit_status_2(tmp_path, small_model):
    (tmp_path / "EMPTY.jsonl").write_text("")
    (tmp_path / "NO_CHOSEN.jsonl").write_text('{"prompt": "a", "rejected": "b"}\n' * 2)
    (tmp_path / "NOT_A_MODEL").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--config", str(ROOT / "jobs/configs/tiny.yaml")]
    command += overrides(tmp_path / "runs", small_model, "bad")
    jobs = [
        subprocess.Popen(
            [*command, f"{setting}={value}", "--dry-run"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for setting, value, _ in BAD
    ]  # fmt: skip
    for job, (_, _, words) in zip(jobs, BAD, strict=True):
        said = job.communicate(timeout=300)[1]
        assert job.returncode == 2, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert words in line
        assert "Traceback" not in said
