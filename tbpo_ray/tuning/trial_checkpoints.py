"""Deletes the checkpoints of trials that have ended and that nothing will read again.

What still matters: a trial that has not ended resumes from its last checkpoint, and so may one that failed;
the trials of the Pareto front (the best one, with a single metric) are exported. Their own runs keep the last
and the best checkpoints, as `training.keep_checkpoints` and `training.keep_best` say.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.training.checkpoint import PENDING, prune
from tbpo_ray.tuning.study_state import Trial, pareto_front


class CheckpointPruner:
    """Prunes while the search runs; the cost of an ended trial depends on the front, not on all trials.

    Args:
        trials_dir: the folder of the trials' runs.
    """

    def __init__(self, trials_dir: Path, tune: TuneConfig):
        self.trials_dir, self.tune = trials_dir, tune
        # Under pbt any trial may take over an earlier checkpoint of another one until the search ends.
        self.during_search = tune.keep_checkpoints == "best" and tune.scheduler != "pbt"
        self._front: list[Trial] = []
        self._last: Trial | None = None

    def on_end(self, trial: Trial) -> None:
        """Note that a trial has ended, and delete what the one that ended before it has made needless."""
        if not self.during_search:
            return
        # One trial late: the workers of a trial that was stopped just now may still be writing.
        previous, self._last = self._last, trial
        if previous is not None:
            self._settle(previous)

    def finish(self, trials: Sequence[Trial]) -> None:
        """Delete what no trial needs after the search, leftovers of earlier sessions included."""
        if self.tune.keep_checkpoints == "all":
            return
        kept = {trial.number for trial in pareto_front(trials, self.tune)}
        for trial in trials:
            if trial.number not in kept and trial.state in ("finished", "stopped"):
                self._delete(trial)
            elif trial.number in kept and self.tune.scheduler == "pbt":
                # Its runs have kept every checkpoint, since any could have become a donor's.
                self._delete_in(name for name in self._run_names(trial) if name != trial.run_name)
                prune(self.trials_dir / trial.run_name / "checkpoints", 1)

    def _settle(self, trial: Trial) -> None:
        if trial.state == "stopped":
            self._delete(trial)
        elif trial.state == "finished":
            # The front of all trials is that of the front so far and the new one.
            candidates = sorted([*self._front, trial], key=lambda t: t.number)
            self._front = pareto_front(candidates, self.tune)
            kept = {t.number for t in self._front}
            for loser in candidates:
                if loser.number not in kept:
                    self._delete(loser)

    def _delete(self, trial: Trial) -> None:
        self._delete_in(self._run_names(trial))

    def _run_names(self, trial: Trial) -> list[str]:
        """The runs of a trial: of its first seed, its repeats and its generations."""
        repeats = [f"{trial.name}-s{repeat}" for repeat in range(1, self.tune.repeats)]
        return [trial.name, *repeats, *(f"{trial.name}-x{n}" for n in range(1, trial.generation + 1))]

    def _delete_in(self, run_names: Iterable[str]) -> None:
        for name in run_names:
            for folder in (self.trials_dir / name / "checkpoints").glob("step-*"):
                if not (folder / PENDING).exists():
                    shutil.rmtree(folder, ignore_errors=True)
