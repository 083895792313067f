"""A node that is preempted while a run trains on it, like a cloud's spot machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EVERY = 50_000
"""Steps between ordinary checkpoints; more than this test runs."""
NOTICE_SECONDS = 45
SETTINGS = {
    "data.train": "builtin:copyedit?split=train&pairs=40",
    "data.eval": "null",
    "objective.name": "dpo",
    "training.pairs_per_step": 8,
    "training.micro_batch_pairs": 4,
    "training.max_steps": 2 * EVERY,
    "training.eval_every": "null",
    "training.checkpoint_every": EVERY,
    "cluster.num_workers": 1,
    "cluster.max_failures": 0,
    "cluster.resources_per_worker": "{CPU: 1}",
    "run.name": "spot",
}


def ray(scaling, *words: str) -> None:
    command = [str(Path(sys.executable).parent / "ray"), *words]
    done = subprocess.run(command, env=scaling.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def training_nodes(scaling) -> set[str]:
    """The nodes that run training workers."""
    actors = scaling.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    return {a["node_id"] for a in actors if a["state"] == "ALIVE" and "RayTrainWorker" in a["class_name"]}


def until(true, words: str, seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, words
        time.sleep(0.2)


def test_a_preempted_node_triggers_a_checkpoint_from_which_another_node_resumes(
    scaling, small_model, tmp_path
):
    folder = tmp_path / "spot"
    settings = SETTINGS | {"run.output_dir": tmp_path, "model.name_or_path": small_model}
    words = ["python", "jobs/train.py", "--config", "jobs/configs/tiny.yaml"]
    scaling.submit(*words, *(f"{k}={v}" for k, v in settings.items()), wait=False, job="spot")

    def steps() -> list[int]:
        file = folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def events() -> str:
        return (folder / "events.log").read_text() if (folder / "events.log").exists() else ""

    def ended() -> bool:
        return scaling.get("/api/jobs/spot")["status"] in ("FAILED", "SUCCEEDED", "STOPPED")

    until(lambda: len(steps()) > 5 or ended(), "no step")
    assert not ended(), scaling.get("/api/jobs/spot/logs")["logs"][-5000:]
    assert not list(folder.glob("checkpoints/step-*"))
    (node,) = training_nodes(scaling)
    ray(
        scaling, "drain-node", f"--address={scaling.gcs_address}", f"--node-id={node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot",
        f"--deadline-remaining-seconds={NOTICE_SECONDS}",
    )  # fmt: skip
    gone_at = time.monotonic() + NOTICE_SECONDS
    manifests = folder / "checkpoints"
    until(lambda: list(manifests.glob("step-*/manifest.json")), "no checkpoint in time", NOTICE_SECONDS)
    (saved,) = (int(f.parent.name.removeprefix("step-")) for f in manifests.glob("step-*/manifest.json"))
    assert 5 < saved < EVERY
    assert f"the node of worker 0 is being preempted: checkpoint at step {saved}" in events()
    time.sleep(max(0.0, gone_at - time.monotonic()))
    scaling.pull_the_plug(node)

    until(lambda: f"continuing from step-{saved:08d}" in events() or ended(), "the run was not resumed")
    assert not ended(), scaling.get("/api/jobs/spot/logs")["logs"][-5000:]
    until(lambda: steps()[-1:] > [saved + 5], "no step after that")
    done = steps()
    assert done == list(range(1, len(done) + 1))
    until(lambda: training_nodes(scaling) - {node}, "no worker on another node")
    ray(scaling, "job", "stop", f"--address={scaling.address}", "spot")
