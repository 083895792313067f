"""Layouts and scores: shared prompt equals separate rows, and both equal the plain formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Lfm2Config,
    LlamaForCausalLM,
    RwkvConfig,
)

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.objectives import MixedBaseline, build_objective
from tbpo_ray.training.batch import collate
from tbpo_ray.training.run_plan import check_shared_prompt, resolve_run
from tbpo_ray.training.scorer import PairScorer, to_scores
from tbpo_ray.training.step import PreferenceStep
from tests.device.step_cases import VOCAB, llama
from tests.training.layout_checks import (
    MODELS,
    attention,
    check_gradients_agree,
    check_plain_scores,
    pairs,
)

__all__ = ["attention"]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.usefixtures("attention")
def test_scores_equal_the_plain_formula(make, shared):
    check_plain_scores(make().eval(), shared=shared)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradients_agree_between_layouts(make, checkpointed):
    layouts = [{"shared": shared, "truncate_to_shorter": False} for shared in (True, False)]
    check_gradients_agree(make, layouts, checkpointed=checkpointed)


@pytest.mark.parametrize("name", ["tbpo_q", "tbpo_a"])
def test_truncation_changes_nothing(name):
    """Truncating to the shorter answer changes neither loss nor gradient of a TBPO objective."""
    objective = build_objective({"name": name, "state_baseline": {"kind": "k3"}})
    prompts, answers = pairs(6, seed=3)
    losses, grads = [], []
    for cut in (True, False):
        model: Any = llama()
        reference = PairScorer(perturbed_llama()).eval()
        step = PreferenceStep(objective, None, reference)
        batch = collate(prompts, answers, pad_id=0, shared=True, truncate_to_shorter=cut)
        loss, _ = step(PairScorer(model), batch)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert int(collate(prompts, answers, pad_id=0, shared=True, truncate_to_shorter=True).mask.sum()) < sum(
        len(a) for side in answers for a in side
    )
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_a_long_row_has_no_dense_mask_and_pair_attention_is_not_saved_with_the_model(tmp_path):
    model = llama()
    scorer = PairScorer(model)
    assert scorer.pair_attention and not PairScorer(llama("eager")).pair_attention
    rng = np.random.default_rng(0)
    prompts, answers = [rng.integers(3, VOCAB, 8)], [[rng.integers(3, VOCAB, 2000)] for _ in range(2)]
    batch = collate(prompts, answers, pad_id=0, shared=True, truncate_to_shorter=False)
    mask = scorer._mask(batch, None)
    assert mask.shape == (1, 2, 1, 2 * 2008 + 4008)
    assert scorer._mask(batch, 9).untyped_storage().nbytes() == 8 * (2 * 2008 + 4008)
    model.save_pretrained(tmp_path)
    assert "pair_sdpa" not in (tmp_path / "config.json").read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits)


def test_a_model_whose_layers_mix_the_answers_of_a_row_gets_separate_rows(tmp_path):
    sizes: Any = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    mixed = Lfm2Config(**sizes, num_attention_heads=2, layer_types=["conv", "full_attention"])
    for name, made in (("rwkv", RwkvConfig(**sizes)), ("lfm2", mixed), ("llama", llama().config)):
        made.save_pretrained(tmp_path / name)
    config = Config()
    apart = stage_config(config, {"training.shared_prompt": False})
    together = stage_config(config, {"training.shared_prompt": True})
    for name, layers in (("rwkv", "recurrent"), ("lfm2", "conv")):
        folder, key = str(tmp_path / name), "model.name_or_path"
        (sentence,) = check_shared_prompt(resolve_run(config), folder, key)
        assert sentence.startswith(f"{key}: the model has ") and layers in sentence
        assert sentence.endswith("(training.shared_prompt=false)")
        with pytest.raises(InputError, match=rf"training\.shared_prompt=true: .*{layers}.*must be false"):
            check_shared_prompt(resolve_run(together), folder, key)
        assert check_shared_prompt(resolve_run(apart), folder, key) == []
    for plan in (resolve_run(config), resolve_run(together)):
        assert check_shared_prompt(plan, str(tmp_path / "llama"), "model.name_or_path") == []
    sft = stage_config(config, {"objective.name": "sft"})
    assert check_shared_prompt(resolve_run(sft), str(tmp_path / "rwkv"), "model.name_or_path") == []
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match=str(tmp_path / "unknown")):
        check_shared_prompt(resolve_run(config), str(tmp_path / "unknown"), "model.name_or_path")


def perturbed_llama() -> LlamaForCausalLM:
    """A reference that differs from the policy, so that log-ratios are not zero."""
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_a_batch_without_pairs_gives_a_zero_with_a_gradient():
    """An idle rank runs one fully masked pair."""
    model = llama()
    batch = collate(
        [np.zeros(1, dtype=np.int64)],
        [[np.zeros(0, dtype=np.int64)]] * 2,
        pad_id=0,
        shared=True,
        truncate_to_shorter=True,
    )
    objective = build_objective({"name": "tbpo_a", "state_baseline": {"kind": "k3"}})
    loss, _ = PreferenceStep(objective, None, PairScorer(llama()).eval())(PairScorer(model), batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["dpo", "tbpo_q", "tbpo_a"])
def test_first_loss_is_ln2_where_policy_is_reference(name):
    objective = build_objective(
        {"name": name, "bregman": {"generator": "logistic"}, "state_baseline": {"kind": "k3"}}
    )
    prompts, answers = pairs()
    batch = collate(
        prompts, answers, pad_id=0, shared=True, truncate_to_shorter=objective.compares_to_shorter
    )
    scorer, reference = PairScorer(llama()), PairScorer(llama())
    loss, _ = PreferenceStep(objective, None, reference)(scorer, batch)
    assert loss.item() / batch.pairs == pytest.approx(np.log(2), abs=1e-5)


def test_side_scores_reach_the_objective_in_the_right_place():
    prompts, answers = pairs(2)
    batch = collate(
        prompts, answers, pad_id=0, shared=True, truncate_to_shorter=False,
        ref_logps=[[np.full(len(a), -1.0) for a in answers[0]], [np.full(len(a), -2.0) for a in answers[1]]],
    )  # fmt: skip
    scores: Any = to_scores(PairScorer(llama())(batch)[0], batch)
    assert scores.chosen_ref_logps[scores.chosen_mask].eq(-1).all()
    assert scores.rejected_ref_logps[scores.rejected_mask].eq(-2).all()
    assert scores.chosen_mask.sum(-1).tolist() == [len(a) for a in answers[0]]


def test_the_rejected_scores_of_a_batch_without_rejected_answers_are_none():
    prompts, answers = pairs(2)
    values = [[np.ones(len(a)) for a in answers[0]]]
    batch = collate(
        prompts, answers[:1], pad_id=0, shared=False, truncate_to_shorter=False,
        ref_logps=values, weights=values,
    )  # fmt: skip
    logp, *_, hidden = PairScorer(llama())(batch)
    scores = to_scores(logp, batch, baseline=hidden[..., 0])
    for name in ("logps", "mask", "ref_logps", "baseline", "weights"):
        assert getattr(scores, f"chosen_{name}").shape == batch.labels.shape[1:]
        assert getattr(scores, f"rejected_{name}") is None
    loss, _ = PreferenceStep(build_objective({"name": "sft"}))(PairScorer(llama()), batch)
    assert loss.item() == pytest.approx(-logp[0].sum(-1).div(batch.mask[0].sum(-1)).sum().item(), rel=1e-4)


def test_the_gate_metric_is_the_mean_over_real_tokens():
    objective = build_objective({"name": "tbpo_q", "state_baseline": {"kind": "mixed"}})
    head: Any = MixedBaseline(32, 0)
    torch.manual_seed(3)
    torch.nn.init.normal_(head.gate[0].weight)  # at its initial value of zero the gate is the same everywhere
    prompts, answers = pairs()
    batch = collate(prompts, answers, pad_id=0, shared=True, truncate_to_shorter=False)
    assert not batch.mask.all()
    scorer = PairScorer(llama()).eval()
    reference = PairScorer(perturbed_llama()).eval()
    _, metrics = PreferenceStep(objective, head, reference)(scorer, batch)
    gates = torch.sigmoid(head.gate(scorer(batch)[-1]).squeeze(-1))[batch.mask]
    torch.testing.assert_close(metrics["baseline/gate"], gates.mean().detach())
    torch.testing.assert_close(metrics["baseline/gate_std"], gates.std(correction=0).detach())


def test_the_adapter_off_reference_is_the_frozen_model_exactly():
    from peft import LoraConfig, get_peft_model

    batch = collate(*pairs(), pad_id=0, shared=True, truncate_to_shorter=False)
    frozen = PairScorer(llama()).eval().reference_logps(batch)
    adapted = get_peft_model(
        llama(),
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, init_lora_weights=False),
    )
    scorer = PairScorer(adapted).train()
    _, _, _, reference, *_ = scorer(batch, outputs=("logp", "ref_logp"), reference="adapter_off")
    assert torch.equal(reference, frozen)
    assert scorer.training and adapted.training
    logp = scorer(batch)[0]
    assert not torch.allclose(logp, frozen, atol=1e-3)
