"""NLL, margins and weights of pairs, f-divergences and tails: worked numbers, limits, bad input."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_cases import CONFIGS, map_sides, random_scores
from torch import Tensor

from tbpo_ray.config.objective import OBJECTIVES, TRAITS
from tbpo_ray.errors import InputError
from tbpo_ray.objectives import TokenScores, build_objective, losses
from tbpo_ray.objectives.objective import FAMILIES

GOLDEN = json.loads((Path(__file__).parent / "golden_2.json").read_text())["cases"]
every_case = pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed{case['seed']}")
SIDES = ("chosen", "rejected")
NESTED = {
    "f_divergence": ("f_divergence", "kind"),
    "f_alpha": ("f_divergence", "alpha"),
    "reward_beta": ("guide", "beta"),
    **{key: ("arc", key) for key in ("delta", "shape", "temperature", "kappa", "winsorize")},
    **{key: ("bregman", key) for key in ("lam", "scale")},
}


def golden_scores(case: dict[str, Any], name: str = "dpo") -> TokenScores:
    """The worked inputs, with NaN behind the answers."""
    x = {k: torch.tensor(v) if "mask" in k or "chunks" in k else torch.tensor(v, dtype=torch.float64)
         for k, v in case["inputs"].items()}  # fmt: skip
    fields: dict[str, Tensor] = {name: x[name] for name in ("pair_margins", "pair_weights")}
    for side in SIDES:
        mask = fields[f"{side}_mask"] = x[f"{side}_mask"]
        for field in ("logps", "ref_logps", "log_collision"):
            fields[f"{side}_{field}"] = torch.where(mask, x[f"{side}_{field}"], torch.nan)
        weights = x[f"{side}_{'guide_log_ratio' if name == 'tgdpo' else 'advantage'}"]
        fields[f"{side}_weights"] = torch.where(mask, weights, torch.nan)
        fields[f"{side}_chunks"] = x[f"{side}_chunks"]
    return TokenScores(**fields)


def golden_config(key: str, beta: float) -> dict[str, Any]:
    """A key such as `dpo[f_divergence=alpha,f_alpha=0.3]` as a configuration."""
    name, _, options = key.rstrip("]").partition("[")
    config: dict[str, Any] = {"name": name, "beta": beta}
    for item in filter(None, options.split(",")):
        option, text = item.split("=")
        value = (
            float(text) if re.fullmatch(r"[\d.]+", text) else {"true": True, "false": False}.get(text, text)
        )
        section, inner = NESTED.get(option, (option, ""))
        if inner:
            config.setdefault(section, {})[inner] = value
        else:
            config[section] = value
    return config


KEYS = list(GOLDEN[0]["per_pair_loss"])


@every_case
@pytest.mark.parametrize("key", KEYS)
def test_golden_values_2(case: dict[str, Any], key: str) -> None:
    config = golden_config(key, case["beta"])
    out = build_objective(config)(golden_scores(case, config["name"]))
    expected = torch.tensor(case["per_pair_loss"][key], dtype=torch.float64)
    torch.testing.assert_close(out.per_pair_loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.loss, expected.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_is_read_beyond_the_shorter_answer(config: dict[str, Any]) -> None:
    objective, scores = build_objective(config), random_scores(ties="ties" in config)
    if not objective.needs_rejected:
        assert not objective.compares_to_shorter
        return
    assert scores.rejected_mask is not None
    both = scores.chosen_mask & scores.rejected_mask
    cut = map_sides(scores, lambda name, v: v & both if "mask" in name else v)
    whole, truncated = objective(scores).per_pair_loss, objective(cut).per_pair_loss
    assert objective.compares_to_shorter == torch.allclose(whole, truncated, rtol=0, atol=1e-12)


@every_case
def test_golden_gradients_2(case: dict[str, Any]) -> None:
    for key in case["grad_chosen_logps"]:
        config = golden_config(key, case["beta"])
        scores = golden_scores(case, config["name"])
        scores.chosen_logps.requires_grad_()
        build_objective(config)(scores).per_pair_loss.sum().backward()
        expected = torch.tensor(case["grad_chosen_logps"][key], dtype=torch.float64)
        atol = 1e-7 if config["name"] == "confpo" else 1e-12
        torch.testing.assert_close(scores.chosen_logps.grad, expected, rtol=0, atol=atol)


@every_case
def test_golden_wpo_weights(case: dict[str, Any]) -> None:
    out = build_objective({"name": "dpo", "pair_weights": "wpo"})(golden_scores(case))
    expected = torch.tensor(case["wpo_weight"], dtype=torch.float64).mean()
    torch.testing.assert_close(out.metrics["pairs/wpo_weight"], expected, rtol=0, atol=1e-12)


# --- limits


def per_pair(config: dict[str, Any], scores: TokenScores | None = None) -> Tensor:
    return build_objective(config)(random_scores() if scores is None else scores).per_pair_loss


LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "ld_alpha 1": ({"ld_alpha": 1}, {}, 1e-14),
    "ld_alpha 1, full": ({"ld_alpha": 1, "ld_reference": "full"}, {}, 1e-14),
    "reverse_kl": ({"f_divergence": {"kind": "reverse_kl"}}, {}, 0),
    "alpha to 0": ({"f_divergence": {"kind": "alpha", "alpha": 1e-9}}, {}, 1e-6),
    "alpha to 1": (
        {"f_divergence": {"kind": "alpha", "alpha": 1 - 1e-9}},
        {"f_divergence": {"kind": "forward_kl"}},
        1e-5,
    ),
    "no NLL": ({"nll_weight": 0.0, "nll_normalization": "sum"}, {}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_dpo(name: str) -> None:
    given, limit, atol = LIMITS[name]
    torch.testing.assert_close(
        per_pair({"name": "dpo", "beta": 0.3, **given}), per_pair({"name": "dpo", "beta": 0.3, **limit}),
        rtol=0, atol=atol,
    )  # fmt: skip


def readers(setting: str) -> list[str]:
    return [name for name in OBJECTIVES if setting in TRAITS[name].settings]


@pytest.mark.parametrize("name", readers("nll_weight"))
def test_the_nll_is_that_of_sft(name: str) -> None:
    expected = per_pair({"name": name}) + 0.7 * per_pair({"name": "sft"})
    torch.testing.assert_close(per_pair({"name": name, "nll_weight": 0.7}), expected, rtol=0, atol=1e-14)
    assert not build_objective({"name": name, "nll_weight": 0.7}).compares_to_shorter


@pytest.mark.parametrize("name", readers("pair_weights"))
def test_weights_multiply_and_the_mean_is_not_divided_by_them(name: str) -> None:
    scores = random_scores()
    plain = per_pair({"name": name, "nll_weight": 0.2}, scores)
    out = build_objective({"name": name, "nll_weight": 0.2, "pair_weights": "data"})(scores)
    torch.testing.assert_close(out.per_pair_loss, scores.pair_weights * plain, rtol=0, atol=1e-14)
    torch.testing.assert_close(out.loss, (scores.pair_weights * plain).mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(out.metrics["pairs/weight"], scores.pair_weights.mean())


@pytest.mark.parametrize("name", readers("pair_weights"))
def test_wpo_weighs_the_preference_loss_and_not_the_nll(name: str) -> None:
    scores = random_scores()
    for side in SIDES:  # answers that are certain, so that both weights are 1
        setattr(scores, f"{side}_log_collision", getattr(scores, f"{side}_logps"))
    wpo = {"name": name, "pair_weights": "wpo", "nll_weight": 0.2}
    torch.testing.assert_close(
        per_pair(wpo, scores), per_pair({"name": name, "nll_weight": 0.2}), rtol=0, atol=1e-14
    )
    unlikely = {"name": name, "pair_weights": "wpo", "wpo_alignment": "none"}
    plain = per_pair({"name": name})
    weights = (per_pair(unlikely, scores) / plain)[plain != 0]
    assert (weights > 0).all() and (weights < 1).all()
    nll = per_pair({**unlikely, "nll_weight": 0.2}, scores) - per_pair(unlikely, scores)
    torch.testing.assert_close(nll, 0.2 * per_pair({"name": "sft"}), rtol=0, atol=1e-14)
    assert not build_objective(unlikely).compares_to_shorter


def test_wpo_reads_the_collision_probability_where_it_is_asked_to() -> None:
    with_it, without = (
        build_objective({"name": "dpo", "pair_weights": "wpo", "wpo_alignment": kind})
        for kind in ("sampled", "none")
    )
    assert with_it.needs_collision and not without.needs_collision
    scores = random_scores()
    expected = without(scores).loss
    scores.chosen_log_collision = None
    assert without(scores).loss == expected
    with pytest.raises(InputError, match="chosen_log_collision: None"):
        with_it(scores)


@pytest.mark.parametrize("name", [name for name in readers("pair_margins") if name != "arc_bpo"])
def test_equal_margins_are_a_gamma_and_no_margins_change_nothing(name: str) -> None:
    scores = random_scores()
    scores.pair_margins = torch.zeros(5)
    config = {"name": name, "pair_margins": "data", "label_smoothing": 0.1}
    plain = per_pair({"name": name, "label_smoothing": 0.1}, scores)
    torch.testing.assert_close(per_pair(config, scores), plain, rtol=0, atol=1e-14)
    scores.pair_margins = torch.full((5,), 0.25, dtype=torch.float64)
    moved = per_pair(config, scores)
    assert torch.equal(moved != plain, plain != 0)  # confpo skips pairs
    if name == "simpo":
        gamma = per_pair({"name": name, "gamma": 0.75, "label_smoothing": 0.1}, scores)
        torch.testing.assert_close(moved, gamma, rtol=0, atol=1e-14)


def test_who_can_take_margins_and_weights() -> None:
    for name, family in FAMILIES.items():
        logistic = family.link is losses.softplus and family.u is not None
        assert ("pair_margins" in TRAITS[name].settings) == (logistic or name == "arc_bpo"), name
        for setting in ("nll_weight", "pair_weights"):
            assert (setting in TRAITS[name].settings) == (name != "sft"), name


def test_a_nan_among_the_numbers_of_pairs_stays_in_its_pair() -> None:
    for column, config in {"pair_margins": "dpo_margins", "pair_weights": "dpo_weights"}.items():
        scores = random_scores()
        getattr(scores, column)[1] = torch.nan
        loss = per_pair(CONFIGS[config], scores)
        assert loss.isnan().tolist() == [False, True, False, False, False]


def test_numbers_of_pairs_that_are_missing_or_of_another_shape() -> None:
    objective = build_objective({"name": "dpo", "pair_margins": "data", "pair_weights": "data"})
    assert objective.pair_columns == ("margin", "weight")
    scores = random_scores()
    scores.pair_weights = torch.ones(5, 1)
    with pytest.raises(InputError, match=r"pair_weights: shape \(5, 1\), expected \(5,\)"):
        objective(scores)
    scores.pair_margins = None
    with pytest.raises(InputError, match="pair_margins: None"):
        objective(scores)


@pytest.mark.parametrize("kind", ["forward_kl", "alpha", "js"])
def test_long_answers_do_not_overflow(kind: str) -> None:
    scores = random_scores(dtype=torch.float32)
    scores.chosen_logps = (scores.chosen_logps.detach() - 1e4).requires_grad_()
    out = build_objective({"name": "dpo", "f_divergence": {"kind": kind}})(scores)
    out.loss.backward()
    assert out.loss.isfinite() and scores.chosen_logps.grad is not None
    assert scores.chosen_logps.grad.isfinite().all()
    if kind != "js":
        assert out.metrics["f_divergence/clamped_share"] == 0.5
        assert not scores.chosen_logps.grad.any()


def test_at_the_start_the_tail_favors_no_side_unless_the_reference_counts_in_full() -> None:
    scores = random_scores()
    scores.chosen_ref_logps, scores.rejected_ref_logps = scores.chosen_logps, scores.rejected_logps
    weighted = build_objective({"name": "dpo", "ld_alpha": 0.5})(scores)
    assert weighted.metrics["u/mean"] == 0
    full = build_objective({"name": "dpo", "ld_alpha": 0.5, "ld_reference": "full"})(scores)
    assert full.metrics["u/mean"] != 0


def test_confpo_with_two_probabilities_is_simpo_on_the_smaller_ones() -> None:
    # Every second token has probability 1, so that the others are those below the mean.
    scores = random_scores(tokens=6)
    even = torch.arange(6) % 2 == 0
    for side in SIDES:
        setattr(scores, f"{side}_logps", torch.where(even, 0.0, -1.0 - torch.rand(5, 1, dtype=torch.float64)))
        setattr(scores, f"{side}_mask", torch.ones(5, 6, dtype=torch.bool))
    got = per_pair({"name": "confpo"}, scores)
    odd = map_sides(scores, lambda _, v: v[:, 1::2])
    torch.testing.assert_close(
        got, per_pair({"name": "simpo", "beta": 1.5, "gamma": 1.6}, odd), rtol=0, atol=1e-14
    )


def test_confpo_skips_pairs_without_a_selected_token_and_counts_them() -> None:
    # log(exp(x)) > x for about 3 % of x: a single token must not be selected by rounding.
    logps = (-torch.rand(500, 1)).requires_grad_()
    mask = torch.ones(500, 1, dtype=torch.bool)
    scores = TokenScores(chosen_logps=logps, rejected_logps=logps * 2, chosen_mask=mask, rejected_mask=mask)
    out = build_objective({"name": "confpo"})(scores)
    out.loss.backward()
    assert out.loss == 0 and out.metrics["pairs/skipped_share"] == 1
    assert logps.grad is not None and not logps.grad.any()
    scores = random_scores()
    scores.chosen_logps.retain_grad()
    objective = build_objective({"name": "confpo"})
    assert not objective.needs_reference and not objective.compares_to_shorter
    out = objective(scores)
    out.loss.backward()
    one_token = (scores.chosen_mask.sum(1) == 1) | (scores.rejected_mask.sum(1) == 1)
    assert torch.equal(out.per_pair_loss == 0, one_token) and one_token.any()
    probability = scores.chosen_logps.detach().exp() * scores.chosen_mask
    below = probability < probability.sum(1, keepdim=True) / scores.chosen_mask.sum(1, keepdim=True)
    assert torch.equal(scores.chosen_logps.grad != 0, below & scores.chosen_mask & ~one_token[:, None])


def test_tgdpo_without_its_guide_is_dpo_and_one_that_stretches_is_tis_dpo() -> None:
    scores = random_scores()
    dpo = per_pair({"name": "dpo"}, scores)
    torch.testing.assert_close(per_pair({"name": "tgdpo", "alpha": 0}, scores), dpo, rtol=0, atol=1e-14)
    got = build_objective({"name": "tgdpo", "alpha": 2.0, "guide": {"beta": 0.7}})(scores)
    assert got.metrics["tgdpo/negative_share"] > 0
    assert scores.chosen_weights is not None and scores.rejected_weights is not None
    scores.chosen_weights = 1 + 1.4 * scores.chosen_weights
    scores.rejected_weights = 1 - 1.4 * scores.rejected_weights
    expected = per_pair({"name": "tis_dpo"}, scores)
    torch.testing.assert_close(got.per_pair_loss, expected, rtol=0, atol=1e-14)
    own = build_objective({"name": "tgdpo", "beta": 0.3}).params
    assert own.guide_beta == 0.3 and own.alpha == 0.5


def chunked(scores: TokenScores, kind: str) -> TokenScores:
    """Every token, or the whole answer, as a chunk."""
    tokens = torch.arange(scores.chosen_logps.shape[1]).expand_as(scores.chosen_logps)
    for side in SIDES:
        setattr(scores, f"{side}_chunks", tokens if kind == "token" else torch.zeros_like(tokens))
    return scores


@pytest.mark.parametrize("lam", [-0.5, 0.0, 1e-13, 1.0, 2.0])
def test_arc_bpo_of_whole_answers_pulls_both_scores_to_their_target(lam: float) -> None:
    scores = chunked(random_scores(), "answer")
    config = {"name": "arc_bpo", "beta": 0.5, "bregman": {"lam": lam, "scale": 3.0}}
    out = per_pair(config, scores)
    (gradient,) = torch.autograd.grad(out.sum(), scores.chosen_logps)
    assert scores.chosen_ref_logps is not None
    a = 0.5 * ((scores.chosen_logps - scores.chosen_ref_logps) * scores.chosen_mask).sum(1)
    slope = torch.exp(-lam * a) * (math.exp(-1) - torch.exp(-a)) / 3
    expected = torch.where(scores.chosen_mask, 0.5 * slope[:, None], 0)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-12)
    assert (out >= 0).all()


def test_arc_bpo_is_zero_at_its_targets_and_only_there() -> None:
    scores = chunked(random_scores(), "token")
    for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
        mask = getattr(scores, f"{side}_mask")
        tau = sign / mask.sum(1, keepdim=True).double()  # margin 2, half of it for each answer
        setattr(scores, f"{side}_logps", getattr(scores, f"{side}_ref_logps") + tau / 0.1)
    torch.testing.assert_close(
        per_pair({"name": "arc_bpo"}, scores), torch.zeros(5).double(), rtol=0, atol=1e-14
    )
    assert (per_pair({"name": "arc_bpo", "arc": {"delta": 2.1}}, scores) > 0).all()
    scores.pair_margins = torch.full((5,), 2.0)
    config = {"name": "arc_bpo", "arc": {"delta": 7.0}, "pair_margins": "data"}
    torch.testing.assert_close(per_pair(config, scores), torch.zeros(5).double(), rtol=0, atol=1e-14)


def test_arc_bpo_with_equal_advantages_is_uniform() -> None:
    scores = random_scores()
    for side in SIDES:
        setattr(scores, f"{side}_weights", torch.zeros(5, 7, dtype=torch.float64))
    got = per_pair({"name": "arc_bpo", "arc": {"shape": "advantage"}}, scores)
    torch.testing.assert_close(got, per_pair({"name": "arc_bpo"}, scores), rtol=0, atol=1e-14)
    assert not build_objective({"name": "arc_bpo"}).needs_weights
    assert build_objective({"name": "arc_bpo", "arc": {"shape": "advantage"}}).needs_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arc_bpo_far_from_its_targets_stays_finite_and_is_counted(dtype: torch.dtype) -> None:
    scores = random_scores(dtype=dtype)
    scores.chosen_logps = (scores.chosen_logps.detach() - 1e4).requires_grad_()
    out = build_objective({"name": "arc_bpo"})(scores)
    out.loss.backward()
    assert out.loss.isfinite() and 0 < out.metrics["arc/clamped_share"] < 1
    assert scores.chosen_logps.grad is not None and not scores.chosen_logps.grad.any()


# --- bad input


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"name": "sft", "nll_weight": 0.1},
            ["objective.nll_weight=0.1", "objective.name=sft", "use 0.0", "dpo"],
        ),
        ({"name": "dpo", "nll_weight": -1}, ["objective.nll_weight=-1", "0"]),
        ({"name": "dpo", "nll_weight": True}, ["objective.nll_weight=True", "number"]),
        ({"name": "dpo", "nll_normalization": "mean"}, ["objective.nll_normalization='mean'", "token_mean"]),
        (
            {"name": "ipo", "pair_margins": "data"},
            ["objective.pair_margins=data", "objective.name=ipo", "none"],
        ),
        ({"name": "tbpo_q", "pair_margins": "data"}, ["objective.pair_margins=data", "use none", "simpo"]),
        ({"name": "dpo", "pair_margins": "column"}, ["objective.pair_margins='column'", "data"]),
        ({"name": "sft", "pair_weights": "data"}, ["objective.pair_weights=data", "use none"]),
        ({"name": "arc_bpo", "label_smoothing": 0.1}, ["objective.label_smoothing=0.1", "arc_bpo", "use 0"]),
        (
            {"name": "arc_bpo", "bregman": {"generator": "lsif"}},
            ["objective.bregman.generator=lsif", "arc_bpo", "use sba"],
        ),
        ({"name": "arc_bpo", "arc": {"delta": 0}}, ["objective.arc.delta=0", "greater than 0"]),
        ({"name": "arc_bpo", "arc": {"shape": "flat"}}, ["objective.arc.shape='flat'", "advantage"]),
        ({"name": "arc_bpo", "chunks": {"max_tokens": 0}}, ["objective.chunks.max_tokens=0", "1"]),
        (
            {"name": "arc_bpo", "chunks": {"min_tokens": 9, "max_tokens": 8}},
            ["objective.chunks.min_tokens=9", "objective.chunks.max_tokens=8"],
        ),
        ({"name": "tgdpo", "guide": {"beta": 0}}, ["objective.guide.beta=0", "greater than 0"]),
        ({"name": "sft", "pair_weights": "wpo"}, ["objective.pair_weights=wpo", "objective.name=sft"]),
        ({"name": "dpo", "wpo_alignment": "token"}, ["objective.wpo_alignment='token'", "sampled"]),
        ({"name": "dpo", "pair_weights": 2}, ["objective.pair_weights=2", "data"]),
        (
            {"name": "dpo", "pair_margins": "data", "ties": "davidson"},
            ["objective.pair_margins=data", "objective.ties=davidson", "objective.ties=drop"],
        ),
        ({"name": "dpo", "f_divergence": {"kind": "kl"}}, ["objective.f_divergence.kind='kl'", "reverse_kl"]),
        ({"name": "dpo", "f_divergence": {"alpha": 1}}, ["objective.f_divergence.alpha=1", "less than 1"]),
        ({"name": "dpo", "f_divergence": {"alpha": 0}}, ["objective.f_divergence.alpha=0", "greater than 0"]),
        ({"name": "dpo", "ld_alpha": 1.5}, ["objective.ld_alpha=1.5", "less than or equal to 1"]),
        ({"name": "dpo", "ld_alpha": -0.1}, ["objective.ld_alpha=-0.1", "greater than or equal to 0"]),
        ({"name": "dpo", "ld_reference": "policy"}, ["objective.ld_reference='policy'", "weighted"]),
        (
            {"name": "dpo", "ld_alpha": 0.5, "f_divergence": {"kind": "js"}},
            ["objective.f_divergence.kind=js", "objective.ld_alpha=0.5", "objective.ld_alpha=null"],
        ),
        (
            {"name": "dpo", "ld_alpha": 0.5, "normalization": "token_mean"},
            ["objective.ld_alpha=0.5", "objective.normalization=token_mean", "objective.normalization=sum"],
        ),
    ],
)
def test_bad_configuration_2(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        build_objective(section)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "dpo"])
def test_the_forms_of_dpo_have_no_effect_on_others(name: str) -> None:
    given = {"name": name, "ld_alpha": 0.3, "f_divergence": {"kind": "forward_kl"}}
    torch.testing.assert_close(per_pair(given), per_pair({"name": name}), rtol=0, atol=0)
