"""The rows of the benchmark of methods, which others read from its JSON."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.methods import exact_quality, markdown
from tests.training.test_self_check import write_pairs


def test_quality_without_sampling_noise(small_model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", [(5, 1, 2), (4, 2, 3)], vocab=900)
    found = exact_quality(small_model, small_model, pairs)
    assert set(found) == {"expected_exact_match", "entropy", "kl"}
    assert found["kl"] == pytest.approx(0, abs=1e-6) and 0 < found["entropy"] <= math.log(1024)
    policy = tmp_path / "policy"
    model = AutoModelForCausalLM.from_pretrained(small_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(policy)
    assert exact_quality(str(policy), small_model, pairs)["kl"] > 1e-4


def test_the_table_shows_each_policy_once():
    def row(policy, seed, match):
        sampled = {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6}, "kl_k1": {"value": 0.1}}
        return {
            "policy": policy, "seed": seed, "beta": 0.1, "rate": 1e-6, "expected_exact_match": match,
            "kl": 0.2, "entropy": 1.0, "metrics": sampled,
        }  # fmt: skip

    lines = markdown(
        [row("sft", 0, 0.25), row("sft", 1, 0.75), row("dpo", 0, 0.5), row("dpo", 1, 0.5)]
    ).splitlines()
    assert lines[0].startswith(
        "| policy | exact match, seed 0 | exact match, seed 1 | expected exact match |"
    )
    (sft,) = [line for line in lines if line.startswith("| sft ")]
    assert "50.0 % [40.0, 60.0]" in sft and "0.500 [0.250, 0.750]" in sft
    assert sum(line.startswith("| dpo ") for line in lines) == 1
