"""Tune's parts, fed from the study's ledger: proposals, early stopping, population-based training."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.progress import log_progress
from tbpo_ray.tuning.searchers import propose
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import StudyState, Trial
from tbpo_ray.tuning.trial import OBJECTIVE, STEP

ENDLESS = 10**9


class Proposals(Searcher):
    """Hands out unfinished trials first, then new ones, each noted before it starts."""

    def __init__(self, space: Space, study: StudyState, tune: TuneConfig, seed: int, size: int):
        super().__init__(metric=None, mode=None)
        self.space, self.study, self.tune, self.seed, self.size = space, study, tune, seed, size
        self.waiting = [trial.number for trial in study.unfinished()]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:  # type: ignore[override]
        if self.waiting:
            return task(self.study.trials[self.waiting.pop(0)])
        trial = propose_next(self.space, self.study, self.tune, self.seed, self.size)
        return task(trial) if trial is not None else Searcher.FINISHED  # type: ignore[return-value]

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The ledger knows already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is to be kept is in the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as :meth:`save`."""


def propose_next(space: Space, study: StudyState, tune: TuneConfig, seed: int, size: int) -> Trial | None:
    """A new trial, in the ledger already; None when the study has all its trials."""
    number = len(study.trials)
    params = propose(space, number, study.trials, tune, seed) if number < size else None
    if params is None:
        return None
    study.trials.append(Trial(number, params))
    study.save()
    return study.trials[-1]


def task(trial: Trial) -> dict[str, Any]:
    return {"number": trial.number, "params": trial.params, "since": trial.step}


class Asha(ASHAScheduler):
    """Successive halving that remembers the trials of earlier sessions."""

    def __init__(self, study: StudyState, **options: Any):
        super().__init__(**options)
        self.past = [trial for trial in study.trials if trial.reports]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        number = trial.config["number"]
        for past in [p for p in self.past if p.ended or p.number == number]:
            self.past.remove(past)
            stand_in = trial if past.number == number else SimpleNamespace(trial_id=f"past-{past.number}")
            if stand_in is not trial:
                super().on_trial_add(tune_controller, stand_in)  # type: ignore[arg-type]
            for report in past.reports:
                super().on_trial_result(tune_controller, stand_in, report)  # type: ignore[arg-type]


class Population(PopulationBasedTraining):
    """Population-based training in which nobody waits for a trial that ended or for a step that is past."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        # Trials that go on from a later step than the first round's have passed the next round too.
        self._go_on(tune_controller)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._go_on(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        # Ray keeps it among the live ones, for which a round would wait for ever.
        tune_controller.get_live_trials().discard(trial)
        self._go_on(tune_controller, trial)

    def _go_on(self, tune_controller: Any, ended: Any = None) -> None:
        """Begin the next round where all that are left have reached this one's step."""
        left = [t for t in tune_controller.get_trials() if t is not ended and not t.is_finished()]
        times = [self._trial_state[t].last_train_time for t in left]
        if self._synch and times and min(times) >= self._next_perturbation_sync:
            self._next_perturbation_sync = max(times) + self._perturbation_interval


def make_scheduler(
    space: Space, study: StudyState, tune: TuneConfig, every: int, concurrent: int, seed: int
) -> TrialScheduler:
    """The scheduler that `tune.scheduler` names, by the first metric."""
    options: dict[str, Any] = {"time_attr": STEP, "metric": OBJECTIVE, "mode": tune.modes[0]}
    if tune.scheduler == "asha":
        # Whoever gets to the last step is finished, so the ladder has no top of its own.
        grace, rungs = every, {"max_t": ENDLESS, "reduction_factor": tune.reduction_factor}
        return Asha(study, grace_period=grace, **rungs, **options)
    if tune.scheduler == "none":
        return FIFOScheduler()
    rng = random.Random(seed)

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return config | {"params": space.in_force(space.explore(config["params"], rng))}

    return Population(
        perturbation_interval=every,
        custom_explore_fn=explore,
        require_attrs=False,
        # Trials that take turns wait for each other; a population that runs whole need not.
        synch=concurrent < len(study.unfinished()),
        log_config=False,
        **options,
    )


class Recorder(Callback):
    """Writes what Tune hears from trials into the ledger, and tells the person who follows."""

    def __init__(self, study: StudyState, tune: TuneConfig, slots: Sequence[int] | None, workers: int):
        self.study, self.tune, self.slots, self.workers = study, tune, slots, workers
        self.before: dict[int, float] = {}

    def setup(self, *args: Any, **info: Any) -> None:
        self.before = {trial.number: trial.seconds for trial in self.study.trials}
        self.began, self.spent = time.monotonic(), float(self.study.facts.get("search_seconds", 0.0))

    def save(self) -> None:
        self.study.facts["search_seconds"] = self.spent + time.monotonic() - self.began
        self.study.save()

    def trial_of(self, trial: Any) -> Trial:
        if self.slots is None:
            return self.study.trials[trial.config["number"]]
        return self.study.trials[self.slots[int(trial.trial_id.rsplit("_", 1)[1])]]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trial_of(trial)
        own.state, own.workers = "running", self.workers
        self.save()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        own = self.trial_of(trial)
        if own.ended:
            return
        own.seconds = self.before.get(own.number, 0.0) + float(result["time_total_s"])
        for fact in ("params", "generation", "lineage"):
            setattr(own, fact, result.get(fact, getattr(own, fact)))
        if "state" in result:
            own.state, own.reason = result["state"], result.get("reason", "")
            own.repeats = result.get("repeats", [])
            if own.repeats:
                keys = set.intersection(*(set(row) for row in own.repeats))
                own.values = {k: sum(r[k] for r in own.repeats) / len(own.repeats) for k in sorted(keys)}
                own.step = int(own.values.get("step", own.step))
        else:
            own.step, own.values = int(result[STEP]), result["row"]
            own.reports = [r for r in own.reports if r[STEP] < own.step]
            own.reports.append({STEP: own.step, OBJECTIVE: result[OBJECTIVE], **result["row"]})
        self.save()
        if own.ended:
            self._say(own)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trial_of(trial)
        if not own.ended:
            own.state = "stopped"
            self.save()
            self._say(own)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trial_of(trial)
        own.state = "failed"
        own.reason = str(trial.get_error() or "the trial's process died").strip().splitlines()[-1][:500]
        self.save()
        self._say(own)

    def _say(self, trial: Trial) -> None:
        shown = [f"{m} {trial.values[m]:.4g}" for m in self.tune.metrics if not _missing(trial, m)]
        done = len([t for t in self.study.trials if t.ended])
        log_progress(
            f"trial {trial.name} {trial.state} at step {trial.step} after {trial.seconds:.0f} s"
            f"{': ' if shown or trial.reason else ''}{trial.reason or ', '.join(shown)}   ({done} ended)"
        )


def _missing(trial: Trial, metric: str) -> bool:
    return not math.isfinite(trial.values.get(metric, math.nan))
