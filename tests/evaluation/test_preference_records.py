"""Judged answers become preference records that training reads."""

from __future__ import annotations

import json
from pathlib import Path

from tbpo_ray.data.records import BadRecord, Prompt, ReadOptions, iter_prompts, iter_records
from tbpo_ray.evaluation.judgments import ComparedAnswers
from tbpo_ray.evaluation.preference_records import FILE, write_records
from tbpo_ray.evaluation.prompts import PromptSet

TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]


def written(tmp_path: Path, make_sample, verdicts: list[float | None]) -> tuple[list[dict], dict[str, int]]:
    """Records of one prompt for each verdict; `a` is the candidate's answer, `b` the baseline's."""
    prompts = [
        Prompt([{"role": "user", "content": f"question {i}"}], {"topic": i}, tools=TOOLS if i else None)
        for i in range(len(verdicts))
    ]
    pairs = [(make_sample(i, f"a{i}"), make_sample(i, f"b{i}")) for i in range(len(verdicts))]
    compared = {"new": ComparedAnswers(pairs, verdicts)}
    counts = write_records(tmp_path, PromptSet("prompts.jsonl", prompts), compared, "old")
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines()]
    return rows, dict(counts)


def answers(row: dict) -> list[str]:
    return [row[side][-1]["content"] for side in ("chosen", "rejected")]


def test_the_preferred_answer_is_chosen_and_a_tie_is_marked(tmp_path: Path, make_sample) -> None:
    rows, counts = written(tmp_path, make_sample, [1.0, 0.0, 0.5, 0.75, 0.25, None])
    assert [answers(row) for row in rows] == [
        ["a0", "b0"],
        ["b1", "a1"],
        ["a2", "b2"],
        ["a3", "b3"],
        ["b4", "a4"],
    ]
    assert [row.get("tie", False) for row in rows] == [False, False, True, False, False]
    assert counts == {"pairs": 5, "ties": 1, "unjudged": 1}
    assert "tools" not in rows[0] and rows[1]["tools"] == TOOLS
    assert rows[3]["metadata"] == {
        "topic": 3, "policy": "new", "baseline": "old", "preference": 0.75, "sample": 0
    }  # fmt: skip


def test_answers_that_teach_nothing_are_left_out(tmp_path: Path, make_sample) -> None:
    prompt = Prompt([{"role": "user", "content": "question"}])
    pairs = [
        (make_sample(0, "same"), make_sample(0, "same")),
        (make_sample(0, "cut", finish_reason="length"), make_sample(0, "whole")),
        (make_sample(0, "good"), make_sample(0, "bad")),
    ]
    compared = {"new": ComparedAnswers(pairs, [0.5, 1.0, 1.0])}
    counts = write_records(tmp_path, PromptSet("p", [prompt]), compared, "old")
    assert counts == {"pairs": 1, "equal": 1, "truncated": 1}


def test_training_reads_the_records(tmp_path: Path, make_sample) -> None:
    written(tmp_path, make_sample, [1.0, 0.0, 0.5])
    bad: list[BadRecord] = []
    file = str(tmp_path / FILE)
    records = list(iter_records(file, None, bad.append, options=ReadOptions(keep_ties=True)))
    assert not bad
    assert [record.tie for record in records] == [False, False, True]
    assert [(r.chosen[-1]["content"], r.rejected[-1]["content"]) for r in records] == [
        ("a0", "b0"), ("b1", "a1"), ("a2", "b2"),
    ]  # fmt: skip
    assert records[1].tools == TOOLS
    assert [prompt.prompt[0]["content"] for prompt in iter_prompts(file, None, bad.append)] == [
        f"question {i}" for i in range(3)
    ]
