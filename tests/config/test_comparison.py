"""Configurations of one run, written at different times, are compared by what they mean."""

from __future__ import annotations

from tbpo_ray.config.comparison import changed_values
from tbpo_ray.config.loading import load_config, to_tree


def test_a_key_that_was_added_since_had_its_default():
    new = to_tree(load_config(None, []))
    old = to_tree(load_config(None, []))
    del old["training"]["tf32"], old["generation"]
    assert changed_values(old, new) == {}
    changed = to_tree(load_config(None, ["training.tf32=true"]))
    assert changed_values(old, changed) == {"training.tf32": (None, True)}
