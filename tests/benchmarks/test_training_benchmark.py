"""The training benchmarks run, and their figures make sense."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import growth, overhead, reference, scaling, training
from benchmarks.bare_loop import FullLogitsScorer
from benchmarks.measure import Measured, ratio, run_in_rounds
from benchmarks.pairs import TINY, Size, build_case, build_model, sample_lengths
from benchmarks.platform_loop import WorkerClock
from benchmarks.tables import goal_cell
from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.errors import InputError
from tbpo_ray.training.batch import collate


@pytest.mark.e2e
def test_quick_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(training.TRL_PYTHON, raising=False)
    result = training.run(Config(), quick=True)
    case = json.loads(json.dumps(result))["cases"]["hh_rlhf"]
    for variant in ("TBPO-A", "all off"):
        (row,) = case["variants"][variant]
        assert row["pairs_per_second"] == pytest.approx(case["pairs"] / row["seconds"])
        assert len(row["step_seconds"]) == 2 and 0 < row["cpu_seconds"] < 2 * row["seconds"] + 1
        assert row["peak_bytes"] > 0
    both = case["variants"]
    off = case["ratios"]["all off"]
    assert off["speed"]["ratio"] == both["all off"][0]["seconds"] / both["TBPO-A"][0]["seconds"]
    text = training.markdown(result)
    assert "| all off |" in text and "TRL was not measured" in text and result["trl"] is None


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_growth_run() -> None:
    result = json.loads(json.dumps(growth.run(Config(), quick=True)))
    assert [row["size"] for row in result["length"]] == list(growth.QUICK_ANSWERS)
    for row in (*result["length"], *result["vocabulary"]):
        for variant in (growth.OURS, growth.PLAIN):
            assert row["variants"][variant][0]["seconds"] > 0
    small, large = (row["variants"][growth.PLAIN][0]["peak_bytes"] for row in result["vocabulary"])
    assert large > small
    text = growth.markdown(result)
    assert "| tokens of each answer |" in text and "| 4,096 |" in text


@pytest.mark.e2e
def test_quick_growth_of_pairs(ray_session) -> None:
    result = json.loads(json.dumps(growth.run(Config(), quick=True, only="pairs")))
    assert [row["pairs"] for row in result["pairs"]] == list(growth.QUICK_FILES)
    for row in result["pairs"]:
        assert row["cpu_seconds"] > 0 and row["order_seconds"] > 0 and row["peak_worker_bytes"] > 2**20
    text = growth.markdown(result)
    assert "| 400 |" in text and "time grows with the power" in text


def test_an_exponent_is_the_slope() -> None:
    assert growth.exponent([1, 2, 4], [5, 7, 28]) == pytest.approx(2)


def test_an_unknown_case_is_named() -> None:
    with pytest.raises(InputError, match="training:hh_rlfh"):
        training.run(Config(), only="hh_rlfh")
    with pytest.raises(InputError, match="growth:pair"):
        growth.run(Config(), only="pair")


def test_lengths_follow_the_measured_ones() -> None:
    lengths = sample_lengths("hh_rlhf", 2000)
    assert lengths.mean(axis=0) == pytest.approx([112, 39, 49], rel=0.03)
    assert np.minimum(lengths[:, 1], lengths[:, 2]).mean() == pytest.approx(27.3, rel=0.05)
    answers = sample_lengths("ultrafeedback", 16)[:, 1:]
    assert answers.min() >= 150 and answers.max() <= 600 and answers.mean() == pytest.approx(375, rel=0.01)


def test_the_ids_for_trl_are_the_pairs_in_random_order(tmp_path: Path) -> None:
    case = build_case(Config(), tmp_path, sample_lengths("hh_rlhf", 16), TINY)
    rows = json.loads(training._write_ids(case, tmp_path / "ids.json").read_text())
    found = sorted([len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for row in rows)
    assert found == sorted(case.prepared.lengths().tolist())
    assert [len(row["prompt_ids"]) for row in rows] != case.prepared.lengths()[:, 0].tolist()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [TINY, replace(TINY, layers=6, gemma_head=32)], ids=["llama", "gemma"])
def test_full_logits_give_the_same_scores(tmp_path: Path, size: Size, shared: bool) -> None:
    from tbpo_ray.models.load import load_model
    from tbpo_ray.training.scorer import PairScorer

    build_model(tmp_path, size)
    model = load_model(str(tmp_path), dtype=torch.float32, attention="sdpa")
    assert type(model).__name__ == ("LlamaForCausalLM" if size is TINY else "Gemma3ForCausalLM")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(9, 1000, n) for n in (5, 11)]
    answers = [[rng.integers(9, 1000, n) for n in sizes] for sizes in ((4, 9), (7, 3))]
    batch = collate(prompts, answers, pad_id=0, shared=shared, truncate_to_shorter=False)
    ours, plain = PairScorer(model)(batch)[0], FullLogitsScorer(model)(batch)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_rounds_and_ratios() -> None:
    order: list[str] = []

    def measure(name: str, seconds: float) -> Measured:
        order.append(name)
        return {"seconds": seconds}

    found = run_in_rounds({"a": partial(measure, "a", 2.0), "b": partial(measure, "b", 1.0)}, 2)
    assert order == ["a", "b", "a", "b"]
    assert ratio(found["a"], found["b"], "seconds") == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    assert goal_cell(2.0, 1.5) == "at least 1.5: reached"
    assert goal_cell(2.0, 1.5, at_most=True).endswith("missed")


def test_cached_scores_count_their_cost() -> None:
    row = {
        "pairs": 8,
        "parameters": 1,
        "machine": {"processor": "p", "cores": 2, "load": 0.0, "versions": {}},
    }
    variants = {
        "scoring": [{"seconds": 1.0, "cpu_seconds": 1.0}],
        "cached": [{"seconds": 3.0, "cpu_seconds": 3.0}],
        "live": [{"seconds": 4.0, "cpu_seconds": 4.0}],
    }
    ratios = reference.epoch_ratios(variants)
    assert ratios[1]["time"]["ratio"] == 1.0 and ratios[3]["time"]["ratio"] == 1.2
    assert "at least 1.1: missed" in reference.markdown({**row, "variants": variants, "ratios": ratios})


def test_the_second_epoch_is_what_counts() -> None:
    row = {"step_seconds": [9.0, 9.0, 1.0, 2.0], "step_cpu_seconds": [9.0, 9.0, 2.0, 4.0], "seconds": 21.0}
    assert reference.last_epoch(row) == {"seconds": 3.0, "cpu_seconds": 6.0}


def test_cpu_seconds_between_steps_are_of_processes_seen_at_both(tmp_path: Path) -> None:
    clock = WorkerClock(tmp_path / "timings.jsonl")
    clock.seen = [(1, {7: 1.0}, {1: 1.0}), (2, {7: 3.0}, {1: 2.0, 2: 5.0}), (4, {7: 9.0}, {1: 4.0, 3: 8.0})]
    assert clock.between(2, 4) == (6.0, 2.0)
    assert clock.between(3, 4) == (0.0, 0.0)
    with pytest.raises(RuntimeError, match="no worker was seen between steps 2 and 5"):
        clock.between(2, 5)


@pytest.mark.e2e
def test_quick_overhead_run() -> None:
    result = overhead.run(Config(), quick=True)
    assert result["steps"] == 4 and len(result["threads"]) == min(2, result["machine"]["cores"])
    for found in result["threads"].values():
        assert found["ratio"]["ratio"] > 0 and found["cpu_ratio"]["ratio"] > 0
        for variant in (overhead.PLATFORM, overhead.BARE):
            assert len(found["variants"][variant][0]["step_seconds"]) >= result["steps"]
    assert "| worker loop, s/step |" in overhead.markdown(result)


def test_the_overhead_compares_the_same_steps() -> None:
    platform = [{"step_seconds": [2.0, 6.0], "worker_cpu_seconds": 9.0}]
    bare = [{"step_seconds": [100.0, 1.0, 3.0], "step_cpu_seconds": [100.0, 1.0, 2.0]}]
    found = overhead.compare(platform, bare, 2)
    assert found["ratio"]["ratio"] == 2.0 and found["cpu_ratio"]["ratio"] == 3.0


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_scaling_run() -> None:
    result = scaling.run(Config(), quick=True)
    assert result["steps"] == 4 and result["ratio"]["ratio"] > 0 and result["cpu_share"]["ratio"] > 0
    assert result["machine_allows"]["low"] > 0 and set(result["variants"]) == {"1 worker", "2 workers"}
    assert "2 workers, tokens/s" in scaling.markdown(result)


def test_the_bound_of_distributing_pairs_across_ranks() -> None:
    lengths = np.array([[10, 5, 5]] * 3 + [[100, 50, 50]])
    schedule = Schedule(
        lengths, seed=0, pairs_per_step=4, micro_batch_pairs=1, max_steps=3, truncate_to_shorter=True
    )
    # With two pairs each, one rank gets rows of 200 + 24 tokens and the other 24 + 24.
    assert scaling.distribution_bound(schedule) == pytest.approx(272 / 224)
