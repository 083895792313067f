"""Quality of the objectives: each trained from the same SFT policy with several seeds.

It is measured twice: on sampled answers, as `jobs/evaluate.py` does, and without sampling noise, as the
probability of exactly the correct answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.local_run import load_policy, measure
from benchmarks.tables import table
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.storage.paths import cache_dir

METHODS: dict[str, dict[str, Any]] = {
    "tbpo_q": {"objective.name": "tbpo_q"},
    "tbpo_a exact": {"objective.name": "tbpo_a", "objective.state_baseline.kind": "exact_kl"},
    "no baseline": {"objective.name": "tbpo_q", "objective.state_baseline.kind": "none"},
    "tdpo2": {"objective.name": "tdpo2"},
    "dpo": {"objective.name": "dpo"},
}
LEARNING_RATES = {
    "tbpo_q": 5e-6,
    "tbpo_a exact": 4e-5,
    "no baseline": 5e-6,
    "tdpo2": 4e-5,
    "dpo": 8e-6,
}
CREDIT_PAIRS = 4
"""Pairs shown in the token credit map of each seed; the areas under the curve are over all pairs."""


def run(
    config: Config,
    *,
    quick: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate; finished runs are reused.

    Args:
        quick: use the first seed only.

    Returns:
        A row for each policy and seed with `policy`, `seed`, `beta`, `rate`, `expected_exact_match`, `kl`,
        `entropy` (see :func:`benchmarks.local_run.measure`) and `metrics`, those of sampled answers as
        `{name: {value, low, high}}`; the SFT policy has no `beta`.
    """
    from tbpo_ray.cluster.fit import fit_to_cluster
    from tbpo_ray.cluster.session import start_ray
    from tbpo_ray.evaluation.evaluator import evaluate_policies
    from tbpo_ray.evaluation.prompts import prompt_sources
    from tbpo_ray.storage.paths import run_dir
    from tbpo_ray.workflows.train import train

    rows = []
    name = config.run.name
    for seed in seeds[:1] if quick else seeds:
        sft = stage_config(
            config, config.sft, objective__name="sft", run__name=f"{name}-sft-{seed}", run__seed=seed
        )
        start = str(train(sft, kind="sft").export)
        policies = {"sft": start}
        used: dict[str, tuple[float | None, float]] = {"sft": (None, sft.training.learning_rate)}
        for method, overrides in (methods or METHODS).items():
            rate = (rates or LEARNING_RATES)[method]
            label = f"{method.replace(' ', '-')}-{rate:g}"
            changes = {
                **overrides,
                "training.learning_rate": rate,
                "model.name_or_path": start,
                "run.name": f"{name}-{label}-{seed}",
                "run.seed": seed,
            }
            settled = stage_config(config, changes)
            policies[label] = str(train(settled).export)
            used[label] = (settled.objective.effective_beta, rate)
        start_ray()
        changes = {"run.seed": seed, "run.name": f"{name}-{seed}", "evaluation.credit_pairs": CREDIT_PAIRS}
        settled = fit_to_cluster(stage_config(config, changes))
        verdict = evaluate_policies(settled, policies, output=run_dir(settled) / "evaluation")
        pairs = _held_out(settled, prompt_sources(settled)[0], start)
        for label, (beta, rate) in used.items():
            metrics = {key: estimate.to_json() for key, estimate in verdict[label].metrics.items()}
            about = {"policy": label, "seed": seed, "beta": beta, "rate": rate}
            rows.append(about | exact_quality(policies[label], start, pairs) | {"metrics": metrics})
    return rows


def _held_out(config: Config, source: str, start: str) -> PreparedPairs:
    """The pairs of a source, whose chosen answers are the correct ones. Needs a Ray session."""
    settled = stage_config(config, {"data.train": source, "data.max_pairs": None})
    spec = PairsSpec(source, settled.data, start)
    return prepare(spec, cache_dir(config), progress=False)


def exact_quality(policy: str, start: str, pairs: PreparedPairs) -> dict[str, float]:
    """`expected_exact_match`, `entropy` and `kl` of a policy's folder; the reference is that of `start`."""
    return measure(load_policy(policy), load_policy(start), pairs)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table: exact match of sampled answers per seed with its 95 % interval, and means of other metrics."""
    seeds = sorted({row["seed"] for row in rows})
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    head = ["policy", *(f"exact match, seed {seed}" for seed in seeds), *MEANS.values()]
    lines = []
    for policy in policies:
        own = [row for row in rows if row["policy"] == policy]
        mine = {row["seed"]: _all_metrics(row) for row in own}
        cells = [_share(mine[seed].get("exact_match")) if seed in mine else "" for seed in seeds]
        lines.append([policy, *cells, *(_mean(mine.values(), key) for key in MEANS)])
    return table(head, lines)


def _all_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row["metrics"], "expected_exact_match": {"value": row["expected_exact_match"]}}


MEANS = {
    "expected_exact_match": "expected exact match",
    "distinct_1": "distinct-1",
    "kl_k1": "KL from SFT",
    "credit_auc": "credit AUC, log-ratio",
    "credit_auc_advantage": "credit AUC, advantage",
}


def _mean(found: Iterable[Mapping[str, Any]], key: str) -> str:
    """Mean over the seeds and, for several seeds, the minimum and the maximum."""
    values = [metrics[key]["value"] for metrics in found if key in metrics]
    if not values:
        return "-"
    span = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{span}"


def _share(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
