"""Build what a training step consists of: scorer, reference, baseline head, objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import add_lora, load_model, load_tokenizer
from tbpo_ray.objectives import build_state_baseline
from tbpo_ray.training.batch import BatchLayout
from tbpo_ray.training.distributed import broadcast_object, rank
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import RunPlan
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.self_check import (
    CheckPairs,
    ScoringChoice,
    attention_name,
    check_scoring,
    select_pairs,
)
from tbpo_ray.training.step import PreferenceStep

Reference = PairScorer | Literal["adapter_off"] | None


@dataclass(frozen=True)
class TrainingComponents:
    """What a training loop needs, on one device."""

    scorer: PairScorer
    step: PreferenceStep
    head: nn.Module | None
    layout: BatchLayout
    sentences: tuple[str, ...] = ()
    """What the self-check changed, for people."""


@dataclass(frozen=True)
class CheckedModel:
    """A model on its device, with the attention and the layout in which its log-probs are right."""

    network: Any
    layout: BatchLayout
    sentences: tuple[str, ...] = ()


def build_components(plan: RunPlan, run_paths: RunPaths, device: torch.device) -> TrainingComponents:
    """Load the models and build the step. Collective; the same torch seed gives the same head on every rank.

    Raises:
        InputError: on every rank, for models that cannot be scored correctly, or not together.
    """
    prepared = [path for path in (run_paths.prepared, run_paths.prepared_eval) if path]
    pairs = select_pairs([PreparedPairs.load(path) for path in prepared])
    # The order matters: adapter and head draw their initial weights from torch's global generator.
    loaded = load_checked(plan, run_paths.model, device, pairs)
    scorer = _build_policy(plan, loaded.network, device)
    layout, sentences = loaded.layout, loaded.sentences
    reference: Reference = None
    if plan.reference_mode == "live":
        reference = "adapter_off"
        if not plan.adapter_off_reference:
            other = load_checked(
                plan, run_paths.reference or run_paths.model, device, pairs, key="model.reference"
            )
            reference = _build_reference(plan, other.network, scorer)
            # Both score the same batches.
            layout = replace(
                layout,
                shared_prompt=layout.shared_prompt and other.layout.shared_prompt,
                packed=layout.packed and other.layout.packed,
            )
            sentences += other.sentences
    head = _build_head(plan, scorer, device)
    return TrainingComponents(
        scorer=scorer,
        step=PreferenceStep(plan.objective, head, reference, seed=plan.config.run.seed),
        head=head,
        layout=layout,
        sentences=sentences,
    )


def load_checked(
    plan: RunPlan,
    model: str,
    device: torch.device,
    pairs: CheckPairs,
    key: str = "model.name_or_path",
) -> CheckedModel:
    """Load a model and let rank 0 check its log-probs; see :mod:`tbpo_ray.training.self_check`. Collective.

    Args:
        pairs: what is checked.
        key: the configuration key that names the model.

    Raises:
        InputError: on every rank, if the model cannot be loaded or scored correctly.
    """

    def load(attention: str) -> Any:
        return cast("Any", load_model(model, dtype=plan.dtype, attention=attention)).to(device)

    network = load(plan.config.model.attention)
    layout = batch_layout(plan, model, network.get_input_embeddings().weight.shape[0])
    name = getattr(plan.config.model, key.removeprefix("model.")) or plan.config.model.name_or_path
    choice: ScoringChoice | InputError | None = None
    # The check draws nothing, but loading a model again may.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if rank() == 0:
            try:
                network, choice = check_scoring(
                    network,
                    pairs,
                    layout,
                    key=f"{key}={name}",
                    folder=model,
                    shared_required=plan.config.training.shared_prompt is True,
                    packing_required=plan.config.training.packing is True,
                    reload=load,
                )
            except InputError as error:
                choice = error
        choice = broadcast_object(choice)
        if isinstance(choice, InputError):
            raise choice
        assert choice is not None
        if attention_name(network) != choice.attention:
            network = load(choice.attention)
    layout = replace(layout, shared_prompt=choice.shared_prompt, packed=choice.packed)
    return CheckedModel(network, layout, choice.sentences)


def batch_layout(plan: RunPlan, model: str, embedding_rows: int) -> BatchLayout:
    """The layout of batches for a model; padding uses its tokenizer's pad token, or else EOS."""
    tokenizer = load_tokenizer(model, check_template=False)
    # A pad token is often added to a tokenizer without resizing the model's embedding.
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(index for index in ids if index is not None and index < embedding_rows)
    return BatchLayout(plan.sides, int(pad_id), plan.shared_prompt, plan.truncate_to_shorter, plan.packed)


def _build_policy(plan: RunPlan, policy: Any, device: torch.device) -> PairScorer:
    config = plan.config
    if config.training.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.lora is not None:
            policy.enable_input_require_grads()
    if config.model.lora is not None:
        policy = add_lora(policy, config.model.lora)
    return PairScorer(policy.to(device)).train()


def _build_reference(plan: RunPlan, network: Any, policy: PairScorer) -> PairScorer:
    reference = PairScorer(network.requires_grad_(False)).eval()
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
