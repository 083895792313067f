"""Put together what a training step is made of: scorer, reference, baseline head, objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import (
    add_lora,
    layers_beside_attention,
    load_model,
    load_tokenizer,
    training_dtype,
)
from tbpo_ray.objectives import Objective, build_objective, build_state_baseline
from tbpo_ray.training.plan import RunPaths
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.step import PreferenceStep


@dataclass
class TrainingComponents:
    """What a loop needs, on one device."""

    scorer: PairScorer
    step: PreferenceStep
    head: nn.Module | None
    pad_id: int
    shared: bool
    cut: bool


def objective_of(config: Config) -> Objective:
    """The objective of a configuration.

    Raises:
        InputError: for a value that will not do.
    """
    return build_objective(config.objective.model_dump(exclude_none=True, exclude={"token_weights"}))


def reference_mode(config: Config, objective: Objective) -> str:
    """`none`, `cached` or `live`: where the reference's scores come from.

    Raises:
        InputError: for `cached` where the whole distribution is needed.
    """
    if not objective.needs_reference:
        return "none"
    distribution = objective.needs_kl or objective.needs_samples > 0
    asked = config.training.reference_scores
    if asked == "cached" and distribution:
        raise InputError(f"training.reference_scores=cached: objective.name={objective.name} needs live")
    return asked or ("live" if distribution else "cached")


def uses_shared_prompt(config: Config) -> bool:
    """Whether both answers follow one prompt in one row. FlashAttention takes no mask of that kind."""
    asked, possible = config.training.shared_prompt, config.model.attention != "flash_attention_2"
    if asked and not possible:
        raise InputError(
            "training.shared_prompt=true: model.attention=flash_attention_2 takes no such mask; use sdpa"
        )
    return possible if asked is None else asked


def check_shared_prompt(config: Config, folder: str, key: str) -> None:
    """Refuse a model in which one answer of a row would reach the other past the attention's mask.

    Args:
        folder: of the model that `key` names.

    Raises:
        InputError: naming the key.
    """
    if not uses_shared_prompt(config) or not objective_of(config).needs_rejected:
        return
    others = layers_beside_attention(folder)
    if others:
        raise InputError(
            f"{key}: the model has {others}, which would carry the chosen answer into the rejected one "
            "behind it; set training.shared_prompt=false, then each answer has a row of its own"
        )


def build_parts(config: Config, run_paths: RunPaths, device: torch.device) -> TrainingComponents:
    """Load models and build the step. The same seed gives the same head on every rank."""
    objective = objective_of(config)
    dtype = training_dtype(config.training.precision)
    model_options: dict[str, Any] = {"dtype": dtype, "attention": config.model.attention}
    policy: Any = load_model(run_paths.model, **model_options)
    tokenizer = load_tokenizer(run_paths.model)
    if config.training.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.lora is not None:
            policy.enable_input_require_grads()
    if config.model.lora is not None:
        policy = add_lora(policy, config.model.lora)
    scorer = PairScorer(policy.to(device))
    scorer.train()

    mode = reference_mode(config, objective)
    reference: PairScorer | Literal["adapter_off"] | None = None
    if mode == "live":
        if config.model.lora is not None and config.model.reference is None:
            reference = "adapter_off"
        else:
            frozen: Any = load_model(run_paths.reference or run_paths.model, **model_options)
            reference = PairScorer(frozen.requires_grad_(False).to(device)).eval()
            if (reference.softcap, reference.logit_scale) != (scorer.softcap, scorer.logit_scale):
                raise InputError(
                    f"model.reference={config.model.reference}: caps or scales its logits otherwise than "
                    f"model.name_or_path={config.model.name_or_path}; use training.reference_scores=cached, "
                    "or a model of one family"
                )

    head = None
    if objective.learned_baseline:
        layer: Any = scorer.output_layer
        section = config.objective.state_baseline.model_dump(exclude_none=True)
        width = int(getattr(layer, "base_layer", layer).weight.shape[-1])
        head = build_state_baseline(section | {"kind": config.objective.baseline_kind}, width)
        assert head is not None
        head.to(device)
    step = PreferenceStep(objective, head, reference, seed=config.run.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TrainingComponents(
        scorer=scorer,
        step=step,
        head=head,
        pad_id=int(pad),
        shared=uses_shared_prompt(config),
        cut=objective.compares_to_shorter and config.training.cut_dead_tail,
    )
