"""Win rates and diversity against worked examples and independent implementations."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from tbpo_ray.errors import InputError
from tbpo_ray.evaluation import (
    bradley_terry,
    distinct_n,
    length_controlled_win_rate,
    predictive_entropy,
    self_bleu,
    win_rate,
)


def test_importing_the_metrics_imports_neither_torch_nor_ray():
    code = (
        "import sys, tbpo_ray.evaluation; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_without_ties_the_interval_is_wilsons():
    got = win_rate([1] * 8 + [0] * 2)  # Wilson 95 % of 8 out of 10, as printed in any table
    assert (got.rate, got.n) == (0.8, 10)
    assert (got.low, got.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_with_only_ties_the_interval_is_tangos_and_not_a_point():
    n, z2 = 400, 3.8414588
    got = win_rate([0.5] * n)
    assert got.high - 0.5 == pytest.approx(z2 / (n + z2) / 2, rel=0.01)
    assert got.low == pytest.approx(1 - got.high)


@pytest.mark.parametrize("values", [[1.0] * 5, [0.0] * 5, [1.0], [0.5], [0.25, 0.75]])
def test_an_interval_contains_its_rate_and_is_in_range(values):
    got = win_rate(values)
    assert 0 <= got.low <= got.rate <= got.high <= 1
    assert got.high > got.low


@pytest.mark.parametrize("shares", [(0.3, 0.4, 0.3), (0.1, 0.8, 0.1), (0.7, 0.2, 0.1), (0.02, 0.0, 0.98)])
def test_the_interval_has_its_nominal_coverage(shares):
    rng = np.random.default_rng(0)
    truth = shares[0] + shares[1] / 2
    drawn = [win_rate(rng.choice([1, 0.5, 0], p=shares, size=400)) for _ in range(400)]
    assert 0.92 <= np.mean([r.low <= truth <= r.high for r in drawn]) <= 0.985


@pytest.mark.parametrize("bad", [[], [1.2], [-0.1], [math.nan], [[1]]])
def test_invalid_preferences_are_rejected(bad):
    with pytest.raises(InputError, match="preferences"):
        win_rate(bad)


def length_biased_judge(rng, n=400, effect=1.5, ties=0.1, advantage=0.0):
    candidate, baseline = rng.lognormal(6.0, 0.4, n), rng.lognormal(5.6, 0.4, n)
    delta = candidate - baseline
    wins = 1 / (1 + np.exp(-effect * np.tanh(delta / delta.std()) - advantage))
    y = (rng.random(n) < wins).astype(float)
    y[rng.random(n) < ties] = 0.5
    return y, candidate, baseline


def test_length_control_removes_a_length_bias():
    rng = np.random.default_rng(1)
    covered, biased = [], []
    for _ in range(100):
        y, candidate, baseline = length_biased_judge(rng)
        got, raw = length_controlled_win_rate(y, candidate, baseline), win_rate(y)
        covered.append(got.low <= 0.5 <= got.high)
        biased.append(raw.low > 0.5)
        assert got.length_effect > 0
    assert np.mean(covered) >= 0.9 and np.mean(biased) >= 0.9


def test_length_control_keeps_a_real_advantage_and_is_antisymmetric():
    y, candidate, baseline = length_biased_judge(np.random.default_rng(2), n=4000, ties=0.0, advantage=1.0)
    got = length_controlled_win_rate(y, candidate, baseline)
    assert got.low <= 1 / (1 + math.exp(-1.0)) <= got.high
    back = length_controlled_win_rate(1 - y, baseline, candidate)
    assert back.rate == pytest.approx(1 - got.rate, abs=1e-6)
    assert back.length_effect == pytest.approx(got.length_effect, abs=1e-5)


def test_length_control_agrees_with_an_independent_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    y, candidate, baseline = length_biased_judge(np.random.default_rng(3), ties=0.0)
    delta = candidate - baseline
    # scikit-learn has one penalty for all columns: a column a tenth as large is penalized a hundredfold.
    x = np.stack([np.ones_like(y), 0.1 * np.tanh(delta / delta.std(ddof=1))], axis=1)
    model = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y)
    got = length_controlled_win_rate(y, candidate, baseline)
    assert got.length_effect == pytest.approx(0.1 * model.coef_[0, 1], abs=1e-4)
    assert got.rate == pytest.approx(1 / (1 + math.exp(-model.coef_[0, 0])), abs=1e-5)


def test_candidates_that_are_always_short_keep_their_rank():
    rng = np.random.default_rng(5)
    baseline = 1900 * np.exp(rng.normal(0, 0.35, 805))
    strength = rng.normal(-1.0, 1.0, 40)
    rates = []
    for theta, typical in zip(strength, [350, 2000] * 20, strict=True):
        candidate = typical * np.exp(rng.normal(0, 0.35, 805))
        delta = candidate - baseline
        wins = rng.random(805) < 1 / (1 + np.exp(-theta - 0.8 * np.tanh(delta / delta.std())))
        rates.append(length_controlled_win_rate(wins.astype(float), candidate, baseline).rate)
    truth = 1 / (1 + np.exp(-strength))
    # Without a prior on the length effect the correlation is 0.80 and one rate is off by 0.35.
    assert stats.spearmanr(rates, truth).statistic > 0.87
    assert np.abs(np.asarray(rates) - truth).max() < 0.25


def test_with_equal_lengths_the_rate_is_the_raw_rate():
    y = [1, 1, 1, 0, 0.5] * 20
    got = length_controlled_win_rate(y, [7] * 100, [7] * 100)
    assert got.length_effect == 0.0
    assert got.rate == pytest.approx(0.7, abs=1e-3)
    assert (got.low, got.high) == pytest.approx((win_rate(y).low, win_rate(y).high), abs=0.01)


def test_instruction_difficulty_is_used_if_given():
    rng = np.random.default_rng(4)
    hard = rng.normal(size=2000)
    y = (rng.random(2000) < 1 / (1 + np.exp(-2 * hard))).astype(float)
    a, b = rng.lognormal(5, 0.3, 2000), rng.lognormal(5, 0.3, 2000)
    with_it = length_controlled_win_rate(y, a, b, difficulty=hard)
    without = length_controlled_win_rate(y, a, b)
    assert with_it.high - with_it.low < without.high - without.low


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_length_control_of_only_wins_or_losses_is_finite(value):
    got = length_controlled_win_rate([value] * 50, range(50), range(50, 100))
    assert 0 <= got.low <= got.rate <= got.high <= 1 and abs(got.rate - value) < 0.01


def test_lengths_must_match_the_preferences():
    with pytest.raises(InputError, match="baseline_lengths"):
        length_controlled_win_rate([1, 0], [1, 2], [1])


def test_bradley_terry_finds_the_order_and_the_strengths():
    rng = np.random.default_rng(5)
    truth = {"weak": -1.0, "middle": 0.0, "strong": 1.0}
    names = list(truth)
    games = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p = 1 / (1 + math.exp(truth[names[j]] - truth[names[i]]))
        games += [(i, j, float(rng.random() < p)) for _ in range(2000)]
    ranking = bradley_terry(names, games)
    assert [s.name for s in ranking] == ["strong", "middle", "weak"]
    assert sum(s.strength for s in ranking) == pytest.approx(0)
    for s in ranking:
        assert s.low <= truth[s.name] <= s.high and s.high - s.low < 0.25
    with pytest.raises(InputError, match="at least two"):
        bradley_terry(["a"], [])


def test_distinct_n_of_a_worked_example():
    assert distinct_n([[1, 2, 1], [1, 3]]) == 3 / 5
    assert distinct_n([[1, 2, 1], [1, 2]], n=2) == 2 / 3
    assert distinct_n([["a"], []], n=1) == 1.0
    assert math.isnan(distinct_n([["a"]], n=2))
    with pytest.raises(InputError):
        distinct_n([["a"]], n=0)


def test_self_bleu_agrees_with_sacrebleu():
    import sacrebleu

    rng = random.Random(0)
    words = [
        "the",
        "a",
        "cat,",
        "dog.",
        "sat",
        "on",
        "mat",
        "1,000",
        "3.5",
        "x-y",
        "7-8",
        "(hi)",
        "&quot;",
        "&lt;b&gt;",
        "don't!",
        "end",
    ]
    prompts = [
        [" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(rng.randint(2, 5))]
        for _ in range(100)
    ]
    scores = [
        sacrebleu.sentence_bleu(text, [other for j, other in enumerate(texts) if j != i]).score
        for texts in prompts
        for i, text in enumerate(texts)
    ]
    assert self_bleu(prompts) == pytest.approx(np.mean(scores) / 100, abs=1e-12)


def test_self_bleu_of_repeats_is_one_and_of_single_answers_nan():
    assert self_bleu([["a b c d e", "a b c d e"]]) == pytest.approx(1.0)
    assert self_bleu([["a b", "c d"]]) == 0.0
    assert math.isnan(self_bleu([["alone"]]))


def test_predictive_entropy_of_a_worked_example():
    assert predictive_entropy([[-1.0, -2.0], [-3.0]]) == pytest.approx(3.0)
    assert predictive_entropy([[-1.0, -2.0], [-3.0]], per_token=True) == pytest.approx(2.0)
    assert math.isnan(predictive_entropy([]))


def test_predictive_entropy_is_the_entropy_of_a_known_distribution():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    drawn = np.random.default_rng(6).choice(4, p=p, size=20000)
    assert predictive_entropy([[math.log(p[i])] for i in drawn]) == pytest.approx(
        -(p * np.log(p)).sum(), abs=0.02
    )
