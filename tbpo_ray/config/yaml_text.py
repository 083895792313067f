"""YAML in which every plain scalar remembers how it was written, and values that have their fields' types.

YAML decides the type of `007`, `1e5`, `12:30:45` or `no` from its spelling. Here the field decides: a field
that takes a string gets the text as typed, and all others get YAML's value. Numbers follow YAML 1.2
(`1e-3` is a number, `010` is ten, `12:30` is not a number), and dates are text.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

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
    if kind == "bool":
        value = loader.construct_yaml_bool(node)
    elif kind == "int":
        value = _integer(text)
    elif kind == "float":
        value = _number(text)
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
    return yaml.load(text, Loader=_Loader)


def typed(value: Any, annotation: Any = Any, prefix: str = "", hints: Mapping[str, Any] | None = None) -> Any:
    """Replace every plain scalar by its text or its value, whichever the annotation takes.

    Args:
        value: what :func:`parse_yaml` returned.
        annotation: the type of the value, such as a section of the configuration.
        prefix: the dotted key of the value with a trailing dot; empty for the whole configuration.
        hints: types of dotted keys inside values that the schema leaves open.
    """
    if isinstance(value, PlainScalar):
        return _choose(value, set(_scalar_types(annotation)))
    if isinstance(value, dict):
        return {
            key: typed(entry, type_at(annotation, key, prefix, hints), f"{prefix}{key}.", hints)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [typed(entry, item_type(annotation), prefix, hints) for entry in value]
    return value


def type_at(annotation: Any, key: str, prefix: str = "", hints: Mapping[str, Any] | None = None) -> Any:
    """The type of a dotted key below a value of type `annotation`; Any where the schema leaves it open."""
    for part in key.split("."):
        prefix += part
        found = [kind for member in _members(annotation) for kind in _entry_types(member, part)]
        if hints and prefix in hints:
            found = [hints[prefix]]
        annotation = Union[tuple(found)] if found else Any  # noqa: UP007
        prefix += "."
    return annotation


def item_type(annotation: Any) -> Any:
    """The type of the items of a list; Any where the schema leaves it open."""
    items = [get_args(kind)[0] for kind in _members(annotation) if get_origin(kind) is list]
    return Union[tuple(items)] if items else Any  # noqa: UP007 (the members are known at run time only)


def takes_text(annotation: Any) -> bool:
    """Whether a value of this type may be a string."""
    return str in set(_scalar_types(annotation))


def takes_null(annotation: Any) -> bool:
    """Whether a value of this type may be null."""
    return type(None) in set(_scalar_types(annotation))


def takes_collection(annotation: Any) -> bool:
    """Whether a value of this type may be a list or a mapping."""
    return any(
        get_origin(member) in (list, dict) or _is_model(member) or member is Any
        for member in _members(annotation)
    )


def _choose(scalar: PlainScalar, accepted: set[Any]) -> Any:
    kind = type(scalar.value)
    if kind in accepted or (kind is int and float in accepted) or (kind is float and int in accepted):
        return scalar.value
    return scalar.text if str in accepted else scalar.value


def _entry_types(member: Any, name: str) -> Iterator[Any]:
    if _is_model(member):
        field = member.model_fields.get(name)
        if field is not None:
            yield field.annotation
    elif get_origin(member) is dict:
        yield get_args(member)[1]


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _scalar_types(annotation: Any) -> Iterator[Any]:
    for member in _members(annotation):
        if get_origin(member) is Literal:
            yield from (type(value) for value in get_args(member))
        else:
            yield member


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)
