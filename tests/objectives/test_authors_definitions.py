"""T-REG, SePO, TIS-DPO, lengths and ties as their authors have them: worked numbers, and their limits."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_cases import random_scores
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.objectives import (
    TokenScores,
    build_objective,
    contrastive_weights,
    make_generator,
    oracle_scores,
    self_rewards,
)
from tbpo_ray.objectives.losses import top_tokens

GOLDEN = json.loads((Path(__file__).parent / "golden_3.json").read_text())
every_case = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"seed{case['seed']}")
SIDES = ("chosen", "rejected")


def float64(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden_scores(case: dict[str, Any], name: str, *, tie: bool = False) -> TokenScores:
    """The worked inputs, with the weights and the KL that the objective reads, and NaN behind the answers."""
    x = {k: float64(v) if "logps" in k or "kl" in k or "weights" in k else torch.tensor(v)
         for k, v in case["inputs"].items()}  # fmt: skip
    fields: dict[str, Tensor] = {"tie": x["tie"]} if tie else {}
    for side in SIDES:
        pair = x[f"{side}_positive_logps"], x[f"{side}_negative_logps"]
        estimates = {"t_reg": self_rewards(*pair), "sepo": oracle_scores(*pair)}
        weights = estimates.get(name, x[f"{side}_weights"])
        mask = fields[f"{side}_mask"] = x[f"{side}_mask"]
        every = {"weights": weights, "baseline": x[f"{side}_reverse_kl"]}
        every |= {field: x[f"{side}_{field}"] for field in ("logps", "ref_logps")}
        fields |= {f"{side}_{k}": torch.where(mask, v, torch.nan) for k, v in every.items()}
    return TokenScores(**fields)


def golden_config(key: str, beta: float) -> dict[str, Any]:
    """A key such as `t_reg[alpha=0.5,base=simpo]` as a configuration."""
    name, _, options = key.rstrip("]").partition("[")
    config: dict[str, Any] = {"name": name, "beta": beta}
    for item in filter(None, options.split(",")):
        option, value = item.split("=")
        config[option] = float(value) if re.fullmatch(r"[\d.]+", value) else value
    return config


@every_case
@pytest.mark.parametrize("key", GOLDEN["cases"][0]["per_pair_loss"])
def test_golden_values(case: dict[str, Any], key: str) -> None:
    config = golden_config(key, case["beta"])
    out = build_objective(config)(golden_scores(case, config["name"], tie="ties" in config))
    expected = torch.tensor(case["per_pair_loss"][key], dtype=torch.float64)
    torch.testing.assert_close(out.per_pair_loss, expected, rtol=0, atol=1e-12)


@every_case
def test_golden_gradients(case: dict[str, Any]) -> None:
    for key, expected in case["grad"].items():
        key, field = key.split(" ")
        scores = golden_scores(case, "t_reg")
        leaf = getattr(scores, field).requires_grad_()
        build_objective(golden_config(key, case["beta"]))(scores).per_pair_loss.sum().backward()
        torch.testing.assert_close(leaf.grad, float64(expected), rtol=0, atol=1e-12)


@every_case
@pytest.mark.parametrize("key", GOLDEN["cases"][0]["token_weights"])
def test_golden_token_weights(case: dict[str, Any], key: str) -> None:
    parts: Any = re.fullmatch(r"(\w+) (\w+)(?:\[(\w+)\])?", key)
    name, side, transform = parts.groups()
    x = case["inputs"]
    mask = torch.tensor(x[f"{side}_mask"])
    pair = [
        torch.where(mask, float64(x[f"{side}_{model}_logps"]), torch.nan)
        for model in ("positive", "negative")
    ]
    if name == "t_reg":
        weights = torch.where(mask, self_rewards(*pair), 0)
    else:
        weights = contrastive_weights(*pair, chosen=side == "chosen", transform=transform, mask=mask)
    expected = float64(case["token_weights"][key])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    if name == "tis_dpo":  # an answer alone, without padding, needs no mask
        for row, (n, want) in enumerate(zip(mask.sum(1).tolist(), expected, strict=True)):
            alone = [logps[row : row + 1, :n] for logps in pair]
            got = contrastive_weights(*alone, chosen=side == "chosen", transform=transform)
            torch.testing.assert_close(got[0], want[:n], rtol=0, atol=1e-12)


def test_weights_keep_their_dtype_and_bad_transforms_are_refused() -> None:
    plus = torch.tensor([[-1.0, -2.0, float("nan"), -4.0]])
    for dtype in (torch.bfloat16, torch.float32):
        for transform in ("exp", "rank", "scaled"):
            weights = contrastive_weights(
                plus.to(dtype), torch.full_like(plus, -2).to(dtype), chosen=True, transform=transform
            )
            # A token that a model could not score has no weight, and does not pass for one that has.
            assert weights.dtype == dtype and weights.isnan().tolist() == [[False, False, True, False]]
    with pytest.raises(InputError, match="transform: 'log'; must be one of exp, rank, scaled"):
        contrastive_weights(plus, plus, chosen=True, transform="log")  # type: ignore[arg-type]


# --- each method's limits


def gradients(config: dict[str, Any], scores: TokenScores) -> tuple[Tensor, ...]:
    out = build_objective(config)(scores).per_pair_loss.sum()
    assert scores.rejected_logps is not None
    return torch.autograd.grad(out, [scores.chosen_logps, scores.rejected_logps])


def test_t_reg_is_dpo_with_token_weights_in_gradient() -> None:
    scores = random_scores()
    alpha, beta = 0.4, 0.5
    out = build_objective({"name": "dpo", "beta": beta})(scores)
    s = [(torch.where(getattr(scores, f"{x}_mask"), getattr(scores, f"{x}_logps")
          - getattr(scores, f"{x}_ref_logps"), 0)).sum(1) for x in SIDES]  # fmt: skip
    w = torch.sigmoid(-beta * (s[0] - s[1]))[:, None]
    got = gradients({"name": "t_reg", "beta": beta, "alpha": alpha}, scores)
    chosen = torch.where(scores.chosen_mask, -w * beta * (1 + alpha * scores.chosen_weights), 0)
    rejected = torch.where(scores.rejected_mask, w * beta * (1 - alpha * scores.rejected_weights), 0)
    torch.testing.assert_close(got[0], chosen, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], rejected, rtol=0, atol=1e-12)
    assert not torch.allclose(out.per_pair_loss, build_objective({"name": "t_reg"})(scores).per_pair_loss)


@pytest.mark.parametrize("base", ["dpo", "simpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_t_reg_without_rewards_is_its_base(base: str, smoothing: float) -> None:
    scores = random_scores()
    scores.chosen_weights = scores.rejected_weights = torch.zeros(5, 7)
    shared = {"beta": 0.5, "gamma": 0.3, "label_smoothing": smoothing}
    got = build_objective({"name": "t_reg", "base": base, **shared})(scores)
    expected = build_objective({"name": base, **shared})(scores)
    torch.testing.assert_close(got.per_pair_loss, expected.per_pair_loss, rtol=0, atol=1e-14)


def test_t_reg_on_simpo_needs_no_reference() -> None:
    objective = build_objective({"name": "t_reg", "base": "simpo"})
    scores = random_scores()
    scores.chosen_ref_logps = scores.rejected_ref_logps = None
    assert not objective.needs_reference and objective.params.beta == 2.0
    assert objective(scores).loss.isfinite()
    assert build_objective({"name": "t_reg"}).needs_reference


def test_sepo_with_every_token_is_length_normalized() -> None:
    scores = random_scores()
    got = build_objective({"name": "sepo", "select_ratio": 1.0, "beta": 0.7})(scores)
    expected = build_objective({"name": "simpo", "gamma": 0.0, "beta": 0.7})(scores)
    torch.testing.assert_close(got.per_pair_loss, expected.per_pair_loss, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("n", "ratio", "count"),
    [(10, 0.3, 3), (1, 0.3, 1), (3, 0.3, 1), (7, 0.3, 2), (1000, 0.29, 290), (4, 1, 4)],
)
def test_sepo_rounds_down_and_keeps_one_token(n: int, ratio: float, count: int) -> None:
    mask = torch.arange(1001) < n
    scores = torch.zeros(1, 1001)
    # All scores are equal, so the earlier tokens come first.
    expected = (torch.arange(1001) < count)[None]
    assert torch.equal(top_tokens(scores, mask[None], ratio), expected)
    assert not top_tokens(scores, torch.zeros_like(mask)[None], ratio).any()


def test_sepo_has_a_ratio_for_each_side() -> None:
    scores = random_scores()
    sides = build_objective({"name": "sepo", "select_ratio": {"chosen": 0.3, "rejected": 0.3}})(scores)
    torch.testing.assert_close(sides.loss, build_objective({"name": "sepo"})(scores).loss, rtol=0, atol=0)
    other = build_objective({"name": "sepo", "select_ratio": {"chosen": 0.3, "rejected": 1.0}})
    assert other.params.select_ratio == (0.3, 1.0) and other(scores).loss != sides.loss


def test_tis_dpo_with_weights_one_is_dpo() -> None:
    scores = random_scores()
    scores.chosen_weights = scores.rejected_weights = torch.ones(5, 7)
    got, expected = build_objective({"name": "tis_dpo"})(scores), build_objective({"name": "dpo"})(scores)
    torch.testing.assert_close(got.per_pair_loss, expected.per_pair_loss, rtol=0, atol=1e-14)


def test_tis_dpo_reads_the_kl_with_its_gradient_only_for_a_positive_alpha() -> None:
    without, with_kl = (
        build_objective({"name": "tis_dpo"}),
        build_objective({"name": "tis_dpo", "alpha": 0.5}),
    )
    assert not without.needs_reverse_kl and not without.needs_distribution
    assert with_kl.needs_reverse_kl and with_kl.needs_distribution and not with_kl.needs_kl
    scores = random_scores()
    with_kl(scores).loss.backward()
    assert scores.chosen_baseline is not None and scores.chosen_baseline.grad is not None
    both = scores.chosen_mask & torch.ones_like(scores.chosen_mask)
    assert torch.equal(scores.chosen_baseline.grad != 0, both)
    scores.rejected_baseline = None
    assert without(scores).loss.isfinite()
    with pytest.raises(InputError, match="rejected_baseline: None"):
        with_kl(scores)


@pytest.mark.parametrize("name", ["dpo", "ipo", "bpo"])
def test_the_token_mean_of_answers_of_one_token_is_the_sum(name: str) -> None:
    scores = random_scores(tokens=1)
    both = [build_objective({"name": name, "normalization": n})(scores) for n in ("sum", "token_mean")]
    torch.testing.assert_close(both[0].per_pair_loss, both[1].per_pair_loss, rtol=0, atol=0)
    longer = random_scores()
    both = [build_objective({"name": name, "normalization": n})(longer) for n in ("sum", "token_mean")]
    assert both[0].loss != both[1].loss
    default = {"dpo": 0, "ipo": 1, "bpo": 0}[name]
    torch.testing.assert_close(
        build_objective({"name": name})(longer).loss, both[default].loss, rtol=0, atol=0
    )


# --- ties


def test_with_the_default_strength_equals_tie_half_the_time() -> None:
    for model in ("rao_kupper", "davidson"):
        scores = random_scores(pairs=2)
        for side in SIDES:
            setattr(scores, f"{side}_ref_logps", getattr(scores, f"{side}_logps").detach())
        scores.tie = torch.tensor([True, False])
        loss = build_objective({"name": "dpo", "ties": model})(scores).per_pair_loss
        # The three outcomes: a tie 1/2, and either answer 1/4.
        torch.testing.assert_close(loss.exp(), torch.tensor([2.0, 4.0]).double())


@pytest.mark.parametrize(("model", "strength"), [("rao_kupper", 1.5), ("davidson", 0.3), ("davidson", 4)])
def test_the_probabilities_of_the_three_outcomes_add_up_to_one(model: str, strength: float) -> None:
    objective = build_objective({"name": "dpo", "beta": 0.7, "ties": model, "tie_strength": strength})
    scores = random_scores(pairs=8)
    swapped = TokenScores(
        **{k: getattr(scores, k.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected"))
           for k in vars(scores) if k != "tie"}
    )  # fmt: skip
    wins = (-objective(scores).per_pair_loss).exp()
    losses = (-objective(swapped).per_pair_loss).exp()
    scores.tie = torch.ones(8, dtype=torch.bool)
    ties = (-objective(scores).per_pair_loss).exp()
    torch.testing.assert_close(wins + losses + ties, torch.ones(8).double())


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
def test_a_tie_pulls_both_answers_together(model: str) -> None:
    scores = random_scores(pairs=1)
    scores.tie = torch.tensor([True])
    objective = build_objective({"name": "dpo", "ties": model})
    u = objective(scores).metrics["u/mean"]
    (gradient,) = torch.autograd.grad(objective(scores).loss, scores.chosen_logps)
    # For u > 0 the rejected answer is ahead, and the chosen one is pulled up; and the reverse.
    assert gradient[scores.chosen_mask].sign().unique().item() == -u.sign()


@pytest.mark.parametrize("name", ["dpo", "tbpo_q", "ipo", "sepo", "t_reg"])
def test_dropped_ties_are_counted_and_change_nothing_else(name: str) -> None:
    scores = random_scores(pairs=6, ties=True)
    objective = build_objective({"name": name})
    plain = random_scores(pairs=6)
    out, expected = objective(scores), objective(plain)
    assert out.metrics["ties/share"] == 0.5 and "ties/share" not in expected.metrics
    assert not out.per_pair_loss[scores.tie].any()
    torch.testing.assert_close(out.loss, expected.per_pair_loss[::2].mean(), rtol=0, atol=1e-14)
    scores.tie = torch.ones(6, dtype=torch.bool)
    nothing = objective(scores)
    nothing.loss.backward()
    assert nothing.loss == 0 and not scores.chosen_logps.grad.any()


def test_decided_pairs_do_not_need_the_tie_column() -> None:
    objective = build_objective({"name": "dpo", "ties": "davidson"})
    scores = random_scores()
    expected = objective(scores).per_pair_loss
    scores.tie = torch.zeros(5, dtype=torch.bool)
    torch.testing.assert_close(objective(scores).per_pair_loss, expected, rtol=0, atol=0)
    scores.tie = torch.zeros(5, 1, dtype=torch.bool)
    with pytest.raises(InputError, match=r"tie: shape \(5, 1\), expected \(5,\)"):
        objective(scores)


def test_a_vanishing_strength_is_dpo() -> None:
    scores = random_scores()
    expected = build_objective({"name": "dpo"})(scores).per_pair_loss
    for model, strength in (("rao_kupper", 1 + 1e-12), ("davidson", 1e-12)):
        got = build_objective({"name": "dpo", "ties": model, "tie_strength": strength})(scores)
        torch.testing.assert_close(got.per_pair_loss, expected, rtol=0, atol=1e-11)


def test_the_generator_of_a_configuration_has_its_point() -> None:
    section = {"name": "bpo", "bregman": {"generator": "beta_family", "a_plus_b": -1, "a_minus_b": 3}}
    generator = build_objective(section).generator
    assert generator == make_generator("beta_family", a=1, b=-2)
    assert math.isinf(generator.turning_point)
