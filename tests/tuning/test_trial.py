"""Takeover of another trial's checkpoint: the files of the new generation, and that it happens once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config, to_tree
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.tensor_files import FileFacts
from tbpo_ray.tuning.trial import Marker, Setup, _Trial

OLD, NEW = {"objective.beta": 0.1}, {"objective.beta": 0.3}


@pytest.fixture
def trials(tmp_path) -> Path:
    """Two trials; the first has a checkpoint at step 4 and has trained on to step 6."""
    for name in ("t000", "t001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"mlflow_run_id": f"run of {name}"}))
    lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 7))
    (tmp_path / "t000" / "metrics.jsonl").write_text(lines)
    folder = ckpt.step_folder(tmp_path / "t000" / "checkpoints", 4)
    folder.mkdir(parents=True)
    (folder / "optimizer-0000.safetensors").write_bytes(b"weights of t000")
    files = {f.name: FileFacts.read(f) for f in folder.iterdir()}
    ckpt.commit_checkpoint(folder, {"step": 4, "metrics_bytes": len(lines) * 4 // 6}, files)
    return tmp_path


def second(folder: Path, params: dict[str, float]) -> _Trial:
    tree = to_tree(load_config(None, ["tune.scheduler=pbt"]))
    setup = Setup(tree, str(folder), "parent", every=4, slots=[0, 1], known=[0, 0], cwd=str(folder))
    return _Trial(setup, 1, params, 0)


def marker(folder: Path, number: int = 0) -> Marker:
    return Marker(number, 4, str(ckpt.step_folder(folder / f"t{number:03d}" / "checkpoints", 4)))


def test_a_takeover_is_a_run_that_resumes_from_the_donor_s_checkpoint(trials):
    trial = second(trials, NEW)
    assert trial._resolve_generation(marker(trials)) == "t001-x1"
    run = trials / "t001-x1"
    found = ckpt.newest(run / "checkpoints")
    assert (found.step, found.rejected) == (4, ())
    assert found.folder is not None
    assert (found.folder / "optimizer-0000.safetensors").read_bytes() == b"weights of t000"
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    assert json.loads((run / "run.json").read_text())["mlflow_run_id"] == "run of t001"
    facts = trial.facts()
    assert (facts["generation"], facts["lineage"][0]["donor"], facts["params"]) == (1, 0, NEW)
    assert trial.since == 4


def test_the_same_takeover_does_not_happen_twice(trials):
    second(trials, NEW)._resolve_generation(marker(trials))
    again = second(trials, NEW)
    assert again._resolve_generation(marker(trials)) == "t001-x1"
    assert not (trials / "t001-x2").exists()


def test_a_restarted_study_finds_the_newest_generation_and_its_values(trials):
    second(trials, NEW)._resolve_generation(marker(trials))
    restarted = second(trials, OLD)
    assert restarted._resolve_generation(None) == "t001-x1"
    assert restarted.params == NEW
    assert restarted.since == 4  # earlier rows are the donor's


def test_a_skipped_checkpoint_is_not_waited_for(trials):
    trial = second(trials, OLD)
    trial.run_dir = trials / "t000"
    later = ckpt.step_folder(trials / "t000" / "checkpoints", 12)
    later.mkdir()
    ckpt.commit_checkpoint(later, {"step": 12, "metrics_bytes": 0}, {})
    began = time.monotonic()
    trial._report({"step": 8, "total": 20, trial.metric: 0.5})
    assert time.monotonic() - began < 5 and trial.since == 8


def test_a_paused_trial_resumes_as_itself(trials):
    trial = second(trials, OLD)
    assert trial._resolve_generation(marker(trials, number=1)) == "t001"
    assert (trial.params, trial.since, trial.generation) == (OLD, 4, 0)
