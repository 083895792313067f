"""What one judge says about the answers of several policies: scores, win rates, slices, ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from tbpo_ray.evaluation.judge import Judge, ScoringJudge, prefer
from tbpo_ray.evaluation.measures import (
    Estimate,
    Groups,
    compare,
    length_estimate,
    mean_estimate,
    paired,
    per_prompt,
    restrict,
    share_estimate,
    slices,
)
from tbpo_ray.evaluation.win_rates import bradley_terry
from tbpo_ray.generation.samples import Sample
from tbpo_ray.progress import log_progress

Scores = Mapping[str, Sequence[float]]
"""Prompt id to the scores of one policy's answers."""
SlicedMetrics = dict[str, dict[str, dict[str, Estimate]]]
"""Column -> value -> metric; `prompts` among the metrics is the size of the slice."""


@dataclass(frozen=True)
class ComparedAnswers:
    """Pairs of answers to the same prompt, and how much the candidate's is preferred in each."""

    pairs: Sequence[tuple[Sample, Sample]]
    preferences: Sequence[float | None]

    def restrict(self, prompt_ids: Sequence[str]) -> ComparedAnswers:
        """Return the pairs with a verdict among those of `prompt_ids`."""
        wanted = set(prompt_ids)
        judged = [
            (pair, preference)
            for pair, preference in zip(self.pairs, self.preferences, strict=True)
            if pair[0].prompt_id in wanted and preference is not None
        ]
        return ComparedAnswers([pair for pair, _ in judged], [preference for _, preference in judged])

    def metrics(self) -> dict[str, Estimate]:
        """Win rates of the pairs.

        Raises:
            RunFailedError: no pair has a verdict.
        """
        return compare(self.pairs, self.preferences)


class Judgments:
    """A judge with the answers it has to judge.

    A scoring judge scores every answer once, here; win rates and the ranking compare these scores.

    Args:
        groups: policy name to its answers.
        baseline: name of the policy that the win rates are against.
    """

    def __init__(self, judge: Judge, groups: Mapping[str, Groups], baseline: str):
        self.judge, self.groups, self.baseline = judge, groups, baseline
        self._scores: dict[str, Scores] = {}
        self.compared: dict[str, ComparedAnswers] = {}
        """Policy name to what `compare_with_baseline` found."""
        if isinstance(judge, ScoringJudge):
            log_progress(f"scoring answers with judge {judge.kind}")
            for name, group in groups.items():
                answers = flatten(group)
                self._scores[name] = per_prompt(answers, judge.scores(answers))

    def compare_with_baseline(self, policy: str) -> ComparedAnswers | None:
        """Judge a policy's answers against the baseline's; None for the baseline itself.

        Raises:
            RunFailedError: the judge did not answer.
        """
        if policy == self.baseline or not self.judge.compares_samples:
            return None
        pairs = paired(self.groups[policy], self.groups[self.baseline])
        self.compared[policy] = ComparedAnswers(pairs, self._preferences(pairs, policy))
        return self.compared[policy]

    def scores(self, policy: str) -> Scores:
        """The scores of a policy's answers; empty for a judge that only compares."""
        return self._scores.get(policy, {})

    def _preferences(self, pairs: Sequence[tuple[Sample, Sample]], policy: str) -> list[float | None]:
        if not isinstance(self.judge, ScoringJudge):
            log_progress(f"judging {len(pairs)} pairs of {policy} and {self.baseline} with {self.judge.kind}")
            return self.judge.preferences([a for a, _ in pairs], [b for _, b in pairs])
        candidate, baseline = self._scores[policy], self._scores[self.baseline]
        return [
            prefer(x, y)
            for key in candidate
            if key in baseline
            for x, y in zip(candidate[key], baseline[key], strict=False)
        ]

    def score_metrics(self, policy: str, prompt_ids: Sequence[str] | None = None) -> dict[str, Estimate]:
        """Mean score of a policy, over all prompts or over `prompt_ids`."""
        scores = self._scores.get(policy, {})
        if prompt_ids is not None:
            scores = restrict(scores, prompt_ids)
        if not isinstance(self.judge, ScoringJudge) or not scores:
            return {}
        if self.judge.bounded:
            return {self.judge.score_name: share_estimate(scores)}
        return {self.judge.score_name: mean_estimate([float(np.mean(values)) for values in scores.values()])}

    def slice_metrics(
        self, policy: str, compared: ComparedAnswers | None, columns: Sequence[str]
    ) -> SlicedMetrics:
        """Score and win rates of a policy for each value of each column."""
        return {
            column: {value: self._slice(policy, compared, keys) for value, keys in values.items()}
            for column, values in slices(self.groups[policy], columns).items()
        }

    def _slice(
        self, policy: str, compared: ComparedAnswers | None, prompt_ids: Sequence[str]
    ) -> dict[str, Estimate]:
        group = restrict(self.groups[policy], prompt_ids)
        metrics = {"prompts": Estimate(len(prompt_ids)), "length_tokens": length_estimate(group)}
        metrics |= self.score_metrics(policy, prompt_ids)
        judged = compared.restrict(prompt_ids) if compared is not None else None
        # A slice without a verdict has no win rate; only a whole policy without one is an error.
        return metrics | judged.metrics() if judged is not None and judged.pairs else metrics

    def ranking(self) -> list[dict[str, Any]]:
        """Bradley-Terry strengths, where a scoring judge saw more than two policies; otherwise empty."""
        names = list(self.groups)
        if len(names) < 3 or not self._scores:
            return []
        games = [
            (i, j, mean_preference(self._scores[names[i]][key], self._scores[names[j]][key]))
            for i, j in combinations(range(len(names)), 2)
            for key in self._scores[names[i]]
            if key in self._scores[names[j]]
        ]
        return [strength.__dict__ for strength in bradley_terry(names, games)]


def mean_preference(candidate: Sequence[float], baseline: Sequence[float]) -> float:
    """Mean preference between answers with these scores, paired by their number."""
    return float(np.mean([prefer(x, y) for x, y in zip(candidate, baseline, strict=False)]))


def flatten(group: Groups) -> list[Sample]:
    """The answers of all prompts, in order."""
    return [sample for samples in group.values() for sample in samples]
