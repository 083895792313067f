"""Evaluate policies: sample, judge, measure, write the verdict, log it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
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
from tbpo_ray.evaluation.held_out_pairs import credit_auc, implicit_rewards, read_pairs, score_pairs
from tbpo_ray.evaluation.judge import Judge, ScoringJudge, prefer
from tbpo_ray.evaluation.judges import make_judge
from tbpo_ray.evaluation.measures import (
    Estimate,
    Groups,
    compare,
    describe,
    mean_estimate,
    paired,
    per_prompt,
    restrict,
    share_estimate,
    slices,
)
from tbpo_ray.evaluation.prompts import Policy, PromptSet, read_prompts, resolve_policy, tokenize_prompts
from tbpo_ray.evaluation.reference_kl import kl_k1, reference_logprobs
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict
from tbpo_ray.evaluation.win_rates import bradley_terry
from tbpo_ray.generation.pool import generate, sampling_fingerprint
from tbpo_ray.generation.samples import Sample, Samples
from tbpo_ray.generation.vllm_engine import check_model, engine_resources, pool_size
from tbpo_ray.progress import log_progress
from tbpo_ray.tracking.tracker import Tracker

BETA = 0.1
"""Scale of the implicit reward where `objective.beta` leaves it to the objective."""


def evaluate_policies(
    config: Config,
    policies: Mapping[str, str],
    *,
    output: str | Path,
    baseline: str | None = None,
    reference: str | None = None,
    tracker: Tracker | None = None,
) -> Verdict:
    """Sample every policy on the held-out prompts, judge the answers, and say who is better.

    Ray must be running. `output` gets `samples/` (Parquet, one folder per policy), `verdict.json` and
    `verdict.txt`; samples that are there already are used again.

    Args:
        policies: name to model folder, adapter folder or run name.
        baseline: the policy that win rates are against; default `evaluation.baseline`, else the first one.
        reference: model folder for the KL; default `model.reference`, else the baseline.
        tracker: gets every number as `<policy>/<metric>`, the prompts as a dataset, samples and verdict.

    Raises:
        InputError: a policy, prompt file or judge that cannot be used; raised before anything is sampled.
        RunFailed: the engines or the judge gave nothing.
    """
    config = _settle_gpus(config)
    folder = Path(output)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    found, base, anchor, prompts = check_evaluation(config, policies, baseline=baseline, reference=reference)
    judge = make_judge(config, source=prompts.source, output=folder)
    log_progress(f"evaluating {', '.join(policies)} on {len(prompts.prompts)} prompts of {prompts.source}")

    _bring_up_engines(config, found, folder)
    samples = {policy.name: _sample(policy, prompts, config, folder) for policy in found}
    groups: dict[str, Groups] = {name: answers.by_prompt() for name, answers in samples.items()}
    own = _pair_metrics(found, base, anchor, judge, config, folder)
    benchmarks = benchmark_settings(config)
    if benchmarks is not None:
        for policy in found:
            own.setdefault(policy.name, {}).update(run_benchmarks(benchmarks, policy.model, config))
    verdict = _judge_all(found, groups, samples, base.name, anchor, judge, prompts, config, own, tracker)
    verdict.save(folder)
    (folder / "verdict.txt").write_text(verdict.table() + "\n", encoding="utf-8")
    if tracker is not None:
        _track(tracker, verdict, prompts, folder)
    return verdict


def check_evaluation(
    config: Config,
    policies: Mapping[str, str],
    *,
    baseline: str | None = None,
    reference: str | None = None,
) -> tuple[list[Policy], Policy, str, PromptSet]:
    """What an evaluation needs, checked without starting anything: policies, baseline, reference, prompts.

    Raises:
        InputError: as :func:`evaluate_policies`.
    """
    found = [resolve_policy(name, where, config) for name, where in policies.items()]
    if not found:
        raise InputError("evaluation.policies: no policy to evaluate; give name: folder")
    baseline = baseline or config.evaluation.baseline or found[0].name
    if baseline not in policies:
        raise InputError(f"evaluation.baseline={baseline}: is not among the policies {', '.join(policies)}")
    base = next(policy for policy in found if policy.name == baseline)
    on_pairs = config.evaluation.credit_pairs > 0 or config.evaluation.judge.get("kind") == "implicit"
    for policy in found:
        check_model(policy.model, policy.adapter)
        if policy.adapter and (on_pairs or config.evaluation.benchmarks):
            raise InputError(
                f"evaluation.policies.{policy.name}: is an adapter; pairs and benchmarks need a merged model"
            )
    reference = reference or config.model.reference
    anchor = resolve_policy("reference", reference, config).model if reference else base.model
    return found, base, anchor, check_settings(config)


def check_settings(config: Config) -> PromptSet:
    """What an evaluation needs beside policies: prompts that can be read, a judge, benchmarks.

    Raises:
        InputError: as :func:`evaluate_policies`.
    """
    prompts = read_prompts(config)
    make_judge(config, source=prompts.source, output=Path(config.run.output_dir))
    benchmark_settings(config)
    return prompts


def _settle_gpus(config: Config) -> Config:
    """`cluster.use_gpu: auto` becomes what the running cluster has, or can grow to."""
    if config.cluster.use_gpu != "auto":
        return config
    labels = config.cluster.labels.generate
    return stage_config(
        config, {}, cluster__use_gpu=any(size.has("GPU", labels) for size in capacities(config))
    )


def _sample(policy: Policy, prompts: PromptSet, config: Config, folder: Path) -> Samples:
    tokens = tokenize_prompts(prompts, policy.model, config)
    seed, adapter = config.run.seed, policy.adapter
    mark = sampling_fingerprint(policy.model, tokens, config.generation, seed=seed, adapter=adapter)
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', policy.name)}-{mark[:8]}"
    return generate(
        policy.model,
        tokens,
        config.generation,
        output=folder / "samples" / name,
        use_gpu=config.cluster.gpus,
        seed=seed,
        adapter=adapter,
        labels=config.cluster.labels.generate,
    )


def _bring_up_engines(config: Config, policies: Sequence[Policy], folder: Path) -> None:
    """Wait for the nodes of the fewest engines; on the CPU an engine makes do with a part of one.

    Raises:
        InputError: they never fit into the cluster, or do not share the storage.
        RunFailed: they do not come up in time.
    """
    engines, _ = pool_size(config.generation)
    bundle = {"CPU": 0.5}
    if config.cluster.gpus:
        bundle = engine_resources(config.generation, use_gpu=True, free_cpus=0.0, engines=engines)
    fit_engines(config, engines, bundle)
    wait_for_resources(
        config,
        "sampling",
        bundle,
        engines,
        labels=config.cluster.labels.generate,
        folders={"run.output_dir": folder},
        files={f"evaluation.policies.{policy.name}": policy.model for policy in policies},
    )


def _judge_all(
    found: Sequence[Policy],
    groups: Mapping[str, Groups],
    samples: Mapping[str, Samples],
    baseline: str,
    anchor: str,
    judge: Judge,
    prompts: PromptSet,
    config: Config,
    own: Mapping[str, Mapping[str, Estimate]],
    tracker: Tracker | None,
) -> Verdict:
    scored: dict[str, dict[str, list[float]]] = {}
    if isinstance(judge, ScoringJudge):
        log_progress(f"judging by {judge.kind}")
        for name, group in groups.items():
            flat = _flat(group)
            scored[name] = per_prompt(flat, judge.scores(flat))
    results = []
    for policy in found:
        group = groups[policy.name]
        metrics = _score_metrics(judge, scored.get(policy.name))
        by_slice = {}
        if policy.name != baseline and judge.compares_samples:
            pairs = paired(group, groups[baseline])
            preferences = _preferences(judge, pairs, scored, policy.name, baseline)
            metrics |= compare(pairs, preferences)
        else:
            pairs, preferences = [], []
        metrics |= describe(group) | dict(own.get(policy.name, {}))
        log_progress(f"{policy.name}: KL from the reference on its own samples")
        flat = _flat(group)
        values = kl_k1(flat, reference_logprobs(flat, anchor, use_gpu=config.cluster.gpus))
        metrics["kl_k1"] = mean_estimate([float(np.mean(v)) for v in per_prompt(flat, values).values()])
        by_slice = _sliced(
            group, config.evaluation.slice_by, judge, scored.get(policy.name), pairs, preferences
        )
        results.append(
            PolicyVerdict(
                name=policy.name,
                model=policy.folder,
                prompts=len(group),
                failed=samples[policy.name].manifest["failed"],
                metrics=metrics,
                slices=by_slice,
                samples=f"samples/{samples[policy.name].folder.name}",
            )
        )
    return Verdict(
        policies=results,
        baseline=baseline,
        reference=anchor,
        judge=judge.report(),
        prompts={
            "source": prompts.source,
            "digest": prompts.digest,
            "rows": len(prompts.prompts),
            "left_out": len(prompts.left_out),
        },
        ranking=_ranking(groups, scored),
        run_id=tracker.run_id if tracker else None,
    )


def _pair_metrics(
    found: Sequence[Policy], base: Policy, anchor: str, judge: Judge, config: Config, folder: Path
) -> dict[str, dict[str, Estimate]]:
    """The policies' own rewards on held-out pairs and the token credit map, where they are asked for."""
    shown = config.evaluation.credit_pairs
    if judge.kind != "implicit" and not shown:
        return {}
    log_progress("scoring held-out preference pairs under every policy")
    pairs = read_pairs(config, base.model)
    scored = {p.name: score_pairs(pairs, p.model, anchor, use_gpu=config.cluster.gpus) for p in found}
    compared_only = config.objective.name.startswith("tbpo")
    metrics = {
        name: implicit_rewards(group, beta=config.objective.beta or BETA, compared_only=compared_only)
        for name, group in scored.items()
    }
    aucs: dict[str, list[Estimate]] = {}
    if all("damage" in record.metadata for record in pairs.records):
        for name, group in scored.items():
            found_by = [credit_auc(group, pairs.spec, signal) for signal in ("log_ratio", "advantage")]
            metrics[name] |= dict(zip(("credit_auc", "credit_auc_advantage"), found_by, strict=True))
            aucs[name] = found_by
    if shown:
        write_credit_map(folder / "credit.html", scored, pairs.spec, aucs, shown)
    return metrics


def _flat(group: Groups) -> list[Sample]:
    return [sample for samples in group.values() for sample in samples]


def _score_metrics(judge: Judge, scores: Mapping[str, Sequence[float]] | None) -> dict[str, Estimate]:
    if not isinstance(judge, ScoringJudge) or not scores:
        return {}
    if judge.bounded:
        return {judge.score_name: share_estimate(scores)}
    return {judge.score_name: mean_estimate([float(np.mean(values)) for values in scores.values()])}


def _preferences(
    judge: Judge,
    pairs: Sequence[tuple[Sample, Sample]],
    scored: Mapping[str, Mapping[str, Sequence[float]]],
    candidate: str,
    baseline: str,
) -> list[float | None]:
    """Preferences of pairs; scores that are known already are compared instead of asked for again."""
    if not isinstance(judge, ScoringJudge):
        log_progress(f"judging {len(pairs)} pairs of {candidate} and {baseline} by {judge.kind}")
        return judge.preferences([a for a, _ in pairs], [b for _, b in pairs])
    return [
        prefer(x, y)
        for key in scored[candidate]
        if key in scored[baseline]
        for x, y in zip(scored[candidate][key], scored[baseline][key], strict=False)
    ]


def _sliced(
    group: Groups,
    columns: Sequence[str],
    judge: Judge,
    scores: Mapping[str, Sequence[float]] | None,
    pairs: Sequence[tuple[Sample, Sample]],
    preferences: Sequence[float | None],
) -> dict[str, dict[str, dict[str, Estimate]]]:
    out: dict[str, dict[str, dict[str, Estimate]]] = {}
    for column, values in slices(group, columns).items():
        out[column] = {}
        for value, keys in values.items():
            inside = set(keys)
            metrics = {"prompts": Estimate(len(keys))}
            metrics |= _score_metrics(judge, restrict(scores, keys) if scores else None)
            part = [
                (p, x)
                for p, x in zip(pairs, preferences, strict=True)
                if p[0].prompt_id in inside and x is not None
            ]
            if part:
                metrics |= compare([p for p, _ in part], [x for _, x in part])
            out[column][value] = metrics
    return out


def _ranking(
    groups: Mapping[str, Groups], scored: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    """Bradley-Terry over all pairs of policies, where there are more than two and a judge that scores."""
    names = list(groups)
    if len(names) < 3 or not scored:
        return []
    games = [
        (
            i,
            j,
            float(
                np.mean(
                    [prefer(x, y) for x, y in zip(scored[names[i]][key], scored[names[j]][key], strict=False)]
                )
            ),
        )
        for i, j in combinations(range(len(names)), 2)
        for key in scored[names[i]]
        if key in scored[names[j]]
    ]
    return [strength.__dict__ for strength in bradley_terry(names, games)]


def _track(tracker: Tracker, verdict: Verdict, prompts: PromptSet, folder: Path) -> None:
    tracker.log_dataset(
        "held-out prompts",
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
        tracker.log_metrics(numbers)
    tracker.flush()
    tracker.log_artifact(folder / "verdict.json")
    tracker.log_artifact(folder / "verdict.txt")
    if (folder / "credit.html").is_file():
        tracker.log_artifact(folder / "credit.html")
    tracker.log_artifact(folder / "samples", "samples")
