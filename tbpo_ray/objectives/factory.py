"""Build an `Objective` from the `objective` section of a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from tbpo_ray.config.objective import BregmanConfig, ObjectiveConfig, StateBaselineConfig
from tbpo_ray.config.validation import validate_section
from tbpo_ray.objectives.generators import Generator, generator_from_config
from tbpo_ray.objectives.objective import FAMILIES, Objective


def build_objective(section: ObjectiveConfig | Mapping[str, Any]) -> Objective:
    """Build an objective from its configuration.

    Args:
        section: the typed section, or a mapping with its keys; `name` is required, an absent key or None
            stands for the default. `tbpo_ray.config.objective` has every key, its default and its limits. A
            key that another objective reads is accepted and has no effect, so that one configuration can
            serve several names.

    Raises:
        InputError: an unknown name or key, or a value out of range; one sentence per fault.
    """
    config = section if isinstance(section, ObjectiveConfig) else _validated(section)
    baseline = config.effective_baseline
    if baseline.detach and baseline.learned:
        warnings.warn(
            f"objective.state_baseline.detach=true keeps the {baseline.kind} head from learning",
            stacklevel=2,
        )
    uses_generator = FAMILIES[config.name].link == "bregman"
    return Objective(config, build_generator(config.effective_bregman) if uses_generator else None)


def build_generator(config: BregmanConfig) -> Generator:
    """Build the Bregman generator of `objective.bregman`."""
    return generator_from_config(config)


def validated_baseline(section: Mapping[str, Any] | None) -> StateBaselineConfig:
    """Check an `objective.state_baseline` mapping; None as a value stands for the default.

    Raises:
        InputError: an unknown kind or key, or a value out of range.
    """
    return validate_section(StateBaselineConfig, _without_none(section or {}), "objective.state_baseline")


def _validated(section: Mapping[str, Any]) -> ObjectiveConfig:
    # The configuration tree has a default name; a mapping without one is more likely a mistake.
    return validate_section(ObjectiveConfig, {"name": None, **_without_none(section)}, "objective")


def _without_none(section: Any) -> Any:
    """Drop None values, in nested mappings too, so that the defaults apply."""
    if not isinstance(section, Mapping):
        return section
    return {key: _without_none(value) for key, value in section.items() if value is not None}
