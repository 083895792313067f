"""Evaluate policies: sample, judge, measure, write the verdict, log it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.cluster.fit import capacities, fit_engines
from tbpo_ray.cluster.placement import wait_for_resources
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.credit import write_credit_map
from tbpo_ray.evaluation.harness import benchmark_settings, run_benchmarks
from tbpo_ray.evaluation.held_out_pairs import (
    ScoredPair,
    credit_auc,
    has_known_damage,
    implicit_rewards,
    read_pairs,
    score_pairs,
)
from tbpo_ray.evaluation.judge import Judge
from tbpo_ray.evaluation.judges import make_judge
from tbpo_ray.evaluation.judgments import Judgments, flatten
from tbpo_ray.evaluation.logged_models import DATASET, log_evaluated_models
from tbpo_ray.evaluation.measures import Estimate, Groups, describe, mean_estimate, per_prompt
from tbpo_ray.evaluation.preference_records import write_records
from tbpo_ray.evaluation.prompts import Policy, PromptSet, read_prompts, resolve_policy, tokenize_prompts
from tbpo_ray.evaluation.reference_kl import kl_k1, reference_logprobs
from tbpo_ray.evaluation.rouge import rouge_metrics
from tbpo_ray.evaluation.sample_table import log_samples
from tbpo_ray.evaluation.suites import reference_column, slice_columns
from tbpo_ray.evaluation.two_turns import has_second_turn, join_turns, second_questions
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict
from tbpo_ray.generation.engine_count import EngineNodes, engine_count
from tbpo_ray.generation.pool import generate, sampling_fingerprint
from tbpo_ray.generation.samples import Sample, Samples
from tbpo_ray.generation.vllm_engine import check_length, check_model, engine_resources
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.tracking.tracker import Tracker

TRACKED = ("max_model_len", "prompts_too_long", "answers_shortened", "stalls", "tokens_per_second")
"""Entries of the samples' manifest that are tracked as metrics."""
BETA = 0.1
"""Scale of the implicit reward where `objective.beta` is left to the objective."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, resolved and checked."""

    policies: list[Policy]
    baseline: Policy
    """The policy that win rates are against."""
    reference: str
    """Model folder that the KL is measured from."""
    prompts: PromptSet
    judge: Judge
    """A judge of the configuration, which has not judged anything."""


def evaluate_policies(
    config: Config,
    policies: Mapping[str, str],
    *,
    output: str | Path,
    baseline: str | None = None,
    reference: str | None = None,
    tracker: Tracker | None = None,
    costs: Sequence[Mapping[str, Any]] = (),
) -> Verdict:
    """Sample every policy on the held-out prompts, judge the answers, and compare the policies.

    Ray must be running. `output` gets `samples/` (Parquet, one folder per policy), `verdict.json`,
    `verdict.txt` and, where a judge compares answers, `preference_pairs.jsonl`. Samples from an earlier
    call with the same settings are reused.

    Args:
        policies: name to model folder, adapter folder or run name.
        baseline: the policy that win rates are against; default `evaluation.baseline`, else the first one.
        reference: model folder for the KL; default `model.reference`, else the baseline.
        tracker: gets every number as `<policy>/<metric>`, the prompts as a dataset, samples and verdict.
        costs: costs of training runs, which become part of the verdict.

    Raises:
        InputError: a policy, prompt file or judge that cannot be used; raised before anything is sampled.
        RunFailedError: the engines or the judge returned nothing.
    """
    config = _resolve_gpus(config)
    folder = Path(output)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    inputs = check_evaluation(config, policies, baseline=baseline, reference=reference)
    prompts = inputs.prompts
    judge = make_judge(config, source=prompts.source, output=folder)
    log_progress(f"evaluating {', '.join(policies)} on {len(prompts.prompts)} prompts from {prompts.source}")

    _wait_for_engines(config, inputs.policies, len(prompts.prompts), folder)
    sampled = {policy.name: _sample_turns(policy, prompts, config, folder) for policy in inputs.policies}
    samples = {name: answers for name, (answers, _) in sampled.items()}
    groups = {name: by_prompt for name, (_, by_prompt) in sampled.items()}
    model_metrics = _model_metrics(inputs, config, folder)
    for name, kl in _kl_estimates(groups, inputs.reference, config).items():
        model_metrics.setdefault(name, {})["kl_k1"] = kl
    # Last: a judge on the cluster's own engines needs the devices of all the others.
    judgments = Judgments(judge, groups, inputs.baseline.name)
    verdict = Verdict(
        policies=[
            _policy_verdict(policy, samples[policy.name], judgments, config, model_metrics[policy.name])
            for policy in inputs.policies
        ],
        baseline=inputs.baseline.name,
        reference=inputs.reference,
        judge=judge.report(),
        prompts=prompts.summary(),
        ranking=judgments.ranking(),
        run_id=tracker.run_id if tracker else None,
        costs=[dict(cost) for cost in costs],
    )
    verdict.save(folder)
    write_atomic(folder / "verdict.txt", verdict.table() + "\n")
    if judgments.compared and not has_second_turn(prompts):  # answers to two questions are not one answer
        write_records(folder, prompts, judgments.compared, inputs.baseline.name)
    if tracker is not None:
        _track(tracker, verdict, samples, prompts, folder)
        log_samples(tracker, verdict, judgments, config.evaluation.traces)
    return verdict


def check_evaluation(
    config: Config,
    policies: Mapping[str, str],
    *,
    baseline: str | None = None,
    reference: str | None = None,
) -> EvaluationInputs:
    """Resolve and check what an evaluation needs, without starting anything.

    Args:
        policies, baseline, reference: as for :func:`evaluate_policies`.

    Raises:
        InputError: as :func:`evaluate_policies`.
    """
    resolved = [resolve_policy(name, where, config) for name, where in policies.items()]
    if not resolved:
        raise InputError("evaluation.policies: no policy to evaluate; give name: folder")
    name = baseline or config.evaluation.baseline or resolved[0].name
    if name not in policies:
        raise InputError(f"evaluation.baseline={name}: must be one of the policies {', '.join(policies)}")
    base = next(policy for policy in resolved if policy.name == name)
    for policy in resolved:
        _check_policy(policy, config)
    reference = reference or config.model.reference
    anchor = resolve_policy("reference", reference, config).model if reference else base.model
    prompts = check_settings(config)
    judge = make_judge(config, source=prompts.source, output=Path(config.run.output_dir))
    return EvaluationInputs(resolved, base, anchor, prompts, judge)


def _check_policy(policy: Policy, config: Config) -> None:
    check_model(policy.model, policy.adapter)
    check_length(policy.model, config.generation)
    if policy.adapter and (needs_pairs(config) or config.evaluation.benchmarks):
        raise InputError(
            f"evaluation.policies.{policy.name}={policy.adapter}: is an adapter; the implicit judge, "
            "evaluation.credit_pairs and evaluation.benchmarks need a merged model"
        )


def check_settings(config: Config) -> PromptSet:
    """Check what an evaluation needs apart from policies: prompts, judge, benchmarks.

    Returns:
        The prompts.

    Raises:
        InputError: as :func:`evaluate_policies`.
    """
    prompts = read_prompts(config)
    make_judge(config, source=prompts.source, output=Path(config.run.output_dir))
    benchmark_settings(config)
    return prompts


def _resolve_gpus(config: Config) -> Config:
    """Replace `cluster.use_gpu: auto` by whether the running cluster has GPUs, or can grow to have some."""
    if config.cluster.use_gpu != "auto":
        return config
    labels = config.cluster.labels.generate
    return stage_config(
        config, {}, cluster__use_gpu=any(size.has("GPU", labels) for size in capacities(config))
    )


def _sample_turns(
    policy: Policy, prompts: PromptSet, config: Config, folder: Path
) -> tuple[Samples, dict[str, list[Sample]]]:
    """The policy's answers, of the second turn where there are two, and all of them by prompt for judges."""
    first = _sample(policy, prompts, config, folder)
    if not has_second_turn(prompts):
        return first, first.by_prompt()
    log_progress(f"{policy.name}: sampling the answers to the second questions")
    second = _sample(policy, second_questions(prompts, first), config, folder)
    return second, join_turns(first, second)


def _sample(policy: Policy, prompts: PromptSet, config: Config, folder: Path) -> Samples:
    tokens = tokenize_prompts(prompts, policy.model, config)
    seed, adapter = config.run.seed, policy.adapter
    fingerprint = sampling_fingerprint(policy.model, tokens, config.generation, seed=seed, adapter=adapter)
    # The fingerprint is part of the name: changed settings sample into a new folder.
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', policy.name)}-{fingerprint[:8]}"
    return generate(
        policy.model,
        tokens,
        config.generation,
        output=folder / "samples" / name,
        nodes=EngineNodes.of(config),
        seed=seed,
        adapter=adapter,
    )


def _wait_for_engines(config: Config, policies: Sequence[Policy], prompts: int, folder: Path) -> None:
    """Wait until the cluster has room for the minimum number of engines.

    Raises:
        InputError: the cluster can never hold them, or its nodes do not share the storage.
        RunFailedError: the nodes do not start in time.
    """
    generation, labels = config.generation, config.cluster.labels.generate
    batches = -(-prompts * generation.samples // generation.batch_size)
    engines = engine_count(generation, batches, EngineNodes.of(config)).smallest
    bundle = {"CPU": 0.5}  # an engine on the CPU runs with a fraction of one
    if config.cluster.gpus:
        bundle = engine_resources(generation, use_gpu=True, free_cpus=0.0, engines=engines)
    fit_engines(config, engines, bundle)
    wait_for_resources(
        config,
        "sampling",
        bundle,
        engines,
        labels=labels,
        folders={"run.output_dir": folder},
        files={f"evaluation.policies.{policy.name}": policy.model for policy in policies},
    )


def _policy_verdict(
    policy: Policy,
    samples: Samples,
    judgments: Judgments,
    config: Config,
    model_metrics: Mapping[str, Estimate],
) -> PolicyVerdict:
    group = judgments.groups[policy.name]
    compared = judgments.compare_with_baseline(policy.name)
    metrics = judgments.score_metrics(policy.name)
    metrics |= compared.metrics() if compared is not None else {}
    metrics |= describe(group) | dict(model_metrics)
    column = reference_column(config)
    metrics |= rouge_metrics(group, column) if column is not None else {}
    return PolicyVerdict(
        name=policy.name,
        model=policy.folder,
        prompts=len(group),
        failed=samples.manifest["failed"],
        metrics=metrics,
        slices=judgments.slice_metrics(policy.name, compared, slice_columns(config)),
        samples=f"samples/{samples.folder.name}",
    )


def _kl_estimates(groups: Mapping[str, Groups], reference: str, config: Config) -> dict[str, Estimate]:
    """The KL of each policy from the reference, which is loaded once."""
    log_progress(f"computing the KL of {', '.join(groups)} from the reference on their samples")
    answers = {name: flatten(group) for name, group in groups.items()}
    logprobs = iter(
        reference_logprobs(
            [sample for samples in answers.values() for sample in samples],
            reference,
            attention=config.model.attention,
            gpu_labels=_gpu_labels(config),
        )
    )
    estimates = {}
    for name, samples in answers.items():
        values = kl_k1(samples, list(islice(logprobs, len(samples))))
        estimates[name] = mean_estimate([float(np.mean(v)) for v in per_prompt(samples, values).values()])
    return estimates


def _gpu_labels(config: Config) -> Mapping[str, str] | None:
    """The labels of the nodes with the GPUs of an evaluation; None without GPUs."""
    return config.cluster.labels.generate if config.cluster.gpus else None


def _model_metrics(inputs: EvaluationInputs, config: Config, folder: Path) -> dict[str, dict[str, Estimate]]:
    """Metrics of the policies that do not come from samples: held-out pairs and benchmarks."""
    metrics = _pair_metrics(inputs, config, folder) if needs_pairs(config) else {}
    benchmarks = benchmark_settings(config)
    if benchmarks is not None:
        for policy in inputs.policies:
            metrics.setdefault(policy.name, {}).update(run_benchmarks(benchmarks, policy.model, config))
    return metrics


def needs_pairs(config: Config) -> bool:
    """Whether the policies score held-out preference pairs."""
    return config.evaluation.credit_pairs > 0 or config.evaluation.judge.get("kind") == "implicit"


def _pair_metrics(inputs: EvaluationInputs, config: Config, folder: Path) -> dict[str, dict[str, Estimate]]:
    """The policies' implicit rewards on held-out pairs; writes the token credit map if it is requested."""
    log_progress("scoring held-out preference pairs under every policy")
    pairs = read_pairs(config, inputs.baseline.model)
    scored: dict[str, list[ScoredPair]] = {
        policy.name: score_pairs(
            pairs,
            policy.model,
            inputs.reference,
            attention=config.model.attention,
            gpu_labels=_gpu_labels(config),
        )
        for policy in inputs.policies
    }
    truncate = config.objective.name.startswith("tbpo")
    beta = config.objective.beta or BETA
    metrics = {
        name: implicit_rewards(group, beta=beta, truncate_to_shorter=truncate)
        for name, group in scored.items()
    }
    aucs: dict[str, list[Estimate]] = {}
    if has_known_damage(pairs):
        for name, group in scored.items():
            aucs[name] = [credit_auc(group, pairs.spec, signal) for signal in ("log_ratio", "advantage")]
            metrics[name] |= dict(zip(("credit_auc", "credit_auc_advantage"), aucs[name], strict=True))
    if config.evaluation.credit_pairs:
        write_credit_map(folder / "credit.html", scored, pairs.spec, aucs, config.evaluation.credit_pairs)
    return metrics


def _track(
    tracker: Tracker, verdict: Verdict, samples: Mapping[str, Samples], prompts: PromptSet, folder: Path
) -> None:
    tracker.log_dataset(
        DATASET,
        digest=prompts.digest,
        source=prompts.source,
        rows=len(prompts.prompts),
        context="evaluation",
    )
    for policy in verdict.policies:
        numbers: dict[str, float | None] = {}
        for name, estimate in policy.metrics.items():
            numbers[f"{policy.name}/{name}"] = estimate.value
            numbers[f"{policy.name}/{name}_low"] = estimate.low
            numbers[f"{policy.name}/{name}_high"] = estimate.high
        manifest = samples[policy.name].manifest
        numbers |= {f"{policy.name}/generation/{name}": manifest.get(name) for name in TRACKED}
        tracker.log_metrics(numbers)
    tracker.flush()
    log_evaluated_models(tracker, verdict, prompts)
    for name in ("verdict.json", "verdict.txt", "credit.html"):
        if (folder / name).is_file():
            tracker.log_artifact(folder / name)
    tracker.log_artifact(folder / "samples", "samples")
