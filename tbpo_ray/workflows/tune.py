"""A study, from configuration and search space to the best configuration, its policy and the report."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.cluster.fit import fit_to_cluster
from tbpo_ray.cluster.session import start_ray
from tbpo_ray.config.loading import digest, stage_config, to_tree, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import file_lock, write_atomic
from tbpo_ray.storage.paths import STUDY_STATE, cache_dir, output_dir, run_dir
from tbpo_ray.tracking.run_note import RUN_NOTE, read_run_note
from tbpo_ray.tracking.store import check_store, store_uri
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training.estimate import plan_text
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.reference_scores import scorings
from tbpo_ray.training.run_plan import make_schedule, resolve_run, with_budget
from tbpo_ray.tuning.check import (
    check_grace_steps,
    concurrent_trials,
    refuse_other_study,
    refuse_run_folder,
    share_cores,
    trial_base_config,
    trial_probes,
)
from tbpo_ray.tuning.metrics import check_metrics
from tbpo_ray.tuning.searchers import trial_count
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import ENDED, StudyState, Trial, pareto_front
from tbpo_ray.tuning.trial import KEEP_ALL, Setup, run_trial, trial_config
from tbpo_ray.tuning.trial_checkpoints import CheckpointPruner
from tbpo_ray.tuning.trial_tracking import log_ended_trial
from tbpo_ray.workflows.confirmation import confirm_best
from tbpo_ray.workflows.evaluate import evaluate
from tbpo_ray.workflows.pipeline import stages
from tbpo_ray.workflows.study_helpers import (
    check_study_helpers,
    study_helper_plan,
    train_study_helpers,
    with_study_helpers,
)
from tbpo_ray.workflows.train import check_run, prepare_inputs, resolve_models, score_inputs, train

if TYPE_CHECKING:
    from ray import tune as ray_tune

QUIET_TUNE = (
    "TUNE_DISABLE_SIGINT_HANDLER",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
)
"""Ctrl-C must end this job like any other, a trial's last report has no step, Tune's logs are not used."""
TRIALS, TRACKED = "trials", ".settled"
"""The folder of the trials' runs, and the file in each that marks its MLflow run as complete."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    folder: Path
    best: Trial
    front: list[Trial]
    """Trials that no other trial dominates; with one metric, the best trial alone."""
    note: str
    """Whether the best configuration was confirmed with new seeds."""
    already_finished: bool = False


def check_study(config: Config, space: Space) -> list[Config]:
    """Check everything that needs no cluster, and return configurations that represent the trials.

    Raises:
        InputError: naming the key, the value and an accepted value.
    """
    space.check(config)
    if config.tune.scheduler == "pbt":
        space.check_changeable(config)
    refuse_run_folder(config.run.name, run_dir(config))
    trials = config.tune.trials
    if config.tune.algorithm == "grid" and (points := len(list(space.grid_points()))) > trials:
        log_progress(
            f"tune.trials={trials}: the first {trials} of the grid's {points} points; "
            f"tune.trials={points} would run all"
        )
    probes = trial_probes(trial_base_config(config), space, check_run)
    check_study_helpers(config, space.source, probes)
    check_metrics(config, probes)
    check_grace_steps(config, config.training.max_steps)
    return probes


def study_plan(config: Config) -> str:
    """What a study would do, and the plan of one of its trials.

    Raises:
        InputError: something that would stop a trial.
    """
    tune = config.tune
    text, planned = study_helper_plan(config)
    search = f"{tune.trials} trials x {tune.repeats} seed(s), {tune.algorithm}, {tune.scheduler}"
    return f"{text}\n# search: {search}; each trial at most" + plan_text(config, planned=planned)


def tune(config: Config, space: Space) -> StudyResult:
    """Run a study, or resume an unfinished one of the same name; a finished study is only reported.

    Raises:
        InputError: bad configuration, space or input, before any trial starts.
        RunFailedError: no trial finished; what the trials reached is kept.
    """
    probes = check_study(config, space)
    folder = run_dir(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.output_dir={folder.parent}: cannot write there ({error.strerror})") from error
    with file_lock(folder / ".lock"):
        state = StudyState.open(folder / STUDY_STATE)
        refuse_other_study(config.run.name, state.facts, config, space)
        failed = state.in_state("failed") if config.tune.resume_errored else []
        if (folder / "DONE").is_file() and not _is_extension(config, state) and not failed:
            log_progress(f"study {config.run.name} is finished: {folder}")
            front = pareto_front(state.trials, config.tune)
            return StudyResult(folder, front[0], front, state.facts["note"], already_finished=True)
        check_store(config)
        start_ray()
        fitted = fit_to_cluster(config)
        gpus = fitted.cluster.use_gpu
        concurrent = concurrent_trials(
            fitted, [stage_config(probe, {}, cluster__use_gpu=gpus) for probe in probes]
        )
        (folder / "DONE").unlink(missing_ok=True)
        _restart_failed(failed, folder)
        state.facts |= {"config": to_tree(config), "space": space.source}
        state.save()
        write_atomic(folder / "config.yaml", to_yaml(config))
        with Tracker.from_note(config, folder / RUN_NOTE, kind="tune") as tracker:
            return _Study(fitted, space, folder, state, tracker).run(concurrent)


def _is_extension(config: Config, state: StudyState) -> bool:
    return bool(state.facts) and bool(state.facts["config"]["tune"]["trials"] < config.tune.trials)


def _restart_failed(trials: list[Trial], folder: Path) -> None:
    """Mark failed trials as waiting, so that they resume from their last checkpoints."""
    if trials:
        log_progress(f"tune.resume_errored: resuming {', '.join(trial.name for trial in trials)}")
    for trial in trials:
        (folder / TRIALS / trial.name / TRACKED).unlink(missing_ok=True)
        trial.state, trial.reason = "waiting", ""


class _Study:
    def __init__(self, config: Config, space: Space, folder: Path, state: StudyState, tracker: Tracker):
        self.config, self.space, self.folder = config, space, folder
        self.state, self.tracker = state, tracker
        self.trials_dir = folder / TRIALS
        self.trials_dir.mkdir(exist_ok=True)
        self.pruner = CheckpointPruner(self.trials_dir, config.tune)

    def run(self, concurrent: int) -> StudyResult:
        start = self._starting_config()
        cache = cache_dir(self.config)
        before = self.state.facts.setdefault("scorings_before", len(scorings(cache)))
        self.state.facts.setdefault("search_seconds", 0.0)
        self.state.save()
        start = share_cores(self._prepare(trial_base_config(start)), concurrent)
        self._search(start, concurrent)
        self._complete_tracking(start)
        front = pareto_front(self.state.trials, self.config.tune)
        if not front:
            raise RunFailedError(self._no_result())
        self.pruner.finish(self.state.trials)
        note = self._confirm(start, front[0], concurrent)
        self.state.facts |= {"note": note, "best": front[0].number}
        self.state.facts["reference_scorings"] = len(scorings(cache)) - before
        self.state.save()
        self._write_results(start, front, note)
        return StudyResult(self.folder, front[0], front, note)

    def _no_result(self) -> str:
        reasons = [trial.reason for trial in self.state.in_state("failed")]
        return (
            f"study {self.config.run.name}: no trial finished with a finite value of "
            f"{', '.join(self.config.tune.metrics)}{': ' + reasons[0] if reasons else ''}. For new "
            "trials use a larger tune.trials or another run.name; tune.resume_errored=true resumes failed "
            "trials"
        )

    def _starting_config(self) -> Config:
        """The configuration that every trial starts from: after SFT if there is any, with a fixed model."""
        sft, start = stages(self.config)
        if sft is not None:
            log_progress("supervised fine-tuning: all trials start from its policy")
            result = train(sft, kind="sft", wait=True)
            self.tracker.set_tags({"start.run": result.mlflow_run_id})
        start = train_study_helpers(start, self.tracker)
        policy, reference = resolve_models(resolve_run(start))
        # The resolved folder is what the trials load, so a GGUF file is not converted again by each of them.
        fixed: dict[str, Any] = {"model__name_or_path": policy, "model__gguf_file": None, "sft": {}}
        if start.model.reference is not None:
            fixed["model__reference"] = reference
        return stage_config(start, {}, **fixed)

    def _prepare(self, start: Config) -> Config:
        """Prepare pairs and reference scores for all trials; return the configuration that they share."""
        total = self._prepare_inputs(start)
        check_grace_steps(start, total)
        tune = start.tune
        every = tune.grace_steps or max(1, total // 4)
        fixed: dict[str, Any] = {
            "tracking__uri": store_uri(start.tracking, output_dir(start)),
            "data__cache_dir": str(cache_dir(start)),
        }
        if tune.scheduler == "pbt":
            # Any checkpoint may become a donor's.
            fixed |= {"training__checkpoint_every": every, "training__keep_checkpoints": KEEP_ALL}
        if tune.scheduler != "none":
            # Trials are compared every so many steps: the metric must be measured and logged at them.
            if tune.scheduler == "pbt" or every % (start.training.eval_every or total):
                fixed["training__eval_every"] = every
            if not tune.metrics[0].startswith("eval/"):
                fixed["training__log_every"] = math.gcd(every, start.training.log_every)
        return stage_config(start, {"tune": {"grace_steps": every}}, **fixed)

    def _prepare_inputs(self, start: Config) -> int:
        """Prepare each distinct set of pairs and scores once; return the number of steps of a trial."""
        steps: dict[str, int] = {}
        for probe in trial_probes(start, self.space, check_run):
            plan = resolve_run(probe)
            identity = digest(
                [
                    *map(to_tree, (probe.data, probe.model)),
                    probe.training.precision,
                    probe.objective.name,
                    plan.objective.pair_columns,
                    plan.reference_mode,
                    plan.truncate_to_shorter,
                ]
            )
            if identity not in steps:
                inputs = prepare_inputs(plan, resolve_models(plan))
                score_inputs(plan, inputs)
                steps[identity] = make_schedule(with_budget(plan), inputs.data.lengths()).steps_total
        return next(iter(steps.values()))

    def _search(self, start: Config, concurrent: int) -> None:
        """Run the trials that have not ended."""
        total = trial_count(self.space, start.tune)
        slots = self._population(start, total) if start.tune.scheduler == "pbt" else None
        new = total - len(self.state.trials)
        if not self.state.unfinished() and not new:
            return
        ended = len([trial for trial in self.state.trials if trial.ended])
        log_progress(f"{total} trials, {concurrent} at a time; {ended} ended")
        os.environ |= dict.fromkeys(QUIET_TUNE, "1")
        scratch = self.folder / ".tune"
        shutil.rmtree(scratch, ignore_errors=True)
        self._tuner(start, total, slots, concurrent, scratch).fit()
        shutil.rmtree(scratch, ignore_errors=True)

    def _population(self, start: Config, total: int) -> list[int]:
        """Propose all trials at once, as population-based training needs, and return the unfinished ones."""
        from tbpo_ray.tuning.ray_tune import propose_next

        while propose_next(self.space, self.state, start.tune, start.run.seed, total):
            pass
        return [trial.number for trial in self.state.unfinished()]

    def _tuner(
        self, start: Config, total: int, slots: list[int] | None, concurrent: int, scratch: Path
    ) -> ray_tune.Tuner:
        """Tune's own experiment over the trials that have not ended.

        Args:
            total: trials of the study, ended ones included.
            slots: pbt: numbers of the trials, in the order in which Tune gets them.
            scratch: a folder for Tune's own files.
        """
        from ray import tune as ray_tune

        from tbpo_ray.tuning.ray_tune import Proposals, Recorder, make_scheduler

        settings, trials = start.tune, self.state.trials
        setup = self._trial_setup(start, slots)
        if slots is None:
            search = Proposals(self.space, self.state, settings, start.run.seed, total)
            samples, param_space = len(self.state.unfinished()) + total - len(trials), {}
        else:
            search = None
            samples, param_space = 1, {"params": ray_tune.grid_search([trials[n].params for n in slots])}
        return ray_tune.Tuner(
            self._trainable(setup, concurrent),
            param_space=param_space,
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=make_scheduler(
                    self.space, self.state, settings, setup.every, concurrent, start.run.seed
                ),
                num_samples=samples,
                max_concurrent_trials=concurrent if slots is None else None,
                trial_name_creator=str,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[Recorder(self.state, settings, slots, start.cluster.max_workers, self.pruner)],
                # A trial reports its own errors as results, so failures here are lost processes and nodes.
                failure_config=ray_tune.FailureConfig(max_failures=max(0, start.cluster.max_failures)),
            ),
        )

    def _trial_setup(self, start: Config, slots: list[int] | None) -> Setup:
        every = start.tune.grace_steps or 1
        if start.tune.scheduler == "none":
            every = start.training.eval_every or every
        return Setup(
            tree=to_tree(start),
            trials_dir=str(self.trials_dir),
            parent_run_id=self.tracker.run_id,
            every=every,
            slots=slots,
            known=[self.state.trials[n].step for n in slots or []],
            cwd=os.getcwd(),
        )

    def _trainable(self, setup: Setup, concurrent: int) -> Any:
        """The function that Tune runs for each trial, with the resources that it holds."""
        import ray
        from ray import tune as ray_tune

        # A trial writes to the run's folder and to MLflow as a driver does, so it stays on the driver's node.
        node = f"node:{ray.util.get_node_ip_address()}"  # type: ignore[no-untyped-call]
        # A population is limited by shares of that node's resource of 1: Tune's own limit counts paused
        # trials too, and would not begin the next one before the last has ended.
        share = 0.001 if setup.slots is None else math.floor(1e4 / concurrent) / 1e4
        return ray_tune.with_resources(
            ray_tune.with_parameters(run_trial, setup=asdict(setup), train=train, evaluate=evaluate),
            ray_tune.PlacementGroupFactory([{"CPU": 0, node: share}]),
        )

    def _complete_tracking(self, start: Config) -> None:
        """Complete the MLflow runs of the trials that have ended; a stopped trial could not do so itself."""
        for trial in self.state.in_state(*ENDED):
            folder = self.trials_dir / trial.name
            run_id = read_run_note(folder / RUN_NOTE)
            if run_id is None or (folder / TRACKED).is_file():
                continue
            tracker = Tracker.start(
                start.tracking,
                self.trials_dir,
                name=trial.name,
                kind="trial",
                parent_run_id=self.tracker.run_id,
                run_id=run_id,
            )
            rows = read_metrics(folder) if trial.state == "stopped" else []
            log_ended_trial(tracker, trial, rows, self.config.tune.metrics)
            (folder / TRACKED).touch()

    def _confirm(self, start: Config, best: Trial, concurrent: int) -> str:
        """Compare the best configuration with the one without the search; return the result in words."""
        count = self.config.tune.confirm
        if not count:
            return "Not confirmed with new seeds (tune.confirm=0)."
        log_progress(
            f"best: {best.name}; training it and the configuration without the search with {count} new seeds"
        )
        parent = read_run_note(self.trials_dir / best.name / RUN_NOTE)
        confirmation = confirm_best(start, best.params, self.folder / "confirm", parent, concurrent)
        self.state.facts.pop("confirmation", None)
        if confirmation.seeds:
            self.state.facts["confirmation"] = confirmation.facts()
            default, found = confirmation.means
            self.tracker.log_metrics(
                {"confirm/default": default, "confirm/best": found, "confirm/gain": confirmation.gain[0]}
            )
        return confirmation.note()

    def _write_results(self, start: Config, front: list[Trial], note: str) -> None:
        """Export the best policy, write `best.yaml`, tables and report, and log all of it to MLflow."""
        from tbpo_ray.tuning.study_report import write_report

        best = front[0]
        # The run is finished; this adds the export, which trials are trained without.
        result = train(
            trial_config(start, self.trials_dir, best.run_name, best.params, start.run.seed),
            kind="trial",
            parent_run_id=self.tracker.run_id,
            wait=True,
        )
        model = stages(self.config)[1].model
        best_config = stage_config(
            self.config,
            best.params,
            run__name=f"{self.config.run.name}-best",
            model__name_or_path=model.name_or_path,
            model__gguf_file=model.gguf_file,
            sft={},
        )
        best_config = with_study_helpers(best_config, self.config)
        write_atomic(self.folder / "best.yaml", to_yaml(best_config))
        files = write_report(self.config, self.space, self.state, front, note, self.folder, self.tracker)
        for file in (*files, self.folder / "best.yaml", self.folder / STUDY_STATE):
            self.tracker.log_artifact(file)
        best_model = self.tracker.find_model(result.export)
        if best_model is not None:
            self.tracker.log_model_inputs([best_model])
        self._log_best(best, result.mlflow_run_id, note)
        write_atomic(self.folder / "DONE", f"{best.name}\n")
        print((self.folder / "trials.txt").read_text(encoding="utf-8"), end="")
        print(f"\nbest: {best.name}\n{note}")
        print(f"\nreport: {self.folder / 'report.html'}\nMLflow: {self.tracker.url_hint()}")

    def _log_best(self, best: Trial, run_id: str | None, note: str) -> None:
        facts = self.state.facts
        self.tracker.log_params({f"best.{key}": value for key, value in best.params.items()})
        self.tracker.set_tags({"best.trial": best.name, "best.run": run_id, "note": note})
        self.tracker.log_metrics({f"best/{k}": v for k, v in best.values.items() if k != "step"})
        counts = {f"trials/{state}": len(self.state.in_state(state)) for state in ENDED}
        self.tracker.log_metrics(counts | {k: facts[k] for k in ("search_seconds", "reference_scorings")})
