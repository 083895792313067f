"""What may change between two calls of the same run, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tbpo_ray.config.comparison import changed_values
from tbpo_ray.config.loading import flatten, stage_config, to_yaml
from tbpo_ray.config.objective import GENERATORS, READ_BY
from tbpo_ray.config.schema import Config
from tbpo_ray.data.pair_sizes import TOKEN_COUNTS
from tbpo_ray.data.schedule import ORDER_VERSION
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.objectives.own_generator import source_digest
from tbpo_ray.storage.paths import STUDY_STATE
from tbpo_ray.training.checkpoint import last_state

NO_EFFECT = (
    "run.output_dir", "tracking.", "cluster.", "evaluation.", "generation.", "compare.", "tune.", "sft",
    "runs", "export.",
    "data.cache_dir", "data.quarantine_limit", "data.card_column", "data.eval", "data.max_eval_pairs",
    "training.log_every", "training.checkpoint_every", "training.keep_checkpoints", "training.eval_every",
    "training.keep_best", "training.best_metric", "training.best_mode", "training.export",
    "training.async_checkpoints", "training.validate_every", "training.validation_prompts",
    "training.on_nonfinite",
    "training.deepspeed.stage", "training.deepspeed.zero_optimization", "training.activation_checkpointing",
)  # fmt: skip
"""Keys and sections that do not affect what a run computes, but for rounding: as with another number of
workers, sums are formed in another order with another ZeRO stage, and on another kind of device."""
AUTOMATIC = {
    "micro_batch_tokens": "auto",
    "packing": None,
    "shared_prompt": None,
    "activation_checkpointing": "auto",
    "deepspeed.stage": None,
}
"""Keys of `training` whose value a run resolves when it starts, and the value that leaves it open. A resumed
run keeps the value that the first call has chosen, on any device."""
UNSET = object()
EXTENDS = ("training.max_steps", "training.epochs")


def refuse_changes(config: Config, folder: Path) -> None:
    """Compare with the configuration that the run was started with.

    Raises:
        InputError: one sentence for each change that would alter the run's result; or `folder` is a study's.
    """
    if (folder / STUDY_STATE).is_file():
        raise InputError(
            f"run.name={config.run.name}: {folder} holds a study; use another run.name for the run"
        )
    file = folder / "config.yaml"
    # Without a checkpoint nothing has been computed yet that a change could contradict.
    if not file.is_file() or not any((folder / "checkpoints").glob("step-*")):
        return
    stored = _stored_config(file)
    unread = [section for section, readers in READ_BY.items() if config.objective.name not in readers]
    changes = changed_values(stored, yaml.safe_load(to_yaml(config)), ignored=(*NO_EFFECT, *unread))
    faults = [
        f"{key}={new!r}: run {config.run.name} was started with {old!r}; "
        + ("only a larger value extends a run" if key in EXTENDS else "use another run.name")
        for key, (old, new) in changes.items()
        if not _is_extension(key, old, new)
    ]
    if faults:
        raise InputError(*faults)


def adopt_resolved(config: Config, folder: Path) -> Config:
    """Take over what an earlier call of the same run has resolved from `auto`, so that it resumes alike."""
    file = folder / "config.yaml"
    if not file.is_file() or not any((folder / "checkpoints").glob("step-*")):
        return config
    stored = flatten(_stored_config(file)["training"])
    current = flatten(config.training.model_dump(mode="json"))
    found = {
        f"training.{key}": stored[key]
        for key, unresolved in AUTOMATIC.items()
        if current.get(key, UNSET) == unresolved and stored.get(key) is not None
    }
    return stage_config(config, found) if found else config


def _is_extension(key: str, old: Any, new: Any) -> bool:
    return key in EXTENDS and old is not None and new is not None and new > old


def refuse_other_order(config: Config, folder: Path, *, extended: bool) -> None:
    """Compare the batch order of this code with the one that the run's checkpoints were trained in.

    Args:
        extended: whether the run gets more steps than it had.

    Raises:
        InputError: there are steps left, and this code would take them in another order.
    """
    state = last_state(folder / "checkpoints")
    old = state.get("order", 1)
    if old == ORDER_VERSION or not _has_steps_left(state, extended=extended):
        return
    age = "older" if old < ORDER_VERSION else "newer"
    raise InputError(
        f"run.name={config.run.name}: its steps up to {state['step']} took the pairs in order {old}, of "
        f"{age} code; this code has order {ORDER_VERSION} and would repeat some pairs and skip others; "
        "resume with the code that started the run, or use another run.name"
    )


def refuse_other_sizes(config: Config, folder: Path, size_columns: int, steps_total: int) -> None:
    """Compare how the sizes of pairs with context were counted in the run's checkpoints.

    Earlier code counted tokens that are context only as tokens of an answer, which gives other micro-batches.

    Args:
        size_columns: columns of the sizes of the prepared pairs, see :mod:`tbpo_ray.data.pair_sizes`.
        steps_total: steps of the run.

    Raises:
        InputError: there are steps left, and this code would take them in another order.
    """
    state = last_state(folder / "checkpoints")
    if not state or state["step"] >= steps_total or state.get("size_columns", TOKEN_COUNTS) == size_columns:
        return
    raise InputError(
        f"run.name={config.run.name}: its steps up to {state['step']} were made by code that counted the "
        "results of tools and the user's turns within answers as trained tokens; this code counts them as "
        "context, and would repeat some pairs and skip others; resume with the code that started the run, or "
        "use another run.name"
    )


def _has_steps_left(state: Mapping[str, Any], *, extended: bool) -> bool:
    return bool(state) and (extended or state["step"] != state.get("steps_total"))


def refuse_other_objective(config: Config, folder: Path, *, extended: bool) -> None:
    """Compare the definition of the objective in this code with the one that the run has minimized so far.

    Args:
        extended: whether the run gets more steps than it had.

    Raises:
        InputError: there are steps left, and this code would minimize another loss under the same name.
    """
    state = last_state(folder / "checkpoints")
    if not _has_steps_left(state, extended=extended):
        return
    _refuse_other_generator(config, state)
    old, new = state.get("objective_definition", 1), config.objective.traits.definition
    if old == new:
        return
    age = "older" if old < new else "newer"
    name = config.objective.name
    raise InputError(
        f"objective.name={name}: run {config.run.name} minimized definition {old} of {name} up to step "
        f"{state['step']}, with {age} code; this code has definition {new}, which is another loss (see the "
        "changelog); resume with the code that started the run, or use another run.name"
    )


def generator_source(config: Config) -> str | None:
    """Digest of the user's own generator file; None if the objective reads none."""
    reference = config.objective.bregman.generator
    if "bregman" not in config.objective.traits.settings or reference in GENERATORS:
        return None
    return source_digest(reference)


def _refuse_other_generator(config: Config, state: Mapping[str, Any]) -> None:
    old = state.get("generator_source")
    if old is not None and old != generator_source(config):
        raise InputError(
            f"objective.bregman.generator={config.objective.bregman.generator}: the file has changed since "
            f"step {state['step']} of run {config.run.name}, which minimized the loss that it had then; "
            "restore it, or use another run.name"
        )


def steps_changed(config: Config, folder: Path) -> bool:
    """Whether the run was started with another number of steps than `config` sets."""
    file = folder / "config.yaml"
    if not file.is_file():
        return False
    old, new = _stored_config(file)["training"], config.training
    return (old.get("max_steps"), old.get("epochs")) != (new.max_steps, new.epochs)


def _stored_config(file: Path) -> dict[str, Any]:
    """The configuration that a run wrote when it was started.

    Raises:
        InputError: the file is empty or damaged.
    """
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = f"is not YAML ({first_line(error, 80)})"
    else:
        if isinstance(stored, dict) and isinstance(stored.get("training"), dict):
            return stored
        problem = "holds no configuration of a run"
    raise InputError(
        f"{file}: {problem}, so it cannot be told what the run was started with; restore the file, or use "
        "another run.name"
    )
