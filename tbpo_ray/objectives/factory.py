"""From the `objective.*` section of a configuration to an `Objective`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tbpo_ray.errors import InputError
from tbpo_ray.objectives.baseline import KINDS, StateBaseline
from tbpo_ray.objectives.generators import is_finite_number, make_generator, nearest
from tbpo_ray.objectives.losses import Params
from tbpo_ray.objectives.objective import FAMILIES, Objective

KEYS = ("name", "beta", "label_smoothing", "alpha", "gamma", "select_ratio", "bregman", "state_baseline")
BREGMAN_KEYS = ("generator", "lam", "scale")
BASELINE_KEYS = tuple(field.name for field in fields(StateBaseline))
DEFAULT_KIND = {"tbpo_q": "learned", "tbpo_a": "exact_kl"}


def build_objective(section: Mapping[str, Any]) -> Objective:
    """An objective from its configuration; an absent key, or None, stands for the source's default.

    Args:
        section: a mapping with
            name: one of `tbpo_q tbpo_a dpo ipo simpo bpo tdpo1 tdpo2 tis_dpo sepo t_reg sft`.
            beta: inverse temperature, above 0. 0.1; `simpo` and `sepo` 2.0 (length-normalised).
            label_smoothing: eps in (1-eps) loss(u) + eps loss(-u), 0 to 0.5. 0; `sft` has none.
            alpha: `tdpo2`: weight of the KL difference, 0.5. `t_reg`: weight of the regulariser, 0.1.
            gamma: `simpo`: target margin, 0.5.
            select_ratio: `sepo`: share of the tokens selected from each answer, 0.3.
            bregman: {generator, lam, scale} for `tbpo_q tbpo_a bpo`: sba, 0, 4.
            state_baseline: {kind, center, clip, detach, samples, lr, hidden} for `tbpo_q` (learned) and
                `tbpo_a` (exact_kl); see `baseline.StateBaseline`.

    A key that another objective reads is accepted and has no effect, so that one configuration can serve
    several names.

    Raises:
        InputError: an unknown name or key, or a value out of range; one sentence per fault.
    """
    name = section.get("name")
    if name not in FAMILIES:
        raise InputError(
            f"objective.name: {name!r} is not an objective; one of {' '.join(FAMILIES)}"
            + nearest(name, FAMILIES)
        )
    family = FAMILIES[name]
    given = known("objective", section, KEYS)
    numbers = {key: given[key] for key in KEYS[1:6] if key in given}
    defaults = {"beta": family.beta, "alpha": family.alpha}
    faults = number_faults(numbers, name)
    if faults:
        raise InputError(*faults)
    kind = DEFAULT_KIND.get(name, "none")
    baseline = build_baseline(given.get("state_baseline", {}), kind)
    generator = build_generator(given.get("bregman", {})) if family.link == "bregman" else None
    params = Params(**{**defaults, **numbers}, baseline=baseline)
    return Objective(name, params, generator)


def number_faults(numbers: Mapping[str, Any], name: str) -> list[str]:
    """What is wrong with the scalar settings, one sentence each."""
    ranges = {
        "beta": (lambda x: x > 0, "a finite number above 0"),
        "label_smoothing": (lambda x: 0 <= x <= 0.5, "a number from 0 to 0.5"),
        "alpha": (lambda x: x >= 0, "a finite number, 0 or more"),
        "gamma": (lambda x: True, "a finite number"),
        "select_ratio": (lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    }
    faults = [
        f"objective.{key}: {value!r} will not do; {ranges[key][1]}"
        for key, value in numbers.items()
        if not is_finite_number(value) or not ranges[key][0](value)
    ]
    if name == "sft" and not faults and numbers.get("label_smoothing", 0):
        faults.append(f"objective.label_smoothing: {numbers['label_smoothing']!r} means nothing for sft; 0")
    return faults


def build_generator(section: Any):
    """The Bregman generator of `objective.bregman`."""
    given = known("objective.bregman", section, BREGMAN_KEYS)
    return make_generator(
        given.get("generator", "sba"), lam=given.get("lam", 0.0), scale=given.get("scale", 4.0)
    )


def build_baseline(section: Any, default_kind: str) -> StateBaseline:
    """The state baseline's settings from `objective.state_baseline`.

    Raises:
        InputError: an unknown kind or key, or a value out of range.
    """
    given = known("objective.state_baseline", section, BASELINE_KEYS)
    spec = StateBaseline(**{"kind": default_kind, **given})
    faults = []
    if spec.kind not in KINDS:
        faults.append(
            f"kind: {spec.kind!r} is not a kind; one of {' '.join(KINDS)}{nearest(spec.kind, KINDS)}"
        )
    for key in ("center", "detach"):
        if not isinstance(getattr(spec, key), bool):
            faults.append(f"{key}: {getattr(spec, key)!r} will not do; true or false")
    if spec.clip is not None and not (is_finite_number(spec.clip) and spec.clip > 0):
        faults.append(f"clip: {spec.clip!r} will not do; a number above 0, or null")
    for key, least in (("samples", 1), ("hidden", 0)):
        value = getattr(spec, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            faults.append(f"{key}: {value!r} will not do; a whole number, {least} or more")
    if not is_finite_number(spec.lr) or spec.lr <= 0:
        faults.append(f"lr: {spec.lr!r} will not do; a number above 0")
    if faults:
        raise InputError(*(f"objective.state_baseline.{fault}" for fault in faults))
    if spec.detach and spec.learned:
        warnings.warn(
            f"objective.state_baseline.detach: true keeps the {spec.kind} head from learning", stacklevel=3
        )
    return spec


def known(where: str, section: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The section without its None values. Raises InputError for a non-mapping or an unknown key."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise InputError(f"{where}: {section!r} will not do; a mapping with keys {' '.join(keys)}")
    unknown = [key for key in section if key not in keys]
    if unknown:
        raise InputError(
            *(
                f"{where}.{key}: unknown key (value {section[key]!r}); one of {' '.join(keys)}"
                + nearest(key, keys)
                for key in unknown
            )
        )
    return {key: value for key, value in section.items() if value is not None}
