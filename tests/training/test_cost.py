"""The cost of a run from what it left: timings, the log of scorings, and the scores that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tbpo_ray.training.cost import RunCost, measure_cost, read_cost
from tbpo_ray.training.reference_scores import SCORINGS


def write_timings(run: Path, steps: list[int]) -> None:
    rows = [{"step": s, "step_seconds": 2.0, "tokens_per_second": 50.0} for s in steps]
    (run / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')


def write_scores(cache: Path) -> list[str]:
    scored = [("reference-a", 10, 3.0), ("reference-b", 10, 4.0), ("reference-c", 99, 50.0)]
    lines = [json.dumps({"folder": f, "pairs": p, "seconds": s}) + "\n" for f, p, s in scored]
    (cache / SCORINGS).write_text("".join(lines))
    weights = cache / "weights-x"
    weights.mkdir()
    (weights / "manifest.json").write_text(json.dumps({"scores": ["reference-a", "reference-b"]}))
    return [str(cache / "reference-a"), str(weights)]


def test_repeated_steps_and_the_scores_that_were_read_count(tmp_path):
    write_timings(tmp_path, [1, 2, 2, 3])
    cost = measure_cost(tmp_path, tmp_path, write_scores(tmp_path), steps=3, pairs=24)
    assert cost == RunCost(3, 24, tokens=400, seconds=8.0, scored_pairs=20, scoring_seconds=7.0)
    cost.save(tmp_path)
    assert read_cost(tmp_path) == cost


def test_a_row_of_several_steps_stands_for_all_of_them(tmp_path):
    write_timings(tmp_path, [2, 4])
    cost = measure_cost(tmp_path, tmp_path, [], steps=4, pairs=8)
    assert (cost.seconds, cost.tokens, cost.scored_pairs) == (pytest.approx(8.0), 400, 0)


def test_a_run_of_an_older_version(tmp_path):
    write_timings(tmp_path, [1, 2])
    rows = [{"step": step, "pairs_seen": 8 * step, "loss": 1.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_cost(tmp_path) == RunCost(2, 16, tokens=200, seconds=4.0)


def test_a_run_without_timings_or_stored_cost(tmp_path):
    assert measure_cost(tmp_path, tmp_path, [], steps=2, pairs=8).seconds == 0
    assert read_cost(tmp_path) is None
