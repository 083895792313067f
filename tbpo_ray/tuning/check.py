"""Checks of a study that need no running trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.fit import capacities
from tbpo_ray.cluster.placement import format_resources
from tbpo_ray.config.comparison import changed_values
from tbpo_ray.config.loading import stage_config, to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.storage.paths import STUDY_STATE
from tbpo_ray.tracking.run_note import RUN_NOTE
from tbpo_ray.tuning.space import Space

PROBES = 64
"""Random proposals that are validated before a study starts."""
MAX_FAULTS = 5
MAY_CHANGE = (
    "tracking", "cluster", "compare", "export", "sft.cluster", "sft.tracking", "runs", "tune.trials",
    "tune.max_concurrent", "tune.num_workers", "tune.confirm", "tune.resume_errored", "tune.keep_checkpoints",
)  # fmt: skip
"""Keys and sections that may differ when a study resumes."""


def trial_base_config(config: Config) -> Config:
    """The study's configuration with the number of workers of a trial."""
    workers = config.tune.num_workers
    return config if workers is None else stage_config(config, {}, cluster__num_workers=workers)


def trial_probes(config: Config, space: Space, check: Callable[[Config], object]) -> list[Config]:
    """Configurations that represent the study's trials: the base one, and random proposals or a whole grid.

    Args:
        check: refuses a configuration that cannot be trained, with an `InputError`.

    Raises:
        InputError: values of the space that are inconsistent or that no run can train with.
    """
    if config.tune.algorithm == "grid":
        proposals = list(islice(space.grid_points(), config.tune.trials))
    else:
        proposals = space.random_samples(PROBES, config.run.seed)
    configs: list[Config] = []
    faults: list[str] = []
    for params in [{}, *proposals]:
        try:
            probe = stage_config(config, params)
            check(probe)
            configs.append(probe)
        except InputError as error:
            values = ", ".join(f"{key}={value}" for key, value in params.items())
            where = f"space: a trial with {values}: " if values else ""
            faults += [f"{where}{fault}" for fault in error.faults]
    if faults:
        raise InputError(*list(dict.fromkeys(faults))[:MAX_FAULTS])
    return configs


def check_grace_steps(config: Config, total: int | None) -> None:
    """Refuse a grace period that is as long as a trial: the scheduler would never judge one.

    Args:
        total: steps of a trial, or None while they are unknown.

    Raises:
        InputError: naming the key.
    """
    grace = config.tune.grace_steps
    if config.tune.scheduler != "none" and grace and total is not None and grace >= total:
        raise InputError(
            f"tune.grace_steps={grace}: a trial has {total} steps and tune.scheduler={config.tune.scheduler} "
            f"has to judge it before its end; use at most {total - 1}"
        )


def refuse_run_folder(name: str, folder: Path) -> None:
    """Refuse a name whose folder already holds a training run.

    Raises:
        InputError: naming the key.
    """
    is_study = (folder / STUDY_STATE).is_file()
    if not is_study and any((folder / mark).exists() for mark in (RUN_NOTE, "checkpoints", "DONE")):
        raise InputError(
            f"run.name={name}: {folder} holds a training run; use another run.name for the study"
        )


def concurrent_trials(config: Config, probes: Sequence[Config]) -> int:
    """How many trials run at the same time: as many of the largest trial as the cluster holds, at most.

    Raises:
        InputError: the cluster does not hold one trial, or fewer than `tune.max_concurrent`.
    """
    sizes, labels = capacities(config), config.cluster.labels.train
    capacity: dict[int, str] = {}
    for probe in probes:
        workers, bundle = probe.cluster.max_workers, probe.cluster.worker_resources
        held = max(size.fits(bundle, labels) for size in sizes)
        capacity[held // workers] = (
            f"{sizes[-1].format(bundle)} hold {held} x ({format_resources(bundle)}), a trial takes {workers}"
        )
    fits = min(capacity, default=config.tune.trials)
    requested = config.tune.max_concurrent
    if fits < 1 or (requested is not None and requested > fits):
        key = "cluster.num_workers" if config.tune.num_workers is None else "tune.num_workers"
        count = config.tune.num_workers or config.cluster.num_workers
        setting = f"tune.max_concurrent={requested}" if fits else f"{key}={count}"
        raise InputError(
            f"{setting}: the cluster holds {fits} trial(s) at a time ({capacity[fits]}); lower it, "
            f"{key} or cluster.resources_per_worker, or add nodes"
        )
    return min(requested or fits, config.tune.trials)


def share_cores(config: Config, concurrent: int) -> Config:
    """On a cluster without GPUs, set the threads of a worker so that concurrent trials share the cores."""
    import ray

    cluster = config.cluster
    if cluster.gpus or cluster.threads_per_worker is not None:
        return config
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    threads = max(1, int(resources.get("CPU", 1.0) / (concurrent * cluster.max_workers)))
    return stage_config(config, {}, cluster__threads_per_worker=threads)


def refuse_other_study(name: str, facts: Mapping[str, Any], config: Config, space: Space) -> None:
    """Compare with the configuration and the space that a study was started with.

    Raises:
        InputError: one sentence for each change that would alter its result.
    """
    if not facts:
        return
    changes = changed_values(facts["config"], to_tree(config), ignored=MAY_CHANGE)
    faults = [
        f"{key}={new!r}: study {name} was started with {old!r}; use another run.name"
        for key, (old, new) in changes.items()
    ]
    if facts["space"] != space.source:
        keys = [k for k in {**facts["space"], **space.source} if facts["space"].get(k) != space.source.get(k)]
        faults.append(
            f"--space: {keys[0]} differs from the space that study {name} was started with; "
            "use another run.name"
        )
    trials = facts["config"]["tune"]["trials"]
    if config.tune.trials < trials:
        faults.append(
            f"tune.trials={config.tune.trials}: study {name} was started with {trials}; only a "
            "larger number extends a study"
        )
    if faults:
        raise InputError(*faults)
