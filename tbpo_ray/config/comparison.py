"""The difference between two configurations of the same run or study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tbpo_ray.config.loading import flatten, is_at_or_below, rename_deprecated_keys, to_tree
from tbpo_ray.config.objective import TRAITS
from tbpo_ray.config.schema import Config

_OWN_DEFAULTS = {"objective.gamma": "gamma", "objective.bregman.lam": "lam"}
"""Keys that older versions wrote with a default for all objectives, and the trait that has it now."""


def changed_values(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignored: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with the old and the new value, in alphabetical order.

    Args:
        old: a nested configuration, which may have been written by an older version: with deprecated keys,
            and without keys that have been added since, which then had their defaults.
        new: a nested configuration.
        ignored: keys and sections that are not compared.
    """
    before = _with_own_defaults(flatten(rename_deprecated_keys(old, log=False)))
    after = _with_own_defaults(flatten(new))
    defaults = flatten(to_tree(Config()))
    added = {key for key in after if key not in before and key in defaults and after[key] == defaults[key]}
    sections = tuple(ignored)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted((before.keys() | after.keys()) - added)
        if before.get(key) != after.get(key) and not any(is_at_or_below(key, section) for section in sections)
    }


def _with_own_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the objective's own default where a key that had one for all objectives is null."""
    traits = TRAITS.get(values.get("objective.name", Config().objective.name))
    defaults = {key: getattr(traits, trait) for key, trait in _OWN_DEFAULTS.items()} if traits else {}
    return dict(values) | {k: v for k, v in defaults.items() if k in values and values[k] is None}
