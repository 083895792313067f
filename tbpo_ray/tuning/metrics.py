"""The metrics that a study can optimize: what a run logs, and what an evaluation of its policy measures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.trial import EVALUATION

ROW_METRICS = ("loss", "grad_norm", "learning_rate", "epoch", "pairs_seen")
"""Metrics in every logged row, whatever the objective."""
SAMPLE_METRICS = ("distinct_1", "distinct_2", "predictive_entropy", "kl_k1", "length_tokens", "truncated")
JUDGE_METRICS = {
    "checker": ("exact_match", "win_rate", "lc_win_rate"),
    "reward_model": ("score", "win_rate", "lc_win_rate"),
    "llm": ("win_rate", "lc_win_rate"),
    "implicit": ("implicit_accuracy", "implicit_margin"),
}
"""What an evaluation measures in addition, by the kind of its judge."""


def logged_metrics(config: Config) -> set[str]:
    """Names of the metrics that a run of this configuration logs, found by evaluating its objective."""
    import torch

    from tbpo_ray.objectives import TokenScores
    from tbpo_ray.training.run_plan import resolve_objective

    objective = resolve_objective(config)
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    inputs = ["logps", "baseline"]
    inputs += ["ref_logps"] * objective.needs_reference + ["weights"] * objective.needs_weights
    inputs += ["log_collision"] * objective.needs_collision
    inputs += ["chunks"] * objective.needs_chunks
    sides = {f"{side}_{name}": zeros for side in ("chosen", "rejected") for name in inputs}
    pairs = {"pair_margins": torch.zeros(1), "pair_weights": torch.ones(1)}
    names = set(objective(TokenScores(**sides, **pairs, chosen_mask=mask, rejected_mask=mask)).metrics)
    if objective.needs_kl:
        names |= {"entropy", "kl/exact"}
    if objective.needs_reverse_kl:
        names |= {"entropy", "kl/exact_reverse"}
    if objective.ties != "drop":
        names.add("ties/share")
    held_out = {f"eval/{name}" for name in {*names, "loss"}} if config.data.eval is not None else set()
    return names | set(ROW_METRICS) | held_out


def evaluated_metrics(config: Config) -> list[str]:
    """Names of the metrics that the evaluation of a trial's policy gives."""
    names = [*JUDGE_METRICS.get(_judge_kind(config), ()), *SAMPLE_METRICS]
    if config.generation.samples > 1:
        names.append("self_bleu")
    if config.evaluation.credit_pairs:
        names += JUDGE_METRICS["implicit"]
    return list(dict.fromkeys(names))


def _judge_kind(config: Config) -> str:
    return str(config.evaluation.judge.get("kind", "checker"))


def _metric_variant(config: Config) -> tuple[object, ...]:
    """What the names of the logged metrics depend on."""
    own = config.objective
    terms = (own.nll_weight > 0, own.pair_margins, own.pair_weights, own.f_divergence.kind)
    return (own.name, own.baseline_kind, *terms)


def check_metrics(config: Config, probes: Sequence[Config]) -> None:
    """Refuse a metric that some trial would not have.

    Args:
        probes: configurations that represent the trials.

    Raises:
        InputError: naming the metric, and the available ones.
    """
    tune = config.tune
    # The logged names depend on the objective, its baseline and the terms of its loss alone.
    variants = {_metric_variant(probe): probe for probe in probes}
    logged = [logged_metrics(probe) for probe in variants.values()]
    faults = []
    for metric in tune.metrics:
        if metric.startswith(EVALUATION):
            fault = _evaluated_metric_fault(config, metric)
        else:
            fault = _logged_metric_fault(metric, logged)
        faults += [fault] if fault else []
    if any(metric.startswith(EVALUATION) for metric in tune.metrics) and not faults:
        from tbpo_ray.evaluation.evaluator import check_evaluation

        model = config.model.name_or_path
        check_evaluation(config, {"start": model, "trial": model})
    if tune.scheduler == "pbt" and tune.repeats > 1:
        faults.append(f"tune.repeats={tune.repeats}: tune.scheduler=pbt trains each trial once; use 1")
    if faults:
        raise InputError(*faults)


def _evaluated_metric_fault(config: Config, metric: str) -> str | None:
    tune, measured = config.tune, evaluated_metrics(config)
    if metric.removeprefix(EVALUATION) not in measured:
        known = " ".join(EVALUATION + name for name in measured)
        return (
            f"tune.metric={metric}: not measured with evaluation.judge.kind={_judge_kind(config)} "
            f"and generation.samples={config.generation.samples}; use one of {known}"
        )
    if metric == tune.metrics[0] and tune.scheduler != "none":
        return (
            f"tune.metric={metric}: known only at the end of a trial, but tune.scheduler={tune.scheduler} "
            "compares running trials; put a logged metric first, or use tune.scheduler=none"
        )
    return None


def _logged_metric_fault(metric: str, logged: Sequence[set[str]]) -> str | None:
    """What is wrong with a metric, given the names that each kind of trial logs."""
    by_all = set.intersection(*logged)
    if metric in by_all:
        return None
    last = metric.rsplit("/", 1)[-1]
    similar = [name for name in sorted(by_all) if last in name] or sorted(by_all)
    near = difflib.get_close_matches(metric, similar, n=1, cutoff=0.0)[0]
    problem = "not every trial logs it" if metric in set.union(*logged) else "no trial logs it"
    return (
        f"tune.metric={metric}: {problem}; the nearest logged metric is {near}; "
        f"all trials log {' '.join(sorted(by_all))}"
    )
