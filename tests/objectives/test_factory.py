"""Invalid configuration and input raise an error that names them, and never give a silent number."""

from __future__ import annotations

import pytest
import torch
from objective_cases import random_scores

from tbpo_ray.config.objective import READ_BY, TRAITS, ObjectiveConfig, StateBaselineConfig
from tbpo_ray.errors import InputError
from tbpo_ray.objectives import (
    GENERATORS,
    OBJECTIVES,
    build_objective,
    contrastive_weights,
    distribution_metrics,
    make_generator,
    oracle_scores,
    self_rewards,
)
from tbpo_ray.objectives.generators import LOSSES
from tbpo_ray.objectives.objective import FAMILIES


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, ["objective.name", "None", "tbpo_q"]),
        ({"name": "tbpo_qq"}, ["objective.name", "'tbpo_qq'", "did you mean tbpo_q?"]),
        ({"name": "dpo", "bata": 1}, ["objective.bata", "objective.beta"]),
        ({"name": "dpo", "beta": 0}, ["objective.beta=0", "greater than 0"]),
        ({"name": "dpo", "beta": "big"}, ["objective.beta", "'big'"]),
        ({"name": "dpo", "beta": float("inf")}, ["objective.beta", "inf"]),
        ({"name": "dpo", "beta": True}, ["objective.beta=True", "number"]),
        ({"name": "dpo", "label_smoothing": 0.5}, ["objective.label_smoothing=0.5", "less than 0.5"]),
        ({"name": "simpo", "gamma": -1}, ["objective.gamma=-1", "0"]),
        ({"name": "dpo", "label_smoothing": 0.7}, ["objective.label_smoothing", "0.7", "0.5"]),
        ({"name": "sft", "label_smoothing": 0.1}, ["objective.label_smoothing", "sft"]),
        ({"name": "sepo", "select_ratio": 0}, ["objective.select_ratio=0", "greater than 0"]),
        ({"name": "sepo", "select_ratio": 1.1}, ["objective.select_ratio=1.1", "less than or equal to 1"]),
        ({"name": "sepo", "select_ratio": "x"}, ["objective.select_ratio='x'", "number"]),
        (
            {"name": "sepo", "select_ratio": {"chosen": 2}},
            ["objective.select_ratio.chosen=2", "less than or equal to 1"],
        ),
        (
            {"name": "sepo", "select_ratio": {"chosn": 0.3}},
            ["objective.select_ratio.chosn", "objective.select_ratio.chosen"],
        ),
        ({"name": "t_reg", "base": "ipo"}, ["objective.base='ipo'", "simpo"]),
        ({"name": "dpo", "normalization": "mean"}, ["objective.normalization='mean'", "token_mean"]),
        ({"name": "bpo", "bregman": {"a": float("nan")}}, ["objective.bregman.a=nan", "finite"]),
        ({"name": "bpo", "bregman": {"b": float("inf")}}, ["objective.bregman.b=inf", "finite"]),
        ({"name": "bpo", "bregman": {"a": 101}}, ["objective.bregman.a=101", "100"]),
        (
            {"name": "bpo", "bregman": {"a": 1, "a_plus_b": 2}},
            ["objective.bregman.a=1.0", "a_plus_b", "remove"],
        ),
        ({"name": "bpo", "bregman": {"generator": "a.py"}}, ["objective.bregman.generator", "path.py:NAME"]),
        ({"name": "dpo", "ties": "elo"}, ["objective.ties='elo'", "davidson"]),
        ({"name": "dpo", "ties": "davidson", "tie_strength": 0}, ["objective.tie_strength=0", "0"]),
        (
            {"name": "dpo", "ties": "rao_kupper", "tie_strength": 1},
            ["objective.tie_strength=1.0", "greater than 1"],
        ),
        *(
            (
                {"name": name, "ties": "davidson"},
                ["objective.ties=davidson", f"objective.name={name}", "drop"],
            )
            for name in ("tbpo_q", "ipo", "bpo", "t_reg", "sft")
        ),
        ({"name": "tdpo2", "alpha": -1}, ["objective.alpha", "-1"]),
        ({"name": "bpo", "bregman": {"lam": -1}}, ["objective.bregman.lam=-1", "greater than -1"]),
        ({"name": "bpo", "bregman": {"generator": "x"}}, ["objective.bregman.generator", "'x'"]),
        ({"name": "bpo", "bregman": {"lamb": 1}}, ["objective.bregman.lamb", "objective.bregman.lam"]),
        ({"name": "bpo", "bregman": "sba"}, ["objective.bregman", "'sba'", "mapping"]),
        ({"name": "tbpo_q", "state_baseline": {"kind": "kl"}}, ["state_baseline.kind", "'kl'", "exact_kl"]),
        (
            {"name": "tbpo_q", "state_baseline": {"center": 1}},
            ["state_baseline.center=1", "boolean"],
        ),
        (
            {"name": "tbpo_q", "state_baseline": {"clip": 0}},
            ["state_baseline.clip=0", "greater than 0"],
        ),
        ({"name": "tbpo_q", "state_baseline": {"samples": 0}}, ["state_baseline.samples=0", "1"]),
        ({"name": "tbpo_q", "state_baseline": {"hidden": -1}}, ["state_baseline.hidden=-1", "0"]),
        (
            {"name": "tbpo_q", "state_baseline": {"lr": 0}},
            ["state_baseline.lr=0", "greater than 0"],
        ),
        ({"name": "tbpo_q", "state_baseline": {"width": 9}}, ["state_baseline.width", "unknown key"]),
    ],
)
def test_bad_configuration(section: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        build_objective(section)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_mapping_and_the_typed_section_build_the_same_objective() -> None:
    for name in OBJECTIVES:
        config = ObjectiveConfig(name=name)
        assert repr(build_objective(config)) == repr(build_objective({"name": name}))
        assert repr(build_objective(config.model_dump())) == repr(build_objective(config))
    assert build_objective({"name": "tbpo_a"}).state_baseline.samples == StateBaselineConfig().samples
    assert make_generator("sba") == build_objective({"name": "tbpo_q"}).generator


def test_every_objective_has_a_formula_and_traits() -> None:
    assert set(FAMILIES) == set(TRAITS) == set(OBJECTIVES)
    assert {*LOSSES, "beta_family"} == set(GENERATORS)
    settings = {key.removeprefix("objective.") for key in READ_BY}
    assert settings < set(ObjectiveConfig.model_fields)
    for name, family in FAMILIES.items():
        assert ("bregman" in TRAITS[name].settings) == (family.link in ("bregman", "chunks"))


def test_the_rejected_side_may_be_none_for_sft_only() -> None:
    scores = random_scores()
    for field in ("logps", "ref_logps", "mask", "baseline", "weights", "log_collision", "chunks"):
        setattr(scores, f"rejected_{field}", None)
    whole, alone = build_objective({"name": "sft"})(random_scores()), build_objective({"name": "sft"})(scores)
    torch.testing.assert_close(alone.per_pair_loss, whole.per_pair_loss, rtol=0, atol=0)
    build_objective({"name": "sft"}).check(scores)
    with pytest.raises(InputError, match="rejected_logps: None"):
        build_objective({"name": "dpo"})(scores)


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(InputError) as error:
        build_objective({"name": "tbpo_q", "state_baseline": {"clip": -1, "hidden": -1}})
    assert len(error.value.faults) == 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_configuration_serves_every_name(name: str) -> None:
    section = {
        "name": name,
        "beta": None,
        "label_smoothing": 0.0,
        "alpha": None,
        "gamma": 0.5,
        "select_ratio": 0.3,
        "bregman": {"generator": "sba", "lam": 0.0, "scale": 4.0},
        "state_baseline": {
            "kind": None,
            "center": False,
            "clip": None,
            "detach": False,
            "samples": 4,
            "lr": 1e-3,
            "hidden": 1024,
        },
    }
    objective = build_objective(section)
    assert objective.name == name and name in repr(objective)
    assert objective.params.beta == {"simpo": 2.0, "sepo": 1.0, "confpo": 1.5}.get(name, 0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mismatched_shapes_and_missing_fields(name: str) -> None:
    objective = build_objective({"name": name})
    scores = random_scores()
    scores.chosen_mask = scores.chosen_mask[:, :-1]
    with pytest.raises(InputError, match=r"chosen_mask: shape \(5, 6\), expected \(5, 7\)"):
        objective(scores)
    scores = random_scores()
    for field in ("ref_logps", "baseline", "weights"):
        setattr(scores, f"chosen_{field}", None)
    if name in ("simpo", "confpo", "sft"):
        objective(scores)
        return
    with pytest.raises(InputError, match=r"chosen_(ref_logps|weights): None"):
        objective(scores)


def test_scores_of_three_dimensions() -> None:
    scores = random_scores()
    for name, value in vars(scores).items():
        setattr(scores, name, None if value is None else value[None])
    with pytest.raises(InputError, match="two dimensions"):
        build_objective({"name": "dpo"})(scores)


def test_check_names_the_nan() -> None:
    scores = random_scores(grad=False)
    objective = build_objective({"name": "tbpo_q"})
    objective.check(scores)
    scores.rejected_logps[~scores.rejected_mask] = float("nan")
    objective.check(scores)
    scores.rejected_logps[2, 0] = float("nan")
    scores.chosen_baseline[1, 0] = float("nan")
    with pytest.raises(InputError) as error:
        objective.check(scores)
    assert len(error.value.faults) == 2
    assert "chosen_baseline: nan at pair 1, token 0" in error.value.faults[0]
    assert "rejected_logps: nan at pair 2, token 0 (1 in all)" in error.value.faults[1]


def test_clamped_share_and_quantiles_of_long_batches() -> None:
    scores = random_scores(pairs=40, tokens=30)
    scores.chosen_logps = scores.chosen_logps.detach() * 1e4
    out = build_objective({"name": "tbpo_q", "beta": 0.1})(scores)
    both = scores.chosen_mask & scores.rejected_mask
    ratio = scores.chosen_logps - scores.chosen_ref_logps
    c = scores.rejected_baseline - scores.chosen_baseline
    u = 0.1 * (scores.rejected_logps - scores.rejected_ref_logps - ratio + c)
    assert out.metrics["u/clamped_share"].item() == pytest.approx((u[both].abs() > 30).double().mean().item())
    rejected = (scores.rejected_logps - scores.rejected_ref_logps)[scores.rejected_mask]
    every = torch.cat([ratio[scores.chosen_mask], rejected])
    for name, q in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        torch.testing.assert_close(out.metrics[f"logratio/{name}"], every.quantile(q))


def test_token_weights_of_two_models() -> None:
    plus, minus = torch.tensor([[-1.0, -1.0, -5.0]]), torch.tensor([[-1.0, -4.0, -1.0]])
    chosen = contrastive_weights(plus, minus, chosen=True)
    torch.testing.assert_close(chosen, torch.tensor([[0.0, 1.5, -0.5]]).exp())
    rejected = contrastive_weights(plus, minus, chosen=False, k=2.0)
    torch.testing.assert_close(rejected, 2 * torch.tensor([[0.0, -0.5, 1.5]]).exp())
    torch.testing.assert_close(oracle_scores(plus, minus), torch.tensor([[0.0, 3.0, -4.0]]))
    rewards = self_rewards(plus, minus)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 3.0, -4.0]]).sigmoid() - 0.5)
    for estimate in (oracle_scores, self_rewards, lambda a, b: contrastive_weights(a, b, chosen=True)):
        with pytest.raises(InputError, match="disagree"):
            estimate(plus, minus[:, :2])


def test_distribution_metrics() -> None:
    masks = {"chosen": torch.tensor([[True, False]]), "rejected": torch.tensor([[True, True]])}
    entropies = {"chosen": torch.tensor([[1.0, 9.0]]), "rejected": torch.tensor([[2.0, 3.0]])}
    found = distribution_metrics(entropies, {"chosen": None}, masks)
    assert found == {"entropy": torch.tensor(2.0)}
