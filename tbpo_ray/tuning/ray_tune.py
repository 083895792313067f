"""Ray Tune components that read and write the study state: proposals, schedulers, and a callback."""

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
from tbpo_ray.tuning.trial_checkpoints import CheckpointPruner

NO_LIMIT = 10**9
MAX_REASON_CHARS = 500


class Proposals(Searcher):
    """Suggests unfinished trials first, then new ones, and stores each before it starts."""

    def __init__(self, space: Space, state: StudyState, tune: TuneConfig, seed: int, size: int):
        super().__init__(metric=None, mode=None)
        self.space, self.state, self.tune, self.seed, self.size = space, state, tune, seed, size
        self.waiting = [trial.number for trial in state.unfinished()]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.waiting:
            return trial_task(self.state.trials[self.waiting.pop(0)])
        trial = propose_next(self.space, self.state, self.tune, self.seed, self.size)
        return trial_task(trial) if trial is not None else Searcher.FINISHED  # type: ignore[return-value]

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing; :class:`Recorder` has already updated the state."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing; the study state holds everything that must survive."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, as in :meth:`save`."""


def propose_next(space: Space, state: StudyState, tune: TuneConfig, seed: int, size: int) -> Trial | None:
    """Add a new trial to the stored state and return it, or None once the study has `size` trials."""
    number = len(state.trials)
    params = propose(space, number, state.trials, tune, seed) if number < size else None
    if params is None:
        return None
    state.trials.append(Trial(number, params))
    # On the disk before its run begins: another proposal under this name would meet that run's folder.
    state.record(state.trials[-1], durable=True)
    return state.trials[-1]


def trial_task(trial: Trial) -> dict[str, Any]:
    """The config that Tune passes to a trial."""
    return {"number": trial.number, "params": trial.params, "since": trial.step}


class Asha(ASHAScheduler):
    """Asynchronous successive halving that also compares with the trials of earlier sessions."""

    def __init__(self, state: StudyState, **options: Any):
        super().__init__(**options)
        self.past = [trial for trial in state.trials if trial.reports]

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
    """Population-based training that does not wait for ended trials or for rounds that are already past."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        # Trials that resume beyond the first round's step have passed the next round too.
        self._advance(tune_controller)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._advance(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        # Ray keeps a failed trial among the live ones, and a synchronous round would wait for it forever.
        tune_controller.get_live_trials().discard(trial)
        self._advance(tune_controller, trial)

    def _advance(self, tune_controller: Any, ended: Any = None) -> None:
        """Begin the next round if all remaining trials have reached the step of this one."""
        left = [t for t in tune_controller.get_trials() if t is not ended and not t.is_finished()]
        times = [self._trial_state[t].last_train_time for t in left]
        if self._synch and times and min(times) >= self._next_perturbation_sync:
            self._next_perturbation_sync = max(times) + self._perturbation_interval


def make_scheduler(
    space: Space, state: StudyState, tune: TuneConfig, every: int, concurrent: int, seed: int
) -> TrialScheduler:
    """The scheduler that `tune.scheduler` names, using the first metric.

    Args:
        every: steps before a trial may be stopped (asha) or between exploits (pbt).
        concurrent: how many trials run at the same time.
    """
    options: dict[str, Any] = {"time_attr": STEP, "metric": OBJECTIVE, "mode": tune.modes[0]}
    if tune.scheduler == "asha":
        # A trial that reaches its last step is finished by itself, so the ladder of rungs has no top.
        return Asha(
            state, grace_period=every, max_t=NO_LIMIT, reduction_factor=tune.reduction_factor, **options
        )
    if tune.scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    rng = random.Random(seed)

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return config | {"params": space.active_values(space.explore(config["params"], rng))}

    return Population(
        perturbation_interval=every,
        custom_explore_fn=explore,
        require_attrs=False,
        # Only a population that does not fit the cluster at once runs in synchronous rounds.
        synch=concurrent < len(state.unfinished()),
        log_config=False,
        **options,
    )


class Recorder(Callback):
    """Writes Tune's events to the study state and logs the progress."""

    def __init__(
        self,
        state: StudyState,
        tune: TuneConfig,
        slots: Sequence[int] | None,
        workers: int,
        pruner: CheckpointPruner | None = None,
    ):
        """
        Args:
            slots: pbt: trial numbers in the order of Tune's own trials; otherwise None.
            workers: training workers of each trial.
            pruner: deletes checkpoints of trials that have ended.
        """
        self.pruner = pruner
        self.state, self.tune, self.slots, self.workers = state, tune, slots, workers
        self.seconds_before: dict[int, float] = {}

    def setup(self, *args: Any, **info: Any) -> None:
        self.seconds_before = {trial.number: trial.seconds for trial in self.state.trials}
        self.start_time = time.monotonic()
        self.earlier_seconds = float(self.state.facts.get("search_seconds", 0.0))

    def record(self, trial: Trial, report: dict[str, float] | None = None) -> None:
        seconds = self.earlier_seconds + time.monotonic() - self.start_time
        self.state.record(trial, report, durable=trial.ended, search_seconds=seconds)

    def recorded_trial(self, tune_trial: Any) -> Trial:
        """The trial of the study that one of Tune's trials runs."""
        # An exploited trial carries its donor's config, so under pbt only its id identifies it.
        if self.slots is not None:
            return self.state.trials[self.slots[int(tune_trial.trial_id.rsplit("_", 1)[1])]]
        trial: Trial = self.state.trials[tune_trial.config["number"]]
        return trial

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        recorded = self.recorded_trial(trial)
        recorded.state, recorded.workers = "running", self.workers
        self.record(recorded)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        recorded = self.recorded_trial(trial)
        if recorded.ended:
            return
        before = self.seconds_before.get(recorded.number, 0.0)
        recorded.seconds = before + float(result["time_total_s"])
        for fact in ("params", "generation", "lineage"):
            setattr(recorded, fact, result.get(fact, getattr(recorded, fact)))
        report = None
        if "state" in result:
            _set_outcome(recorded, result)
        else:
            report = _add_report(recorded, result)
        self.record(recorded, report)
        if recorded.ended:
            self._end(recorded)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        recorded = self.recorded_trial(trial)
        # A trial that ran to its end has reported its outcome; any other was stopped by the scheduler.
        if not recorded.ended:
            recorded.state = "stopped"
            self.record(recorded)
            self._end(recorded)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        recorded = self.recorded_trial(trial)
        recorded.state = "failed"
        # The last line of Ray's error is the exception itself; the lines above are its traceback.
        message = str(trial.get_error() or "the trial's process died").strip()
        recorded.reason = message.splitlines()[-1][:MAX_REASON_CHARS]
        self.record(recorded)
        self._end(recorded)

    def _end(self, trial: Trial) -> None:
        self._log(trial)
        if self.pruner is not None:
            self.pruner.on_end(trial)

    def _log(self, trial: Trial) -> None:
        measured = [f"{m} {trial.values[m]:.4g}" for m in self.tune.metrics if _has_value(trial, m)]
        ended = len([t for t in self.state.trials if t.ended])
        outcome = trial.reason or ", ".join(measured)
        log_progress(
            f"trial {trial.name} {trial.state} at step {trial.step} after {trial.seconds:.0f} s"
            f"{': ' if outcome else ''}{outcome}   ({ended} ended)"
        )


def _set_outcome(trial: Trial, result: dict[str, Any]) -> None:
    """The last report of a trial: how it ended, and the final metrics of each seed."""
    trial.state, trial.reason = result["state"], result.get("reason", "")
    trial.repeats = result.get("repeats", [])
    if trial.repeats:
        keys = set.intersection(*(set(row) for row in trial.repeats))
        trial.values = {k: sum(row[k] for row in trial.repeats) / len(trial.repeats) for k in sorted(keys)}
        trial.step = int(trial.values.get("step", trial.step))


def _add_report(trial: Trial, result: dict[str, Any]) -> dict[str, float]:
    """Add an intermediate report to the trial, and return it."""
    trial.step, trial.values = int(result[STEP]), result["row"]
    report = {STEP: trial.step, OBJECTIVE: result[OBJECTIVE], **result["row"]}
    trial.add_report(report)
    return report


def _has_value(trial: Trial, metric: str) -> bool:
    return math.isfinite(trial.values.get(metric, math.nan))
