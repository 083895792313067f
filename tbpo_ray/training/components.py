"""Build what a training step consists of: scorer, reference, baseline head, objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tbpo_ray.errors import InputError
from tbpo_ray.models.load import add_lora, load_model, load_tokenizer
from tbpo_ray.objectives import build_state_baseline
from tbpo_ray.training.batch import BatchLayout
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import RunPlan
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.step import PreferenceStep

Reference = PairScorer | Literal["adapter_off"] | None


@dataclass(frozen=True)
class TrainingComponents:
    """What a training loop needs, on one device."""

    scorer: PairScorer
    step: PreferenceStep
    head: nn.Module | None
    layout: BatchLayout


def build_components(plan: RunPlan, run_paths: RunPaths, device: torch.device) -> TrainingComponents:
    """Load the models and build the step. The same torch seed gives the same head on every rank."""
    # The order matters: adapter and head draw their initial weights from torch's global generator.
    scorer = _load_policy(plan, run_paths.model, device)
    reference = _load_reference(plan, run_paths, scorer, device)
    head = _build_head(plan, scorer, device)
    return TrainingComponents(
        scorer=scorer,
        step=PreferenceStep(plan.objective, head, reference, seed=plan.config.run.seed),
        head=head,
        layout=batch_layout(plan, run_paths.model),
    )


def batch_layout(plan: RunPlan, model: str) -> BatchLayout:
    """The layout of batches for a model; padding uses its tokenizer's pad token, or else EOS."""
    tokenizer = load_tokenizer(model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return BatchLayout(plan.sides, int(pad_id), plan.shared_prompt, plan.truncate_to_shorter)


def load_frozen(plan: RunPlan, model: str, device: torch.device) -> PairScorer:
    """A scorer whose model is not trained."""
    frozen: Any = load_model(model, dtype=plan.dtype, attention=plan.config.model.attention)
    return PairScorer(frozen.requires_grad_(False).to(device)).eval()


def _load_policy(plan: RunPlan, model: str, device: torch.device) -> PairScorer:
    config = plan.config
    policy: Any = load_model(model, dtype=plan.dtype, attention=config.model.attention)
    if config.training.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.lora is not None:
            policy.enable_input_require_grads()
    if config.model.lora is not None:
        policy = add_lora(policy, config.model.lora)
    return PairScorer(policy.to(device)).train()


def _load_reference(
    plan: RunPlan, run_paths: RunPaths, policy: PairScorer, device: torch.device
) -> Reference:
    if plan.reference_mode != "live":
        return None
    if plan.adapter_off_reference:
        return "adapter_off"
    reference = load_frozen(plan, run_paths.reference or run_paths.model, device)
    # Policy and reference go through one fused output layer, which has one softcap and one scale.
    if (reference.softcap, reference.logit_scale) != (policy.softcap, policy.logit_scale):
        model = plan.config.model
        raise InputError(
            f"model.reference={model.reference}: its logit softcap {reference.softcap} or logit scale "
            f"{reference.logit_scale:g} differs from that of model.name_or_path={model.name_or_path} "
            f"({policy.softcap}, {policy.logit_scale:g}); use training.reference_scores=cached, or a model "
            "of the same family"
        )
    return reference


def _build_head(plan: RunPlan, scorer: PairScorer, device: torch.device) -> nn.Module | None:
    """The learned state baseline, where the objective has one."""
    if not plan.objective.learned_baseline:
        return None
    layer: Any = scorer.output_layer
    settings = plan.config.objective
    section = settings.state_baseline.model_dump(exclude_none=True) | {"kind": settings.baseline_kind}
    # peft wraps the output layer where LoRA targets it.
    hidden_size = int(getattr(layer, "base_layer", layer).weight.shape[-1])
    head = build_state_baseline(section, hidden_size)
    assert head is not None
    return head.to(device)
