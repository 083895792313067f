"""Run the workers of a training run with Ray Train, and follow them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.cluster.worker_logs import keep_dead_workers_logs
from tbpo_ray.config.loading import to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.progress import log_progress
from tbpo_ray.signals import GRACE_SECONDS
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.metrics_follower import Follower
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import OtherRowsError, RunPlan, make_schedule

OnRow = Callable[[dict[str, Any]], None]

WORKER_LOG = "worker.log"
"""In the folder of the run: what workers printed that died."""
INTERRUPTED_WRITE_SECONDS = 0.5 * GRACE_SECONDS
"""After a signal, how long to let a checkpoint be completed that is being written."""

KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
"""glibc settings for CPU workers: memory that a step frees is kept for the next one. Ray Train runs the loop
in a thread, where glibc would otherwise return large blocks to the system and page-fault them in again in
every step. Peak memory is the same."""


ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""What torch reads the settings of its allocator from, in this order."""
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Settings for GPU workers: micro-batches differ in size, and blocks of fixed size would fragment."""


def worker_environment(config: Config) -> dict[str, str]:
    """Environment variables of the training workers, beyond those of the cluster."""
    if not config.cluster.gpus:
        return KEEP_MEMORY
    import ray

    job = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    own = {name: os.environ[name] for name in ALLOCATOR_NAMES if name in os.environ}
    return own or ({} if any(name in job for name in ALLOCATOR_NAMES) else EXPANDABLE)


def run_workers(
    plan: RunPlan, run_paths: RunPaths, data: PreparedPairs, tracker: Tracker, on_row: OnRow | None
) -> dict[str, Any]:
    """Run the workers to the last step, following their metrics.

    Returns:
        What rank 0 returned: `step` and `pairs_seen`.

    Raises:
        InputError: the workers found a model that cannot train with this configuration.
        OtherRowsError: the self-check chose other rows than those of the plan's micro-batches.
        RunFailedError: the workers failed, or ended before the last step.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    name, total = plan.config.run.name, make_schedule(plan, data.lengths()).steps_total
    checkpoints = Path(run_paths.checkpoints)
    checkpoints.mkdir(exist_ok=True)
    _forget_attempts(checkpoints)
    log_progress(
        f"{name}: {data.pairs} pairs, {total} steps of {plan.config.training.pairs_per_step} pairs, "
        f"{plan.objective.name}, {plan.config.cluster.max_workers} worker(s)"
    )
    trainer = _build_trainer(plan, run_paths, data)
    # Ray Train's own handler of Ctrl-C waits for its controller, then exits with status 0.
    trainer._register_sigint_handler = lambda controller: None
    began = time.time()
    with Follower(Path(run_paths.run_dir), tracker, label=name, on_row=on_row):
        try:
            outcome = trainer.fit()
        except KeyboardInterrupt:
            # The workers continue until this process leaves the cluster.
            ckpt.await_writers(checkpoints, INTERRUPTED_WRITE_SECONDS)
            raise
        except TrainingFailedError as error:
            log = Path(run_paths.run_dir) / "failure.log"
            with log.open("a", encoding="utf-8") as out:
                out.write("".join(traceback.format_exception(error)))
            # A process that was killed or crashed left no exception, only what it printed.
            printed = keep_dead_workers_logs(Path(run_paths.run_dir) / WORKER_LOG, since=began)
            parts = (error_summary(error), printed, f"the traceback is in {log}")
            raise RunFailedError(f"run {name}: {'; '.join(filter(None, parts))}") from error
    value: dict[str, Any] = outcome.return_value or {}
    if "refused" in value:
        raise InputError(*value["refused"].splitlines())
    if "other_rows" in value:
        raise OtherRowsError(*value["other_rows"])
    if "failed" in value:
        raise RunFailedError(f"run {name}: {value['failed']}")
    if value.get("step") != total:
        raise RunFailedError(f"run {name}: the workers ended at step {value.get('step')} of {total}")
    return value


def _forget_attempts(checkpoints: Path) -> None:
    """Delete what would make Ray or the pruning follow an earlier attempt."""
    # The manifests decide which checkpoint a run resumes from, not Ray's own record of checkpoints.
    for record in checkpoints.glob("*.json"):
        record.unlink()
    # The validations of an earlier attempt ended with it.
    for pending in checkpoints.glob(f"step-*/{ckpt.PENDING}"):
        pending.unlink()


def _build_trainer(plan: RunPlan, run_paths: RunPaths, data: PreparedPairs) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from tbpo_ray.data.stream import StreamConfig, stream_datasets
    from tbpo_ray.training.callbacks import FailureLog
    from tbpo_ray.training.worker import train_loop

    config, checkpoints = plan.config, Path(run_paths.checkpoints)
    cluster, workers = config.cluster, config.cluster.num_workers
    stream = StreamConfig(
        data,
        make_schedule(plan, data.lengths()),
        start_step=_StartStep(str(checkpoints)),
        extra_dirs=run_paths.extra,
    )
    return TorchTrainer(
        train_loop,  # type: ignore[arg-type]
        train_loop_config={"config": to_tree(config), "run_paths": asdict(run_paths)},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=tuple(workers) if isinstance(workers, list) else workers,  # type: ignore[arg-type]
            use_gpu=cluster.gpus,
            resources_per_worker=cluster.worker_resources,
            label_selector=cluster.labels.train or None,
        ),
        run_config=RunConfig(
            name=checkpoints.name,
            storage_path=str(checkpoints.parent),
            worker_runtime_env={"env_vars": worker_environment(config)},
            callbacks=[FailureLog(run_paths.lease)],  # type: ignore[list-item]
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=cluster.max_failures, max_preemption_failures=cluster.max_preemption_failures
            ),
        ),
        validation_config=_validation_config(config, run_paths),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus else "gloo"),
        **stream_datasets(stream),
    )


def _validation_config(config: Config, run_paths: RunPaths) -> Any:
    """How Ray Train samples and judges checkpoints in the background; None if it does not."""
    from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

    from tbpo_ray.workflows.validate import TASK_CPUS, validate_checkpoint

    if config.training.validate_every is None:
        return None
    arguments = {"tree": to_tree(config), "run_paths": asdict(run_paths)}
    return ValidationConfig(
        validate_checkpoint,  # type: ignore[arg-type]
        ValidationTaskConfig(fn_kwargs=arguments),
        ray_remote_kwargs={"num_cpus": TASK_CPUS},
    )


class _StartStep:
    """The step of the newest complete checkpoint; Ray evaluates it at every start of the worker group.

    The workers verify its content, and read an older one's stream themselves if it is damaged.
    """

    def __init__(self, checkpoints: str):
        self.checkpoints = checkpoints

    def __call__(self) -> int:
        return ckpt.newest(Path(self.checkpoints), ckpt.find_incompleteness).step
