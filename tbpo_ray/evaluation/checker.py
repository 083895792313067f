"""The checker judge: a Python function that knows the correct answer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tbpo_ray.config.open_values import JUDGE_KEYS
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.judge import ScoringJudge, refuse_unknown
from tbpo_ray.generation.samples import Sample

COPYEDIT_CHECKER = "tbpo_ray.data.copyedit:check"


class Checker(ScoringJudge):
    """Scores an answer with `function(metadata, answer)`, which returns a bool or a number in [0, 1]."""

    kind = "checker"
    score_name = "exact_match"
    bounded = True

    def __init__(self, function: Callable[[Mapping[str, Any], str], bool | float], name: str):
        self._function, self.name = function, name

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str) -> Checker:
        """Build the checker of `evaluation.judge`.

        Args:
            settings: `evaluation.judge` without `kind`.
            source: where the prompts come from; the built-in task has its own checker.

        Raises:
            InputError: unknown keys, no function, or one that cannot be imported.
        """
        refuse_unknown(settings, JUDGE_KEYS["checker"])
        name = settings.get("function")
        if name is None and source.startswith("builtin:copyedit"):
            name = COPYEDIT_CHECKER
        if name is None:
            raise InputError(
                "evaluation.judge.function: missing; must be module:function(metadata, answer) -> bool"
            )
        return cls(load_function(name), name)

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """Score answers.

        Raises:
            InputError: the function raises, or returns something other than a number in [0, 1].
        """
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        where = f"evaluation.judge.function={self.name}: on prompt {sample.prompt_id}"
        try:
            score = float(self._function(sample.metadata, sample.answer))
        except Exception as error:  # a user's function may raise anything; the first error is reported
            raise InputError(f"{where} it raised {type(error).__name__}: {error}") from error
        if not 0 <= score <= 1:
            raise InputError(f"{where} it returned {score}; must return True, False or a number in [0, 1]")
        return score

    def report(self) -> dict[str, Any]:
        return {"kind": self.kind, "function": self.name}


def load_function(name: str) -> Callable[..., Any]:
    """Import the callable `module:function`; modules in the working directory are found too.

    Raises:
        InputError: it cannot be imported, or is not callable.
    """
    module, colon, attribute = str(name).partition(":")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        function = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise InputError(f"evaluation.judge.function={name}: {error}") from error
    if not callable(function):
        raise InputError(f"evaluation.judge.function={name}: must have the form module:function")
    return cast(Callable[..., Any], function)
