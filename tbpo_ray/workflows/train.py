"""A training run from its configuration to the exported policy. The driver itself needs no GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.device import detect_device_memory
from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.cluster.fit import fit_to_cluster
from tbpo_ray.cluster.placement import wait_for_resources
from tbpo_ray.cluster.session import start_ray
from tbpo_ray.config.loading import stage_config, to_tree, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.data.preparation import find_sources
from tbpo_ray.data.reader import check_descriptors
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.models.hub import check_hub
from tbpo_ray.models.load import check_same_tokenizer, load_tokenizer
from tbpo_ray.models.preflight import ModelFacts, check_model, check_token_ids
from tbpo_ray.models.resolve import local_model, policy_folder
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.ownership import RunLock, WriteLease
from tbpo_ray.storage.paths import shared_folders
from tbpo_ray.tracking.run_note import RUN_NOTE, read_run_note
from tbpo_ray.tracking.store import check_store
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.automatic import describe_defaults, resolve_automatic
from tbpo_ray.training.chunk_columns import chunk_columns
from tbpo_ray.training.cost import measure_cost
from tbpo_ray.training.deepspeed_engine import check_offload_library
from tbpo_ray.training.memory_plan import check_fits, fewest_workers, plan_memory
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.training.pair_columns import pair_columns
from tbpo_ray.training.resume_checks import (
    adopt_resolved,
    refuse_changes,
    refuse_other_objective,
    refuse_other_order,
    refuse_other_sizes,
    steps_changed,
)
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import (
    OtherRowsError,
    RunPlan,
    check_shared_prompt,
    make_schedule,
    resolve_run,
    settle_rows,
)
from tbpo_ray.training.run_result import RunResult
from tbpo_ray.training.token_weight_cache import check_token_weights, token_weights
from tbpo_ray.workflows.model_logging import log_policies, result_table
from tbpo_ray.workflows.prepare import log_prepared, prepare_role
from tbpo_ray.workflows.publish import publish
from tbpo_ray.workflows.system_metrics import system_metrics
from tbpo_ray.workflows.trainer import OnRow, run_workers

_MODEL_KEYS = ("model.name_or_path", "model.reference")
DONE = "DONE"
"""Written last; a run with this file is finished."""


@dataclass(frozen=True)
class Inputs:
    """What the runs of one configuration read; cached by content and shared by all of them."""

    model: str
    reference: str
    data: PreparedPairs
    held_out: PreparedPairs | None


@dataclass(frozen=True)
class ExtraColumns:
    """Folders whose columns extend the training pairs and the held-out pairs."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


def check_run(config: Config) -> RunPlan:
    """Resolve a configuration and refuse what no run can use, before anything starts.

    Raises:
        InputError: naming the key.
    """
    plan = resolve_run(config)
    check_descriptors()
    _check_sources(config)
    return plan


def _check_sources(config: Config) -> None:
    best = config.training.best_metric
    if config.training.keep_best and best.startswith("eval/") and config.data.eval is None:
        raise InputError(
            f"training.best_metric={best}: needs data.eval, which is not set; set it, or use another metric"
        )
    find_sources(config.data.train, "data.train")
    if config.data.eval is not None:
        find_sources(config.data.eval, "data.eval")


def resolve_models(plan: RunPlan) -> tuple[str, str]:
    """Policy and reference, as transformers loads them.

    Raises:
        InputError: a folder that is not a model, a template that cannot be used, models with different
            tokenizers, a model that cannot take both answers in one row where that is required, or token
            weights that cannot be estimated.
    """
    config = plan.config
    model = policy_folder(config)
    reference = model
    if config.model.reference is not None:
        reference = local_model(config.model.reference, plan.cache_dir, key="model.reference")
        check_same_tokenizer(model, reference, "model.reference")
    for folder, key in {reference: "model.reference", model: "model.name_or_path"}.items():
        notes = check_shared_prompt(plan, folder, key)
        for note in notes + check_model(config, ModelFacts(folder, key)):
            log_progress(note)
    # The template is compiled here, before a Ray session starts.
    load_tokenizer(model, chat_template=config.model.chat_template)
    check_token_weights(plan)
    return model, reference


def prepare_inputs(plan: RunPlan, models: tuple[str, str]) -> Inputs:
    """Prepare the training and the held-out pairs. Needs a Ray session."""
    model, reference = models
    data = prepare_role(plan.config, "train", model, plan.cache_dir)
    held_out = None
    if plan.config.data.eval is not None:
        held_out = prepare_role(plan.config, "eval", model, plan.cache_dir)
    for folder, key in {reference: "model.reference", model: "model.name_or_path"}.items():
        facts = ModelFacts(folder, key)
        check_token_ids(facts, data.largest_token_id(), "data.train")
        if held_out is not None:
            check_token_ids(facts, held_out.largest_token_id(), "data.eval")
    return Inputs(model, reference, data, held_out)


def score_inputs(plan: RunPlan, inputs: Inputs) -> ExtraColumns:
    """Compute the reference scores, token weights and chunks that the objective reads, and collect the
    numbers of the records."""
    from tbpo_ray.training.reference_scores import reference_scores

    columns = ExtraColumns()
    for prepared, folders in ((inputs.data, columns.train), (inputs.held_out, columns.held_out)):
        if prepared is None:
            continue
        if plan.reference_mode == "cached":
            folders.append(str(reference_scores(plan, prepared, inputs.reference, progress=log_progress)))
        if plan.objective.needs_weights:
            folders.append(str(token_weights(plan, prepared, progress=log_progress)))
        if plan.objective.needs_chunks:
            folders.append(str(chunk_columns(plan, prepared, inputs.model)))
        if plan.objective.pair_columns:
            folders.append(str(pair_columns(plan, prepared)))
    return columns


def train(
    config: Config,
    *,
    kind: str = "train",
    parent_run_id: str | None = None,
    export: bool = True,
    on_row: OnRow | None = None,
    wait: bool = False,
) -> RunResult:
    """Prepare, score the reference, train, export; resume an unfinished run of the same name.

    Args:
        kind: the MLflow run's kind.
        export: write `export/`; a run that finished without it gets it in a later call.
        on_row: called with every new row of `metrics.jsonl` and the `total` of steps, in a separate thread.
        wait: wait until another driver of the same run ends, instead of refusing.

    Raises:
        InputError: bad configuration or input, before any worker starts.
        RunFailedError: training could not be finished; checkpoints and metrics are kept.
    """
    folder = resolve_run(config).run_dir
    config = adopt_resolved(config, folder)
    plan = resolve_run(config)
    refuse_changes(config, folder)
    _create_folder(folder)
    with RunLock(folder, wait=wait) as lease:
        done, extended = folder / DONE, steps_changed(config, folder)
        if _is_finished(folder, export) and not extended:
            log_progress(f"run {config.run.name} is finished: {folder}")
            return _finished_result(folder)
        if extended or not done.is_file():
            refuse_other_order(config, folder, extended=extended)
            refuse_other_objective(config, folder, extended=extended)
        if done.is_file() and extended:
            done.unlink()
            log_progress(f"run {config.run.name} is extended")
        return _train(plan, lease, kind=kind, parent_run_id=parent_run_id, export=export, on_row=on_row)


def _train(
    plan: RunPlan,
    lease: WriteLease,
    *,
    kind: str,
    parent_run_id: str | None,
    export: bool,
    on_row: OnRow | None,
) -> RunResult:
    """Everything that a run needs once its folder is ours."""
    folder = plan.run_dir
    check_store(plan.config)
    publishes = kind == "train" and parent_run_id is None
    if publishes:
        check_hub(plan.config.export)
    _check_sources(plan.config)
    check_offload_library(plan.config)
    models = resolve_models(plan)
    plan, notes = settle_rows(plan, dict(zip(_MODEL_KEYS, models, strict=True)))
    for note in notes:
        log_progress(note)
    start_ray()
    plan = replace(plan, config=detect_device_memory(fit_to_cluster(plan.config)))
    inputs = prepare_inputs(plan, models)
    plan = _plan_memory(plan, inputs)
    lengths = inputs.data.lengths()
    refuse_other_sizes(plan.config, folder, lengths.shape[1], make_schedule(plan, lengths).steps_total)
    write_atomic(folder / "config.yaml", to_yaml(plan.config))
    with Tracker.from_note(plan.config, folder / RUN_NOTE, kind=kind, parent_run_id=parent_run_id) as tracker:
        _log_inputs(plan, inputs, tracker)
        if defaults := describe_defaults(plan.config):
            tracker.log_params({f"gpu/{name}": value for name, value in defaults.items()})
        began = time.monotonic()
        columns = score_inputs(plan, inputs)
        if columns.train:
            tracker.log_metrics({"cost/reference_seconds": time.monotonic() - began})
        run_paths = _run_paths(plan, inputs, columns, lease)
        _await_workers(plan.config, inputs.model)
        result = _reached_end(plan, run_paths, inputs.data)
        if result is None:
            with system_metrics(plan.config, tracker.run_id):
                result = _run_workers(plan, run_paths, inputs.data, tracker, on_row)
        if export:
            _export(plan.config, run_paths, tracker, result)
        last_row = _last_row(folder)
        lease.check()
        log_policies(plan.config, tracker, result["step"], inputs.held_out, export=export)
        _store_cost(plan, columns, result, tracker)
        if publishes and export:
            publish(plan.config, folder / "export", tracker, result_table(last_row))
        write_atomic(folder / DONE, json.dumps({"step": result["step"]}))
        tracker.log_artifact(folder / "metrics.jsonl")
        tracker.describe(result_table(last_row), {"parent": parent_run_id} if parent_run_id else {})
    return RunResult(folder, folder / "export", tracker.run_id, last_row)


def _run_workers(
    plan: RunPlan, run_paths: RunPaths, data: PreparedPairs, tracker: Tracker, on_row: OnRow | None
) -> dict[str, Any]:
    """Run the workers; once more with other rows where the self-check finds those of the plan wrong."""
    try:
        return run_workers(plan, run_paths, data, tracker, on_row)
    except OtherRowsError as error:
        changed = ", ".join(f"{key}={str(value).lower()}" for key, value in error.changes.items())
        log_progress(f"{error.sentence}; the workers start again with {changed}")
        plan = resolve_run(stage_config(plan.config, error.changes))
    write_atomic(plan.run_dir / "config.yaml", to_yaml(plan.config))
    return run_workers(plan, run_paths, data, tracker, on_row)


def _plan_memory(plan: RunPlan, inputs: Inputs) -> RunPlan:
    """Choose what depends on the memory plan, and check that the workers fit into their devices.

    Raises:
        InputError: with the calculation.
    """
    facts, lengths = ModelFacts(inputs.model), inputs.data.lengths()
    plan, choices = resolve_automatic(plan, facts, lengths)
    for choice in choices:
        log_progress(choice)
    if plan.config.cluster.device_memory_gib is not None:
        memory = plan_memory(plan, facts, lengths)
        check_fits(plan, memory)
        workers, fewest = plan.config.cluster.num_workers, fewest_workers(plan, memory)
        if isinstance(workers, list) and fewest is not None and fewest > workers[0]:
            log_progress(
                f"cluster.num_workers={workers}: fewer than {fewest} would not fit into their devices"
            )
    return plan


def _log_inputs(plan: RunPlan, inputs: Inputs, tracker: Tracker) -> None:
    sources = plan.config.data
    for role, source, prepared in (
        ("train", sources.train, inputs.data),
        ("eval", sources.eval, inputs.held_out),
    ):
        if prepared is not None and source is not None:
            log_prepared(tracker, role, source, prepared, plan.config, plan.run_dir)
            bad = f", {prepared.quarantined} quarantined" if prepared.quarantined else ""
            log_progress(f"data.{role}: {prepared.records} records, {prepared.pairs} pairs{bad}")


def _run_paths(plan: RunPlan, inputs: Inputs, columns: ExtraColumns, lease: WriteLease) -> RunPaths:
    return RunPaths(
        run_dir=str(plan.run_dir),
        checkpoints=str(plan.run_dir / "checkpoints"),
        model=inputs.model,
        prepared=inputs.data.path,
        owner=lease.token,
        prepared_eval=inputs.held_out.path if inputs.held_out else None,
        reference=inputs.reference if plan.config.model.reference is not None else None,
        extra=columns.train,
        extra_eval=columns.held_out,
    )


def _store_cost(plan: RunPlan, columns: ExtraColumns, result: Mapping[str, Any], tracker: Tracker) -> None:
    folders = [*columns.train, *columns.held_out]
    steps, pairs = result["step"], result["pairs_seen"]
    cost = measure_cost(plan.run_dir, plan.cache_dir, folders, steps=steps, pairs=pairs)
    cost.save(plan.run_dir)
    tracker.log_metrics({f"cost/{name}": float(value) for name, value in asdict(cost).items()})


def _reached_end(plan: RunPlan, run_paths: RunPaths, data: PreparedPairs) -> dict[str, Any] | None:
    """What the workers returned, if the last step's checkpoint exists already."""
    checkpoints, total = Path(run_paths.checkpoints), make_schedule(plan, data.lengths()).steps_total
    # The workers verify what they resume from; only the end of a run is verified here.
    if ckpt.newest(checkpoints, ckpt.find_incompleteness).state.get("step") != total:
        return None
    state = ckpt.newest(checkpoints).state
    if state.get("step") != total:
        return None
    return {"step": state["step"], "pairs_seen": state["pairs_seen"]}


def _await_workers(config: Config, model: str) -> None:
    """Wait until the cluster can hold all workers; of a range, the smallest number."""
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


def _export(config: Config, run_paths: RunPaths, tracker: Tracker, result: dict[str, Any]) -> Path:
    """Write `export/` from a checkpoint in a Ray task, so that the driver's node needs no memory for it."""
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


def _is_finished(folder: Path, export: bool) -> bool:
    exported = (folder / "export" / "config.json").is_file()
    return (folder / DONE).is_file() and (exported or not export)


def _finished_result(folder: Path) -> RunResult:
    return RunResult(
        folder, folder / "export", read_run_note(folder / RUN_NOTE), _last_row(folder), already_finished=True
    )


def _last_row(folder: Path) -> dict[str, Any]:
    rows = read_metrics(folder)
    return rows[-1] if rows else {}


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise InputError(f"run.output_dir={folder.parent}: cannot write there ({error.strerror})") from error
