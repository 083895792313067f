"""Which checkpoints of a study survive: those that something can still read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.training.checkpoint import PENDING
from tbpo_ray.tuning.study_state import Trial
from tbpo_ray.tuning.trial_checkpoints import CheckpointPruner

METRIC, KL = "eval/rewards/accuracy", "eval/kl/k3"


def make_run(folder: Path, name: str, steps=(2, 4)) -> None:
    for step in steps:
        checkpoint = folder / name / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")


def kept(folder: Path) -> dict[str, list[int]]:
    """The steps of the checkpoints of each run that has some."""
    found: dict[str, list[int]] = {}
    for checkpoint in sorted(folder.glob("*/checkpoints/step-*")):
        found.setdefault(checkpoint.parts[-3], []).append(int(checkpoint.name[5:]))
    return found


def ended(number: int, state: str, value: float = 0.0, **more) -> Trial:
    return Trial(number, {}, state, values={METRIC: value, KL: value}, **more)


def test_a_trial_keeps_its_checkpoints_while_it_leads(tmp_path):
    pruner = CheckpointPruner(tmp_path, TuneConfig(metric=METRIC, mode="max", repeats=2))
    order = [
        (0, "finished", 0.5),
        (1, "stopped", 0.9),
        (2, "finished", 0.7),
        (3, "failed", 0.9),
        (4, "finished", 0.6),
    ]
    trials = []
    for number, state, value in order:
        make_run(tmp_path, f"t{number:03d}")
        make_run(tmp_path, f"t{number:03d}-s1")
        trials.append(ended(number, state, value))
        pruner.on_end(trials[-1])
    both = {name: [2, 4] for n in (2, 3, 4) for name in (f"t{n:03d}", f"t{n:03d}-s1")}
    assert kept(tmp_path) == both  # the last one to end is judged by the next end
    make_run(tmp_path, "t001", steps=(6,))  # a worker that was still writing when its trial was stopped
    pruner.finish([*trials, Trial(5, {}, "running")])
    del both["t004"], both["t004-s1"]
    assert kept(tmp_path) == both


def test_the_whole_front_is_kept(tmp_path):
    pruner = CheckpointPruner(tmp_path, TuneConfig(metric=[METRIC, KL], mode=["max", "min"]))
    trials = [
        Trial(number, {}, "finished", values={METRIC: score, KL: distance})
        for number, (score, distance) in enumerate([(0.5, 0.1), (0.6, 0.2), (0.4, 0.3), (0.7, 0.15)])
    ]
    for trial in trials:
        make_run(tmp_path, trial.name)
        pruner.on_end(trial)
    pruner.finish(trials)
    assert set(kept(tmp_path)) == {"t000", "t003"}


def test_pbt_keeps_every_possible_donor_until_the_search_has_ended(tmp_path):
    pruner = CheckpointPruner(tmp_path, TuneConfig(metric=METRIC, scheduler="pbt"))
    trials = [ended(0, "finished", 0.3), ended(1, "finished", 0.8, generation=2)]
    for name in ("t000", "t001", "t001-x1", "t001-x2"):
        make_run(tmp_path, name)
    for trial in trials:
        pruner.on_end(trial)
    assert set(kept(tmp_path)) == {"t000", "t001", "t001-x1", "t001-x2"}
    pruner.finish(trials)
    assert kept(tmp_path) == {"t001-x2": [4]}


def test_all_keeps_all_and_a_pending_checkpoint_is_kept(tmp_path):
    trials = [ended(0, "stopped"), ended(1, "finished", 0.5)]
    for trial in trials:
        make_run(tmp_path, trial.name)
    CheckpointPruner(tmp_path, TuneConfig(keep_checkpoints="all")).finish(trials)
    assert set(kept(tmp_path)) == {"t000", "t001"}
    (tmp_path / "t000" / "checkpoints" / "step-00000002" / PENDING).touch()
    CheckpointPruner(tmp_path, TuneConfig(metric=METRIC)).finish(trials)
    assert kept(tmp_path) == {"t000": [2], "t001": [2, 4]}


@pytest.mark.parametrize("state", ["waiting", "running", "failed"])
def test_a_trial_that_can_resume_keeps_its_checkpoints(tmp_path, state):
    make_run(tmp_path, "t000")
    CheckpointPruner(tmp_path, TuneConfig(metric=METRIC)).finish([ended(0, state)])
    assert kept(tmp_path) == {"t000": [2, 4]}
