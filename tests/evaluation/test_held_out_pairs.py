"""The implicit reward on pairs, and the credit of their tokens."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tbpo_ray.config.loading import load_config
from tbpo_ray.data.messages import answer_text
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation import token_credit as token_credit_module
from tbpo_ray.evaluation.credit import write_credit_map
from tbpo_ray.evaluation.held_out_pairs import (
    ScoredPair,
    _auc,
    credit_auc,
    damaged_tokens,
    implicit_rewards,
    read_pairs,
    score_pairs,
)
from tbpo_ray.evaluation.scoring import length_batches, load_scorer
from tbpo_ray.evaluation.token_credit import TokenCredit, token_credit
from tbpo_ray.models.baseline_head import save_state_baseline
from tbpo_ray.objectives import build_state_baseline
from tbpo_ray.training.scorer import PairScorer


@pytest.fixture(scope="module")
def pairs(tiny_model):
    config = load_config(
        None, ["evaluation.prompts=builtin:copyedit?split=test", "evaluation.max_prompts=40"]
    )
    return read_pairs(config, tiny_model)


def with_signal(pairs, value):
    """Pairs whose rejected tokens have log-ratio `value(damaged)`, each in a state with baseline 0.25."""
    return [
        ScoredPair(
            r,
            t,
            credit([0.0] * len(t.chosen_ids)),
            credit([value(m) for m in damaged_tokens(r, t, pairs.spec)]),
        )
        for r, t in zip(pairs.records, pairs.tokens, strict=True)
    ]


def credit(log_ratios, baseline=0.25):
    return TokenCredit(log_ratios, [baseline] * len(log_ratios))


def test_damage_is_marked_on_the_words_it_hit(pairs):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(pairs.spec.backend)
    for record, tokens in zip(pairs.records, pairs.tokens, strict=True):
        marks = damaged_tokens(record, tokens, pairs.spec)
        assert len(marks) == len(tokens.rejected_ids) and any(marks)
        spans = record.metadata["damage"]
        if all(stop > start for start, stop in spans):
            hit = [i for i, mark in zip(tokens.rejected_ids, marks, strict=True) if mark]
            words = " ".join(answer_text(record.rejected)[start:stop] for start, stop in spans)
            assert "".join(backend.decode(hit).split()) == "".join(words.split())
        else:
            assert marks[-1] and tokens.rejected_ids[-1] == pairs.spec.eos


def test_credit_is_scored_against_known_damage(pairs):
    assert credit_auc(with_signal(pairs, lambda m: -1.0 if m else 0.1), pairs.spec).value == 1.0
    assert credit_auc(with_signal(pairs, lambda m: 1.0 if m else 0.1), pairs.spec).value == 0.0
    rng = np.random.default_rng(0)
    chance = credit_auc(with_signal(pairs, lambda m: rng.normal()), pairs.spec)
    assert chance.low is not None and chance.high is not None
    assert chance.low <= 0.5 <= chance.high


def test_a_baseline_can_hide_or_reveal_damage(pairs):
    scored = [
        replace(
            pair,
            rejected=TokenCredit(
                [0.0] * len(pair.rejected.log_ratio),
                [-2.0 if mark else 0.0 for mark in damaged_tokens(pair.record, pair.tokens, pairs.spec)],
            ),
        )
        for pair in with_signal(pairs, lambda m: 0.0)
    ]
    assert credit_auc(scored, pairs.spec, "log_ratio").value == 0.5
    assert credit_auc(scored, pairs.spec, "advantage").value == 1.0


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """The tiny model with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def test_token_credit_agrees_with_full_distributions(pairs, tiny_model, other_model):
    from transformers import AutoModelForCausalLM

    found = token_credit(pairs.tokens, other_model, tiny_model, "cpu")
    models = [AutoModelForCausalLM.from_pretrained(m).eval() for m in (other_model, tiny_model)]
    for tokens, sides in list(zip(pairs.tokens, found, strict=True))[:5]:
        for ids, side in zip((tokens.chosen_ids, tokens.rejected_ids), sides, strict=True):
            rows = torch.tensor([[*tokens.prompt_ids, *ids]])
            with torch.no_grad():
                ours, theirs = (
                    m(rows).logits[0, len(tokens.prompt_ids) - 1 : -1].log_softmax(-1) for m in models
                )
            label = torch.tensor(ids)[:, None]
            ratio = (ours - theirs).gather(1, label)[:, 0]
            kl = (theirs.exp() * (theirs - ours)).sum(-1)
            assert side.log_ratio == pytest.approx(ratio.tolist(), abs=1e-4)
            assert side.baseline == pytest.approx(kl.tolist(), abs=1e-4)
            # The advantage is the log-ratio minus its mean under the reference.
            mean = (theirs.exp() * (ours - theirs)).sum(-1)
            assert side.advantage == pytest.approx((ratio - mean).tolist(), abs=1e-4)


def test_policy_and_reference_take_turns_on_the_device(pairs, tiny_model, other_model, monkeypatch):
    """`cpu:0` stands for the device, `cpu` for the host."""
    present: set[int] = set()
    most, moves, move = [], [], PairScorer.to

    def follow(scorer, device):
        (present.add if str(device) == "cpu:0" else present.discard)(id(scorer))
        most.append(len(present))
        moves.append(str(device))
        return move(scorer, device)

    monkeypatch.setattr(PairScorer, "to", follow)
    monkeypatch.setattr(token_credit_module, "load_scorer", lambda model, *_: load_scorer(model, "cpu"))
    monkeypatch.setattr(token_credit_module, "TURN_BATCHES", 1)
    monkeypatch.setattr(token_credit_module, "length_batches", lambda sizes: length_batches(sizes, 400))
    in_turns = token_credit(pairs.tokens, other_model, tiny_model, "cpu:0")
    assert max(most) == 1 and moves.count("cpu:0") >= 4 and present == set()
    monkeypatch.undo()
    for found, plain in zip(
        in_turns, token_credit(pairs.tokens, other_model, tiny_model, "cpu"), strict=True
    ):
        for side, expected in zip(found, plain, strict=True):
            assert side.log_ratio == pytest.approx(expected.log_ratio, abs=1e-5)
            assert side.baseline == pytest.approx(expected.baseline, abs=1e-5)


@pytest.mark.parametrize(("kind", "width"), [("learned", 16), ("learned", 0), ("mixed", 8)])
def test_a_learned_baseline_is_loaded_with_the_policy(pairs, tiny_model, other_model, tmp_path, kind, width):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    shutil.copytree(other_model, tmp_path / "policy")
    hidden = AutoModelForCausalLM.from_pretrained(tiny_model).config.hidden_size
    head = build_state_baseline({"kind": kind, "hidden": width}, hidden)
    assert head is not None
    torch.nn.init.constant_(head.get_parameter(f"head.{2 if width else 0}.bias"), 0.75)
    if kind == "mixed":
        torch.nn.init.constant_(head.get_parameter("gate.0.bias"), 50.0)  # all learned
    save_state_baseline(tmp_path / "policy", head.state_dict(), kind, width)
    assert set(load_file(tmp_path / "policy" / "state_baseline" / "model.safetensors")) == set(
        head.state_dict()
    )
    plain = token_credit(pairs.tokens, other_model, tiny_model, "cpu")
    with_head = token_credit(pairs.tokens, str(tmp_path / "policy"), tiny_model, "cpu")
    for (a, _), (b, _) in zip(plain, with_head, strict=True):
        assert a.log_ratio == b.log_ratio
        assert b.baseline == pytest.approx([0.75] * len(b.baseline), abs=1e-6)


def test_the_auc_agrees_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    marks, signal = rng.random(200) < 0.3, rng.integers(0, 9, 200).astype(float)
    assert _auc(signal, marks) == pytest.approx(roc_auc_score(marks, signal))
    assert math.isnan(_auc(signal, np.zeros(200, dtype=bool)))


def test_a_policy_equal_to_its_reference_has_zero_reward(pairs, tiny_model):
    scored = score_pairs(pairs, tiny_model, tiny_model)
    for side in [side for pair in scored for side in (pair.chosen, pair.rejected)]:
        assert set(side.log_ratio) == {0.0}
        assert side.baseline == pytest.approx([0.0] * len(side.baseline), abs=1e-6)
    got = implicit_rewards(scored, beta=0.1, truncate_to_shorter=True)
    assert got["implicit_accuracy"].value == 0.5 and got["implicit_margin"].value == 0.0


def test_implicit_rewards_of_a_worked_example(pairs):
    pair = ScoredPair(pairs.records[0], pairs.tokens[0], credit([1.0, 1.0, -9.0]), credit([0.5, 0.5]))
    truncated = implicit_rewards([pair], beta=0.1, truncate_to_shorter=True)
    assert truncated["implicit_margin"].value == pytest.approx(0.1)
    whole = implicit_rewards([pair], beta=0.1, truncate_to_shorter=False)
    assert whole["implicit_margin"].value == pytest.approx(-0.8)


def test_the_map_is_self_contained_and_shows_every_policy(pairs, tmp_path):
    scored = {"a": with_signal(pairs, lambda m: -1.0 if m else 0.1), "b": with_signal(pairs, lambda m: 0.0)}
    aucs = {
        name: [credit_auc(group, pairs.spec, s) for s in ("log_ratio", "advantage")]
        for name, group in scored.items()
    }
    write_credit_map(tmp_path / "credit.html", scored, pairs.spec, aucs, 3)
    text = (tmp_path / "credit.html").read_text()
    assert text.count("<section>") == 3 and text.count("b, rejected") == 3
    assert "<script" not in text and "http" not in text
    assert "advantage -0.7500, log-ratio -1.0000, baseline +0.2500 nats, damaged" in text
    for quantity in ("advantage", "log_ratio", "baseline"):
        assert f"#by-{quantity}:checked" in text and f"--{quantity}: rgba(" in text


def test_pairs_without_known_damage_are_rejected(pairs):
    bare = [replace(p, record=replace(p.record, metadata={})) for p in with_signal(pairs, lambda m: 0.0)]
    with pytest.raises(InputError, match=r"evaluation\.credit_pairs.*builtin:copyedit"):
        credit_auc(bare, pairs.spec)
