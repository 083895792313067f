"""The policy's own reward on pairs, and which tokens it credits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tbpo_ray.configuration import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.credit import write_credit_map
from tbpo_ray.evaluation.pairs import (
    ScoredPair,
    _auc,
    credit_auc,
    damaged_tokens,
    implicit_rewards,
    read_pairs,
    score_pairs,
)


@pytest.fixture(scope="module")
def pairs(tiny_model):
    config = load_config(
        None, ["evaluation.prompts=builtin:copyedit?split=test", "evaluation.max_prompts=40"]
    )
    return read_pairs(config, tiny_model)


def with_signal(pairs, value):
    """Pairs whose rejected tokens have log-ratio `value(damaged)`."""
    return [
        ScoredPair(r, t, [0.0] * len(t.chosen_ids), [value(m) for m in damaged_tokens(r, t, pairs.spec)])
        for r, t in zip(pairs.records, pairs.tokens, strict=True)
    ]


def test_damage_is_marked_on_the_words_it_hit(pairs):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(pairs.spec.backend)
    for record, tokens in zip(pairs.records, pairs.tokens, strict=True):
        marks = damaged_tokens(record, tokens, pairs.spec)
        assert len(marks) == len(tokens.rejected_ids) and any(marks)
        spans = record.metadata["damage"]
        if all(stop > start for start, stop in spans):
            hit = [i for i, mark in zip(tokens.rejected_ids, marks, strict=True) if mark]
            words = " ".join(record.rejected[start:stop] for start, stop in spans)
            assert "".join(backend.decode(hit).split()) == "".join(words.split())
        else:
            assert marks[-1] and tokens.rejected_ids[-1] == pairs.spec.eos


def test_credit_is_scored_against_the_truth(pairs):
    assert credit_auc(with_signal(pairs, lambda m: -1.0 if m else 0.1), pairs.spec).value == 1.0
    assert credit_auc(with_signal(pairs, lambda m: 1.0 if m else 0.1), pairs.spec).value == 0.0
    rng = np.random.default_rng(0)
    chance = credit_auc(with_signal(pairs, lambda m: rng.normal()), pairs.spec)
    assert chance.low <= 0.5 <= chance.high


def test_the_auc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    marks, signal = rng.random(200) < 0.3, rng.integers(0, 9, 200).astype(float)
    assert _auc(signal, marks) == pytest.approx(roc_auc_score(marks, signal))
    assert math.isnan(_auc(signal, np.zeros(200, dtype=bool)))


def test_a_policy_that_is_its_reference_has_no_opinion(pairs, tiny_model):
    scored = score_pairs(pairs, tiny_model, tiny_model)
    assert all(value == 0.0 for pair in scored for value in (*pair.chosen, *pair.rejected))
    got = implicit_rewards(scored, beta=0.1, compared_only=True)
    assert got["implicit_accuracy"].value == 0.5 and got["implicit_margin"].value == 0.0


def test_rewards_by_hand(pairs):
    pair = ScoredPair(pairs.records[0], pairs.tokens[0], [1.0, 1.0, -9.0], [0.5, 0.5])
    assert implicit_rewards([pair], beta=0.1, compared_only=True)["implicit_margin"].value == pytest.approx(
        0.1
    )
    assert implicit_rewards([pair], beta=0.1, compared_only=False)["implicit_margin"].value == pytest.approx(
        -0.8
    )


def test_the_map_is_self_contained_and_shows_every_policy(pairs, tmp_path):
    scored = {"a": with_signal(pairs, lambda m: -1.0 if m else 0.1), "b": with_signal(pairs, lambda m: 0.0)}
    aucs = {name: credit_auc(group, pairs.spec) for name, group in scored.items()}
    write_credit_map(tmp_path / "credit.html", scored, pairs.spec, aucs, 3)
    text = (tmp_path / "credit.html").read_text()
    assert text.count("<section>") == 3 and text.count("b, rejected") == 3
    assert "<script" not in text and "http" not in text and "-1.0000 nats, damaged" in text


def test_pairs_without_known_damage_have_no_credit_score(pairs):
    bare = [replace(p, record=replace(p.record, metadata={})) for p in with_signal(pairs, lambda m: 0.0)]
    with pytest.raises(InputError, match="no known damage"):
        credit_auc(bare, pairs.spec)
