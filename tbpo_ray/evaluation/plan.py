"""The plan of an evaluation: which model is where, and when, without starting anything."""

from __future__ import annotations

from collections.abc import Iterator

from tbpo_ray.cluster.capacity import possible
from tbpo_ray.cluster.placement import format_resources
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.evaluation.evaluator import EvaluationInputs, needs_pairs
from tbpo_ray.evaluation.harness import benchmark_settings
from tbpo_ray.evaluation.judge import Judge
from tbpo_ray.evaluation.pool_judge import PoolJudge
from tbpo_ray.evaluation.prompts import tokenize_prompts
from tbpo_ray.evaluation.reward_model import RewardModelJudge
from tbpo_ray.generation.engine_count import EngineNodes
from tbpo_ray.generation.vllm_engine import engine_length
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training.memory_plan import GIB, kv_cache_bytes


def plan_text(config: Config, inputs: EvaluationInputs) -> str:
    """What `jobs/evaluate.py --dry-run` prints: the engines, and the stages in their order.

    Raises:
        InputError: a policy's chat template rejects every prompt, or the cluster file cannot be read.
    """
    config = _with_known_gpus(config)
    prompts, generation = inputs.prompts, config.generation
    answers = len(prompts.prompts) * generation.samples
    batches = -(-answers // generation.batch_size)
    lines = [
        "",
        "# plan",
        f"# prompts          {len(prompts.prompts)} of {prompts.source}",
        f"# answers          {generation.samples} per prompt, of at most {generation.max_tokens} tokens",
        f"# engines          {_format_engines(config, batches)}",
        "# stages, one after the other: the processes of a stage have ended when the next one begins",
        *(f"#   {number}. {stage}" for number, stage in enumerate(_stages(config, inputs), start=1)),
    ]
    return "\n".join(lines) + "\n"


def _with_known_gpus(config: Config) -> Config:
    """Resolve `cluster.use_gpu: auto` where a file describes the cluster."""
    size = possible(config.cluster.node_types)
    if config.cluster.use_gpu != "auto" or size is None:
        return config
    return stage_config(config, {}, cluster__use_gpu=size.has("GPU", config.cluster.labels.generate))


def _format_engines(config: Config, batches: int) -> str:
    engines = config.generation.engines
    work = f"for {batches} batch(es) of {config.generation.batch_size}"
    if engines != "auto":
        return f"{engines if isinstance(engines, int) else f'{engines[0]} to {engines[1]}'}, {work}"
    size = possible(config.cluster.node_types)
    if size is None or config.cluster.use_gpu == "auto":
        return f"as many as the nodes hold, at most {batches}, {work}"
    nodes = EngineNodes(config.cluster.gpus, config.cluster.labels.generate, [size])
    return f"at most {max(1, min(nodes.holds(config.generation), batches))}, {work}"


def _stages(config: Config, inputs: EvaluationInputs) -> Iterator[str]:
    each = config.generation.gpus_per_engine
    for policy in inputs.policies:
        longest = max(len(p.token_ids) for p in tokenize_prompts(inputs.prompts, policy.model, config))
        adapter = f" with adapter {policy.adapter}" if policy.adapter else ""
        yield (
            f"sampling {policy.name}: vLLM on {_device(config, each)}, {policy.model}{adapter}, "
            f"{_format_memory(config, policy.model, longest)}"
        )
    if needs_pairs(config):
        device = _device(config, 1)
        yield f"held-out pairs: each policy and the reference {inputs.reference} in turn on {device}"
    benchmarks = benchmark_settings(config)
    if benchmarks is not None:
        yield f"benchmarks: lm-eval with each policy in turn on {_device(config, each)}"
    yield f"KL from the reference: {inputs.reference} on {_device(config, 1)}"
    yield f"judge: {_format_judge(config, inputs.judge)}"


def _format_judge(config: Config, judge: Judge) -> str:
    if isinstance(judge, PoolJudge):
        device = _device(config, config.generation.gpus_per_engine)
        cache = f"cache for its longest prompt and {judge.settings.max_tokens} tokens"
        return f"llm, vLLM on {device}, {judge.model}, {cache}"
    if isinstance(judge, RewardModelJudge):
        return f"reward_model, {judge.model} on {_device(config, 1)}"
    return f"{judge.kind}, on no device of the cluster"


def _device(config: Config, gpus: int) -> str:
    labels = config.cluster.labels.generate
    where = f" of a node with {format_resources(labels)}" if labels else ""
    names = {True: f"{gpus} GPU(s)", False: "the CPUs", "auto": f"{gpus} GPU(s), without GPUs the CPUs"}
    return names[config.cluster.use_gpu] + where


def _format_memory(config: Config, model: str, longest: int) -> str:
    """Weights, and the cache of one sequence of the engine's longest length, on all GPUs of an engine."""
    facts = ModelFacts(model, "evaluation.policies")
    width = 2 if config.cluster.use_gpu is not False else 4
    weights = width * sum(parameter.numel() for parameter in facts.skeleton.parameters())
    length = engine_length(model, longest, config.generation)
    cache = "vLLM's own length"
    if length is not None:
        size = kv_cache_bytes(config, facts.config, length)
        cache = f"cache {size / GIB:.3f} GiB for {length} tokens (longest prompt {longest})"
    return f"weights {weights / GIB:.2f} GiB, {cache}"
