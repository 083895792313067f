"""Search spaces: YAML that maps dotted configuration keys to the values they may take.

    objective.bregman.generator: {choice: [logistic, sba]}
    objective.bregman.lam: {uniform: [-0.5, 1.0], when: {objective.bregman.generator: sba}}

A `when` value may be a list, which means any of them. A key whose `when` does not hold keeps its configured
value.
"""

from __future__ import annotations

import difflib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from tbpo_ray.config.loading import (
    is_at_or_below,
    known_keys,
    read_space,
    stage_config,
    unknown_key,
)
from tbpo_ray.config.schema import RENAMED_KEYS, Config
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.parameter import DISCRETE, RANGES, Parameter, Suggester, parse_parameter

NOT_SEARCHED = ("run", "tracking", "tune", "sft", "runs", "compare", "export")
"""Sections that a trial cannot set. Seeds are excluded too: `tune.repeats` varies them."""
CHANGEABLE = (
    "objective.beta", "objective.label_smoothing", "objective.alpha", "objective.gamma",
    "objective.bregman.", "objective.state_baseline.center", "objective.state_baseline.clip",
    "objective.state_baseline.lr", "training.learning_rate", "training.weight_decay",
    "training.max_grad_norm", "training.on_nonfinite",
)  # fmt: skip
"""Keys and sections that can change during a run, as population-based training does."""


class Space:
    """A checked search space.

    Attributes:
        parameters: sorted so that every `when` refers to earlier parameters only.
        source: the space as the user wrote it.
    """

    def __init__(self, parameters: Mapping[str, Parameter], source: Mapping[str, Any]):
        self.parameters = parameters
        self.source = dict(source)

    @classmethod
    def load(cls, path: str) -> Space:
        """Read a YAML file.

        Raises:
            InputError: the file is missing, is not YAML, or has invalid content (one sentence per fault).
        """
        return cls.parse(read_space(path), path)

    @classmethod
    def parse(cls, tree: Mapping[str, Any], where: str = "space") -> Space:
        """Check that a space is consistent in itself; :meth:`check` checks it against a configuration.

        Raises:
            InputError: one sentence per fault.
        """
        faults: list[str] = []
        parsed: dict[str, Parameter] = {}
        for key, entry in tree.items():
            try:
                parameter = parse_parameter(RENAMED_KEYS.get(str(key), str(key)), entry)
                parsed[parameter.key] = parameter
            except InputError as error:
                faults += error.faults
        if not tree:
            faults.append(f"{where}: the space is empty; give it a key such as objective.beta")
        if not faults:
            faults = [fault for p in parsed.values() for fault in _condition_faults(p, parsed)]
        if faults:
            raise InputError(*faults)
        return cls(_in_dependency_order(parsed), tree)

    def check(self, config: Config) -> None:
        """Check every key and every value against the configuration's types.

        Raises:
            InputError: an unknown key (with the nearest known one), or a value that its type rejects.
        """
        known = set(known_keys())
        faults: list[str] = []
        for p in self.parameters.values():
            faults += self._parameter_faults(p, config, known)
        if faults:
            raise InputError(*dict.fromkeys(faults))

    def _parameter_faults(self, p: Parameter, config: Config, known: set[str]) -> list[str]:
        if any(is_at_or_below(p.key, section) for section in NOT_SEARCHED):
            return [f"{p.key}: a trial cannot set this key; remove it from the space"]
        if p.key not in known and not _is_inside_value(p.key, known):
            return [unknown_key(p.key)]
        faults: list[str] = []
        for value in p.probes():
            faults += self._value_faults(p, value, config)
            # Several values of one range would repeat the same fault.
            if faults and p.kind in RANGES:
                break
        return faults

    def _value_faults(self, p: Parameter, value: Any, config: Config) -> list[str]:
        try:
            stage_config(config, {**self._enabling_values(p), p.key: value})
        except InputError as error:
            return [
                f"space: {fault}" if fault.startswith(p.key) else f"space, {p.key}={value!r}: {fault}"
                for fault in error.faults
            ]
        return []

    def check_changeable(self, config: Config) -> None:
        """Refuse keys that cannot change during a run, and values that change what the objective reads.

        Args:
            config: the trials' configuration, without the space's values.

        Raises:
            InputError: one sentence per key.
        """
        fixed = [k for k in self.parameters if not any(is_at_or_below(k, c) for c in CHANGEABLE)]
        if fixed:
            raise InputError(
                *(
                    f"tune.scheduler=pbt: {key} cannot change during a run; remove it from the space, "
                    "or use tune.scheduler=asha"
                    for key in fixed
                )
            )
        for key, p in self.parameters.items():
            read = {
                value: stage_config(config, {**self._enabling_values(p), key: value}).objective.inputs
                for value in p.probes()
            }
            if len(set(read.values())) > 1:
                raise InputError(
                    f"tune.scheduler=pbt: {key} from {min(read)!r} to {max(read)!r} changes what the "
                    "objective reads, which cannot change during a run; leave 0 out of the range"
                )

    def propose(self, trial: Suggester) -> dict[str, Any]:
        """One value for every active key."""
        values: dict[str, Any] = {}
        for p in self.parameters.values():
            if p.is_active(values):
                values[p.key] = p.suggest(trial)
        return values

    def grid_points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the listed values, reduced to its active keys, each once.

        Raises:
            InputError: the space has a range, which has no grid.
        """
        ranges = [p for p in self.parameters.values() if p.kind in RANGES]
        if ranges:
            raise InputError(
                *(f"{p.key}: {p.kind} has no grid; list values, or use tune.algorithm=tpe" for p in ranges)
            )
        seen: set[str] = set()
        for combination in itertools.product(*(p.values for p in self.parameters.values())):
            point = self.active_values(dict(zip(self.parameters, combination, strict=True)))
            identity = json.dumps(point, sort_keys=True, default=str)
            if identity not in seen:
                seen.add(identity)
                yield point

    def active_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` without the keys whose `when` does not hold."""
        kept: dict[str, Any] = {}
        for p in self.parameters.values():
            if p.key in values and p.is_active(kept):
                kept[p.key] = values[p.key]
        return kept

    def explore(self, values: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        """Move each value by a fifth of its range; with probability 1/4, draw a new value instead."""
        out: dict[str, Any] = {}
        for p in self.parameters.values():
            if p.key not in values or rng.random() < 0.25:
                out[p.key] = p.value_at(rng.random())
                continue
            step = 1 / max(1, len(p.values) - 1) if p.kind in DISCRETE else 0.2
            out[p.key] = p.value_at(p.position(values[p.key]) + rng.choice((-step, step)))
        return out

    def random_samples(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Random proposals, to try a configuration with."""
        rng = random.Random(seed)
        drawn = [{p.key: p.value_at(rng.random()) for p in self.parameters.values()} for _ in range(count)]
        return [self.active_values(values) for values in drawn]

    def _enabling_values(self, p: Parameter) -> dict[str, Any]:
        """Values of other parameters under which `p` is active."""
        values: dict[str, Any] = {}
        for key, allowed in p.when.items():
            values |= self._enabling_values(self.parameters[key]) | {key: allowed[0]}
        return values


def _condition_faults(p: Parameter, space: Mapping[str, Parameter]) -> Iterator[str]:
    """What is wrong with a parameter's `when`, one sentence per fault."""
    for key, allowed in p.when.items():
        other = space.get(key)
        if other is None:
            near = difflib.get_close_matches(key, [k for k in space if k != p.key], n=1, cutoff=0.0)
            hint = f"; the nearest key of the space is {near[0]}" if near else ""
            yield f"{p.key}: when: {key} is not in the space{hint}"
        elif other.kind not in DISCRETE:
            yield f"{p.key}: when: {key} is a {other.kind}; a condition needs a choice or a grid"
        else:
            listed = ", ".join(str(value) for value in other.values)
            for value in allowed:
                if value not in other.values:
                    yield f"{p.key}: when: {key}={value!r} never occurs; its values are {listed}"
    if _depends_on_itself(p, space):
        yield f"{p.key}: when: the condition depends on {p.key} itself"


def _depends_on_itself(p: Parameter, space: Mapping[str, Parameter]) -> bool:
    seen, pending = {p.key}, list(p.when)
    while pending:
        key = pending.pop()
        if key == p.key:
            return True
        if key in space and key not in seen:
            seen.add(key)
            pending += space[key].when
    return False


def _in_dependency_order(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    out: dict[str, Parameter] = {}
    while len(out) < len(parameters):
        ready = {k: p for k, p in parameters.items() if k not in out and all(w in out for w in p.when)}
        out |= ready
    return out


def _is_inside_value(key: str, known: set[str]) -> bool:
    """Whether the key points into a value that is itself a mapping, such as `training.deepspeed.stage`."""
    parent = key
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent in known:
            return not any(k.startswith(f"{parent}.") for k in known)
    return False
