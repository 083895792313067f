"""Judged answers in MLflow: the evaluation table, and traces with assessments."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pandas as pd

from tbpo_ray.config.schema import TrackingConfig
from tbpo_ray.evaluation.judge import Judge, ScoringJudge
from tbpo_ray.evaluation.judgments import Judgments
from tbpo_ray.evaluation.sample_table import TABLE, log_samples, table_rows
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict
from tbpo_ray.generation.samples import Sample
from tbpo_ray.tracking.tracker import Tracker


def sample(prompt: str, answer: str) -> Sample:
    return Sample(prompt, 0, f"prompt {prompt}", [1], answer, [5, 2], [-0.1, -0.2], "stop", {}, "")


class Length(ScoringJudge):
    kind, score_name = "checker", "length"

    def scores(self, samples):
        return [float(len(item.answer)) for item in samples]


class Talking(Judge):
    kind = "llm"

    def preferences(self, candidate, baseline):
        return [1.0 if "b" in item.answer else None for item in candidate]

    def rationale(self, candidate, baseline):
        return f"{candidate.answer} is better than {baseline.answer}"


GROUPS = {
    "sft": {"p0": [sample("p0", "a")], "p1": [sample("p1", "aa")]},
    "tbpo": {"p0": [sample("p0", "bb")], "p1": [sample("p1", "c")]},
}


def judged(judge: Judge) -> Judgments:
    judgments = Judgments(judge, GROUPS, "sft")
    for name in GROUPS:
        judgments.compare_with_baseline(name)
    return judgments


def verdict(kind: str) -> Verdict:
    policies = [PolicyVerdict(name, "/m", 2, 0, {}) for name in GROUPS]
    return Verdict(policies, "sft", "/m", {"kind": kind}, {"source": "x", "digest": "d", "rows": 2})


def test_rows_have_scores_and_preferences_prompt_by_prompt():
    rows = table_rows(judged(Length()), ["sft", "tbpo"])
    assert [(r["prompt"], r["policy"], r["answer"], r["score"], r["preference"]) for r in rows] == [
        ("prompt p0", "sft", "a", 1.0, None),
        ("prompt p0", "tbpo", "bb", 2.0, 1.0),
        ("prompt p1", "sft", "aa", 2.0, None),
        ("prompt p1", "tbpo", "c", 1.0, 0.0),
    ]
    assert rows[0]["tokens"] == 2 and rows[0]["finish_reason"] == "stop"
    assert len(table_rows(judged(Length()), ["sft", "tbpo"], prompts=1)) == 2


def test_the_table_is_logged_as_mlflow_reads_it(tmp_path: Path):
    with Tracker.start(TrackingConfig(), tmp_path, name="e", kind="evaluate") as tracker:
        log_samples(tracker, verdict("checker"), judged(Length()), traces=0)
        log_samples(tracker, verdict("checker"), judged(Length()), traces=0)  # a resumed evaluation
    client = tracker._client
    file = client.download_artifacts(tracker.run_id, TABLE)
    table = pd.read_json(Path(file), orient="split")  # as MLflow's own `load_table` does
    assert list(table["answer"]) == ["a", "bb", "aa", "c"]
    tags = client.get_run(tracker.run_id).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": TABLE, "type": "table"}]
    assert not client.search_traces(locations=[tracker.experiment_id])


def test_traces_have_the_judge_its_verdict_and_its_reasons(tmp_path: Path):
    before = mlflow.get_tracking_uri()
    with Tracker.start(TrackingConfig(), tmp_path, name="e", kind="evaluate") as tracker:
        for _ in range(2):  # once per run, though an evaluation may be repeated
            log_samples(tracker, verdict("llm"), judged(Talking()), traces=1)
    assert mlflow.get_tracking_uri() == before
    traces = tracker._client.search_traces(locations=[tracker.experiment_id], run_id=tracker.run_id)
    by_policy = {trace.info.tags["tbpo.policy"]: trace for trace in traces}
    assert sorted(by_policy) == ["sft", "tbpo"] and len(traces) == 2
    assert not by_policy["sft"].info.assessments
    trace = by_policy["tbpo"]
    assert trace.data.spans[0].inputs["messages"][0]["content"] == "prompt p0"
    assert trace.data.spans[0].outputs["choices"][0]["message"]["content"] == "bb"
    (assessment,) = trace.info.assessments
    assert (assessment.name, assessment.value) == ("preference", 1.0)
    assert assessment.source.source_type == "LLM_JUDGE" and assessment.source.source_id == "llm"
    assert "bb is better than a" in assessment.rationale and "answer of sft: a" in assessment.rationale
