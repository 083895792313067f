"""The plan of a run and what it will need, without a GPU, a worker or the model's weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from tbpo_ray.config.schema import Config
from tbpo_ray.data.pair_sizes import TOKEN_COUNTS, compact, measure_pairs, row_spans, trained_tokens
from tbpo_ray.data.preparation import report_losses
from tbpo_ray.data.records import ReadOptions, iter_records
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.tokenize import PairTokenizer, TokenizedPair, TokenizerSpec
from tbpo_ray.errors import InputError
from tbpo_ray.generation.vllm_engine import round_length
from tbpo_ray.models.load import load_tokenizer, resolve_model
from tbpo_ray.models.preflight import ModelFacts, check_model, check_token_ids
from tbpo_ray.progress import log_progress
from tbpo_ray.training.automatic import describe_defaults, resolve_automatic
from tbpo_ray.training.deepspeed_engine import check_offload_library
from tbpo_ray.training.memory_plan import (
    MemoryPlan,
    check_fits,
    fewest_workers,
    kv_cache_bytes,
    plan_memory,
)
from tbpo_ray.training.run_plan import (
    RunPlan,
    check_shared_prompt,
    make_schedule,
    resolve_run,
    settle_rows,
)
from tbpo_ray.training.token_weight_cache import check_token_weights

READ_RECORDS, SAMPLE_PAIRS = 200_000, 1_000
BUSY_STEPS = 8
"""Steps whose distribution across workers is reported."""


@dataclass(frozen=True)
class DataEstimate:
    """Counts from the records that were read, lengths from a sample of them."""

    pairs: int
    complete: bool
    """Whether all records were read."""
    lengths: np.ndarray
    """[sample, 3 or 9] sizes of pairs, see :mod:`tbpo_ray.data.pair_sizes`"""
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
    plan, more = settle_rows(plan, {"model.name_or_path": model})
    if notes:
        plan = replace(plan, shared_prompt=False)
    notes += more
    facts = ModelFacts(model, source=config.model)
    for note in notes + check_model(config, facts):
        log_progress(note)
    check_token_weights(plan, planned=planned)
    check_offload_library(config)
    data = estimate_data(config, model)
    check_token_ids(facts, data.largest_token, "data.train")
    prompt, chosen, rejected = data.lengths[:, :TOKEN_COUNTS].mean(axis=0)
    per_pair = _tokens_per_pair(plan, data.lengths)
    lengths = np.resize(data.lengths, (max(1, data.pairs), data.lengths.shape[1]))
    plan, choices = resolve_automatic(plan, facts, lengths)
    schedule = make_schedule(plan, lengths)
    tokens = int(per_pair * schedule.pairs_before(schedule.steps_total))
    memory = plan_memory(plan, facts, lengths)
    check_fits(plan, memory)
    lines = [
        "",
        "# plan",
        f"# pairs            {_format_pairs(data, config)}",
        f"# tokens per pair  prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} "
        f"(mean of {len(data.lengths)}); through the model {per_pair:.0f}",
        *_format_context(data.lengths),
        f"# steps            {schedule.steps_total} of {config.training.pairs_per_step} pairs",
        f"# tokens in all    {tokens}",
        f"# objective        {plan.objective.name}; reference: {plan.reference_mode}; "
        f"shared prompt: {plan.shared_prompt}; truncated to shorter answer: {plan.truncate_to_shorter}",
        f"# workers          {config.cluster.num_workers}, each {config.cluster.worker_resources}",
        f"# micro-batches    {_format_micro_batches(plan, memory)}",
        f"# layout           {_format_layout(plan)}",
        *(f"#   {choice}" for choice in choices),
        f"# busy             {_format_busy(schedule, config.cluster.max_workers)}",
        "# memory per worker, at the largest micro-batch of a sample",
        *(_format_bytes(part, size) for part, size in memory.parts.items() if size),
        *(
            [f"#   activations are not known and not in the total ({memory.failure})"]
            if memory.failure
            else []
        ),
        _format_bytes("total", memory.total),
        *_format_fewest(plan, memory),
        "# memory of the node, per worker on it",
        *(_format_bytes(part, size) for part, size in memory.host.items() if size),
        *_format_checkpoints(config, memory, schedule.steps_total),
        *_format_engine(config, facts),
    ]
    return "\n".join(lines) + "\n"


def _format_bytes(part: str, size: float) -> str:
    return f"#   {part:<26} {int(size):>16} bytes ({size / 2**30:.2f} GiB)"


def _format_layout(plan: RunPlan) -> str:
    training = plan.config.training
    facts = [f"ZeRO stage {training.zero_stage}"]
    facts.append(f"activations {'recomputed' if training.recomputes else 'stored'}")
    facts += [f"on GPUs: {name} {value}" for name, value in describe_defaults(plan.config).items()]
    return "; ".join(facts)


def _format_micro_batches(plan: RunPlan, memory: MemoryPlan) -> str:
    training = plan.config.training
    limits = [
        f"at most {limit} {name}"
        for name, limit in (("tokens", training.micro_batch_tokens), ("pairs", training.micro_batch_pairs))
        if limit is not None
    ]
    return f"{', '.join(limits)}; rows: {plan.rows}; the largest one has {memory.tokens} tokens"


def _format_busy(schedule: Schedule, workers: int) -> str:
    steps = range(min(BUSY_STEPS, schedule.steps_total))
    busy = np.mean([schedule.busy_share(step, workers) for step in steps])
    bound = np.mean([schedule.busy_bound(step, workers) for step in steps])
    return f"{busy:.1%} of the time of {workers} worker(s), by tokens; the longest pairs allow {bound:.1%}"


def _format_fewest(plan: RunPlan, memory: MemoryPlan) -> list[str]:
    fewest = fewest_workers(plan, memory)
    if fewest is None or not isinstance(plan.config.cluster.num_workers, list):
        return []
    return [f"# of cluster.num_workers={plan.config.cluster.num_workers}, {fewest} or more fit"]


def _format_checkpoints(config: Config, memory: MemoryPlan, steps: int) -> list[str]:
    training = config.training
    every = training.checkpoint_steps(steps)
    written = -(-steps // every)  # the last step has one in any case
    background = training.writes_in_background(gpus=config.cluster.use_gpu is not False)
    best = f", the best {training.keep_best}" if training.keep_best else ""
    return [
        f"# checkpoints      {written}, every {every} steps, written "
        f"{'while training continues' if background else 'while training waits'}; kept: the latest "
        f"{training.keep_checkpoints}{best}",
        _format_bytes("each", memory.checkpoint),
        _format_bytes("on disk, at most", memory.checkpoints),
        _format_bytes(f"written in all, {written} times", written * memory.checkpoint),
    ]


def _format_engine(config: Config, facts: ModelFacts) -> list[str]:
    """What a vLLM engine needs at least: the weights, and the cache of one sequence of the longest length."""
    generation = config.generation
    text = facts.config.get_text_config() if hasattr(facts.config, "get_text_config") else facts.config
    limit = int(getattr(text, "max_position_embeddings", 0))
    needed = round_length(config.data.prompt_limit + generation.max_tokens)
    longest = generation.engine.get("max_model_len") or generation.max_model_len or min(limit, needed)
    width = 2 if config.cluster.use_gpu is not False else 4
    weights = width * sum(p.numel() for p in facts.skeleton.parameters())
    return [
        f"# vLLM engine, divided by {generation.tensor_parallel} GPU(s)",
        _format_bytes("weights", weights),
        _format_bytes(f"cache of {longest} tokens", kv_cache_bytes(config, facts.config, longest)),
    ]


def _format_pairs(data: DataEstimate, config: Config) -> str:
    about = "" if config.data.share_range == (0.0, 1.0) else "about "  # draws decide the exact number
    return f"{about}{data.pairs}{'' if data.complete else ' or more (reading stopped there)'}"


def _tokens_per_pair(plan: RunPlan, lengths: np.ndarray) -> float:
    """Mean number of tokens that a pair sends through the model. lengths: [N, 3 or 9]"""
    spans = row_spans(lengths, truncate_to_shorter=plan.truncate_to_shorter)[:, : plan.sides]
    prompts = lengths[:, 0].mean() * (1 if plan.shared_prompt else plan.sides)
    return float(prompts + spans.sum(axis=1).mean())


def _format_context(lengths: np.ndarray) -> list[str]:
    """How many tokens of the answers are trained, where some are context only."""
    if lengths.shape[1] == TOKEN_COUNTS:
        return []
    chosen, rejected = trained_tokens(lengths).mean(axis=0)
    return [f"# trained tokens   chosen {chosen:.0f}, rejected {rejected:.0f}; the others are context"]


def estimate_data(config: Config, model: str) -> DataEstimate:
    """Read records, at most READ_RECORDS of them, and tokenize a sample.

    Raises:
        InputError: a source cannot be read, or contains no pair.
    """
    tokenizer = load_tokenizer(
        model,
        chat_template=config.model.chat_template,
        revision=config.model.revision,
        gguf_file=config.model.gguf_file,
    )
    spec = TokenizerSpec.of(tokenizer, config.data.template_kwargs)
    pairs = PairTokenizer(spec, config.data.max_length, config.data.prompt_limit)
    sources = config.data.train
    mix = [(sources, 1.0)] if isinstance(sources, str) else [(s.source, s.weight) for s in sources]
    found: list[TokenizedPair] = []
    count, read, largest = 0.0, 0, 0
    reading, share = ReadOptions.of(config.data, config.run.seed), config.data.share_range
    for source, weight in mix:
        try:
            rows = iter_records(source, config.data.max_pairs, options=reading, counts=pairs.counts)
            records = list(islice(rows, READ_RECORDS - read))
        except InputError as error:
            raise InputError(*(f"data.train: {fault}" for fault in error.faults)) from error
        read += len(records)
        count += weight * (share[1] - share[0]) * len(records)
        for pair in pairs.pairs(records[:SAMPLE_PAIRS]):
            if not isinstance(pair, RecordError):
                found.append(pair)
                largest = max(largest, *pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)
    report_losses("data.train", pairs.counts, ", in the records that were read")
    if not found:
        raise InputError(f"data.train={sources}: no preference pair in it")
    answers = [[pair.chosen_ids for pair in found], [pair.rejected_ids for pair in found]]
    masks = [[pair.chosen_mask for pair in found], [pair.rejected_mask for pair in found]]
    lengths = compact(measure_pairs([pair.prompt_ids for pair in found], answers, masks))
    return DataEstimate(round(count), read < READ_RECORDS, lengths, largest)
