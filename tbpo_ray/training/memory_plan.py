"""What a worker of a run needs in memory, on its device and on its host, before anything starts.

The activations of the largest micro-batch come from the real step on tensors without values
(:mod:`tbpo_ray.training.memory_trace`); weights, gradients and optimizer states from ZeRO's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tbpo_ray.config.schema import Config
from tbpo_ray.data.deal import ALIGN
from tbpo_ray.data.pair_sizes import TOKEN_COUNTS, row_spans, trained_tokens
from tbpo_ray.data.schedule import Schedule, row_tokens
from tbpo_ray.errors import InputError
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training.batch import BatchLayout, PairBatch, collate_columns
from tbpo_ray.training.memory_trace import StepMemory, trace_step
from tbpo_ray.training.run_plan import RunPlan, make_schedule, with_budget

GIB = 2**30
OPTIMIZER_STATES = {"rmsprop": 1, "adamw": 2}
UPDATE_COPIES = {"rmsprop": 1, "adamw": 2}
"""fp32 copies of what torch's optimizer updates at once, which it makes while it does."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, unless the configuration sets it."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: gathered weights that stage 3 holds at a time."""
CUDA_CONTEXT = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces, NCCL buffers and the unused part of the allocator's blocks."""
SAMPLE_STEPS = 16
MARGIN = 0.95
"""Share of the device's memory that `training.micro_batch_tokens: auto` plans to use."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker, by part."""

    parts: dict[str, int]
    """On the device at the peak of the backward pass."""
    update: int
    """What the optimizer's step adds to all parts but the activations."""
    host: dict[str, int] = field(default_factory=dict)
    """In the node's memory, for each worker on it."""
    checkpoints: int = 0
    """On disk: all checkpoints that the run keeps, and the one being written."""
    checkpoint: int = 0
    """On disk: one checkpoint, of all workers together."""
    tokens: int = 0
    """Tokens of the micro-batch that was traced, padding included."""
    failure: str | None = None
    """Why the activations are not known."""
    traced: StepMemory | None = None
    """The step without ZeRO, from which the plan for another number of workers follows."""

    @property
    def total(self) -> int:
        """The peak on the device: of the backward pass or of the optimizer's step."""
        fixed = sum(self.parts.values()) - self.parts["activations"]
        return fixed + max(self.parts["activations"], self.update)

    @property
    def fixed(self) -> int:
        """Bytes on the device that do not depend on the micro-batch."""
        return sum(self.parts.values()) - self.parts["activations"]


def plan_memory(
    plan: RunPlan, facts: ModelFacts, lengths: np.ndarray, *, workers: int | None = None
) -> MemoryPlan:
    """The memory of a worker whose micro-batches come from pairs of these lengths.

    Args:
        lengths: sizes of pairs, see :mod:`tbpo_ray.data.pair_sizes`: [N, 3 or 9].
        workers: number of ranks; default: the most that the configuration allows.
    """
    world = workers or plan.config.cluster.max_workers
    largest = largest_micro_batch(make_schedule(plan, lengths), lengths, world)
    traced = trace_step(plan, facts, lambda: dummy_batch(plan, largest))
    rows = row_tokens(largest, truncate_to_shorter=plan.truncate_to_shorter, rows=plan.rows, sides=plan.sides)
    tokens = int(rows.sum()) if plan.packed else int(rows.max()) * len(rows)
    return replace(_with_states(plan, traced, world), tokens=tokens)


def largest_micro_batch(schedule: Schedule, lengths: np.ndarray, world: int) -> np.ndarray:
    """[B, 3 or 9] sizes of the micro-batch with the most tokens, padding included, in the first steps."""
    found = [
        part
        for step in range(min(SAMPLE_STEPS, schedule.steps_total))
        for parts in schedule.deal(step, world)
        for part in parts
        if len(part)
    ]
    return np.asarray(lengths[max(found, key=schedule.micro_batch_tokens)])


def dummy_batch(plan: RunPlan, lengths: np.ndarray) -> PairBatch:
    """A micro-batch of pairs with these sizes [B, 3 or 9], of one token each."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    columns: dict[str, Sequence[np.ndarray]] = {
        "prompt_ids": [np.ones(max(1, int(n)), dtype=np.int64) for n in lengths[:, 0]]
    }
    # A row has the tokens up to the last trained one, and the output layer the trained ones among them.
    spans = np.maximum(1, row_spans(lengths, truncate_to_shorter=plan.truncate_to_shorter))
    trained = np.maximum(1, trained_tokens(lengths))
    if plan.truncate_to_shorter:
        trained = np.broadcast_to(trained.min(axis=1, keepdims=True), trained.shape)
    for side, sizes, numbers in zip(("chosen", "rejected"), spans.T, trained.T, strict=True):
        columns[f"{side}_ids"] = [np.ones(n, dtype=np.int64) for n in sizes]
        if lengths.shape[1] > TOKEN_COUNTS:
            columns[f"{side}_mask"] = [np.arange(n) >= n - k for n, k in zip(sizes, numbers, strict=True)]
        values = [np.zeros(n, dtype=np.float32) for n in numbers]
        if plan.reference_mode == "cached":
            columns[f"{side}_ref_logps"] = values
        if plan.objective.needs_weights:
            columns[f"{side}_weights"] = values
        if plan.objective.needs_chunks:
            columns[f"{side}_chunks"] = values
    for name in plan.objective.pair_columns:
        columns[f"pair_{name}"] = [np.ones(1, dtype=np.float32)] * len(lengths)
    layout = BatchLayout(plan.sides, 0, plan.shared_prompt, plan.truncate_to_shorter, plan.packed)
    with unset_fake_temporarily():
        return collate_columns(columns, layout)


def _with_states(plan: RunPlan, traced: StepMemory, world: int) -> MemoryPlan:
    """Add what ZeRO, the optimizer and the checkpoints need to a traced step."""
    config = plan.config
    training, stage = config.training, config.training.zero_stage
    fp32 = training.precision == "fp32"
    # What the engine does: ZeRO has nothing to partition for a single fp32 worker, and bf16 needs stage 1.
    stage = (0 if world == 1 and not training.offloads else stage) if fp32 else max(1, stage)
    trained, width = traced.trained_parameters, plan.dtype.itemsize
    zero = training.deepspeed.get("zero_optimization") or {}
    optimizer_on_host, weights_on_host = (
        (zero.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in ("optimizer", "param")
    )
    states = OPTIMIZER_STATES[training.optimizer]
    share = world if stage >= 1 else 1
    master = 4 * trained * (states + (1 if stage else 0)) // share
    weights = traced.weights // world if stage == 3 else traced.weights
    gathered = min(traced.weights, max(LIVE_ELEMENTS * width, 2 * traced.largest_layer)) if stage == 3 else 0
    bucket = min(trained, int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))) if stage and world > 1 else 0
    updated = trained // share if stage else 0
    checkpoint = 4 * trained * (1 + states)
    kept = training.keep_checkpoints + training.keep_best + 1
    return MemoryPlan(
        parts={
            "weights": 0 if weights_on_host else weights,
            "gathered weights": gathered if world > 1 or weights_on_host else 0,
            "reference": traced.reference if stage < 3 else _divided_reference(traced, world),
            "state baseline": traced.head,
            "gradients": trained * _gradient_width(fp32, stage) // (world if stage >= 2 else 1),
            "communication buckets": bucket * 4 * (2 if zero.get("overlap_comm") else 1),
            "master and optimizer": 0 if optimizer_on_host else master,
            "activations": traced.activations,
        },
        update=0 if optimizer_on_host else 4 * UPDATE_COPIES[training.optimizer] * updated,
        host={
            # Otherwise weights are mapped from their files, or go to the device one by one.
            "loading (rank 0's node)": max(traced.weights, traced.reference) if stage == 3 else 0,
            "offloaded": (master if optimizer_on_host else 0) + (weights if weights_on_host else 0),
            "checkpoint being written": checkpoint // share if _is_copied(config) else 0,
        },
        checkpoints=checkpoint * kept,
        checkpoint=checkpoint,
        failure=traced.failure,
        traced=traced,
    )


def _is_copied(config: Config) -> bool:
    """Whether a checkpoint is written from a copy in host memory."""
    gpus = config.cluster.use_gpu is not False
    return gpus or config.training.writes_in_background(gpus=gpus)


def _divided_reference(traced: StepMemory, world: int) -> int:
    """What `partitioned.gather_blocks` leaves of a live reference on a rank, with one block gathered."""
    inside = traced.reference - traced.reference_outside
    return traced.reference_outside + inside // world + traced.reference_block


def in_layout(plan: RunPlan, memory: MemoryPlan, world: int) -> MemoryPlan:
    """The memory of the same step with the ZeRO stage of `plan` and this number of workers."""
    assert memory.traced is not None
    return replace(_with_states(plan, memory.traced, world), tokens=memory.tokens)


def _gradient_width(fp32: bool, stage: int) -> int:
    """Bytes of gradient per parameter, see `deepspeed_engine.FP32_GRADIENTS`."""
    # Up to stage 1, a bf16 gradient of the micro-batch exists next to the fp32 sum; then only in buckets.
    return 6 if not fp32 and stage < 2 else 4


def device_memory(config: Config) -> int | None:
    """Bytes of a worker's device: configured, or of the GPU of this process; None if neither is known."""
    import torch

    if config.cluster.device_memory_gib is not None:
        return int(config.cluster.device_memory_gib * GIB)
    if config.cluster.use_gpu is not False and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def resolve_budget(plan: RunPlan, facts: ModelFacts, lengths: np.ndarray) -> RunPlan:
    """Replace `training.micro_batch_tokens: auto` by the most tokens that fit into a worker's device.

    The memory of a step is traced for two budgets; it grows linearly between and beyond them.

    Args:
        lengths: sizes of pairs, see :mod:`tbpo_ray.data.pair_sizes`: [N, 3 or 9].

    Raises:
        InputError: the memory is not known, or too small for the longest pair.
    """
    if plan.config.training.micro_batch_tokens != "auto":
        return plan
    available = device_memory(plan.config)
    if available is None:
        raise InputError(
            "training.micro_batch_tokens=auto: the memory of a worker's device is not known here; set "
            "cluster.device_memory_gib, or a number of tokens"
        )
    longest = longest_row(plan, lengths)
    small, large = (plan_memory(with_budget(plan, factor * longest), facts, lengths) for factor in (1, 4))
    if small.failure:
        raise InputError(
            "training.micro_batch_tokens=auto: the memory of a step cannot be computed for "
            f"{facts.key}={facts.folder} ({small.failure}); must be a number of tokens"
        )
    usable = usable_memory(plan, available) - _context(plan.config)
    slope = (large.parts["activations"] - small.parts["activations"]) / max(1, large.tokens - small.tokens)
    room = usable - small.total
    if room < 0:
        raise InputError(_too_large(plan, small, available))
    tokens = small.tokens + int(room / max(slope, 1.0)) // 64 * 64
    # More than a step's share of a rank cannot be used.
    rows = _rows(plan, lengths)
    share = int(rows.mean() * plan.config.training.pairs_per_step / plan.config.cluster.max_workers * 1.25)
    return with_budget(plan, max(longest, min(tokens, share)))


def longest_row(plan: RunPlan, lengths: np.ndarray) -> int:
    """Tokens of the longest pair in a micro-batch, padding included. `lengths`: [N, 3]"""
    return -(-int(_rows(plan, lengths).max()) // ALIGN) * ALIGN


def _rows(plan: RunPlan, lengths: np.ndarray) -> np.ndarray:
    return row_tokens(lengths, truncate_to_shorter=plan.truncate_to_shorter, rows=plan.rows, sides=plan.sides)


def required_memory(plan: RunPlan, memory: MemoryPlan) -> int:
    """Bytes of the device that a worker takes, with what is not the step's own."""
    return memory.total + _context(plan.config)


def usable_memory(plan: RunPlan, available: int) -> int:
    """Bytes of the device that may be planned: not all where the micro-batches are made to fit."""
    automatic = plan.config.training.micro_batch_tokens == "auto"
    return int(MARGIN * available) if automatic else available


def _context(config: Config) -> int:
    return 0 if config.cluster.use_gpu is False else CUDA_CONTEXT


def check_fits(plan: RunPlan, memory: MemoryPlan, *, limit: int | None = None) -> None:
    """Refuse a run whose workers do not fit into their devices, where their size is known.

    Args:
        limit: bytes that the workers may take; default: all.

    Raises:
        InputError: with the calculation, and what would fit.
    """
    available = device_memory(plan.config)
    if available is not None and required_memory(plan, memory) > (limit or available):
        raise InputError(_too_large(plan, memory, available))


def fewest_workers(plan: RunPlan, memory: MemoryPlan) -> int | None:
    """The smallest number of workers that fit into their devices; None if their size is not known.

    Micro-batches are assumed to be as large with fewer workers, which a budget of tokens guarantees.
    """
    available = device_memory(plan.config)
    if available is None or memory.traced is None:
        return None
    most = plan.config.cluster.max_workers
    room = available - _context(plan.config)
    fitting = (n for n in range(1, most + 1) if _with_states(plan, memory.traced, n).total <= room)
    return next(fitting, None)


def _too_large(plan: RunPlan, memory: MemoryPlan, available: int) -> str:
    training = plan.config.training
    key = "micro_batch_pairs" if training.micro_batch_tokens is None else "micro_batch_tokens"
    parts = memory.parts | {"CUDA context and allocator": _context(plan.config)}
    sum_of = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= GIB / 20)
    needed = required_memory(plan, memory) / GIB
    return (
        f"training.{key}={getattr(training, key)}: a worker needs {needed:.1f} GiB ({sum_of}), more than the "
        f"{available / GIB:.1f} GiB of its device (cluster.device_memory_gib); "
        f"{_remedy(plan, memory, available)}"
    )


def _remedy(plan: RunPlan, memory: MemoryPlan, available: int) -> str:
    """What would make the worker fit, the smallest change first."""
    training = plan.config.training
    room = available - _context(plan.config) - memory.fixed
    changes = []
    if room > memory.update:
        fitting = int(memory.tokens * room / max(1, memory.parts["activations"]))
        changes.append(f"lower it so that a micro-batch has at most about {fitting // 8 * 8} tokens")
    if not training.recomputes:
        changes.append("set training.activation_checkpointing=true")
    if training.zero_stage < 3 and room <= memory.update:
        changes.append("set training.deepspeed={stage: 3}, which divides all of it by the workers")
    if room <= memory.update:
        changes += ["raise cluster.num_workers", "use model.lora"]
        if not training.offloads:
            changes.append(
                "keep the optimizer state on the host (training.deepspeed={zero_optimization: {stage: 3, "
                "offload_optimizer: {device: cpu}}}, and offload_param: {device: cpu} for the weights)"
            )
    return ", or ".join(changes)


def kv_cache_bytes(config: Config, facts: Any, tokens: int) -> int:
    """Bytes of vLLM's KV cache for a sequence of `tokens`, on all GPUs of an engine together.

    Args:
        facts: the model's transformers configuration.
    """
    text = facts.get_text_config() if hasattr(facts, "get_text_config") else facts
    queries = getattr(text, "num_attention_heads", None)
    if not isinstance(queries, int) or queries < 1:
        return 0  # recurrent layers keep a state of fixed size instead
    given = getattr(text, "num_key_value_heads", None)
    heads = given if isinstance(given, int) and given else queries  # some models have a number for each layer
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    width = 2 if config.cluster.use_gpu is not False else 4
    return int(2 * text.num_hidden_layers * heads * size * width * tokens)
