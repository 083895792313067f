"""The judge interface: what turns answers into preferences.

Every judge implements :meth:`Judge.preferences`. A judge that scores one answer at a time is a
:class:`ScoringJudge`; it prefers the answer with the higher score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from tbpo_ray.config.validation import unknown_key_message
from tbpo_ray.errors import InputError
from tbpo_ray.generation.samples import Sample


class Judge(ABC):
    """Compares the answers of two policies."""

    kind: str
    """`evaluation.judge.kind` that selects this judge."""
    compares_samples = True
    """Whether the judge compares sampled answers; `implicit` scores preference pairs instead."""

    @abstractmethod
    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        """Return how much the candidate's answer is preferred, one value per pair of answers.

        1 means that the candidate wins, 0.5 a tie, 0 that it loses, and None that there is no verdict.
        """

    def rationale(self, candidate: Sample, baseline: Sample) -> str:
        """Return what the judge has written about a judged pair; empty for judges that write nothing."""
        return ""

    def report(self) -> dict[str, Any]:
        """Return the judge's identity, cost and error counts, for the verdict."""
        return {"kind": self.kind}


class ScoringJudge(Judge):
    """A judge that scores one answer at a time."""

    score_name = "score"
    """Metric name of a policy's mean score."""
    bounded = False
    """Whether all scores are within [0, 1]."""

    @abstractmethod
    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """Return one score per answer; higher is better."""

    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        return [prefer(a, b) for a, b in zip(self.scores(candidate), self.scores(baseline), strict=True)]


class ImplicitJudge(Judge):
    """The policy's own reward on held-out preference pairs; sampled answers are not compared."""

    kind = "implicit"
    compares_samples = False

    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        return [None] * len(candidate)


def prefer(candidate: float, baseline: float) -> float:
    """Return 1, 0.5 or 0 if the first score is higher, equal or lower."""
    return 0.5 if candidate == baseline else float(candidate > baseline)


def refuse_unknown(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise InputError for keys of `evaluation.judge` that this kind of judge does not have."""
    accepted = [f"evaluation.judge.{name}" for name in ("kind", *known)]
    unknown = [f"evaluation.judge.{key}" for key in settings if key not in known]
    if unknown:
        raise InputError(*(unknown_key_message(key, accepted) for key in unknown))
