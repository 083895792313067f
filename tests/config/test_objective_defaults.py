"""Keys whose default depends on the objective, in runs that an older version started."""

from __future__ import annotations

from typing import Any

import pytest

from tbpo_ray.config.comparison import changed_values
from tbpo_ray.config.loading import load_config, to_tree


def tree(*overrides: str) -> dict[str, Any]:
    return to_tree(load_config(None, list(overrides)))


@pytest.mark.parametrize("name", ["simpo", "t_reg", "tbpo_q", "bpo"])
def test_an_older_run_with_the_old_defaults_is_unchanged(name: str) -> None:
    old, new = tree(f"objective.name={name}"), tree(f"objective.name={name}")
    old["objective"]["gamma"] = 0.5
    old["objective"]["bregman"]["lam"] = 0.0
    for key in ("nll_weight", "pair_margins", "pair_weights", "f_divergence", "ld_alpha", "arc", "guide"):
        del old["objective"][key]
    assert changed_values(old, new) == {}


@pytest.mark.parametrize(
    ("key", "value", "own"), [("objective.gamma", 0.5, 1.6), ("objective.bregman.lam", 0.0, 1.0)]
)
def test_a_value_that_is_not_the_objectives_own_default_is_a_change(
    key: str, value: float, own: float
) -> None:
    name = "objective.name=" + ("confpo" if "gamma" in key else "arc_bpo")
    assert changed_values(tree(name, f"{key}={value}"), tree(name)) == {key: (value, own)}
    assert changed_values(tree(name, f"{key}={own}"), tree(name)) == {}
