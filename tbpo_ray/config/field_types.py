"""Questions about the types of configuration fields: what a value of a field may be."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def type_at(annotation: Any, key: str, prefix: str = "", hints: Mapping[str, Any] | None = None) -> Any:
    """The type of a dotted key below a value of type `annotation`.

    It is Any where the schema leaves the type open, and `object` for a key that does not exist.
    """
    for part in key.split("."):
        prefix += part
        found = [kind for member in members(annotation) for kind in _entry_types(member, part)]
        if hints and prefix in hints:
            found = [hints[prefix]]
        annotation = Union[tuple(found)] if found else object  # noqa: UP007
        prefix += "."
    return annotation


def item_type(annotation: Any) -> Any:
    """The type of the items of a list: Any where the schema leaves it open, `object` if it is not a list."""
    items = [
        Any if kind in (Any, list) else get_args(kind)[0]
        for kind in members(annotation)
        if kind in (Any, list) or get_origin(kind) is list
    ]
    return Union[tuple(items)] if items else object  # noqa: UP007 (the members are known at run time only)


def takes_text(annotation: Any) -> bool:
    """Whether a value of this type may be a string."""
    return str in set(scalar_types(annotation))


def is_open(annotation: Any) -> bool:
    """Whether the schema leaves the type open."""
    return Any in set(members(annotation))


def takes_null(annotation: Any) -> bool:
    """Whether a value of this type may be null."""
    return type(None) in set(scalar_types(annotation))


def takes_collection(annotation: Any) -> bool:
    """Whether a value of this type may be a list or a mapping."""
    return any(
        get_origin(member) in (list, dict) or _is_model(member) or member in (Any, list, dict)
        for member in members(annotation)
    )


def _entry_types(member: Any, name: str) -> Iterator[Any]:
    if _is_model(member):
        field = member.model_fields.get(name)
        if field is not None:
            yield field.annotation
    elif get_origin(member) is dict:
        yield get_args(member)[1]
    elif member in (Any, dict):
        yield Any


def members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from members(argument)
    else:
        yield annotation


def scalar_types(annotation: Any) -> Iterator[Any]:
    """The types of the scalars that a value of this type may be."""
    for member in members(annotation):
        if get_origin(member) is Literal:
            yield from (type(value) for value in get_args(member))
        else:
            yield member


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)
