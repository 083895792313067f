"""Compute metrics with intervals from samples and judgments. NumPy and SciPy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tbpo_ray.errors import RunFailedError
from tbpo_ray.evaluation.diversity import distinct_n, predictive_entropy, self_bleu
from tbpo_ray.evaluation.style import FEATURES, style_features
from tbpo_ray.evaluation.win_rates import (
    Rate,
    length_controlled_win_rate,
    style_controlled_win_rate,
    t_interval,
    win_rate,
)
from tbpo_ray.generation.samples import Sample

Groups = Mapping[str, Sequence[Sample]]
"""Prompt id to the answered samples of one policy."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of_rate(cls, rate: Rate) -> Estimate:
        return cls(rate.rate, rate.low, rate.high)

    def to_json(self) -> dict[str, float | None]:
        """Return a plain mapping; a value that is not finite becomes null."""
        return {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in asdict(self).items()
        }


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean with a 95 % interval by Student's t; a single value has no interval."""
    mean, low, high = t_interval(values)
    return Estimate(mean) if math.isnan(low) else Estimate(mean, low, high)


def share_estimate(per_prompt: Mapping[str, Sequence[float]]) -> Estimate:
    """Mean over prompts of the mean score within each prompt, for scores in [0, 1]."""
    return Estimate.of_rate(win_rate([float(np.mean(values)) for values in per_prompt.values()]))


def describe(groups: Groups) -> dict[str, Estimate]:
    """Diversity, entropy and length of one policy's answers."""
    samples = [sample for group in groups.values() for sample in group]
    logprobs = [sample.logprobs for sample in samples]
    metrics = {
        "distinct_1": Estimate(distinct_n([sample.token_ids for sample in samples], 1)),
        "distinct_2": Estimate(distinct_n([sample.token_ids for sample in samples], 2)),
        "self_bleu": Estimate(self_bleu([[s.answer for s in group] for group in groups.values()])),
        "predictive_entropy": Estimate(predictive_entropy(logprobs)),
        "entropy_per_token": Estimate(predictive_entropy(logprobs, per_token=True)),
        "length_tokens": length_estimate(groups),
        "length_chars": _mean_over_prompts(groups, lambda sample: len(sample.answer)),
        "truncated": Estimate(float(np.mean([s.finish_reason == "length" for s in samples]))),
    }
    return {name: estimate for name, estimate in metrics.items() if math.isfinite(estimate.value)}


def length_estimate(groups: Groups) -> Estimate:
    """Mean number of tokens of an answer."""
    return _mean_over_prompts(groups, lambda sample: len(sample.token_ids))


def _mean_over_prompts(groups: Groups, measure: Callable[[Sample], float]) -> Estimate:
    """Mean over prompts of the mean within each prompt: samples of one prompt are not independent."""
    return mean_estimate([float(np.mean([measure(s) for s in group])) for group in groups.values()])


def paired(candidate: Groups, baseline: Groups) -> list[tuple[Sample, Sample]]:
    """Pair sample k of the candidate with sample k of the baseline, for every prompt that both answered."""
    return [
        (a, b)
        for key, group in candidate.items()
        if key in baseline
        for a, b in zip(group, baseline[key], strict=False)
    ]


def compare(
    pairs: Sequence[tuple[Sample, Sample]], preferences: Sequence[float | None]
) -> dict[str, Estimate]:
    """Raw, length-controlled and, with Markdown, style-controlled win rate; length is in characters.

    Preferences are averaged within each prompt first, so that the intervals are over prompts.

    Raises:
        RunFailedError: no pair has a verdict.
    """
    judged: dict[str, list[list[float]]] = {}
    for (a, b), preference in zip(pairs, preferences, strict=True):
        if preference is not None:
            row = [preference, *style_features(a.answer), *style_features(b.answer)]
            judged.setdefault(a.prompt_id, []).append(row)
    if not judged:
        raise RunFailedError(f"the judge gave no verdict on any of {len(pairs)} pairs of answers")
    means = np.asarray([np.mean(rows, axis=0) for rows in judged.values()])  # [prompts, 1 + 2 F]
    preferred, own, other = means[:, 0], means[:, 1 : 1 + len(FEATURES)], means[:, 1 + len(FEATURES) :]
    controlled = length_controlled_win_rate(preferred, own[:, 0], other[:, 0])
    metrics = {
        "win_rate": Estimate.of_rate(win_rate(means[:, 0])),
        "lc_win_rate": Estimate.of_rate(controlled),
        "length_effect": Estimate(controlled.length_effect),
    }
    if own[:, 1:].any() or other[:, 1:].any():  # without Markdown, style is length
        style = style_controlled_win_rate(preferred, own, other)
        metrics["style_win_rate"] = Estimate.of_rate(style)
        effects = zip(FEATURES, style.effects, strict=True)
        metrics |= {f"style_effect/{name}": Estimate(value) for name, value in effects}
    return metrics


def slices(groups: Groups, columns: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Group prompts by the values of metadata columns: column -> value -> prompt ids.

    The columns `prompt_length` and `answer_length` are quartiles of the number of tokens.
    """
    out: dict[str, dict[str, list[str]]] = {}
    for column in columns:
        if column == "prompt_length":
            label = _quartiles({key: len(group[0].prompt_token_ids) for key, group in groups.items()})
        elif column == "answer_length":
            label = _quartiles({k: float(np.mean([len(s.token_ids) for s in g])) for k, g in groups.items()})
        else:
            label = {key: str(group[0].metadata.get(column, "(none)")) for key, group in groups.items()}
        values: dict[str, list[str]] = {}
        for key, value in label.items():
            values.setdefault(value, []).append(key)
        out[column] = dict(sorted(values.items()))
    return out


def _quartiles(sizes: Mapping[str, float]) -> dict[str, str]:
    edges = np.unique(np.quantile(list(sizes.values()), [0, 0.25, 0.5, 0.75, 1]))
    if len(edges) < 2:
        return {key: f"{edges[0]:.0f}" for key in sizes}
    cell = np.clip(np.searchsorted(edges, list(sizes.values()), side="right") - 1, 0, len(edges) - 2)
    return {
        key: f"{i + 1}: {edges[i]:.0f} to {edges[i + 1]:.0f} tokens"
        for key, i in zip(sizes, cell, strict=True)
    }


def per_prompt(samples: Iterable[Sample], values: Iterable[float]) -> dict[str, list[float]]:
    """Group the values of samples by prompt id."""
    out: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        out.setdefault(sample.prompt_id, []).append(value)
    return out


def restrict(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return the entries of `mapping` whose keys are in `keys`."""
    return {key: mapping[key] for key in keys if key in mapping}
