"""One parameter of a search space: its kind, its values, its condition, and how it is read from YAML."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tbpo_ray.config.schema import RENAMED_KEYS
from tbpo_ray.errors import InputError

DISCRETE = ("choice", "grid")
RANGES = ("uniform", "loguniform", "randint")
KINDS = (*DISCRETE, *RANGES)
FORMS = (
    "write it as {choice: [..]}, {grid: [..]}, {uniform: [lo, hi]}, {loguniform: [lo, hi]} or "
    "{randint: [lo, hi]}"
)


class Suggester(Protocol):
    """Proposes values: an Optuna trial, or anything else with these methods."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Parameter:
    """One key of a space."""

    key: str
    kind: str
    """`choice`, `grid`, `uniform`, `loguniform` or `randint`."""
    values: tuple[Any, ...]
    """The listed values, or (low, high), both inclusive."""
    when: Mapping[str, tuple[Any, ...]]
    """Maps another key to the values under which this parameter is active."""

    def is_active(self, values: Mapping[str, Any]) -> bool:
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())

    def suggest(self, trial: Suggester) -> Any:
        if self.kind in DISCRETE:
            # By index, because Optuna accepts only scalars and a listed value may be any YAML value.
            return self.values[trial.suggest_categorical(self.key, tuple(range(len(self.values))))]
        low, high = self.values
        if self.kind == "randint":
            return trial.suggest_int(self.key, low, high)
        return trial.suggest_float(self.key, low, high, log=self.kind == "loguniform")

    def position(self, value: Any) -> float:
        """The position of `value` in the parameter's range, in [0, 1]."""
        if self.kind in DISCRETE:
            return self.values.index(value) / max(1, len(self.values) - 1)
        low, high = self._scale(self.values[0]), self._scale(self.values[1])
        return (self._scale(value) - low) / (high - low)

    def value_at(self, position: float) -> Any:
        """The value at a position in [0, 1]; positions outside are clamped."""
        place = min(max(position, 0.0), 1.0)
        if self.kind in DISCRETE:
            return self.values[round(place * (len(self.values) - 1))]
        low, high = self._scale(self.values[0]), self._scale(self.values[1])
        value = low + place * (high - low)
        if self.kind == "randint":
            return round(value)
        value = math.exp(value) if self.kind == "loguniform" else value
        # exp(log(x)) can miss a bound by one rounding.
        return min(max(value, self.values[0]), self.values[1])

    def probes(self) -> tuple[Any, ...]:
        """Representative values: the listed ones, or both bounds and one value between them."""
        return self.values if self.kind in DISCRETE else (*self.values, self.value_at(0.37))

    def _scale(self, value: float) -> float:
        return math.log(value) if self.kind == "loguniform" else float(value)


def parse_parameter(key: str, entry: Any) -> Parameter:
    """Read one entry of a space.

    Raises:
        InputError: naming key, value and the accepted forms.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{key}: {entry!r} is not a range; {FORMS}")
    kind = _parse_kind(key, entry)
    fault = _value_fault(kind, entry[kind])
    if fault:
        raise InputError(f"{key}: {kind}={entry[kind]!r}: {fault}")
    when = entry.get("when") or {}
    if not isinstance(when, Mapping):
        raise InputError(f"{key}: when={when!r}: write it as {{other.key: value}}")
    allowed = {
        RENAMED_KEYS.get(str(k), str(k)): tuple(v) if isinstance(v, list) else (v,) for k, v in when.items()
    }
    return Parameter(key, kind, tuple(entry[kind]), allowed)


def _parse_kind(key: str, entry: Mapping[Any, Any]) -> str:
    unknown = [str(word) for word in entry if word not in (*KINDS, "when")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], (*KINDS, "when"), n=1, cutoff=0.0)
        raise InputError(f"{key}: unknown kind {unknown[0]!r}, the nearest is {near[0]}; {FORMS}")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        raise InputError(f"{key}: has {' and '.join(kinds) or 'no range'}; give exactly one; {FORMS}")
    return kinds[0]


def _value_fault(kind: str, values: Any) -> str | None:
    """What is wrong with the values of a range, if anything."""
    if not isinstance(values, list):
        return "must be a list"
    if kind in DISCRETE:
        return None if values else "is empty; list at least one value"
    if len(values) != 2:
        return "must be two bounds, [lo, hi]"
    return _bounds_fault(kind, *values)


def _bounds_fault(kind: str, low: Any, high: Any) -> str | None:
    if not (_is_finite_number(low) and _is_finite_number(high)):
        return "the bounds must be finite numbers (in YAML, write 1.0e-6 and not 1e-6)"
    if low > high:
        return f"the lower bound exceeds the upper one; write [{high}, {low}]"
    if low == high:
        return "lo equals hi"
    if kind == "loguniform" and low <= 0:
        return "the bounds of a logarithmic range must be above 0"
    if kind == "randint" and not (isinstance(low, int) and isinstance(high, int)):
        return "the bounds must be integers"
    return None


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
