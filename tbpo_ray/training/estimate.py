"""What a run is going to do and need, without a GPU, a worker or the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from tbpo_ray.config.schema import Config
from tbpo_ray.data.records import iter_records
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import add_lora, load_tokenizer, model_config, resolve_model
from tbpo_ray.storage.paths import cache_dir
from tbpo_ray.training.components import objective_of, reference_mode, uses_shared_prompt
from tbpo_ray.training.plan import make_schedule
from tbpo_ray.training.token_weight_cache import check_token_weights

READ_RECORDS, SAMPLE_PAIRS = 200_000, 1_000
OUTPUT_BLOCK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class DataEstimate:
    """Counts from the records read, lengths from a sample of them."""

    pairs: int
    complete: bool
    """Whether all records were read."""
    lengths: np.ndarray
    """[sample, 3] tokens of prompt, chosen, rejected"""


def plan_text(config: Config) -> str:
    """The plan behind `--dry-run`: pairs, tokens, steps, bytes of memory per worker by part.

    Raises:
        InputError: for what would stop the run before its workers start.
    """
    objective = objective_of(config)
    mode, shared = reference_mode(config, objective), uses_shared_prompt(config)
    model = resolve_model(config.model.name_or_path, cache_dir(config))
    check_token_weights(config, objective)
    data = estimate_data(config, model)
    prompt, chosen, rejected = data.lengths.mean(axis=0)
    cut = objective.compares_to_shorter and config.training.cut_dead_tail
    shorter = data.lengths[:, 1:].min(axis=1).mean()
    answers = 2 * shorter if cut else chosen + (rejected if objective.needs_rejected else 0)
    prompts = prompt * (1 if shared or not objective.needs_rejected else 2)
    repeated = np.resize(data.lengths, (max(1, data.pairs), 3))
    schedule = make_schedule(config, repeated)
    tokens = int((prompts + answers) * schedule.pairs_before(schedule.steps_total))
    memory = estimate_memory(config, model, mode, float(data.lengths.sum(axis=1).max()))
    gib = 2.0**30
    lines = [
        "",
        "# plan",
        f"# pairs            {data.pairs}{'' if data.complete else ' or more (reading stopped there)'}",
        f"# tokens per pair  prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} "
        f"(mean of {len(data.lengths)}); through the model {prompts + answers:.0f}",
        f"# steps            {schedule.steps_total} of {config.training.pairs_per_step} pairs",
        f"# tokens in all    {tokens}",
        f"# objective        {objective.name}; reference: {mode}; shared prompt: {shared}; tail cut: {cut}",
        f"# workers          {config.cluster.num_workers}, each {config.cluster.worker_resources}",
        "# memory per worker (estimate)",
        *(f"#   {part:<22} {int(size):>16} bytes ({size / gib:.2f} GiB)" for part, size in memory.items()),
        f"#   {'total':<22} {int(sum(memory.values())):>16} bytes ({sum(memory.values()) / gib:.2f} GiB)",
    ]
    return "\n".join(lines) + "\n"


def estimate_data(config: Config, model: str) -> DataEstimate:
    """Read records (at most 200,000) and tokenize a sample of them.

    Raises:
        InputError: a source that cannot be read, or holds no pair.
    """
    options = {"revision": config.model.revision, "gguf_file": config.model.gguf_file}
    tokenizer = load_tokenizer(model, chat_template=config.model.chat_template, **options)
    pairs = PairTokenizer(TokenizerSpec.of(tokenizer), config.data.max_length, config.data.prompt_limit)
    sources = config.data.train
    mix = [(sources, 1.0)] if isinstance(sources, str) else [(s.source, s.weight) for s in sources]
    count, read, lengths = 0.0, 0, []
    for source, weight in mix:
        try:
            found = list(islice(iter_records(source, config.data.max_pairs), READ_RECORDS - read))
        except InputError as error:
            raise InputError(*(f"data.train: {fault}" for fault in error.faults)) from error
        read += len(found)
        count += weight * len(found)
        for pair in pairs.pairs(found[:SAMPLE_PAIRS]):
            if not isinstance(pair, RecordError):
                lengths.append((len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)))
    if not lengths:
        raise InputError(f"data.train={sources}: no preference pair in it")
    return DataEstimate(round(count), read < READ_RECORDS, np.array(lengths, dtype=np.int32))


def estimate_memory(config: Config, model: str, mode: str, longest_pair: float) -> dict[str, float]:
    """Bytes on one worker, by part. Activations are a rule of thumb, the rest is counted."""
    import torch
    from transformers import AutoModelForCausalLM

    facts = model_config(model, config.model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(facts, trust_remote_code=False)
        if config.model.lora is not None:
            network = add_lora(network, config.model.lora)
    all_weights = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    training, workers = config.training, config.cluster.max_workers
    width = 2 if training.precision == "bf16" else 4
    stage = training.zero_stage
    text = facts.get_text_config() if hasattr(facts, "get_text_config") else facts
    tokens = training.micro_batch_pairs * min(longest_pair, 2.0 * config.data.max_length)
    per_token = text.hidden_size * width * (2 if training.activation_checkpointing else 16)
    states = {"rmsprop": 1, "adamw": 2}[training.optimizer]
    second = mode == "live" and (config.model.lora is None or config.model.reference is not None)
    return {
        "weights": all_weights * width / (workers if stage == 3 else 1),
        "reference": all_weights * width if second else 0,
        "gradients": trained * width / (workers if stage >= 2 else 1),
        "master and optimizer": trained * 4 * (1 + states) / (workers if stage >= 1 else 1),
        "activations": tokens * per_token * text.num_hidden_layers,
        "output layer blocks": OUTPUT_BLOCK_BYTES,
    }
