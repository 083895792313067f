"""What a configuration resolves to: objective, source of reference scores, row layout, folders, schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config, ModelConfig
from tbpo_ray.data.schedule import RowKind, Schedule
from tbpo_ray.errors import InputError
from tbpo_ray.models.attention import choose_attention
from tbpo_ray.models.load import model_config, non_attention_layers, training_dtype
from tbpo_ray.objectives import Objective, build_objective
from tbpo_ray.storage import paths

ReferenceMode = Literal["none", "cached", "live"]
EVALUATION_PAIRS = 64
"""Pairs per worker that an evaluation divides into micro-batches together, with a budget of tokens."""


@dataclass(frozen=True)
class RunPlan:
    """The decisions that follow from a configuration; made once by `resolve_run` and passed down."""

    config: Config
    objective: Objective
    reference_mode: ReferenceMode
    """`cached` scores the reference once, before training; `live` keeps it beside the policy."""
    shared_prompt: bool
    """Whether both answers follow one prompt in one row."""
    truncate_to_shorter: bool
    """Whether the answers of a pair are truncated to the shorter one's length."""
    packed: bool
    """Whether the pairs of a micro-batch follow each other in one row."""

    # Lazy: they belong to the driver's file system view. Workers get their folders as `RunPaths`.
    @cached_property
    def run_dir(self) -> Path:
        return paths.run_dir(self.config)

    @cached_property
    def cache_dir(self) -> Path:
        return paths.cache_dir(self.config)

    @property
    def adapter_off_reference(self) -> bool:
        """Whether the live reference is the policy with its LoRA adapter disabled, without a second model."""
        model = self.config.model
        return self.reference_mode == "live" and model.lora is not None and model.reference is None

    @property
    def sides(self) -> int:
        """Answers per pair that go through the model: 2, or 1 for SFT."""
        return 2 if self.objective.needs_rejected else 1

    @property
    def rows(self) -> RowKind:
        """How the pairs of a micro-batch become rows."""
        if self.packed:
            return "packed"
        return "shared" if self.shared_prompt or self.sides == 1 else "separate"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of model weights in training."""
        return training_dtype(self.config.training.precision)


def resolve_run(config: Config) -> RunPlan:
    """Resolve everything that depends on the configuration alone.

    Raises:
        InputError: a value or a combination of values that no run can use.
    """
    objective = resolve_objective(config)
    return RunPlan(
        config=config,
        objective=objective,
        reference_mode=_reference_mode(config, objective),
        shared_prompt=_shared_prompt(config),
        truncate_to_shorter=objective.compares_to_shorter and config.training.truncate_to_shorter,
        packed=_packed(config),
    )


def resolve_objective(config: Config) -> Objective:
    """Build the objective of a configuration.

    Raises:
        InputError: an invalid value in the `objective` section.
    """
    settings = config.objective.model_dump(exclude_none=True, exclude={"token_weights", "helpers"})
    return build_objective(settings)


def _reference_mode(config: Config, objective: Objective) -> ReferenceMode:
    if not objective.needs_reference:
        return "none"
    # The cache holds log-probs of the labels. A KL needs the distribution over the vocabulary.
    needs_distribution = objective.needs_distribution
    requested = config.training.reference_scores
    assert not (requested == "cached" and needs_distribution), "refused by the configuration"
    return requested or ("live" if needs_distribution else "cached")


def _shared_prompt(config: Config) -> bool:
    requested = config.training.shared_prompt
    supported = config.model.attention != "flash_attention_2"  # it takes no block mask
    if requested and not supported:
        raise InputError(
            "training.shared_prompt=true: not supported by model.attention=flash_attention_2; use sdpa"
        )
    return supported if requested is None else requested


def _packed(config: Config) -> bool:
    training, attention = config.training, config.model.attention
    # Rows of several pairs are long; only gathered attention avoids a dense mask over them.
    if training.packing and attention != "sdpa":
        raise InputError(
            f"training.packing=true: not supported by model.attention={attention}; use sdpa, or set "
            "training.packing=false"
        )
    possible = training.micro_batch_tokens is not None and attention == "sdpa"
    return possible and training.shared_prompt is not False and training.packing is not False


def check_shared_prompt(plan: RunPlan, folder: str, key: str) -> list[str]:
    """Find a model in which one part of a row would influence another despite the attention mask.

    Args:
        folder: the model that the configuration key `key` names.

    Returns:
        Sentences about what will be done differently; the self-check in the workers decides the same.

    Raises:
        InputError: naming the key, if rows of several answers are required.
    """
    if not plan.packed and not (plan.shared_prompt and plan.objective.needs_rejected):
        return []
    if plan.config.training.packing and (obstacle := packing_obstacle(plan, folder)):
        raise InputError(f"training.packing=true: {key}: {obstacle}; set training.packing=false")
    layers = non_attention_layers(folder)
    if layers is None or not (plan.shared_prompt and plan.objective.needs_rejected):
        return []
    cause = f"the model has {layers}, which would carry the chosen answer over into the rejected one"
    if plan.config.training.shared_prompt:
        raise InputError(
            f"training.shared_prompt=true: {key}: {cause}; must be false or unset, so that each answer gets "
            "its own row"
        )
    return [f"{key}: {cause}; each answer gets its own row (training.shared_prompt=false)"]


def packing_obstacle(plan: RunPlan, folder: str) -> str | None:
    """Why the model in `folder` cannot take several pairs in one row; None if nothing is known against it."""
    if layers := non_attention_layers(folder):
        return f"the model has {layers}, which would carry one pair over into the next one of its row"
    choice = choose_attention(model_config(folder, ModelConfig()), plan.config.model.attention)
    if choice.implementation != "sdpa":
        return f"the model runs with {choice.implementation} attention, whose mask of a long row is too large"
    return None


def settle_packing(plan: RunPlan, folders: Mapping[str, str]) -> tuple[RunPlan, list[str]]:
    """Give each pair its own row where packing was not requested and a model cannot do it.

    Args:
        folders: the models by configuration key.

    Returns:
        The plan, and sentences about what is done differently.
    """
    if not plan.packed or plan.config.training.packing:
        return plan, []
    for key, folder in folders.items():
        if obstacle := packing_obstacle(plan, folder):
            note = f"{key}: {obstacle}; each pair gets its own row (training.packing=false)"
            return resolve_run(stage_config(plan.config, {}, training__packing=False)), [note]
    return plan, []


def settle_rows(plan: RunPlan, folders: Mapping[str, str]) -> tuple[RunPlan, list[str]]:
    """Choose rows that all models can take, so that micro-batches of a budget of tokens are made of them.

    Args:
        folders: the models by configuration key.

    Returns:
        The plan, and sentences about what is done differently and :func:`check_shared_prompt` does not say.
    """
    plan, notes = settle_packing(plan, folders)
    if plan.config.training.micro_batch_tokens is None or plan.rows != "shared" or plan.sides == 1:
        return plan, notes
    if plan.config.training.shared_prompt is None and any(map(non_attention_layers, folders.values())):
        plan = resolve_run(stage_config(plan.config, {}, training__shared_prompt=False))
    return plan, notes


class OtherRowsError(Exception):
    """The self-check chose other rows than those that the micro-batches of a budget of tokens are made of.

    Attributes:
        changes: keys of the configuration that make the plan agree, and their values.
    """

    def __init__(self, changes: Mapping[str, bool], sentence: str):
        self.changes, self.sentence = dict(changes), sentence
        super().__init__(sentence)

    def __reduce__(self) -> tuple[Any, ...]:
        return (OtherRowsError, (self.changes, self.sentence))


def check_rows(plan: RunPlan, *, packed: bool, shared_prompt: bool, sentence: str) -> None:
    """Compare the rows of the plan with those that the self-check chose.

    Args:
        sentence: what the self-check says, for people.

    Raises:
        OtherRowsError: they differ, and micro-batches of the plan would exceed the budget of tokens.
    """
    changes = {}
    if plan.packed and not packed:
        changes["training.packing"] = False
    if plan.shared_prompt and plan.sides == 2 and not shared_prompt:
        changes["training.shared_prompt"] = False
    if changes and plan.config.training.token_budget is not None:
        raise OtherRowsError(changes, sentence)


def with_budget(plan: RunPlan, tokens: int | None = None) -> RunPlan:
    """The plan with `training.micro_batch_tokens`; default: any number in place of `auto`, to count steps."""
    if tokens is None and plan.config.training.micro_batch_tokens != "auto":
        return plan
    return replace(plan, config=stage_config(plan.config, {}, training__micro_batch_tokens=tokens or 1))


def make_schedule(plan: RunPlan, lengths: Any) -> Schedule:
    """The order in which the prepared pairs are trained on. `lengths`: [N, 3] prompt, chosen, rejected."""
    training = plan.config.training
    return Schedule(
        lengths,
        seed=plan.config.run.seed,
        pairs_per_step=training.pairs_per_step,
        micro_batch_pairs=training.micro_batch_pairs,
        micro_batch_tokens=training.token_budget,
        rows=plan.rows,
        sides=plan.sides,
        length_batches=training.length_batches,
        truncate_to_shorter=plan.truncate_to_shorter,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )


def evaluation_schedule(plan: RunPlan, lengths: Any, world: int) -> Schedule:
    """One pass over held-out pairs in micro-batches as large as those of training. `lengths`: [N, 3]"""
    training = plan.config.training
    per_rank = training.scoring_pairs if training.token_budget is None else EVALUATION_PAIRS
    return Schedule(
        lengths,
        seed=0,
        pairs_per_step=per_rank * world,
        micro_batch_pairs=training.micro_batch_pairs,
        micro_batch_tokens=training.token_budget,
        rows=plan.rows,
        sides=plan.sides,
        truncate_to_shorter=plan.truncate_to_shorter,
    )
