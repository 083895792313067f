"""The judged answers for MLflow: a table that its evaluation page shows, and traces with assessments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tbpo_ray.evaluation.judgments import Judgments
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.generation.samples import Sample
from tbpo_ray.tracking.traces import JudgedAnswer
from tbpo_ray.tracking.tracker import Tracker

TABLE = "samples.json"
_MODELS = ("llm", "reward_model")
"""Kinds of judges that are models, and not programs."""
MAX_PROMPTS = 500
"""Prompts in the table, since MLflow's page loads it as a whole; the Parquet files have all of them."""


@dataclass(frozen=True)
class _Judged:
    """An answer with what the judge says about it."""

    policy: str
    sample: Sample
    score: float | None
    preference: float | None
    """1: better than the baseline's answer, 0.5: as good, 0: worse; None without a verdict."""
    opponent: Sample | None


def log_samples(tracker: Tracker, verdict: Verdict, judgments: Judgments, traces: int) -> None:
    """Log the judged answers as MLflow's evaluation table, and those to some prompts as traces.

    Args:
        traces: number of prompts whose answers become traces; 0: none.

    Raises:
        RunFailedError: the store does not accept traces.
    """
    names = [policy.name for policy in verdict.policies]
    tracker.log_table(table_rows(judgments, names), TABLE)
    if traces:
        answers = list(_judged_answers(judgments, names, verdict.judge_name, traces))
        tracker.log_traces(answers, judge_is_model=verdict.judge["kind"] in _MODELS)


def table_rows(
    judgments: Judgments, policies: Sequence[str], prompts: int = MAX_PROMPTS
) -> list[dict[str, Any]]:
    """One row per answer, ordered by prompt; every row has the same columns."""
    return [
        {
            "prompt": item.sample.prompt_text,
            "policy": item.policy,
            "sample": item.sample.sample,
            "answer": item.sample.answer,
            "score": item.score,
            "preference": item.preference,
            "tokens": len(item.sample.token_ids),
            "finish_reason": item.sample.finish_reason,
        }
        for item in _judged(judgments, policies, prompts)
    ]


def _judged(judgments: Judgments, policies: Sequence[str], prompts: int) -> Iterator[_Judged]:
    """The answers to the first prompts, prompt by prompt."""
    keys = dict.fromkeys(key for name in policies for key in judgments.groups[name])
    compared = {
        (name, pair[0].prompt_id, pair[0].sample): (preference, pair[1])
        for name, answers in judgments.compared.items()
        for pair, preference in zip(answers.pairs, answers.preferences, strict=True)
    }
    for key in islice(keys, prompts):
        for name in policies:
            scores = judgments.scores(name).get(key, [])
            for number, sample in enumerate(judgments.groups[name].get(key, [])):
                preference, opponent = compared.get((name, key, sample.sample), (None, None))
                score = scores[number] if number < len(scores) else None
                yield _Judged(name, sample, score, preference, opponent)


def _judged_answers(
    judgments: Judgments, policies: Sequence[str], judge: str, prompts: int
) -> Iterator[JudgedAnswer]:
    for item in _judged(judgments, policies, prompts):
        assessments: dict[str, tuple[float, str]] = {}
        if item.score is not None:
            assessments["score"] = (float(item.score), "")
        if item.preference is not None and item.opponent is not None:
            rationale = judgments.judge.rationale(item.sample, item.opponent)
            against = f"Against the answer of {judgments.baseline}: {item.opponent.answer}"
            assessments["preference"] = (float(item.preference), f"{rationale}\n\n{against}".strip())
        yield JudgedAnswer(
            policy=item.policy,
            prompt=item.sample.prompt_text,
            answer=item.sample.answer,
            judge=judge,
            assessments=assessments,
        )
