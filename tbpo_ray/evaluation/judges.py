"""Judges: what turns answers into scores or preferences.

Every judge has :meth:`Judge.preferences`; those that see one answer at a time also have scores, and prefer
the higher one.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.generation.samples import Sample

KINDS = ("checker", "reward_model", "llm", "implicit")


class Judge(ABC):
    """Compares answers."""

    kind: str
    compares_samples = True
    """Whether sampled answers are compared; `implicit` looks at preference pairs instead."""

    @abstractmethod
    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        """For each pair of answers to the same prompt how much the candidate's is preferred.

        1: the candidate wins, 0.5: a tie, 0: it loses; None: no verdict.
        """

    def report(self) -> dict[str, Any]:
        """What judging took and what went wrong, for the verdict."""
        return {"kind": self.kind}


class ScoringJudge(Judge):
    """A judge that scores one answer at a time."""

    score_name = "score"
    """What the mean score of a policy is called."""
    bounded = False
    """Whether scores are shares in [0, 1]."""

    @abstractmethod
    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """One score per answer, higher is better."""

    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        return [prefer(a, b) for a, b in zip(self.scores(candidate), self.scores(baseline), strict=True)]


class Checker(ScoringJudge):
    """A Python callable that knows the right answer: `function(metadata, answer) -> bool` or a share."""

    kind = "checker"
    score_name = "exact_match"
    bounded = True

    def __init__(self, function: Callable[[Mapping[str, Any], str], bool | float], name: str):
        self._function, self.name = function, name

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """Raises InputError where the checker raises, or returns something that is no share in [0, 1]."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        where = f"evaluation.judge.function={self.name}: on prompt {sample.prompt_id}"
        try:
            score = float(self._function(sample.metadata, sample.answer))
        except Exception as error:  # a user's function may raise anything; the first fault is reported
            raise InputError(f"{where} it raised {type(error).__name__}: {error}") from error
        if not 0 <= score <= 1:
            raise InputError(f"{where} it returned {score}; return True, False or a share in [0, 1]")
        return score

    def report(self) -> dict[str, Any]:
        return {"kind": self.kind, "function": self.name}


class Implicit(Judge):
    """The policy's own reward on held-out preference pairs; sampled answers are not compared."""

    kind = "implicit"
    compares_samples = False

    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        return [None] * len(candidate)


def prefer(candidate: float, baseline: float) -> float:
    """1, 0.5 or 0: whether the first score is higher, equal or lower."""
    return 0.5 if candidate == baseline else float(candidate > baseline)


def make_judge(config: Config, *, source: str, output: Path) -> Judge:
    """The judge of `evaluation.judge`.

    Args:
        source: where the prompts come from; the built-in task brings its own checker.
        output: folder in which a judge may keep its cache.

    Raises:
        InputError: an unknown kind, or settings that do not fit it.
    """
    settings = dict(config.evaluation.judge)
    kind = settings.pop("kind", "checker")
    if kind == "checker":
        return _checker(settings, source)
    if kind == "reward_model":
        from tbpo_ray.evaluation.reward_model import RewardModelJudge

        return RewardModelJudge.from_settings(settings, use_gpu=config.cluster.gpus)
    if kind == "llm":
        from tbpo_ray.evaluation.llm_judge import LlmJudge

        if "pool" in settings:
            from tbpo_ray.evaluation.pool_judge import PoolJudge

            return PoolJudge.on_cluster(settings, config, output)
        return LlmJudge.from_settings(settings, cache=output / "judge_cache.jsonl")
    if kind == "implicit":
        refuse_unknown(settings, ("kind",))
        return Implicit()
    raise InputError(f"evaluation.judge.kind={kind!r}: use one of {', '.join(KINDS)}")


def _checker(settings: dict[str, Any], source: str) -> Checker:
    name = settings.pop("function", None)
    refuse_unknown(settings, ("function",))
    if name is None and source.startswith("builtin:copyedit"):
        name = "tbpo_ray.data.copyedit:check"
    if name is None:
        raise InputError(
            "evaluation.judge.function: a checker is wanted, as module:function(metadata, answer) -> bool"
        )
    return Checker(load_function(name), name)


def load_function(name: str) -> Callable[..., Any]:
    """The callable at `module:function`; modules in the working directory are found too."""
    module, colon, attribute = str(name).partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise InputError(f"evaluation.judge.function={name}: {error}") from error
    if not callable(function):
        raise InputError(f"evaluation.judge.function={name}: write it as module:function")
    return function


def refuse_unknown(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise InputError for settings of `evaluation.judge` that this kind does not have."""
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise InputError(
            *(
                f"evaluation.judge.{key}: unknown key; this kind of judge has {', '.join(known)}"
                for key in unknown
            )
        )
