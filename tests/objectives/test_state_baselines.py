"""State baselines: the kinds, their options, the learned heads and the gradients through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objective_cases import random_scores
from torch import nn

from tbpo_ray.errors import InputError
from tbpo_ray.objectives import Objective, TokenScores, build_objective, build_state_baseline, k3

B, T, H = 3, 5, 8


def tbpo(**state_baseline: Any) -> Objective:
    return build_objective({"name": "tbpo_a", "beta": 0.5, "state_baseline": state_baseline})


def test_none_ignores_a_given_baseline() -> None:
    scores = random_scores()
    given = tbpo(kind="none")(scores)
    scores.chosen_baseline = scores.rejected_baseline = None
    torch.testing.assert_close(tbpo(kind="none")(scores).per_pair_loss, given.per_pair_loss)
    assert "baseline/mean" not in given.metrics


def test_k3_is_computed_unless_given() -> None:
    scores = random_scores()
    given = tbpo(kind="k3")(scores).loss
    scores.chosen_baseline = scores.rejected_baseline = None
    computed = tbpo(kind="k3")(scores)
    assert computed.loss != given
    scores.chosen_baseline = k3(scores.chosen_logps - scores.chosen_ref_logps)
    scores.rejected_baseline = k3(scores.rejected_logps - scores.rejected_ref_logps)
    torch.testing.assert_close(tbpo(kind="exact_kl")(scores).loss, computed.loss)


def test_k3_with_its_gradient_cancels_the_log_ratio_and_without_it_does_not() -> None:
    scores = random_scores()
    scores.chosen_baseline = scores.rejected_baseline = None
    both = scores.chosen_mask & scores.rejected_mask
    ratio = {
        s: getattr(scores, f"{s}_logps") - getattr(scores, f"{s}_ref_logps") for s in ("chosen", "rejected")
    }
    u = 0.5 * (ratio["rejected"].exp() - ratio["chosen"].exp())
    cancelled = torch.where(both, (u.exp() + u) / 4, 0).sum(1) / both.sum(1)
    attached, detached = tbpo(kind="k3")(scores), tbpo(kind="k3", detach=True)(scores)
    torch.testing.assert_close(attached.per_pair_loss, cancelled)
    torch.testing.assert_close(attached.loss, detached.loss)
    gradients = [torch.autograd.grad(out.loss, scores.chosen_logps)[0] for out in (attached, detached)]
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("kind", ["exact_kl", "k3_sampled", "learned", "mixed"])
@pytest.mark.filterwarnings("ignore:objective.state_baseline.detach")
def test_detach_and_missing(kind: str) -> None:
    scores = random_scores()
    tbpo(kind=kind)(scores).loss.backward()
    assert scores.chosen_baseline is not None and scores.chosen_baseline.grad.any()
    scores.chosen_baseline.grad = None
    tbpo(kind=kind, detach=True)(scores).loss.backward()
    assert scores.chosen_baseline.grad is None
    scores.rejected_baseline = None
    with pytest.raises(InputError, match=f"rejected_baseline.*{kind}"):
        tbpo(kind=kind)(scores)


def test_centering_makes_a_constant_irrelevant_and_clip_bounds_the_difference() -> None:
    scores = random_scores()
    plain, centered = tbpo(center=True)(scores), tbpo(center=True)
    scores.chosen_baseline = scores.chosen_baseline + 3
    torch.testing.assert_close(centered(scores).per_pair_loss, plain.per_pair_loss)
    tight = tbpo(clip=1e-12)(scores)
    torch.testing.assert_close(tight.per_pair_loss, tbpo(kind="none")(scores).per_pair_loss)


def test_requirements_of_an_objective() -> None:
    def flags(config: dict) -> tuple:
        o = build_objective(config)
        return (o.needs_reference, o.needs_kl, o.needs_samples, o.needs_weights, o.needs_rejected)

    assert flags({"name": "tbpo_q"}) == (True, False, 0, False, True)
    assert flags({"name": "tbpo_a"}) == (True, True, 0, False, True)
    sampled = {"name": "tbpo_a", "state_baseline": {"kind": "k3_sampled", "samples": 7}}
    assert flags(sampled) == (True, False, 7, False, True)
    assert flags({"name": "tbpo_q", "state_baseline": {"kind": "mixed"}}) == (True, True, 0, False, True)
    assert flags({"name": "dpo", "state_baseline": {"kind": "mixed"}}) == (True, False, 0, False, True)
    assert flags({"name": "tdpo2"}) == (True, True, 0, False, True)
    assert flags({"name": "tis_dpo"}) == flags({"name": "t_reg"}) == (True, False, 0, True, True)
    assert flags({"name": "sepo"}) == (False, False, 0, True, True)
    assert flags({"name": "simpo"}) == (False, False, 0, False, True)
    assert flags({"name": "sft"}) == (False, False, 0, False, False)
    shorter = {
        n: build_objective({"name": n}).compares_to_shorter for n in ("tbpo_q", "tbpo_a", "bpo", "sft")
    }
    assert shorter == {"tbpo_q": True, "tbpo_a": True, "bpo": False, "sft": False}
    learned = [build_objective({"name": n}).learned_baseline for n in ("tbpo_q", "tbpo_a", "dpo")]
    assert learned == [True, False, False]


class Backbone(nn.Module):
    """A stand-in for a policy: hidden states, and log-probs of some label per position."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, H)
        self.out = nn.Linear(H, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return hidden, self.out(hidden).log_softmax(-1)[..., 0]


def scores_from(policy: Backbone, head: nn.Module | None, inputs: dict[str, torch.Tensor]) -> TokenScores:
    fields = {}
    for side in ("chosen", "rejected"):
        hidden, fields[f"{side}_logps"] = policy(inputs[side])
        fields[f"{side}_ref_logps"] = torch.full((B, T), -1.5)
        fields[f"{side}_mask"] = torch.ones(B, T, dtype=torch.bool)
        fields[f"{side}_baseline"] = None if head is None else head(hidden, torch.ones(B, T))
    return TokenScores(**fields)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {side: torch.randn(B, T, 4, generator=rng) for side in ("chosen", "rejected")}


@pytest.mark.parametrize("width", [0, 16])
@pytest.mark.parametrize("kind", ["learned", "mixed"])
def test_heads_start_at_zero_and_learn_without_touching_the_backbone(kind, width, inputs) -> None:
    torch.manual_seed(0)
    policy = Backbone()
    head = build_state_baseline({"kind": kind, "hidden": width}, H)
    assert head is not None
    hidden, _ = policy(inputs["chosen"])
    c = head(hidden, torch.full((B, T), 0.8))
    torch.testing.assert_close(c, torch.full((B, T), 0.0 if kind == "learned" else 0.4))
    c.sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert any(p.grad is not None and p.grad.any() for p in head.parameters())


def test_backbone_update_is_the_same_with_and_without_the_heads_optimizer(inputs) -> None:
    """One step: the head's optimizer changes the head, and not one bit of the backbone's update."""

    def step(train_head: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(1)
        policy = Backbone()
        head = build_state_baseline({"kind": "learned", "hidden": 16}, H)
        assert head is not None
        objective = build_objective({"name": "tbpo_q"})
        for p in head.parameters():
            nn.init.normal_(p, std=0.3)
        optimizers: list[torch.optim.Optimizer] = [torch.optim.RMSprop(policy.parameters(), lr=0.01)]
        optimizers += [torch.optim.AdamW(head.parameters(), lr=1e-3)] if train_head else []
        before = [p.detach().clone() for p in head.parameters()]
        objective(scores_from(policy, head, inputs)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        moved = [(p - b).detach() for p, b in zip(head.parameters(), before, strict=True)]
        return [p.detach() for p in policy.parameters()], moved

    with_head, moved = step(True)
    without, still = step(False)
    assert all(torch.equal(a, b) for a, b in zip(with_head, without, strict=True))
    assert any(m.any() for m in moved) and not any(m.any() for m in still)


@pytest.mark.parametrize("kind", ["learned", "mixed"])
def test_heads_compute_in_float32(kind) -> None:
    head: Any = build_state_baseline({"kind": kind, "hidden": 16}, H)
    assert head is not None
    nn.init.normal_(head.head[-1].weight)
    hidden, kl = torch.randn(B, T, H).bfloat16(), torch.rand(B, T).bfloat16()
    expected = head(hidden.float(), kl.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden, kl), expected)
    assert head.bfloat16()(hidden, kl).dtype == torch.float32


def test_gate_is_a_metric_and_needs_the_kl() -> None:
    head: Any = build_state_baseline({"kind": "mixed"}, H)
    assert head is not None
    nn.init.normal_(head.gate[-1].weight)
    hidden, kl = torch.randn(B, T, H), torch.rand(B, T)
    mask = torch.arange(T) < torch.tensor([[1], [3], [5]])
    head(hidden, kl, mask)
    gate = torch.sigmoid(head.gate(hidden).squeeze(-1))[mask].detach()
    torch.testing.assert_close(head.metrics["baseline/gate"], gate.mean())
    torch.testing.assert_close(head.metrics["baseline/gate_std"], gate.std(correction=0))
    with pytest.raises(InputError, match="kl: shape None"):
        head(hidden)


def test_kinds_without_parameters_have_no_head() -> None:
    for kind in ("none", "exact_kl", "k3", "k3_sampled"):
        assert build_state_baseline({"kind": kind}, H) is None
    assert build_state_baseline(build_objective({"name": "tbpo_a"}).state_baseline, H) is None
