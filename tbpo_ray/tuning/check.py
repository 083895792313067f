"""What can be refused before a study starts anything."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.fit import capacities
from tbpo_ray.cluster.placement import format_resources
from tbpo_ray.config.loading import flatten, stage_config, to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.storage.paths import STUDY_STATE
from tbpo_ray.tracking.tracker import RUN_NOTE
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.trial import EVALUATION

PROBES = 64
"""Proposals tried against the configuration before a study starts."""
EVERY_ROW = ("loss", "grad_norm", "learning_rate", "epoch", "pairs_seen")
OF_SAMPLES = ("distinct_1", "distinct_2", "predictive_entropy", "kl_k1", "length_tokens", "truncated")
OF_JUDGE = {
    "checker": ("exact_match", "win_rate", "lc_win_rate"),
    "reward_model": ("score", "win_rate", "lc_win_rate"),
    "llm": ("win_rate", "lc_win_rate"),
    "implicit": ("implicit_accuracy", "implicit_margin"),
}
"""What an evaluation measures, by the kind of its judge."""
MAY_CHANGE = (
    "tracking.", "cluster.", "compare.", "sft.cluster", "sft.tracking", "runs", "tune.trials",
    "tune.max_concurrent", "tune.num_workers", "tune.confirm", "tune.resume_errored",
)  # fmt: skip
"""Keys (or beginnings of keys) that may be otherwise when a study goes on."""


def trial_base_config(config: Config) -> Config:
    """The study's configuration with a trial's workers."""
    workers = config.tune.num_workers
    return config if workers is None else stage_config(config, {}, cluster__num_workers=workers)


def trial_probes(config: Config, space: Space, check: Callable[[Config], object]) -> list[Config]:
    """Configurations that stand for the study's trials: without the search, and with proposals at random, or
    with all those of a grid.

    Args:
        check: refuses a configuration that cannot be trained, with an `InputError`.

    Raises:
        InputError: values of the space that do not go together, or that no run can do.
    """
    configs: list[Config] = []
    faults: list[str] = []
    if config.tune.algorithm == "grid":
        proposals = list(islice(space.points(), config.tune.trials))
    else:
        proposals = space.samples(PROBES, config.run.seed)
    for params in [{}, *proposals]:
        try:
            probe = stage_config(config, params)
            check(probe)
            configs.append(probe)
        except InputError as error:
            shown = ", ".join(f"{k}={v}" for k, v in params.items())
            faults += [f"{'space: a trial with ' + shown + ': ' if shown else ''}{f}" for f in error.faults]
    if faults:
        raise InputError(*list(dict.fromkeys(faults))[:5])
    return configs


def logged_metrics(config: Config) -> set[str]:
    """Names of the metrics that a run of this configuration logs, as an objective shows on two tokens."""
    import torch

    from tbpo_ray.objectives import TokenScores
    from tbpo_ray.training.components import objective_of

    objective = objective_of(config)
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    given = ["logps", "baseline"]
    given += ["ref_logps"] * objective.needs_reference + ["weights"] * objective.needs_weights
    sides = {f"{side}_{part}": zeros for side in ("chosen", "rejected") for part in given}
    names = set(objective(TokenScores(**sides, chosen_mask=mask, rejected_mask=mask)).metrics)
    if objective.needs_kl:
        names |= {"entropy", "kl/exact"}
    held_out = {f"eval/{name}" for name in {*names, "loss"}} if config.data.eval is not None else set()
    return names | set(EVERY_ROW) | held_out


def evaluated_metrics(config: Config) -> list[str]:
    """Names of what the evaluation of a trial's policy measures."""
    names = [*OF_JUDGE.get(_judge_kind(config), ()), *OF_SAMPLES]
    if config.generation.samples > 1:
        names.append("self_bleu")
    if config.evaluation.credit_pairs:
        names += OF_JUDGE["implicit"]
    return list(dict.fromkeys(names))


def _judge_kind(config: Config) -> str:
    return str(config.evaluation.judge.get("kind", "checker"))


def check_metrics(config: Config, probes: Sequence[Config]) -> None:
    """Refuse a metric that some trial would not log.

    Raises:
        InputError: naming it, and those that are logged.
    """
    tune = config.tune
    variants = {(p.objective.name, p.objective.baseline_kind): p for p in probes}
    each = [logged_metrics(probe) for probe in variants.values()]
    logged = set.intersection(*each)
    faults = []
    for metric in tune.metrics:
        if metric.startswith(EVALUATION):
            measures = evaluated_metrics(config)
            if metric.removeprefix(EVALUATION) not in measures:
                known = " ".join(EVALUATION + name for name in measures)
                faults.append(
                    f"tune.metric={metric}: not measured with evaluation.judge.kind={_judge_kind(config)} "
                    f"and generation.samples={config.generation.samples}; one of {known}"
                )
            elif metric == tune.metrics[0] and tune.scheduler != "none":
                faults.append(
                    f"tune.metric={metric}: known at the end only, and tune.scheduler={tune.scheduler} "
                    "judges trials in the middle; put a logged metric first, or use tune.scheduler=none"
                )
        elif metric not in logged:
            some = metric in set.union(*each)
            last = metric.rsplit("/", 1)[-1]
            alike = [name for name in sorted(logged) if last in name] or sorted(logged)
            near = difflib.get_close_matches(metric, alike, n=1, cutoff=0.0)[0]
            faults.append(
                f"tune.metric={metric}: {'not every trial logs it' if some else 'nothing logs it'}; the "
                f"nearest is {near}; logged are {' '.join(sorted(logged))}"
            )
    if any(metric.startswith(EVALUATION) for metric in tune.metrics) and not faults:
        from tbpo_ray.evaluation.evaluator import check_evaluation

        model = config.model.name_or_path
        check_evaluation(config, {"start": model, "trial": model})
    if tune.scheduler == "pbt" and tune.repeats > 1:
        faults.append(f"tune.repeats={tune.repeats}: tune.scheduler=pbt trains each trial once; use 1")
    if faults:
        raise InputError(*faults)


def check_grace(config: Config, total: int | None) -> None:
    """Refuse a first look at trials that comes when they have ended.

    Args:
        total: steps of a trial, None where they are not known yet.

    Raises:
        InputError: naming the key.
    """
    grace = config.tune.grace_steps
    if config.tune.scheduler != "none" and grace and total is not None and grace >= total:
        raise InputError(
            f"tune.grace_steps={grace}: a trial has {total} steps, and is judged before its end with "
            f"tune.scheduler={config.tune.scheduler}; use fewer"
        )


def refuse_name_of_run(name: str, folder: Path) -> None:
    """Raises InputError where a training run owns the folder that the study would get."""
    if not (folder / STUDY_STATE).is_file() and any(
        (folder / x).exists() for x in (RUN_NOTE, "checkpoints", "DONE")
    ):
        raise InputError(
            f"run.name={name}: {folder} holds a training run; use another run.name for the study"
        )


def concurrency(config: Config, probes: Sequence[Config]) -> int:
    """How many trials the cluster holds at once, by the largest trial.

    Raises:
        InputError: with the arithmetic, where `tune.max_concurrent` asks for more.
    """
    sizes, labels = capacities(config), config.cluster.labels.train
    rooms: dict[int, str] = {}
    for probe in probes:
        workers, bundle = probe.cluster.max_workers, probe.cluster.worker_resources
        held = max(size.fits(bundle, labels) for size in sizes)
        rooms[held // workers] = (
            f"{sizes[-1].sentence(bundle)} hold {held} x ({format_resources(bundle)}), "
            f"a trial takes {workers}"
        )
    fits = min(rooms, default=config.tune.trials)
    asked = config.tune.max_concurrent
    if fits < 1 or (asked is not None and asked > fits):
        key = "cluster.num_workers" if config.tune.num_workers is None else "tune.num_workers"
        count = config.tune.num_workers or config.cluster.num_workers
        what = f"tune.max_concurrent={asked}" if fits else f"{key}={count}"
        raise InputError(
            f"{what}: the cluster holds {fits} trial(s) at a time ({rooms[fits]}); lower it, "
            f"{key} or cluster.resources_per_worker, or add nodes"
        )
    return min(asked or fits, config.tune.trials)


def share_cores(config: Config, at_once: int) -> Config:
    """Without GPUs: threads of a worker such that those of all trials at a time share the cluster's cores."""
    import ray

    cluster = config.cluster
    if cluster.gpus or cluster.threads_per_worker is not None:
        return config
    cores = ray.cluster_resources().get("CPU", 1.0)
    threads = max(1, int(cores / (at_once * cluster.max_workers)))
    return stage_config(config, {}, cluster__threads_per_worker=threads)


def refuse_other_study(name: str, facts: Mapping[str, Any], config: Config, space: Space) -> None:
    """Compare with what a study was started with.

    Raises:
        InputError: one sentence for each change that would alter its result.
    """
    if not facts:
        return
    old, new = flatten(facts["config"]), flatten(to_tree(config))
    faults = [
        f"{key}={new.get(key)!r}: study {name} was started with {old.get(key)!r}; use another run.name"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(_under(key, beginning) for beginning in MAY_CHANGE)
    ]
    if facts["space"] != space.source:
        keys = [k for k in {**facts["space"], **space.source} if facts["space"].get(k) != space.source.get(k)]
        faults.append(f"--space: {keys[0]} differs from study {name}'s own; use another run.name")
    if config.tune.trials < old["tune.trials"]:
        faults.append(
            f"tune.trials={config.tune.trials}: study {name} was started with {old['tune.trials']}; only a "
            "larger number extends a study"
        )
    if faults:
        raise InputError(*faults)


def _under(key: str, beginning: str) -> bool:
    return key == beginning or key.startswith(beginning if beginning.endswith(".") else f"{beginning}.")
