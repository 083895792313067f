"""YAML in which every plain scalar remembers how it was written, and values that have their fields' types.

YAML decides the type of `007`, `1e5`, `12:30:45` or `no` from its spelling. Here the field decides: a field
that takes a string gets the text as typed, and all others get YAML's value. Numbers follow YAML 1.2
(`1e-3` is a number, `010` is ten, `12:30` is not a number), and dates are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tbpo_ray.config.field_types import item_type, scalar_types, type_at

_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        self.flatten_mapping(node)
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
        return {
            key_node.value: self.construct_object(value_node, deep=deep)
            for key_node, value_node in node.value
        }


class Dumper(yaml.SafeDumper):
    """A safe dumper that also quotes strings which only :func:`parse_yaml` would read as numbers."""


def _construct_plain(loader: _Loader, node: yaml.ScalarNode) -> Any:
    kind = node.tag.rsplit(":", 1)[-1]
    text = str(node.value)
    value: Any = None
    try:
        if kind == "bool":
            value = loader.construct_yaml_bool(node)
        elif kind == "int":
            value = _integer(text)
        elif kind == "float":
            value = _number(text)
    except (KeyError, ValueError) as error:  # an explicit tag such as `!!int abc`
        raise yaml.constructor.ConstructorError(
            None, None, f"{text!r} is not of the type {kind}", node.start_mark
        ) from error
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


def parse_yaml(text: str) -> Any:
    """Parse a YAML document; its numbers, booleans and nulls are :class:`PlainScalar`.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping has a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_cycle(node, set(), set())
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("the values are nested too deeply") from error
    finally:
        loader.dispose()


def _refuse_cycle(node: yaml.Node, parents: set[int], checked: set[int]) -> None:
    """Raise an error for an anchor that refers to a value around it: no configuration can be that."""
    if id(node) in parents:
        raise yaml.constructor.ConstructorError(None, None, "a value contains itself", node.start_mark)
    if id(node) in checked:  # an alias: values that many aliases share are walked once
        return
    parents.add(id(node))
    for child in node.value if isinstance(node, yaml.CollectionNode) else []:
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_cycle(part, parents, checked)
    parents.remove(id(node))
    checked.add(id(node))


def typed(value: Any, annotation: Any = Any, prefix: str = "", hints: Mapping[str, Any] | None = None) -> Any:
    """Replace every plain scalar by its text or its value, whichever the annotation takes.

    Args:
        value: what :func:`parse_yaml` returned.
        annotation: the type of the value, such as a section of the configuration.
        prefix: the dotted key of the value with a trailing dot; empty for the whole configuration.
        hints: types of dotted keys inside values that the schema leaves open.
    """
    if isinstance(value, PlainScalar):
        return _choose(value, set(scalar_types(annotation)))
    if isinstance(value, dict):
        return {
            key: typed(entry, type_at(annotation, key, prefix, hints), f"{prefix}{key}.", hints)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [typed(entry, item_type(annotation), prefix, hints) for entry in value]
    return value


def _choose(scalar: PlainScalar, accepted: set[Any]) -> Any:
    kind = type(scalar.value)
    if kind in accepted or (kind is int and float in accepted) or (kind is float and int in accepted):
        return scalar.value
    return scalar.text if str in accepted else scalar.value
