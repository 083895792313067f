"""YAML in which every plain scalar remembers how it was written, and values that have their fields' types.

YAML decides the type of `007`, `1e5`, `12:30:45` or `no` from its spelling. Here the field decides: a field
that takes a string gets the text as typed, and all others get YAML's value. Numbers follow YAML 1.2
(`1e-3` is a number, `010` is ten, `12:30` is not a number), and dates are text.

Where the schema leaves the type open, a spelling that a number would lose (`007`, `1.10`, `1_000`) is text,
and `yes`, `no`, `on` and `off`, which YAML 1.1 and 1.2 read differently, are refused.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_origin

import yaml

from tbpo_ray.config import yaml_limits
from tbpo_ray.config.field_types import item_type, scalar_types, takes_text, type_at
from tbpo_ray.errors import InputError

_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# A number with one of these spellings would not be written out as it was typed.
_LOSSY = re.compile(r"[-+]?0[0-9_].*|.*_.*|[-+]?[0-9]*\.[0-9]+0|[-+]?0b.*")
_YAML_11_BOOLEANS = ("yes", "no", "on", "off")


@dataclass(frozen=True)
class PlainScalar:
    """An unquoted scalar that YAML reads as a number, a boolean or null."""

    text: str
    value: Any


class _Loader(yaml.SafeLoader):
    """A safe loader that keeps plain scalars, takes keys as text and refuses a key that is given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute, copied below and not shared)
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rsplit(":", 1)[-1] in ("bool", "null", "merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # Sets, pairs, bytes and dates are not values of a configuration.
    yaml_constructors = {  # noqa: RUF012 (as above)
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rsplit(":", 1)[-1] in ("str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml_limits.fault("a key must be text", key.start_mark)
            if key.value in seen and key.value != "<<":
                raise yaml_limits.fault(f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {
            key_node.value: self.construct_object(value_node, deep=deep)
            for key_node, value_node in node.value
        }


class Dumper(yaml.SafeDumper):
    """A safe dumper that also quotes strings which only :func:`parse_yaml` would read as numbers."""


def _construct_plain(loader: _Loader, node: Any) -> Any:
    kind = node.tag.rsplit(":", 1)[-1]
    text = loader.construct_scalar(node)  # refuses `!!int [1]`
    if kind in ("int", "float") and len(text) > yaml_limits.MAX_DIGITS:
        raise yaml_limits.fault(f"a number of {len(text)} characters is too long", node.start_mark)
    value: Any = None
    try:
        if kind == "bool":
            value = loader.construct_yaml_bool(node)
        elif kind == "int":
            value = _integer(text)
        elif kind == "float":
            value = _number(text)
    except (KeyError, ValueError) as error:  # an explicit tag such as `!!int abc`
        raise yaml_limits.fault(f"{text!r} is not of the type {kind}", node.start_mark) from error
    return PlainScalar(text, value)


def _integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    # Base 0 refuses a leading zero, which means nothing in YAML 1.2.
    return int(digits, 0) if re.match(r"[-+]?0[box]", digits) else int(digits)


def _number(text: str) -> float:
    plain = text.replace("_", "").lower()
    return float(plain.replace(".inf", "inf").replace(".nan", "nan"))


_RESOLVERS = {"int": (_INTEGER, "-+0123456789"), "float": (_FLOAT, "-+.0123456789")}
for _handler in (_Loader, Dumper):
    for _kind, (_pattern, _first) in _RESOLVERS.items():
        _handler.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern.pattern})$"), list(_first)
        )
for _tag in ("bool", "int", "float", "null"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_plain)


def parse_yaml(
    text: str, sections: Collection[str] = (), repeated: list[tuple[str, int]] | None = None
) -> Any:
    """Parse a YAML document; its numbers, booleans and nulls are :class:`PlainScalar`.

    Args:
        sections: top-level keys whose own keys may be dotted, as those at the top level.
        repeated: receives the keys that a section gives twice, dotted and nested, and their lines; they are
            refused by default.

    Raises:
        yaml.YAMLError: the text is not YAML, has a key twice, or is deeper or larger than a configuration.
    """
    yaml_limits.check_depth(text, _Loader)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        yaml_limits.check_aliases(node)
        yaml_limits.check_keys(node, () if repeated is not None else sections)
        if repeated is not None:
            repeated += yaml_limits.section_repeats(node, sections)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def typed(value: Any, annotation: Any = Any, prefix: str = "", hints: Mapping[str, Any] | None = None) -> Any:
    """Replace every plain scalar by its text or its value, whichever the annotation takes.

    Args:
        value: what :func:`parse_yaml` returned.
        annotation: the type of the value, such as a section of the configuration.
        prefix: the dotted key of the value with a trailing dot; empty for the whole configuration.
        hints: types of dotted keys inside values that the schema leaves open.
    """
    if isinstance(value, PlainScalar):
        return _choose(value, annotation, prefix.rstrip("."))
    if isinstance(value, dict):
        return {
            key: typed(entry, type_at(annotation, key, prefix, hints), f"{prefix}{key}.", hints)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [typed(entry, item_type(annotation), prefix, hints) for entry in value]
    return value


def _choose(scalar: PlainScalar, annotation: Any, key: str) -> Any:
    accepted = set(scalar_types(annotation))
    if Any in accepted:
        return _open_value(scalar, key)
    kind = type(scalar.value)
    if kind in accepted or (kind is int and float in accepted) or (kind is float and int in accepted):
        return _as_written(scalar)
    # A list of strings takes no single value; the error message shows what was typed.
    wanted_list = any(get_origin(member) is list for member in accepted) and takes_text(item_type(annotation))
    return scalar.text if str in accepted or wanted_list else _as_written(scalar)


def _open_value(scalar: PlainScalar, key: str) -> Any:
    if isinstance(scalar.value, bool) and scalar.text.lower() in _YAML_11_BOOLEANS:
        meant = str(scalar.value).lower()
        raise InputError(
            f"{key}={scalar.text}: may be a truth value or a text; must be {meant}, or '{scalar.text}' in "
            "quotes"
        )
    if isinstance(scalar.value, int | float) and _LOSSY.fullmatch(scalar.text):
        return scalar.text
    return scalar.value


class WrittenInt(int):
    """An integer that was written in another way, such as `007`."""

    text: str


class WrittenFloat(float):
    """A number that was written in another way, such as `1.10`."""

    text: str


def _as_written(scalar: PlainScalar) -> Any:
    """The value of a scalar; a number remembers its spelling for messages."""
    value = scalar.value
    if isinstance(value, bool) or value is None or not math.isfinite(value) or repr(value) == scalar.text:
        return value
    written = WrittenInt(value) if isinstance(value, int) else WrittenFloat(value)
    written.text = scalar.text
    return written


def split_written(value: Any, key: str = "") -> tuple[Any, dict[str, tuple[str, str]]]:
    """A value with plain numbers only, and the numbers that were written in another way.

    Returns:
        The value, and each dotted key with the number as Python shows it and as it was written.
    """
    if isinstance(value, WrittenInt | WrittenFloat):
        number = int(value) if isinstance(value, int) else float(value)
        return number, {key: (repr(number), value.text)}
    if isinstance(value, Mapping):
        parts = {name: split_written(entry, f"{key}.{name}".lstrip(".")) for name, entry in value.items()}
        plain = {name: part for name, (part, _) in parts.items()}
        return plain, dict(ChainMap(*(found for _, found in parts.values())))
    if isinstance(value, list):
        items = [split_written(entry, f"{key}.{index}") for index, entry in enumerate(value)]
        return [part for part, _ in items], dict(ChainMap(*(found for _, found in items)))
    return value, {}
