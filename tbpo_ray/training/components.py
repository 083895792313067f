"""Build what a training step consists of: scorer, reference, baseline head, objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import add_lora, empty_model, load_model, load_tokenizer
from tbpo_ray.objectives import build_state_baseline
from tbpo_ray.training.batch import BatchLayout
from tbpo_ray.training.deepspeed_engine import deepspeed_config, partitions_weights
from tbpo_ray.training.distributed import broadcast_object, rank
from tbpo_ray.training.finite_weights import refuse_non_finite_weights
from tbpo_ray.training.partitioned import (
    block_weights,
    build_empty,
    divide_weights,
    find_difference,
    fits_whole,
    gather_blocks,
    in_turn,
    run_from_host,
    share_rng_state,
    stop_running_from_host,
)
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
    is_divided: bool = False
    """Whether only rank 0 has weights, on any device, which `divide_weights` is to divide."""


def build_components(plan: RunPlan, run_paths: RunPaths, device: torch.device) -> TrainingComponents:
    """Load the models and build the step. Collective; the same torch seed gives the same head on every rank.

    With ZeRO stage 3 each rank keeps its part of the weights only.

    Raises:
        InputError: on every rank, for models that cannot be scored correctly, or not together.
    """
    prepared = [path for path in (run_paths.prepared, run_paths.prepared_eval) if path]
    pairs = select_pairs([PreparedPairs.load(path) for path in prepared])
    divide = partitions_weights(plan.config)
    # The order matters: adapter and head draw their initial weights from torch's global generator.
    loaded = load_checked(plan, run_paths.model, device, pairs, divide=divide)
    scorer = _build_policy(plan, loaded, device)
    layout, sentences = loaded.layout, loaded.sentences
    reference: Reference = None
    if plan.reference_mode == "live":
        reference = "adapter_off"
        if not plan.adapter_off_reference:
            other = load_checked(
                plan,
                run_paths.reference or run_paths.model,
                device,
                pairs,
                key="model.reference",
                divide=divide,
            )
            reference = _build_reference(plan, other, scorer, device)
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
    *,
    divide: bool = False,
) -> CheckedModel:
    """Load a model and let rank 0 check its log-probs; see :mod:`tbpo_ray.training.self_check`. Collective.

    Args:
        pairs: what is checked.
        key: the configuration key that names the model.
        divide: rank 0 alone loads the model, if the other ranks can build it without its weights.

    Raises:
        InputError: on every rank, if the model cannot be loaded or scored correctly.
    """

    # A model that is divided because it does not fit is run from the host's memory while it is checked.
    from_host = divide and not fits_whole(model, device)

    def load(attention: str) -> Any:
        if from_host:
            whole = load_model(model, dtype=plan.dtype, attention=attention)
            refuse_non_finite_weights(whole, _name_of(plan, key), model)
            return run_from_host(whole, device)
        network = load_model(model, dtype=plan.dtype, attention=attention, device=device)
        return cast("Any", network).to(device)

    network: Any = None if divide else load(plan.config.model.attention)
    choice: ScoringChoice | InputError | None = None
    # The check draws nothing, but loading a model again may.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if rank() == 0:
            try:
                network = network or load(plan.config.model.attention)
                network, choice = _check(plan, network, model, pairs, key, load)
            except InputError as error:
                choice = error
        choice = broadcast_object(choice)
        if isinstance(choice, InputError):
            raise choice
        assert choice is not None
        attention = choice.attention
        note = None
        if divide:
            if from_host and rank() == 0:
                stop_running_from_host(network)
            network, note = _match_ranks(plan, network, model, attention, device)
        elif attention_name(network) != attention:
            network = load(attention)
    layout = batch_layout(plan, model, network.get_input_embeddings().weight.shape[0])
    return CheckedModel(
        network,
        replace(layout, shared_prompt=choice.shared_prompt, packed=choice.packed),
        choice.sentences + ((f"{key}: {note}",) if note else ()),
        is_divided=divide and note is None,
    )


def _check(
    plan: RunPlan, network: Any, model: str, pairs: CheckPairs, key: str, load: Callable[[str], Any]
) -> tuple[Any, ScoringChoice]:
    return check_scoring(
        network,
        pairs,
        batch_layout(plan, model, network.get_input_embeddings().weight.shape[0]),
        key=_name_of(plan, key),
        folder=model,
        shared_required=plan.config.training.shared_prompt is True,
        packing_required=plan.config.training.packing is True,
        reload=load,
    )


def _name_of(plan: RunPlan, key: str) -> str:
    """The key with its value, for messages."""
    name = getattr(plan.config.model, key.removeprefix("model.")) or plan.config.model.name_or_path
    return f"{key}={name}"


def _match_ranks(
    plan: RunPlan, network: Any, model: str, attention: str, device: torch.device
) -> tuple[Any, str | None]:
    """Rank 0's model, and on the other ranks the same without weights, or else the whole model.

    Returns:
        The model, and why every rank has the whole of it, if that is so.
    """
    if rank() != 0:
        network = build_empty(lambda: empty_model(model, dtype=plan.dtype, attention=attention))
    obstacle = find_difference(network)
    if obstacle is None:
        return network, None
    whole = in_turn(lambda: load_model(model, dtype=plan.dtype, attention=attention, device=device))
    note = f"cannot be built without its weights ({obstacle}); the ranks load all of it, one after the other"
    return (network if whole is None else whole).to(device), note


def batch_layout(plan: RunPlan, model: str, embedding_rows: int) -> BatchLayout:
    """The layout of batches for a model; padding uses its tokenizer's pad token, or else EOS."""
    tokenizer = load_tokenizer(model, check_template=False)
    # A pad token is often added to a tokenizer without resizing the model's embedding.
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(index for index in ids if index is not None and index < embedding_rows)
    return BatchLayout(plan.sides, int(pad_id), plan.shared_prompt, plan.truncate_to_shorter, plan.packed)


def _build_policy(plan: RunPlan, loaded: CheckedModel, device: torch.device) -> PairScorer:
    config, policy = plan.config, loaded.network
    if config.training.recomputes:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.lora is not None:
            policy.enable_input_require_grads()
    if config.model.lora is not None:
        policy = add_lora(policy, config.model.lora)
    if loaded.is_divided:
        policy = divide_weights(policy, deepspeed_config(config), device)
        share_rng_state()
    else:
        policy = policy.to(device)
    return PairScorer(policy).train()


def _build_reference(
    plan: RunPlan, loaded: CheckedModel, policy: PairScorer, device: torch.device
) -> PairScorer:
    network = loaded.network
    if loaded.is_divided:
        # The fused output layer reads the output weight outside of the forward pass, so it stays whole.
        blocks = block_weights(network)
        names = {name for found in blocks.values() for name in found}
        divide_weights(network, deepspeed_config(plan.config), device, names=names)
        gather_blocks(network, blocks)
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
    weight = getattr(layer, "base_layer", layer).weight
    hidden_size = int(getattr(weight, "ds_shape", weight.shape)[-1])
    head = build_state_baseline(section, hidden_size)
    assert head is not None
    return head.to(device)
