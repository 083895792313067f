"""The settings and results of lm-eval."""

from __future__ import annotations

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.harness import BenchmarkSettings, benchmark_settings, estimates


def test_the_leaderboard_suite_has_its_few_shot_numbers():
    plan = BenchmarkSettings(suite="open_llm_leaderboard_v1", shots={"gsm8k": 0}, tasks=["mine"]).plan()
    assert plan["arc_challenge"] == 25 and plan["mmlu"] == 5 and len(plan) == 7
    assert plan["gsm8k"] == 0 and plan["mine"] is None


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        ("{suite: other}", "suite=other"),
        ("{tasks: [a], shots: {b: 1}}", "shots.b"),
        ("{speed: 1}", "benchmarks.speed"),
        ("{limit: 3}", r"evaluation\.benchmarks: .*tasks"),
    ],
)
def test_invalid_settings_are_rejected(benchmarks, message):
    with pytest.raises(InputError, match=message):
        benchmark_settings(load_config(None, [f"evaluation.benchmarks={benchmarks}"]))
    assert benchmark_settings(load_config(None, [])) is None


def test_results_become_estimates_with_intervals():
    results = {
        "t": {
            "alias": "t",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": "N/A",
            "sample_len": 30,
        }
    }
    metrics = estimates(results)
    assert metrics["bench/t/acc"].low == pytest.approx(0.304, abs=1e-3)
    assert metrics["bench/t/exact_match/strict"].low is None
    assert set(metrics) == {"bench/t/acc", "bench/t/exact_match/strict"}
