"""Judged answers as MLflow traces with assessments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tbpo_ray.errors import RunFailedError, first_line
from tbpo_ray.redaction import redact_text
from tbpo_ray.tracking.store import Store

POLICY_TAG = "tbpo.policy"
_ASYNCHRONOUS = "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer of a policy and what a judge says about it."""

    policy: str
    prompt: str
    answer: str
    judge: str
    assessments: Mapping[str, tuple[float, str]]
    """Name to value and rationale; the rationale may be empty."""


def log_traces(store: Store, run_id: str, answers: Sequence[JudgedAnswer], judge_is_model: bool) -> None:
    """Log every answer as a trace of the run; nothing if the run has traces already.

    Args:
        judge_is_model: whether the assessments come from a language model, and not from code.

    Raises:
        RunFailedError: the store does not accept traces.
    """
    from mlflow.exceptions import MlflowException

    try:
        if store.client.search_traces(
            locations=[store.experiment_id], run_id=run_id, max_results=1, include_spans=False
        ):
            return
        with _global_uri(store.uri):
            for answer in answers:
                _log_trace(store, run_id, answer, judge_is_model)
    except (MlflowException, OSError) as error:
        raise RunFailedError(
            f"tracking.uri={redact_text(store.uri)}: traces could not be logged: "
            f"{redact_text(first_line(error))}; set evaluation.traces=0"
        ) from error


def _log_trace(store: Store, run_id: str, answer: JudgedAnswer, judge_is_model: bool) -> None:
    import mlflow
    from mlflow.entities import AssessmentSource, AssessmentSourceType

    span = store.client.start_trace(
        answer.policy,
        span_type="LLM",
        inputs={"messages": [{"role": "user", "content": answer.prompt}]},
        tags={POLICY_TAG: answer.policy},
        experiment_id=store.experiment_id,
        run_id=run_id,
    )
    outputs = {"choices": [{"message": {"role": "assistant", "content": answer.answer}}]}
    store.client.end_trace(span.trace_id, outputs=outputs)
    kind = AssessmentSourceType.LLM_JUDGE if judge_is_model else AssessmentSourceType.CODE
    for name, (value, rationale) in answer.assessments.items():
        mlflow.log_feedback(
            trace_id=span.trace_id,
            name=name,
            value=value,
            rationale=rationale or None,
            source=AssessmentSource(source_type=kind, source_id=answer.judge),
        )


@contextmanager
def _global_uri(uri: str) -> Iterator[None]:
    """Point MLflow's global client at a store: traces have no client of their own. Exports are awaited."""
    import mlflow

    is_set: Any = mlflow.is_tracking_uri_set
    set_uri: Any = mlflow.set_tracking_uri  # None unsets it, in the environment too
    before = mlflow.get_tracking_uri() if is_set() else None
    was_asynchronous = os.environ.get(_ASYNCHRONOUS)
    os.environ[_ASYNCHRONOUS] = "false"
    set_uri(uri)
    try:
        yield
    finally:
        set_uri(before)
        if was_asynchronous is None:
            del os.environ[_ASYNCHRONOUS]
        else:
            os.environ[_ASYNCHRONOUS] = was_asynchronous
