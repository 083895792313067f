"""A study from configuration and space to the best configuration, its policy and the report."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.fit import fit_to_cluster
from tbpo_ray.cluster.session import start_ray
from tbpo_ray.config.loading import digest, stage_config, to_tree, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, RunFailedError, TbpoError
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import file_lock, write_atomic
from tbpo_ray.storage.paths import STUDY_STATE, cache_dir, output_dir, run_dir
from tbpo_ray.tracking.tracker import RUN_NOTE, Tracker, noted_run, store_uri
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.plan import make_schedule
from tbpo_ray.training.reference_scores import scorings
from tbpo_ray.tuning.check import (
    check_grace,
    check_metrics,
    concurrency,
    refuse_name_of_run,
    refuse_other_study,
    share_cores,
    trial_base_config,
    trial_probes,
)
from tbpo_ray.tuning.searchers import size
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import StudyState, Trial, interval, pareto
from tbpo_ray.tuning.trial import EVALUATION, KEEP_ALL, Setup, measured, run_trial, trial_config
from tbpo_ray.workflows.evaluate import evaluate
from tbpo_ray.workflows.pipeline import stages
from tbpo_ray.workflows.train import check_run, prepare_inputs, resolve_models, score_inputs, train

QUIET_TUNE = (
    "TUNE_DISABLE_SIGINT_HANDLER",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
)
"""Ctrl-C ends the job as any other; a trial's last report has no step; Tune's own logs are nobody's."""
TRIALS, SETTLED = "trials", ".settled"
"""The folder of the trials' runs; in each, the sign that its MLflow run is complete."""
NEW_SEEDS = 1000
"""Seeds of the confirmation start so far above `run.seed`."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    folder: Path
    best: Trial
    front: list[Trial]
    """Trials that no other beats in every metric; with one metric, the best alone."""
    note: str
    """Whether the best configuration held up with new seeds."""
    already_finished: bool = False


def check_study(config: Config, space: Space) -> list[Config]:
    """Refuse what can be refused without a cluster. Returns configurations that stand for the trials.

    Raises:
        InputError: naming key, value and what would do.
    """
    space.check(config)
    if config.tune.scheduler == "pbt":
        space.check_changeable()
    refuse_name_of_run(config.run.name, run_dir(config))
    trials = config.tune.trials
    if config.tune.algorithm == "grid" and (points := len(list(space.points()))) > trials:
        log_progress(
            f"tune.trials={trials}: the first {trials} of the grid's {points} points; {points} would run all"
        )
    probes = trial_probes(trial_base_config(config), space, check_run)
    check_metrics(config, probes)
    check_grace(config, config.training.max_steps)
    return probes


def tune(config: Config, space: Space) -> StudyResult:
    """Search; go on with an unfinished study of the same name; say so when it is finished.

    Raises:
        InputError: bad configuration, space or input, before any trial starts.
        RunFailed: no trial could be finished; what they reached is kept.
    """
    probes = check_study(config, space)
    folder = run_dir(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.output_dir={folder.parent}: cannot write there ({error.strerror})") from error
    with file_lock(folder / ".lock"):
        study = StudyState.open(folder / STUDY_STATE)
        refuse_other_study(config.run.name, study.facts, config, space)
        extended = bool(study.facts) and study.facts["config"]["tune"]["trials"] < config.tune.trials
        again = study.in_state("failed") if config.tune.resume_errored else []
        if (folder / "DONE").is_file() and not extended and not again:
            log_progress(f"study {config.run.name} is finished: {folder}")
            front = pareto(study.trials, config.tune)
            return StudyResult(folder, front[0], front, study.facts["note"], already_finished=True)
        start_ray()
        settled = fit_to_cluster(config)
        gpus = settled.cluster.use_gpu
        at_once = concurrency(settled, [stage_config(p, {}, cluster__use_gpu=gpus) for p in probes])
        (folder / "DONE").unlink(missing_ok=True)
        if again:
            log_progress(f"tune.resume_errored: {', '.join(trial.name for trial in again)} go on")
        for trial in again:
            (folder / TRIALS / trial.name / SETTLED).unlink(missing_ok=True)
            trial.state, trial.reason = "waiting", ""
        study.facts |= {"config": to_tree(config), "space": space.source}
        study.save()
        write_atomic(folder / "config.yaml", to_yaml(config))
        with Tracker.noted(config, folder / RUN_NOTE, kind="tune") as tracker:
            return _Study(settled, space, folder, study, tracker).run(at_once)


class _Study:
    def __init__(self, config: Config, space: Space, folder: Path, study: StudyState, tracker: Tracker):
        self.config, self.space, self.folder = config, space, folder
        self.study, self.tracker = study, tracker
        self.trials_dir = folder / TRIALS
        self.trials_dir.mkdir(exist_ok=True)

    def run(self, at_once: int) -> StudyResult:
        start = self._start()
        scored = cache_dir(self.config)
        before = self.study.facts.setdefault("scorings_before", len(scorings(scored)))
        self.study.facts.setdefault("search_seconds", 0.0)
        self.study.save()
        start = share_cores(self._prepare(trial_base_config(start)), at_once)
        self._search(start, at_once)
        self._settle(start)
        front = pareto(self.study.trials, self.config.tune)
        if not front:
            reasons = [t.reason for t in self.study.in_state("failed")]
            raise RunFailedError(
                f"study {self.config.run.name}: no trial was finished with a number for "
                f"{', '.join(self.config.tune.metrics)}{': ' + reasons[0] if reasons else ''}. For new "
                "trials use a larger tune.trials or another run.name; tune.resume_errored=true lets failed "
                "ones go on"
            )
        best = front[0]
        note = self._confirm(start, best, at_once)
        self.study.facts |= {"note": note, "best": best.number}
        self.study.facts["reference_scorings"] = len(scorings(scored)) - before
        self.study.save()
        self._leave(start, best, front, note)
        return StudyResult(self.folder, best, front, note)

    def _start(self) -> Config:
        """What every trial starts from: the SFT policy where there is one, the same model for all seeds."""
        sft, start = stages(self.config)
        if sft is not None:
            log_progress("supervised fine-tuning: what all trials start from")
            result = train(sft, kind="sft", wait=True)
            self.tracker.set_tags({"start.run": result.mlflow_run_id})
        policy, reference = resolve_models(start)
        fixed: dict[str, Any] = {"model__name_or_path": policy, "model__gguf_file": None, "sft": {}}
        if start.model.reference is not None:
            fixed["model__reference"] = reference
        return stage_config(start, {}, **fixed)

    def _prepare(self, start: Config) -> Config:
        """Prepared pairs and reference scores for all trials; then the configuration that they share."""
        made: dict[str, int] = {}
        for probe in trial_probes(start, self.space, check_run):
            mode = check_run(probe)
            parts = [probe.data, probe.model]
            identity = digest([*map(to_tree, parts), probe.training.precision, probe.objective.name, mode])
            if identity not in made:
                inputs = prepare_inputs(probe, resolve_models(probe))
                score_inputs(probe, inputs)
                made[identity] = make_schedule(probe, inputs.data.lengths()).steps_total
        total = next(iter(made.values()))
        check_grace(start, total)
        every = start.tune.grace_steps or max(1, total // 4)
        fixed: dict[str, Any] = {
            "tracking__uri": store_uri(start.tracking, output_dir(start)),
            "data__cache_dir": str(cache_dir(start)),
        }
        pbt = start.tune.scheduler == "pbt"
        if start.tune.scheduler != "none" and (pbt or every % (start.training.eval_every or total)):
            fixed["training__eval_every"] = every
        if start.tune.scheduler != "none" and not start.tune.metrics[0].startswith("eval/"):
            # Trials are judged every so many steps: what they are judged by has to be logged then.
            fixed["training__log_every"] = math.gcd(every, start.training.log_every)
        if pbt:
            fixed |= {"training__checkpoint_every": every, "training__keep_checkpoints": KEEP_ALL}
        return stage_config(start, {"tune": {"grace_steps": every}}, **fixed)

    def _search(self, start: Config, at_once: int) -> None:
        """Run what is left of the trials."""
        import ray
        from ray import tune as ray_tune

        from tbpo_ray.tuning.ray_tune import Proposals, Recorder, make_scheduler, propose_next

        settings, total = start.tune, size(self.space, start.tune)
        slots: list[int] | None = None
        known: list[int] = []
        space: dict[str, Any] = {}
        search: Any = None
        if settings.scheduler == "pbt":
            while propose_next(self.space, self.study, settings, start.run.seed, total):
                pass
            slots = [trial.number for trial in self.study.unfinished()]
            known = [self.study.trials[n].step for n in slots]
            space = {"params": ray_tune.grid_search([self.study.trials[n].params for n in slots])}
            left = 1
        else:
            search = Proposals(self.space, self.study, settings, start.run.seed, total)
            left = len(self.study.unfinished()) + total - len(self.study.trials)
        if not left or slots == []:
            return
        every = settings.grace_steps or 1
        log_progress(
            f"{total} trials, {at_once} at a time; {len([t for t in self.study.trials if t.ended])} ended"
        )
        setup = Setup(
            tree=to_tree(start),
            trials_dir=str(self.trials_dir),
            parent_run_id=self.tracker.run_id,
            every=every if settings.scheduler != "none" else (start.training.eval_every or every),
            slots=slots,
            known=known,
            cwd=os.getcwd(),
        )
        # Trials write to the run's folder and to MLflow, as a driver does: they stay on the driver's node.
        here = f"node:{ray.util.get_node_ip_address()}"
        # A population takes turns by sharing that node's resource of 1: Tune's own limit counts paused trials
        # too, and would not begin the next one before the last has ended.
        share = 0.001 if slots is None else math.floor(1e4 / at_once) / 1e4
        trainable = ray_tune.with_resources(
            ray_tune.with_parameters(run_trial, setup=asdict(setup), train=train, evaluate=evaluate),
            ray_tune.PlacementGroupFactory([{"CPU": 0, here: share}]),
        )
        os.environ |= dict.fromkeys(QUIET_TUNE, "1")
        scratch = self.folder / ".tune"
        shutil.rmtree(scratch, ignore_errors=True)
        tuner = ray_tune.Tuner(
            trainable,
            param_space=space,
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=make_scheduler(self.space, self.study, settings, setup.every, at_once,
                                         start.run.seed),
                num_samples=left,
                max_concurrent_trials=at_once if slots is None else None,
                trial_name_creator=str,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[Recorder(self.study, settings, slots, start.cluster.max_workers)],
                # A trial's own faults are results; what is left are processes and nodes that died.
                failure_config=ray_tune.FailureConfig(max_failures=max(0, start.cluster.max_failures)),
            ),
        )  # fmt: skip
        tuner.fit()
        shutil.rmtree(scratch, ignore_errors=True)

    def _settle(self, start: Config) -> None:
        """Complete the MLflow runs of trials that ended; of stopped ones nobody else does."""
        for trial in self.study.in_state("finished", "stopped", "failed"):
            own = self.trials_dir / trial.name
            run_id = noted_run(own / RUN_NOTE)
            if run_id is None or (own / SETTLED).is_file():
                continue
            tracker = Tracker.start(
                start.tracking, self.trials_dir, name=trial.name, kind="trial",
                parent_run_id=self.tracker.run_id, run_id=run_id,
            )  # fmt: skip
            for row in read_metrics(own) if trial.state == "stopped" else []:
                if row["step"] <= trial.step:
                    tracker.log_metrics({k: v for k, v in row.items() if k != "step"}, int(row["step"]))
            tracker.log_params({f"sampled.{key}": value for key, value in trial.params.items()})
            tracker.set_tags({"tune.state": trial.state, "tune.reason": trial.reason})
            for take_over in trial.lineage:
                tracker.set_tags({f"tune.took_over_at_{take_over['step']}": f"t{take_over['donor']:03d}"})
            for metric in self.config.tune.metrics if trial.state == "finished" else []:
                mean, low, high = interval([row.get(metric, math.nan) for row in trial.repeats])
                known = {"": mean, "/low": low, "/high": high}
                tracker.log_metrics({f"mean/{metric}{k}": v for k, v in known.items() if math.isfinite(v)})
            tracker.log_metrics(
                {"trial_seconds": trial.seconds, "worker_seconds": trial.seconds * trial.workers}
            )
            tracker.finish({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[trial.state])
            (own / SETTLED).touch()

    def _confirm(self, start: Config, best: Trial, at_once: int) -> str:
        """Train the best configuration and the one without the search anew, with seeds nobody has seen."""
        count = self.config.tune.confirm
        if not count:
            return "Not confirmed with new seeds (tune.confirm=0)."
        log_progress(
            f"best: {best.name}; running it and the configuration without the search with {count} new seeds"
        )
        parent = noted_run(self.trials_dir / best.name / RUN_NOTE)
        metric, mode = self.config.tune.metrics[0], self.config.tune.modes[0]
        judged = metric.startswith(EVALUATION)

        def one(job: tuple[str, Mapping[str, Any], int]) -> tuple[float, str]:
            label, params, seed = job
            # Named by what it runs, so that a study that is extended confirms another best anew.
            name = f"{label}-{digest(dict(params))[:8]}-s{seed}"
            try:
                run = trial_config(start, self.folder / "confirm", name, params, seed)
                result = train(run, kind="confirm", parent_run_id=parent, export=judged)
                value = measured(result, run, evaluate if judged else None).get(metric, math.nan)
            except TbpoError as error:
                return math.nan, f"{name}: {error}"
            return value, "" if math.isfinite(value) else f"{name}: {metric}={value}"

        seeds = [start.run.seed + NEW_SEEDS + i for i in range(count)]
        jobs: list[tuple[str, Mapping[str, Any], int]] = [("default", {}, s) for s in seeds]
        jobs += [("best", best.params, s) for s in seeds]
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            outcomes = list(pool.map(one, jobs))
        # Seeds with which both could be run.
        both = [
            (seed, d, b)
            for seed, (d, _), (b, _) in zip(seeds, outcomes[:count], outcomes[count:], strict=True)
            if math.isfinite(d) and math.isfinite(b)
        ]
        faults = [fault for _, fault in outcomes if fault]
        failed = (
            f"{len(faults)} of {len(jobs)} confirming runs failed, the first: {faults[0]}" if faults else ""
        )
        if not both:
            self.study.facts.pop("confirmation", None)
            return f"Not confirmed with new seeds: {failed}"
        seeds, default, found = (list(column) for column in zip(*both, strict=True))
        count, sign = len(both), 1 if mode == "max" else -1
        gain, low, high = interval([sign * (b - d) for d, b in zip(default, found, strict=True)])
        self.study.facts["confirmation"] = {
            "metric": metric, "seeds": seeds, "default": default, "best": found, "gain": gain,
        }  # fmt: skip
        bounds = f", 95 % interval {low:+.4f} to {high:+.4f}" if math.isfinite(low) else ""
        self.tracker.log_metrics({"confirm/default": sum(default) / count, "confirm/best": sum(found) / count,
                                  "confirm/gain": gain})  # fmt: skip
        verdict = "beats" if gain > 0 else "does not beat"
        sure = "" if gain <= 0 or (math.isfinite(low) and low > 0) else "; not told apart from noise"
        return (
            f"With {count} new seed(s) the best configuration {verdict} the one without the search in "
            f"{metric}: {sum(found) / count:.4f} against {sum(default) / count:.4f}, a gain of "
            f"{gain:+.4f}{bounds}{sure}.{' ' + failed if failed else ''}"
        )

    def _leave(self, start: Config, best: Trial, front: list[Trial], note: str) -> None:
        """Export, `best.yaml`, tables and report; all of it also on the study's MLflow run."""
        from tbpo_ray.tuning.study_report import write_report

        name = best.name if not best.generation else f"{best.name}-x{best.generation}"
        result = train(
            trial_config(start, self.trials_dir, name, best.params, start.run.seed),
            kind="trial", parent_run_id=self.tracker.run_id, wait=True,
        )  # fmt: skip
        model = stages(self.config)[1].model
        settled = stage_config(
            self.config, best.params, run__name=f"{self.config.run.name}-best",
            model__name_or_path=model.name_or_path, model__gguf_file=model.gguf_file, sft={},
        )  # fmt: skip
        write_atomic(self.folder / "best.yaml", to_yaml(settled))
        files = write_report(self.config, self.space, self.study, front, note, self.folder, self.tracker)
        for file in (*files, self.folder / "best.yaml", self.folder / STUDY_STATE):
            self.tracker.log_artifact(file)
        self.tracker.log_artifact(result.export, "model")
        self.tracker.log_params({f"best.{key}": value for key, value in best.params.items()})
        self.tracker.set_tags({"best.trial": best.name, "best.run": result.mlflow_run_id, "note": note})
        self.tracker.log_metrics({f"best/{k}": v for k, v in best.values.items() if k != "step"})
        counts = {f"trials/{s}": len(self.study.in_state(s)) for s in ("finished", "stopped", "failed")}
        self.tracker.log_metrics(
            counts | {k: self.study.facts[k] for k in ("search_seconds", "reference_scorings")}
        )
        write_atomic(self.folder / "DONE", f"{best.name}\n")
        print((self.folder / "trials.txt").read_text(encoding="utf-8"), end="")
        print(f"\nbest: {best.name}\n{note}")
        print(f"\nreport: {self.folder / 'report.html'}\nMLflow: {self.tracker.url_hint()}")
