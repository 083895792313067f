"""The plan of a run and what it will need, without a GPU, a worker or the model's weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from tbpo_ray.config.schema import Config
from tbpo_ray.data.records import ReadOptions, iter_records
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import add_lora, load_tokenizer, resolve_model
from tbpo_ray.models.preflight import ModelFacts, check_model, check_token_ids
from tbpo_ray.progress import log_progress
from tbpo_ray.training.run_plan import RunPlan, check_shared_prompt, make_schedule, resolve_run
from tbpo_ray.training.token_weight_cache import check_token_weights

READ_RECORDS, SAMPLE_PAIRS = 200_000, 1_000
ACTIVATION_WIDTHS, CHECKPOINTED_WIDTHS = 16, 2
"""Hidden-sized tensors that a layer keeps per token, without and with activation checkpointing."""
OPTIMIZER_STATES = {"rmsprop": 1, "adamw": 2}
OUTPUT_BLOCK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class DataEstimate:
    """Counts from the records that were read, lengths from a sample of them."""

    pairs: int
    complete: bool
    """Whether all records were read."""
    lengths: np.ndarray
    """[sample, 3] tokens of prompt, chosen and rejected answer"""
    largest_token: int
    """The largest token id of the sample."""


def plan_text(config: Config, *, planned: Collection[str] = ()) -> str:
    """The plan that `--dry-run` prints: pairs, tokens, steps, bytes of memory per worker by part.

    Args:
        planned: `positive` and `negative` where that token weight model will be trained first.

    Raises:
        InputError: something that would stop the run before its workers start.
    """
    plan = resolve_run(config)
    model = resolve_model(config.model.name_or_path, plan.cache_dir)
    notes = check_shared_prompt(plan, model, "model.name_or_path")
    if notes:
        plan = replace(plan, shared_prompt=False)
    facts = ModelFacts(model, source=config.model)
    for note in notes + check_model(config, facts):
        log_progress(note)
    check_token_weights(plan, planned=planned)
    data = estimate_data(config, model)
    check_token_ids(facts, data.largest_token, "data.train")
    prompt, chosen, rejected = data.lengths.mean(axis=0)
    per_pair = _tokens_per_pair(plan, data.lengths)
    schedule = make_schedule(plan, np.resize(data.lengths, (max(1, data.pairs), 3)))
    tokens = int(per_pair * schedule.pairs_before(schedule.steps_total))
    memory = estimate_memory(plan, model, float(data.lengths.sum(axis=1).max()))
    memory["total"] = sum(memory.values())
    lines = [
        "",
        "# plan",
        f"# pairs            {_format_pairs(data, config)}",
        f"# tokens per pair  prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} "
        f"(mean of {len(data.lengths)}); through the model {per_pair:.0f}",
        f"# steps            {schedule.steps_total} of {config.training.pairs_per_step} pairs",
        f"# tokens in all    {tokens}",
        f"# objective        {plan.objective.name}; reference: {plan.reference_mode}; "
        f"shared prompt: {plan.shared_prompt}; truncated to shorter answer: {plan.truncate_to_shorter}",
        f"# workers          {config.cluster.num_workers}, each {config.cluster.worker_resources}",
        "# memory per worker (estimate)",
        *(f"#   {part:<22} {int(size):>16} bytes ({size / 2**30:.2f} GiB)" for part, size in memory.items()),
    ]
    return "\n".join(lines) + "\n"


def _format_pairs(data: DataEstimate, config: Config) -> str:
    about = "" if config.data.share_range == (0.0, 1.0) else "about "  # draws decide the exact number
    return f"{about}{data.pairs}{'' if data.complete else ' or more (reading stopped there)'}"


def _tokens_per_pair(plan: RunPlan, lengths: np.ndarray) -> float:
    """Mean number of tokens that a pair sends through the model. lengths: [N, 3]"""
    prompt, chosen, rejected = lengths.mean(axis=0)
    if plan.truncate_to_shorter:
        answers = 2 * lengths[:, 1:].min(axis=1).mean()
    else:
        answers = chosen + (rejected if plan.sides == 2 else 0)
    return float(prompt * (1 if plan.shared_prompt else plan.sides) + answers)


def estimate_data(config: Config, model: str) -> DataEstimate:
    """Read records, at most READ_RECORDS of them, and tokenize a sample.

    Raises:
        InputError: a source cannot be read, or contains no pair.
    """
    options = {"revision": config.model.revision, "gguf_file": config.model.gguf_file}
    tokenizer = load_tokenizer(model, chat_template=config.model.chat_template, **options)
    spec = TokenizerSpec.of(tokenizer, config.data.template_kwargs)
    pairs = PairTokenizer(spec, config.data.max_length, config.data.prompt_limit)
    sources = config.data.train
    mix = [(sources, 1.0)] if isinstance(sources, str) else [(s.source, s.weight) for s in sources]
    count, read, lengths, largest = 0.0, 0, [], 0
    reading, share = ReadOptions.of(config.data, config.run.seed), config.data.share_range
    for source, weight in mix:
        try:
            rows = iter_records(source, config.data.max_pairs, options=reading)
            records = list(islice(rows, READ_RECORDS - read))
        except InputError as error:
            raise InputError(*(f"data.train: {fault}" for fault in error.faults)) from error
        read += len(records)
        count += weight * (share[1] - share[0]) * len(records)
        for pair in pairs.pairs(records[:SAMPLE_PAIRS]):
            if not isinstance(pair, RecordError):
                lengths.append((len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)))
                largest = max(largest, *pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)
    if not lengths:
        raise InputError(f"data.train={sources}: no preference pair in it")
    return DataEstimate(round(count), read < READ_RECORDS, np.array(lengths, dtype=np.int32), largest)


def estimate_memory(plan: RunPlan, model: str, longest_pair: float) -> dict[str, float]:
    """Bytes on one worker, by part. Activations follow a rule of thumb, the rest is counted."""
    config = plan.config
    training, workers, stage = config.training, config.cluster.max_workers, config.training.zero_stage
    facts = ModelFacts(model, source=config.model)
    weights, trained = _count_parameters(config, facts)
    width = plan.dtype.itemsize
    has_reference = plan.reference_mode == "live" and not plan.adapter_off_reference
    master_and_states = 4 * (1 + OPTIMIZER_STATES[training.optimizer])
    return {
        "weights": weights * width / (workers if stage == 3 else 1),
        "reference": weights * width if has_reference else 0,
        "gradients": trained * _gradient_width(training.precision, stage) / (workers if stage >= 2 else 1),
        "master and optimizer": trained * master_and_states / (workers if stage >= 1 else 1),
        "activations": _activation_bytes(config, facts.config, width, longest_pair),
        "output layer blocks": OUTPUT_BLOCK_BYTES,
    }


def _gradient_width(precision: str, stage: int) -> int:
    """Bytes of gradient per parameter, see `deepspeed_engine.FP32_GRADIENTS`."""
    # Up to stage 1, a bf16 gradient of the micro-batch exists next to the fp32 sum; then only in buckets.
    return 6 if precision == "bf16" and stage < 2 else 4


def _count_parameters(config: Config, facts: ModelFacts) -> tuple[int, int]:
    """All parameters of the model, adapter included, and those that are trained."""
    import torch

    network: Any = facts.skeleton
    with torch.device("meta"):
        if config.model.lora is not None:
            network = add_lora(network, config.model.lora)
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _activation_bytes(config: Config, facts: Any, width: int, longest_pair: float) -> float:
    training = config.training
    text = facts.get_text_config() if hasattr(facts, "get_text_config") else facts
    tokens = training.micro_batch_pairs * min(longest_pair, 2.0 * config.data.max_length)
    widths = CHECKPOINTED_WIDTHS if training.activation_checkpointing else ACTIVATION_WIDTHS
    return float(tokens * text.hidden_size * width * widths * text.num_hidden_layers)
