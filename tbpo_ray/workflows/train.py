"""A training run from configuration to exported policy. Runs where the job runs, on no GPU."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.cluster.fit import fit_to_cluster
from tbpo_ray.cluster.placement import wait_for_resources
from tbpo_ray.cluster.session import start_ray
from tbpo_ray.config.loading import to_tree, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.data.prepare import find_sources
from tbpo_ray.data.shards import Prepared
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.models.load import check_same_tokenizer
from tbpo_ray.models.resolve import local_model, policy_folder
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.ownership import RunLock
from tbpo_ray.storage.paths import cache_dir, run_dir, shared_folders
from tbpo_ray.tracking.tracker import RUN_NOTE, Tracker, noted_run
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.components import check_shared_prompt, objective_of, reference_mode, uses_shared_prompt
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.metrics_follower import Follower
from tbpo_ray.training.plan import RunPaths, make_schedule, refuse_changes, refuse_other_order
from tbpo_ray.training.run_result import RunResult
from tbpo_ray.training.token_weight_cache import check_token_weights, token_weights
from tbpo_ray.workflows.prepare import log_prepared, prepare_role

KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
"""For glibc in a worker on CPUs: memory that a step frees stays for the next. Ray Train runs the loop in a
thread, where glibc would otherwise give large blocks back and have each of their pages mapped anew in every
step. Peak memory is the same."""


@dataclass(frozen=True)
class Inputs:
    """What runs of one configuration read; made once, by content, and shared by all of them."""

    model: str
    reference: str
    data: Prepared
    held_out: Prepared | None


def check_run(config: Config) -> str:
    """Refuse what no run can do, before anything starts. Returns `none`, `cached` or `live`.

    Raises:
        InputError: naming the key.
    """
    mode = reference_mode(config, objective_of(config))
    uses_shared_prompt(config)
    best = config.training.best_metric
    if config.training.keep_best and best.startswith("eval/") and config.data.eval is None:
        raise InputError(f"training.best_metric={best}: there is no data.eval; give it, or another metric")
    find_sources(config.data.train, "data.train")
    if config.data.eval is not None:
        find_sources(config.data.eval, "data.eval")
    return mode


def resolve_models(config: Config) -> tuple[str, str]:
    """Policy and reference as transformers loads them.

    Raises:
        InputError: for a folder that is no model, models that read other tokens or cannot take both answers
            in one row, and token weights that no model can give.
    """
    cache = cache_dir(config)
    model = policy_folder(config)
    reference = model
    if config.model.reference is not None:
        reference = local_model(config.model.reference, cache, key="model.reference")
        check_same_tokenizer(model, reference, "model.reference")
    check_shared_prompt(config, model, "model.name_or_path")
    if reference != model:
        check_shared_prompt(config, reference, "model.reference")
    check_token_weights(config, objective_of(config))
    return model, reference


def prepare_inputs(config: Config, models: tuple[str, str]) -> Inputs:
    """Prepared training and held-out pairs. Wants a cluster."""
    model, reference = models
    cache = cache_dir(config)
    data = prepare_role(config, "train", model, cache)
    held_out = prepare_role(config, "eval", model, cache) if config.data.eval is not None else None
    return Inputs(model, reference, data, held_out)


def score_inputs(config: Config, inputs: Inputs) -> tuple[list[str], list[str]]:
    """Folders with columns that go beside the training and the held-out pairs: cached reference scores and
    token weights, where the objective reads them."""
    from tbpo_ray.training.reference_scores import reference_scores

    objective = objective_of(config)
    cut = objective.compares_to_shorter and config.training.cut_dead_tail
    columns: tuple[list[str], list[str]] = ([], [])
    for prepared, target in zip((inputs.data, inputs.held_out), columns, strict=True):
        if prepared is None:
            continue
        if reference_mode(config, objective) == "cached":
            cache = cache_dir(config)
            scores = reference_scores(
                config, prepared, inputs.reference, cut=cut, cache=cache, progress=log_progress
            )
            target.append(str(scores))
        if objective.needs_weights:
            target.append(str(token_weights(config, prepared, progress=log_progress)))
    return columns


def train(
    config: Config,
    *,
    kind: str = "train",
    parent_run_id: str | None = None,
    export: bool = True,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    wait: bool = False,
) -> RunResult:
    """Prepare, score the reference, train, export; go on with an unfinished run of the same name.

    Args:
        kind: the MLflow run's kind.
        export: write `export/`; a run that is finished without it gets it in a later call.
        on_row: gets every new row of `metrics.jsonl` with the `total` of steps, in a thread of its own.
        wait: for another driver that is at work on the same run, instead of refusing.

    Raises:
        InputError: bad configuration or input, before any worker starts.
        RunFailed: training could not be finished; what it reached is kept.
    """
    folder = run_dir(config)
    refuse_changes(config, folder)
    objective_of(config)
    _writable(folder)
    with RunLock(folder, wait=wait) as lease:
        finished = _finished(config, folder, export)
        if finished is not None:
            log_progress(f"run {config.run.name} is finished: {folder}")
            return finished
        check_run(config)
        models = resolve_models(config)
        start_ray()
        config = fit_to_cluster(config)
        inputs = prepare_inputs(config, models)
        data, held_out = inputs.data, inputs.held_out
        write_atomic(folder / "config.yaml", to_yaml(config))

        with Tracker.noted(config, folder / RUN_NOTE, kind=kind, parent_run_id=parent_run_id) as tracker:
            for role, source, prepared in (
                ("train", config.data.train, data),
                ("eval", config.data.eval, held_out),
            ):
                if prepared is not None and source is not None:
                    log_prepared(tracker, role, source, prepared, config, folder)
                    bad = f", {prepared.quarantined} in quarantine" if prepared.quarantined else ""
                    log_progress(f"data.{role}: {prepared.records} records, {prepared.pairs} pairs{bad}")
            began = time.monotonic()
            columns, columns_eval = score_inputs(config, inputs)
            if columns:
                tracker.log_metrics({"reference_seconds": time.monotonic() - began})
            run_paths = RunPaths(
                run_dir=str(folder),
                checkpoints=str(folder / "checkpoints"),
                model=inputs.model,
                prepared=data.path,
                owner=lease.token,
                prepared_eval=held_out.path if held_out else None,
                reference=inputs.reference if config.model.reference is not None else None,
                extra=columns,
                extra_eval=columns_eval,
            )
            _bring_up_workers(config, inputs.model)
            result = _reached_end(config, run_paths, data) or _fit(config, run_paths, data, tracker, on_row)
            if export:
                _export(config, run_paths, tracker, result)
            rows = read_metrics(folder)
            last = rows[-1] if rows else {}
            lease.check()
            write_atomic(folder / "DONE", json.dumps({"step": result["step"]}))
            tracker.log_artifact(folder / "metrics.jsonl")
    return RunResult(folder, folder / "export", tracker.run_id, last)


def _reached_end(config: Config, run_paths: RunPaths, data: Prepared) -> dict[str, Any] | None:
    """What the workers returned, where the last step's checkpoint is there already."""
    state = ckpt.newest(Path(run_paths.checkpoints)).state
    if not state or state["step"] != make_schedule(config, data.lengths()).steps_total:
        return None
    return {"step": state["step"], "pairs_seen": state["pairs_seen"]}


def _fit(
    config: Config,
    run_paths: RunPaths,
    data: Prepared,
    tracker: Tracker,
    on_row: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Run the workers, following their metrics. Returns what rank 0 returned."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

    from tbpo_ray.data.stream import StreamConfig, stream_datasets
    from tbpo_ray.training.callbacks import FailureLog
    from tbpo_ray.training.worker import train_loop
    from tbpo_ray.workflows.validate import TASK_CPUS, validate_checkpoint

    checkpoints = Path(run_paths.checkpoints)
    checkpoints.mkdir(exist_ok=True)
    # Which checkpoint a run goes on from is decided by the manifests, not by what Ray remembers of it.
    for remembered in checkpoints.glob("*.json"):
        remembered.unlink()
    for pending in checkpoints.glob(f"step-*/{ckpt.PENDING}"):
        pending.unlink()
    workers = config.cluster.num_workers
    schedule = make_schedule(config, data.lengths())
    total = schedule.steps_total
    log_progress(
        f"{config.run.name}: {data.pairs} pairs, {total} steps of {config.training.pairs_per_step} pairs, "
        f"{config.objective.name}, {config.cluster.max_workers} worker(s)"
    )
    stream = StreamConfig(data, schedule, start_step=_StartStep(str(checkpoints)), extra_dirs=run_paths.extra)
    validation = None
    if config.training.validate_every is not None:
        settings = {"tree": to_tree(config), "run_paths": asdict(run_paths)}
        validation = ValidationConfig(
            validate_checkpoint,  # type: ignore[arg-type]
            ValidationTaskConfig(fn_kwargs=settings),
            ray_remote_kwargs={"num_cpus": TASK_CPUS},
        )
    trainer = TorchTrainer(
        train_loop,  # type: ignore[arg-type]
        train_loop_config={"config": to_tree(config), "run_paths": asdict(run_paths)},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=tuple(workers) if isinstance(workers, list) else workers,  # type: ignore[arg-type]
            use_gpu=config.cluster.gpus,
            resources_per_worker=config.cluster.worker_resources,
            label_selector=config.cluster.labels.train or None,
        ),
        run_config=RunConfig(
            name=checkpoints.name,
            storage_path=str(checkpoints.parent),
            worker_runtime_env={} if config.cluster.gpus else {"env_vars": KEEP_MEMORY},
            callbacks=[FailureLog(run_paths.lease)],  # type: ignore[list-item]
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=config.cluster.max_failures,
                max_preemption_failures=config.cluster.max_preemption_failures,
            ),
        ),
        validation_config=validation,
        torch_config=TorchConfig(backend="nccl" if config.cluster.gpus else "gloo"),
        **stream_datasets(stream),
    )
    with Follower(Path(run_paths.run_dir), tracker, label=config.run.name, on_row=on_row):
        try:
            outcome = trainer.fit()
        except TrainingFailedError as error:
            log = Path(run_paths.run_dir) / "failure.log"
            with log.open("a", encoding="utf-8") as out:
                out.write("".join(traceback.format_exception(error)))
            raise RunFailedError(
                f"run {config.run.name}: {error_summary(error)}; all of it is in {log}"
            ) from error
    value: dict[str, Any] = outcome.return_value or {}  # type: ignore[attr-defined]
    if "failed" in value:
        raise RunFailedError(f"run {config.run.name}: {value['failed']}")
    if value.get("step") != total:
        raise RunFailedError(
            f"run {config.run.name}: the workers ended at step {value.get('step')} of {total}"
        )
    return value


def _bring_up_workers(config: Config, model: str) -> None:
    """Wait until the whole gang has a place; the fewest workers of a range."""
    workers = config.cluster.num_workers
    wait_for_resources(
        config,
        f"training {config.run.name}",
        config.cluster.worker_resources,
        workers[0] if isinstance(workers, list) else workers,
        labels=config.cluster.labels.train,
        folders=shared_folders(config),
        files={"model.name_or_path": model} if Path(model).is_absolute() else {},
    )


class _StartStep:
    """Step of the newest whole checkpoint; asked at every start of the worker group."""

    def __init__(self, checkpoints: str):
        self.checkpoints = checkpoints

    def __call__(self) -> int:
        return ckpt.newest(Path(self.checkpoints)).step


def _export(config: Config, run_paths: RunPaths, tracker: Tracker, result: dict[str, Any]) -> Path:
    """Write `export/` from the last checkpoint, in a Ray task, so that the driver's node needs no memory."""
    import ray

    from tbpo_ray.training.exporting import export_checkpoint

    card = {
        "name": config.run.name,
        "base model": config.model.name_or_path,
        "objective": config.objective.name,
        "steps": result["step"],
        "pairs seen": result["pairs_seen"],
        "MLflow run": tracker.run_id,
    }
    task = ray.remote(
        num_cpus=config.cluster.worker_resources.get("CPU", 1.0),
        label_selector=config.cluster.labels.prepare,
    )(export_checkpoint)
    try:
        return Path(ray.get(task.remote(to_tree(config), asdict(run_paths), card)))
    except ray.exceptions.RayError as error:
        raise RunFailedError(f"run {config.run.name}: export failed: {error_summary(error)}") from error


def _finished(config: Config, folder: Path, export: bool) -> RunResult | None:
    """The result of a run that has nothing left to do.

    Raises:
        InputError: it has, and cannot go on with this code.
    """
    done, extended = folder / "DONE", _extended(config, folder)
    if extended or not done.is_file():
        refuse_other_order(config, folder, extended=extended)
    if not done.is_file():
        return None
    if extended:
        done.unlink()
        log_progress(f"run {config.run.name} is extended")
        return None
    if export and not (folder / "export" / "config.json").is_file():
        return None
    rows = read_metrics(folder)
    return RunResult(folder, folder / "export", noted_run(folder / RUN_NOTE), rows[-1] if rows else {}, True)


def _extended(config: Config, folder: Path) -> bool:
    """Whether the run was started with another number of steps."""
    import yaml

    file = folder / "config.yaml"
    if not file.is_file():
        return False
    old, new = yaml.safe_load(file.read_text(encoding="utf-8"))["training"], config.training
    return (old["max_steps"], old["epochs"]) != (new.max_steps, new.epochs)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise InputError(f"run.output_dir={folder.parent}: cannot write there ({error.strerror})") from error
