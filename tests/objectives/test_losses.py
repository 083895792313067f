"""Properties of every loss: golden numbers, hand-computed values, masks, gradients, NaN, padding."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from objective_cases import CONFIGS, map_sides, random_scores, rows

from tbpo_ray.objectives import GENERATORS, OBJECTIVES, TokenScores, build_objective, losses, pair_terms

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
every_loss = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def scores_for(config: dict[str, Any], **options: Any) -> TokenScores:
    """Random scores, with ties for the configurations that read them."""
    return random_scores(**options, ties="ties" in config)


def golden_config(key: str, beta: float) -> tuple[dict[str, Any], str]:
    """A golden key such as `tbpo[sba,lam=0.5,s=4.0][q]` as a configuration and the baseline it reads."""
    name, options = key.split("[")[0], re.findall(r"\[([^\]]*)\]", key)
    config: dict[str, Any] = {"name": name, "beta": beta}
    column = "kl"
    for option in options:
        first, *rest = option.split(",")
        if first in GENERATORS:
            numbers = dict(item.split("=") for item in rest)
            config["bregman"] = {"generator": first, "lam": float(numbers.get("lam", 0))}
            config["bregman"]["scale"] = float(numbers.get("s", 4))
        elif "=" in option:
            config[option.split("=")[0]] = float(option.split("=")[1])
    if name == "ipo":
        config["normalization"] = "sum"  # the token mean is in golden_3.json
    if name == "tbpo":
        variant = options[-1]
        config["name"] = "tbpo_a" if variant == "a" else "tbpo_q"
        config["state_baseline"] = {
            "q": {},
            "a": {},
            "q_centered_clip": {"center": True, "clip": 0.4},
            "no_baseline": {"kind": "none"},
        }[variant]
        column = "kl" if variant == "a" else "baseline"
    return config, column


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("key", GOLDEN[0]["per_pair_loss"])
def test_golden(case: dict[str, Any], key: str) -> None:
    config, column = golden_config(key, case["beta"])
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["inputs"].items()}
    fields = {k: v for k, v in inputs.items() if k.split("_", 1)[1] in ("logps", "ref_logps", "weights")}
    for side in ("chosen", "rejected"):
        fields[f"{side}_mask"] = inputs[f"{side}_mask"].bool()
        fields[f"{side}_baseline"] = inputs[f"{side}_{column}"]
    out = build_objective(config)(TokenScores(**fields))
    expected = torch.tensor(case["per_pair_loss"][key], dtype=torch.float64)
    torch.testing.assert_close(out.per_pair_loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.loss, expected.mean(), rtol=0, atol=1e-9)


HAND = {
    "dpo": math.log1p(math.exp(-0.45)),  # S^w = .8, S^l = -.1
    "dpo_mean": math.log1p(math.exp(-0.5 * (0.8 / 3 + 0.05))),
    "dpo_rao_kupper": math.log1p(3 * math.exp(-0.45)),
    "dpo_davidson": 0.9 * math.log(1 + math.exp(-0.45) + 2 * math.exp(-0.225))
    + 0.1 * math.log(1 + math.exp(0.45) + 2 * math.exp(0.225)),
    "ipo": (0.8 / 3 + 0.05 - 1) ** 2,
    "ipo_sum": 0.01,  # (.9 - 1)^2
    "simpo": math.log1p(math.exp(1 / 3)),  # .5 (-7/6 + 3/2) - .5 = -1/3
    "bpo": (math.exp(-0.45 * 1.5) - 3 * math.expm1(0.225)),  # ba, lam 1/2
    "tdpo1": math.log1p(math.exp(-0.5)),  # K^w = .6, K^l = .5
    "tdpo2": math.log1p(math.exp(-0.475)),
    "tis_dpo": math.log1p(math.exp(-0.125)),  # .35 - .1
    "tis_dpo_kl": math.log1p(math.exp(-0.125 + 0.25 * (0.65 - 0.3))),  # D^w = .65, D^l = .3
    "sft": 3.5 / 3,
    "sepo": math.log1p(math.exp(-0.25)),  # tokens 0, 1 of the chosen, token 0 of the rejected
    # R^w = -.5 (-1 - 4 - .25) = 2.625, R^l = -.5 (-1 - 1) = 1
    "t_reg": math.log1p(math.exp(-0.45)) + 0.25 * 3.625 / (1 + math.exp(0.45)),
    "t_reg_simpo": math.log1p(math.exp(2 / 15)) + 0.25 * (2.625 / 3 + 0.5) / (1 + math.exp(-2 / 15)),
    # the chosen answer's first two tokens (probabilities below a mean of .37), the rejected one's first
    "confpo": math.log1p(math.exp(0.5 * (-2 + 1.5) + 0.4)),
    # weights 1 + .4 (1, 2, .5) on (.5, -.2, .5) and 1 - .4 (.5, 1) on (-.4, .3)
    "tgdpo": math.log1p(math.exp(-0.5 * (0.7 - 0.36 + 0.6 - (-0.32 + 0.18)))),
    # a = .15, .25 with target .5; a = -.2, .15 with target -.5; at lam 1, D = (e^-tau - e^-a)^2 / 8
    "arc_bpo": sum((math.exp(-0.5) - math.exp(-a)) ** 2 for a in (0.15, 0.25)) / 16
    + sum((math.exp(0.5) - math.exp(-a)) ** 2 for a in (-0.2, 0.15)) / 16,
    "dpo_nll": math.log1p(math.exp(-0.45)) + 0.2 * 3.5 / 3,
    "dpo_nll_sum": math.log1p(math.exp(-0.45)) + 0.01 * 3.5,
    "tbpo_nll": (math.exp(-0.45) - 0.45 + math.exp(0.25) + 0.25) / 8 + 0.2 * 3.5 / 3,
    "dpo_margins": 0.9 * math.log1p(math.exp(-0.15)) + 0.1 * math.log1p(math.exp(0.15)),
    "simpo_margins": math.log1p(math.exp(1 / 3 + 0.3)),
    "t_reg_margins": math.log1p(math.exp(-0.15)) + 0.25 * 3.625 / (1 + math.exp(0.15)),
    "dpo_weights": 2 * (math.log1p(math.exp(-0.45)) + 0.2 * 3.5 / 3),
    "tbpo_weights": 2 * (math.exp(-0.45) - 0.45 + math.exp(0.25) + 0.25) / 8,
    # means of log pi - log collision: -2.9/3 and -1.2
    "dpo_wpo": math.exp(-2.9 / 3 - 1.2) * math.log1p(math.exp(-0.45)) + 0.2 * 3.5 / 3,
    "dpo_wpo_none": math.exp(-3.5 / 3 - 1.5) * math.log1p(math.exp(-0.45)),
    "tbpo_wpo": math.exp(-2.9 / 3 - 1.2) * (math.exp(-0.45) - 0.45 + math.exp(0.25) + 0.25) / 8,
    "dpo_forward_kl": math.log1p(math.exp(-0.5 * (math.exp(0.1) - math.exp(-0.8)))),
    "dpo_js": math.log1p(math.exp(-0.5 * (math.log1p(math.exp(0.1)) - math.log1p(math.exp(-0.8))))),
    "dpo_alpha": math.log1p(math.exp(-0.5 * (math.exp(0.03) - math.exp(-0.24)) / 0.3)),
    "dpo_ld": math.log1p(math.exp(-0.275)),  # S^w = .3 + .3 (.5)
    "dpo_ld_0": math.log1p(math.exp(-0.2)),
    "dpo_ld_full": math.log1p(math.exp(-0.625)),  # S^w = -3.15 + 4.3
    "dpo_ld_0_full": math.log1p(math.exp(-0.7)),
    "dpo_ld_0_nll": math.log1p(math.exp(-0.2)) + 0.2 * 3.5 / 3,
    "tbpo_none": (math.exp(-0.45) - 0.45 + math.exp(0.25) + 0.25) / 8,
    "tbpo_q": (math.exp(-0.3) - 0.3 + math.exp(0.2) + 0.2) / 8,
    "tbpo_a": (math.exp(-0.6) - 2 * math.exp(0.3) + math.exp(0.4) - 2 * math.exp(-0.2)) / 2,
    # with k3's gradient left in, u_t = beta (rho_t^l - rho_t^w)
    "tbpo_a_k3": sum(
        (math.exp(u) + u) / 8
        for u in (0.5 * (math.exp(-0.4) - math.exp(0.5)), 0.5 * (math.exp(0.3) - math.exp(-0.2)))
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_hand_computed_value(name: str, hand_scores: TokenScores) -> None:
    if name == "tbpo_a_k3":  # computed from the log-probs unless given
        hand_scores.chosen_baseline = hand_scores.rejected_baseline = None
    out = build_objective(CONFIGS[name])(hand_scores)
    assert out.loss.item() == pytest.approx(HAND[name], abs=1e-12)


def test_every_objective_has_a_hand_computed_value() -> None:
    assert {CONFIGS[name]["name"] for name in HAND} == set(OBJECTIVES)


@every_loss
def test_mask_equals_selection(config: dict[str, Any]) -> None:
    objective, scores = build_objective(config), scores_for(config)
    whole = objective(scores).per_pair_loss
    assert scores.rejected_mask is not None
    for pair in range(len(whole)):
        longest = int(max(scores.chosen_mask[pair].sum(), scores.rejected_mask[pair].sum()))
        alone = objective(rows(scores, (slice(pair, pair + 1), slice(0, longest)))).per_pair_loss
        torch.testing.assert_close(alone[0], whole[pair], rtol=0, atol=1e-12)


@every_loss
def test_padding_and_order_change_nothing(config: dict[str, Any]) -> None:
    objective, scores = build_objective(config), scores_for(config)
    out = objective(scores)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    shuffled = objective(rows(scores, order))
    torch.testing.assert_close(shuffled.per_pair_loss, out.per_pair_loss[order], rtol=0, atol=1e-12)

    def pad(name: str, x: torch.Tensor) -> torch.Tensor:
        fill = torch.zeros(5, 3) if "mask" in name else torch.full((5, 3), float("nan"))
        return torch.cat([x, fill.to(x.dtype)], 1)

    padded = objective(map_sides(scores, pad))
    torch.testing.assert_close(padded.per_pair_loss, out.per_pair_loss, rtol=0, atol=1e-12)
    for name, value in out.metrics.items():
        torch.testing.assert_close(padded.metrics[name], value, rtol=0, atol=1e-12)


@every_loss
def test_gradient_is_the_numerical_one(config: dict[str, Any]) -> None:
    scores = scores_for(config, pairs=3, tokens=4, seed=2)
    objective = build_objective(config)
    frozen = frozen_weight(config, scores)
    names = ["chosen_logps"]
    if objective.needs_rejected:
        names.append("rejected_logps")
    reads_baseline = objective.needs_kl or objective.needs_reverse_kl or objective.learned_baseline
    if reads_baseline and config["name"] != "tdpo2":
        names += ["chosen_baseline", "rejected_baseline"]  # tdpo2 stops one of them on purpose
    leaves = [getattr(scores, name) for name in names]

    def per_pair(*values: torch.Tensor) -> torch.Tensor:
        with frozen:
            return objective(
                TokenScores(**{**vars(scores), **dict(zip(names, values, strict=True))})
            ).per_pair_loss

    assert torch.autograd.gradcheck(per_pair, leaves)


def frozen_weight(config: dict[str, Any], scores: TokenScores) -> Any:
    """A context in which the weight that `t_reg` and `wpo` stop the gradient of is a constant."""
    if config.get("pair_weights") == "wpo":
        with mock.patch.object(pair_terms, "wpo_weight", wraps=pair_terms.wpo_weight) as called:
            build_objective(config)(scores)
        constant = pair_terms.wpo_weight(*called.call_args.args)
        return mock.patch.object(pair_terms, "wpo_weight", lambda *_: constant)
    if config["name"] != "t_reg":
        return nullcontext()
    original, at = losses.t_reg_pull, []

    def pull(u: torch.Tensor, *rest: Any) -> torch.Tensor:
        at.append(u.detach())
        # The pull is linear in its weight, so the pull at the first u is that with a constant weight.
        return original(at[0], *rest)

    patch = mock.patch.object(losses, "t_reg_pull", pull)
    with patch:
        build_objective(config)(scores)
    return patch


@every_loss
@pytest.mark.parametrize("masked", ["both", "chosen", "rejected"])
def test_all_masked_is_zero_with_a_gradient(config: dict[str, Any], masked: str) -> None:
    objective = build_objective(config)
    scores = scores_for(config)
    for side in ("chosen", "rejected") if masked == "both" else (masked,):
        mask = getattr(scores, f"{side}_mask").clone()
        mask[0] = False
        setattr(scores, f"{side}_mask", mask)
    out = objective(scores)
    out.loss.backward()
    assert scores.chosen_logps.grad is not None
    assert scores.chosen_logps.grad.isfinite().all()
    if objective.needs_rejected or masked != "rejected":
        assert out.per_pair_loss[0] == 0
        assert not scores.chosen_logps.grad[0].any()
    scores.chosen_mask = scores.rejected_mask = torch.zeros(5, 7, dtype=torch.bool)
    nothing = objective(scores)
    nothing.loss.backward()
    assert nothing.loss == 0
    assert all(value.isfinite() for value in nothing.metrics.values())


@every_loss
def test_nan_stays_nan_in_its_own_pair(config: dict[str, Any]) -> None:
    objective = build_objective(config)
    reads = ["chosen_logps"]
    reads += ["rejected_logps"] if objective.needs_rejected else []
    reads += ["chosen_ref_logps"] if objective.needs_reference else []
    reads += ["chosen_weights", "rejected_weights"] if objective.needs_weights else []
    reads_baseline = objective.needs_kl or objective.needs_reverse_kl or objective.learned_baseline
    reads += ["chosen_baseline"] if reads_baseline else []
    reads += ["rejected_log_collision"] if objective.needs_collision else []
    for name in reads:
        scores = scores_for(config, grad=False)
        getattr(scores, name)[1, 0] = float("nan")
        loss = objective(scores).per_pair_loss
        assert loss[1].isnan(), name
        assert loss[[0, 2, 3, 4]].isfinite().all(), name


@every_loss
def test_nan_outside_the_mask_poisons_nothing(config: dict[str, Any]) -> None:
    objective = build_objective(config)
    clean, dirty = scores_for(config), scores_for(config, grad=False)
    for side in ("chosen", "rejected"):
        for field in ("logps", "ref_logps", "baseline", "weights"):
            getattr(dirty, f"{side}_{field}")[~getattr(dirty, f"{side}_mask")] = float("nan")
    dirty.chosen_logps.requires_grad_()
    expected, out = objective(clean), objective(dirty)
    torch.testing.assert_close(out.per_pair_loss, expected.per_pair_loss, rtol=0, atol=0)
    expected.loss.backward()
    out.loss.backward()
    assert dirty.chosen_logps.grad is not None
    torch.testing.assert_close(dirty.chosen_logps.grad, clean.chosen_logps.grad, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_scores_stay_finite(config: dict[str, Any], dtype: torch.dtype) -> None:
    scores = scores_for(config, dtype=dtype)
    objective = build_objective(config)
    for scale in (1e2, 1e4, 1e6):
        far = map_sides(scores, lambda name, v: v if "mask" in name else v.detach() * scale)  # noqa: B023
        far.chosen_logps.requires_grad_()
        out = objective(far)
        out.loss.backward()
        assert out.per_pair_loss.dtype == torch.float32
        assert out.per_pair_loss.isfinite().all()
        assert far.chosen_logps.grad is not None and far.chosen_logps.grad.isfinite().all()


@every_loss
def test_metrics_are_scalars_without_gradient(config: dict[str, Any], scores: TokenScores) -> None:
    out = build_objective(config)(scores)
    assert out.loss.requires_grad
    for name, value in out.metrics.items():
        assert value.dim() == 0 and not value.requires_grad and value.isfinite(), name


def test_tokens_beyond_the_shorter_answer_have_no_effect_in_tbpo(scores: TokenScores) -> None:
    objective = build_objective(CONFIGS["tbpo_q"])
    objective(scores).loss.backward()
    assert scores.rejected_mask is not None
    both = scores.chosen_mask & scores.rejected_mask
    assert scores.chosen_logps.grad is not None
    assert not scores.chosen_logps.grad[~both].any() and scores.chosen_logps.grad[both].all()
    cut = map_sides(scores, lambda name, v: v.masked_fill(~both, 0) if "mask" in name else v)
    torch.testing.assert_close(objective(cut).loss, objective(scores).loss)


def test_tdpo2_stops_the_chosen_kl(scores: TokenScores) -> None:
    build_objective(CONFIGS["tdpo2"])(scores).loss.backward()
    assert scores.chosen_baseline is not None and scores.rejected_baseline is not None
    assert scores.chosen_baseline.grad is None or not scores.chosen_baseline.grad.any()
    assert scores.rejected_baseline.grad is not None and scores.rejected_baseline.grad.any()


def test_metric_values(hand_scores: TokenScores) -> None:
    m = build_objective({"name": "dpo", "beta": 0.5})(hand_scores).metrics
    expected = {
        "rewards/chosen": 0.4,
        "rewards/rejected": -0.05,
        "rewards/margin": 0.45,
        "rewards/accuracy": 1.0,
        "rewards/token_accuracy": 0.5,
        "logps/chosen": -3.5,
        "logps/rejected": -3.0,
        "logps/chosen_drift": 0.8,
        "logps/rejected_drift": -0.1,
        "logratio/q05": -0.36,
        "logratio/q50": 0.3,
        "logratio/q95": 0.5,
        "u/mean": -0.45,
        "kl/k3": sum(math.exp(-r) - 1 + r for r in (0.5, -0.2, 0.5, -0.4, 0.3)) / 5,
    }
    assert {k: round(v.item(), 9) for k, v in m.items()} == {k: round(v, 9) for k, v in expected.items()}
