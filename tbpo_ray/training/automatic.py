"""What a run leaves to the memory plan: the ZeRO stage, recomputing activations, tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training.memory_plan import (
    GIB,
    MemoryPlan,
    check_fits,
    device_memory,
    in_layout,
    longest_row,
    plan_memory,
    required_memory,
    resolve_budget,
    usable_memory,
)
from tbpo_ray.training.run_plan import RunPlan, with_budget

STAGES = (1, 2, 3)
"""ZeRO stages that are chosen from. Stage 0 computes the same as stage 1 and needs more memory."""
ROWS = 4
"""Rows of the longest pair that a micro-batch should hold where its tokens are chosen after the stage."""


@dataclass(frozen=True)
class Layout:
    """A ZeRO stage, and whether activations are recomputed."""

    stage: int
    recompute: bool

    def apply(self, plan: RunPlan) -> RunPlan:
        return _with(plan, stage=self.stage, recompute=self.recompute)


def resolve_automatic(
    plan: RunPlan, facts: ModelFacts, lengths: np.ndarray
) -> tuple[RunPlan, tuple[str, ...]]:
    """Choose what the configuration leaves open: the lowest ZeRO stage that fits, and so on.

    Recomputing activations is tried last, since it costs more time than a higher stage.

    Args:
        lengths: tokens of prompt, chosen and rejected: [N, 3].

    Returns:
        The plan with every value, and a sentence about each choice.

    Raises:
        InputError: no choice fits into a worker's device, with the calculation; or the memory is not known
            where it is needed.
    """
    plan, notes = _resolve_layout(plan, facts, lengths)
    if plan.config.training.micro_batch_tokens == "auto":
        plan = resolve_budget(plan, facts, lengths)
        notes += (f"training.micro_batch_tokens=auto: {plan.config.training.micro_batch_tokens} tokens",)
    return plan, notes


def describe_defaults(config: Config) -> dict[str, str]:
    """Settings of a run on GPUs that follow from the device alone, by name."""
    if config.cluster.use_gpu is False:
        return {}
    zero = config.training.deepspeed.get("zero_optimization") or {}
    return {
        "overlap_comm": str(zero.get("overlap_comm", True)).lower(),
        "allocator": "expandable_segments:True, unless PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF is set",
    }


def _resolve_layout(plan: RunPlan, facts: ModelFacts, lengths: np.ndarray) -> tuple[RunPlan, tuple[str, ...]]:
    training, available = plan.config.training, device_memory(plan.config)
    open_stage, open_recompute = training.leaves_stage_open, training.activation_checkpointing == "auto"
    if not open_stage and not open_recompute:
        return plan, ()
    if available is None:
        return Layout(training.zero_stage, training.recomputes).apply(plan), _unknown(plan)
    limit = usable_memory(plan, available)
    for sized in _sizes(plan, lengths):
        for layout, memory in _layouts(sized, facts, lengths):
            # Half is left for activations that are not known.
            if required_memory(sized, memory) <= (limit if memory.failure is None else limit // 2):
                return layout.apply(plan), _chosen(plan, layout, memory, available)
            last = layout, sized, memory
    layout, sized, memory = last
    if memory.failure is None:
        check_fits(layout.apply(sized), memory, limit=limit)
    return layout.apply(plan), (
        f"the activations of a step cannot be computed ({memory.failure}); "
        f"training.deepspeed.stage={layout.stage} and "
        f"training.activation_checkpointing={str(layout.recompute).lower()} need the least memory",
    )


def _sizes(plan: RunPlan, lengths: np.ndarray) -> Iterator[RunPlan]:
    """The plan with the micro-batches that have to fit: those configured, or first several long rows."""
    if plan.config.training.micro_batch_tokens != "auto":
        yield plan
        return
    longest = longest_row(plan, lengths)
    yield with_budget(plan, ROWS * longest)
    yield with_budget(plan, longest)


def _layouts(plan: RunPlan, facts: ModelFacts, lengths: np.ndarray) -> Iterator[tuple[Layout, MemoryPlan]]:
    """The layouts that the configuration allows, in order of preference, with their memory."""
    training = plan.config.training
    stages = STAGES if training.leaves_stage_open else (training.zero_stage,)
    recompute = (False, True) if training.activation_checkpointing == "auto" else (training.recomputes,)
    workers = plan.config.cluster.num_workers
    fewest = workers[0] if isinstance(workers, list) else workers
    for again in recompute:
        traced = plan_memory(Layout(stages[0], again).apply(plan), facts, lengths, workers=fewest)
        for stage in stages:
            layout = Layout(stage, again)
            yield layout, in_layout(layout.apply(plan), traced, fewest)


def _with(plan: RunPlan, *, stage: int, recompute: bool) -> RunPlan:
    fixed: dict[str, object] = {"training__activation_checkpointing": recompute}
    if plan.config.training.leaves_stage_open:
        fixed["training__deepspeed__stage"] = stage
    return replace(plan, config=stage_config(plan.config, {}, **fixed))


def _chosen(plan: RunPlan, layout: Layout, memory: MemoryPlan, available: int) -> tuple[str, ...]:
    training = plan.config.training
    why = (
        f"a worker needs {required_memory(plan, memory) / GIB:.1f} GiB of {available / GIB:.1f} GiB by the "
        "memory plan"
    )
    if memory.failure is not None:
        why += f", which does not know the activations ({memory.failure})"
    notes = []
    if training.leaves_stage_open:
        notes.append(f"training.deepspeed.stage: {layout.stage}; {why}")
    if training.activation_checkpointing == "auto":
        notes.append(f"training.activation_checkpointing=auto: {str(layout.recompute).lower()}; {why}")
    return tuple(notes)


def _unknown(plan: RunPlan) -> tuple[str, ...]:
    if plan.config.cluster.use_gpu is False:
        return ()
    training = plan.config.training
    return (
        f"training.deepspeed.stage={training.zero_stage}, training.activation_checkpointing="
        f"{str(training.recomputes).lower()}: the memory of a worker's device is not known here; set "
        "cluster.device_memory_gib to have them chosen by the memory plan",
    )
