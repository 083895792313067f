"""Search spaces: YAML that maps dotted configuration keys to what they may be.

    objective.bregman.generator: {choice: [logistic, sba]}
    objective.bregman.lam: {uniform: [-0.5, 1.0], when: {objective.bregman.generator: sba}}

A `when` value may be a list: any of them. A key whose `when` does not hold stays as configured.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tbpo_ray.config.loading import known_keys, read_yaml_mapping, stage_config, unknown_key
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError

LISTED = ("choice", "grid")
RANGES = ("uniform", "loguniform", "randint")
NOT_SEARCHED = ("run", "tracking", "tune", "sft", "runs", "compare")
"""Sections that are not a trial's to choose; seeds are the business of `tune.repeats`."""
CHANGEABLE = (
    "objective.beta", "objective.label_smoothing", "objective.alpha", "objective.gamma",
    "objective.bregman.", "objective.state_baseline.center", "objective.state_baseline.clip",
    "objective.state_baseline.lr", "training.learning_rate", "training.weight_decay",
    "training.max_grad_norm", "training.on_nonfinite",
)  # fmt: skip
"""Keys (or beginnings of keys) that a run can change in the middle, as population-based training does."""


class Suggests(Protocol):
    """What proposes values: an Optuna trial, or anything with these two methods."""

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
    """The listed values, or (low, high), both included."""
    when: Mapping[str, tuple[Any, ...]]
    """Other key to the values under which this one counts."""

    def active(self, values: Mapping[str, Any]) -> bool:
        return all(key in values and values[key] in wanted for key, wanted in self.when.items())

    def suggest(self, trial: Suggests) -> Any:
        if self.kind in LISTED:
            # By index, so that a listed value may be anything that YAML can write.
            return self.values[trial.suggest_categorical(self.key, tuple(range(len(self.values))))]
        low, high = self.values
        if self.kind == "randint":
            return trial.suggest_int(self.key, low, high)
        return trial.suggest_float(self.key, low, high, log=self.kind == "loguniform")

    def position(self, value: Any) -> float:
        """Where `value` lies in the parameter's range, in [0, 1]."""
        if self.kind in LISTED:
            return self.values.index(value) / max(1, len(self.values) - 1)
        low, high = self._scaled(self.values[0]), self._scaled(self.values[1])
        return (self._scaled(value) - low) / (high - low)

    def at(self, position: float) -> Any:
        """The value at a position in [0, 1]; positions outside are brought to the nearer end."""
        place = min(max(position, 0.0), 1.0)
        if self.kind in LISTED:
            return self.values[round(place * (len(self.values) - 1))]
        low, high = self._scaled(self.values[0]), self._scaled(self.values[1])
        value = low + place * (high - low)
        if self.kind == "randint":
            return round(value)
        value = math.exp(value) if self.kind == "loguniform" else value
        return min(max(value, self.values[0]), self.values[1])

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: the listed ones, or both ends and one between."""
        return self.values if self.kind in LISTED else (*self.values, self.at(0.37))

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.kind == "loguniform" else float(value)


class Space:
    """A checked search space. `parameters` are in an order in which every `when` looks back only."""

    def __init__(self, parameters: Mapping[str, Parameter], source: Mapping[str, Any]):
        self.parameters = parameters
        self.source = dict(source)
        """As it was written."""

    @classmethod
    def load(cls, path: str) -> Space:
        """Read a YAML file.

        Raises:
            InputError: no such file, not YAML, or a fault of its content, one sentence each.
        """
        return cls.parse(read_yaml_mapping(path, option="--space", example="tune_spaces/joint.yaml"), path)

    @classmethod
    def parse(cls, tree: Mapping[str, Any], where: str = "space") -> Space:
        """Check what a space says about itself; :meth:`check` holds it against a configuration."""
        faults: list[str] = []
        found: dict[str, Parameter] = {}
        for key, entry in tree.items():
            try:
                found[str(key)] = _parameter(str(key), entry)
            except InputError as error:
                faults += error.faults
        if not tree:
            faults.append(f"{where}: the space is empty; give it a key such as objective.beta")
        if not faults:
            faults = [fault for p in found.values() for fault in _when_faults(p, found)]
        if faults:
            raise InputError(*faults)
        return cls(_ordered(found), tree)

    def check(self, config: Config) -> None:
        """Hold every key and every value against the configuration's types.

        Raises:
            InputError: an unknown key (with the nearest known one), a value that its type refuses.
        """
        faults: list[str] = []
        known = set(known_keys())
        for p in self.parameters.values():
            if any(p.key == key or p.key.startswith(f"{key}.") for key in NOT_SEARCHED):
                faults.append(f"{p.key}: is not a trial's to choose; leave it out of the space")
                continue
            if p.key not in known and not _inside_value(p.key, known):
                faults.append(unknown_key(p.key))
                continue
            for value in p.probes():
                try:
                    stage_config(config, {**self._enabling(p), p.key: value})
                except InputError as error:
                    faults += [
                        f"space: {fault}" if fault.startswith(p.key) else f"space, {p.key}={value!r}: {fault}"
                        for fault in error.faults
                    ]
                    if p.kind in RANGES:
                        break
        if faults:
            raise InputError(*dict.fromkeys(faults))

    def check_changeable(self) -> None:
        """Raises InputError for keys that a run cannot change in the middle."""
        fixed = [k for k in self.parameters if not any(_under(k, c) for c in CHANGEABLE)]
        if fixed:
            raise InputError(
                *(
                    f"tune.scheduler=pbt: {key} cannot change in the middle of a run; leave it out of the "
                    "space, or use asha"
                    for key in fixed
                )
            )

    def propose(self, trial: Suggests) -> dict[str, Any]:
        """One value for every key that is in force."""
        values: dict[str, Any] = {}
        for p in self.parameters.values():
            if p.active(values):
                values[p.key] = p.suggest(trial)
        return values

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the listed values that are in force, each once.

        Raises:
            InputError: for keys that are ranges.
        """
        ranges = [p for p in self.parameters.values() if p.kind in RANGES]
        if ranges:
            raise InputError(
                *(f"{p.key}: {p.kind} has no grid; list values, or use tune.algorithm=tpe" for p in ranges)
            )
        seen: set[str] = set()
        for combination in itertools.product(*(p.values for p in self.parameters.values())):
            point = self.in_force(dict(zip(self.parameters, combination, strict=True)))
            shown = json.dumps(point, sort_keys=True, default=str)
            if shown not in seen:
                seen.add(shown)
                yield point

    def in_force(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` without the keys whose `when` does not hold."""
        kept: dict[str, Any] = {}
        for p in self.parameters.values():
            if p.key in values and p.active(kept):
                kept[p.key] = values[p.key]
        return kept

    def explore(self, values: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        """Values near the given ones: a fifth of each range to either side, now and then anew anywhere."""
        out: dict[str, Any] = {}
        for p in self.parameters.values():
            if p.key not in values or rng.random() < 0.25:
                out[p.key] = p.at(rng.random())
                continue
            step = 1 / max(1, len(p.values) - 1) if p.kind in LISTED else 0.2
            out[p.key] = p.at(p.position(values[p.key]) + rng.choice((-step, step)))
        return out

    def samples(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Some proposals at random, to try a configuration with."""
        rng = random.Random(seed)
        anywhere = [{p.key: p.at(rng.random()) for p in self.parameters.values()} for _ in range(count)]
        return [self.in_force(values) for values in anywhere]

    def _enabling(self, p: Parameter) -> dict[str, Any]:
        """Values under which `p` is in force."""
        values: dict[str, Any] = {}
        for key, wanted in p.when.items():
            values |= self._enabling(self.parameters[key]) | {key: wanted[0]}
        return values


def _parameter(key: str, entry: Any) -> Parameter:
    kinds = (*LISTED, *RANGES)
    example = "write it as {choice: [..]}, {grid: [..]}, {uniform: [lo, hi]}, {loguniform: [lo, hi]} or "
    example += "{randint: [lo, hi]}"
    if not isinstance(entry, Mapping):
        raise InputError(f"{key}: {entry!r} is no range; {example}")
    unknown = [str(word) for word in entry if word not in (*kinds, "when")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], (*kinds, "when"), n=1, cutoff=0.0)
        raise InputError(f"{key}: {unknown[0]!r} is no kind of range, the nearest is {near[0]}; {example}")
    given = [word for word in kinds if word in entry]
    if len(given) != 1:
        raise InputError(f"{key}: has {' and '.join(given) or 'no range'}; give exactly one; {example}")
    kind, values = given[0], entry[given[0]]
    fault = _value_fault(kind, values)
    if fault:
        raise InputError(f"{key}: {kind}={values!r}: {fault}")
    when = entry.get("when") or {}
    if not isinstance(when, Mapping):
        raise InputError(f"{key}: when={when!r}: write it as {{other.key: value}}")
    wanted = {str(k): tuple(v) if isinstance(v, list) else (v,) for k, v in when.items()}
    return Parameter(key, kind, tuple(values), wanted)


def _value_fault(kind: str, values: Any) -> str | None:
    if not isinstance(values, list):
        return "wants a list"
    if kind in LISTED:
        return None if values else "is empty; list at least one value"
    if len(values) != 2:
        return "wants two bounds, [lo, hi]"
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numeric or not all(math.isfinite(v) for v in values):
        return "the bounds must be finite numbers (in YAML, write 1.0e-6 and not 1e-6)"
    low, high = values
    if low >= high:
        return f"the bounds are the wrong way round; write [{high}, {low}]" if low > high else "lo equals hi"
    if kind == "loguniform" and low <= 0:
        return "a logarithmic range starts above 0"
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        return "the bounds must be whole numbers"
    return None


def _when_faults(p: Parameter, space: Mapping[str, Parameter]) -> Iterator[str]:
    for key, wanted in p.when.items():
        other = space.get(key)
        if other is None:
            near = difflib.get_close_matches(key, [k for k in space if k != p.key], n=1, cutoff=0.0)
            hint = f"; the nearest key of the space is {near[0]}" if near else ""
            yield f"{p.key}: when: {key} is not in the space{hint}"
        elif other.kind not in LISTED:
            yield f"{p.key}: when: {key} is a {other.kind}; only a choice or a grid can be waited for"
        else:
            for value in wanted:
                if value not in other.values:
                    takes = ", ".join(str(v) for v in other.values)
                    yield f"{p.key}: when: {key}={value!r} never happens; it takes {takes}"
    if not p.when:
        return
    seen, waiting = {p.key}, list(p.when)
    while waiting:
        key = waiting.pop()
        if key == p.key:
            yield f"{p.key}: when: waits for itself"
            return
        if key in space and key not in seen:
            seen.add(key)
            waiting += space[key].when


def _ordered(found: Mapping[str, Parameter]) -> dict[str, Parameter]:
    out: dict[str, Parameter] = {}
    while len(out) < len(found):
        out |= {k: p for k, p in found.items() if k not in out and all(w in out for w in p.when)}
    return out


def _inside_value(key: str, known: set[str]) -> bool:
    """Whether the key reaches into a value that is a mapping of its own, as `training.deepspeed.stage`."""
    parent = key
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in known:
            return not any(k.startswith(f"{parent}.") for k in known)
    return False


def _under(key: str, beginning: str) -> bool:
    return key == beginning or (beginning.endswith(".") and key.startswith(beginning))
