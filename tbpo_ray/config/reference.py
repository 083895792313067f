"""The configuration reference in Markdown, generated from the typed tree and its docstrings."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tbpo_ray.config.schema import RENAMED_KEYS, Config

TYPE_NAMES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    dict: "mapping",
    list: "list",
    Any: "any",
    type(None): "null",
}
BOUNDS: dict[type, tuple[str, str]] = {
    Gt: ("gt", "> "),
    Ge: ("ge", ">= "),
    Lt: ("lt", "< "),
    Le: ("le", "<= "),
}
HEADER = "| Key | Type | Default | Accepted values | Description |\n|---|---|---|---|---|"


def reference_markdown() -> str:
    """A Markdown page with one table per section: key, type, default, accepted values and description."""
    parts = [
        "# Configuration reference",
        "Every key can be set in the YAML file or overridden on the command line as `dotted.key=value`. "
        "An unknown key, a wrong type or a value outside the accepted range ends the job with exit status 2.",
    ]
    for title, prefix, model in sections(Config):
        parts.append(f"{'###' if '.' in title else '##'} {title}")
        parts.append(" ".join((model.__doc__ or "").split()))
        fields = model.model_fields.items()
        rows = [_row(prefix + name, field) for name, field in fields if not _is_section(field)]
        if rows:
            parts.append("\n".join([HEADER, *rows]))
    parts.append("## Deprecated keys")
    renamed = [f"| `{old}` | `{new}` |" for old, new in RENAMED_KEYS.items()]
    parts.append("\n".join(["| Deprecated | Present name |\n|---|---|", *renamed]))
    return "\n\n".join(parts) + "\n"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Title, key prefix and class of every section, in the order of the tree, list entries included."""
    yield (f"`{prefix[:-1]}`" if prefix else "Top level"), prefix, model
    entries: dict[type[BaseModel], list[str]] = {}
    for name, field in model.model_fields.items():
        for kind in _models(field.annotation):
            if kind in _list_items(field.annotation):
                entries.setdefault(kind, []).append(f"{prefix}{name}")
            else:
                yield from sections(kind, f"{prefix}{name}.")
    for kind, keys in entries.items():
        yield "Entries of " + " and ".join(f"`{key}`" for key in keys), "", kind


def type_text(annotation: Any) -> str:
    """The type of a key in words, such as `integer or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(dict.fromkeys(TYPE_NAMES[type(value)] for value in arguments))
    if origin in (list, dict) and arguments[-1] is not Any:
        return f"{TYPE_NAMES[origin]} of {type_text(arguments[-1])}s"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return TYPE_NAMES[origin or annotation]


def accepted_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """The accepted values of a key: the alternatives of a literal, or the bounds of a number."""
    return ", ".join(dict.fromkeys(_accepted(annotation, metadata)))


def _accepted(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _accepted(arguments[0], arguments[1:])
        return
    yield from _bounds(metadata)
    if origin is Literal:
        yield from (f"`{_plain(value)}`" for value in arguments)
    elif origin in (Union, types.UnionType, list):
        for argument in arguments:
            yield from _accepted(argument)


def _row(key: str, field: FieldInfo) -> str:
    required = field.is_required()
    default = "required" if required else f"`{_plain(field.get_default(call_default_factory=True))}`"
    cells = (
        f"`{key}`",
        type_text(field.annotation),
        default,
        accepted_text(field.annotation, tuple(field.metadata)),
        " ".join((field.description or "").split()),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    lengths: dict[type, int] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(tuple(item.metadata))
        elif type(item) in BOUNDS:
            attribute, sign = BOUNDS[type(item)]
            yield f"{sign}{getattr(item, attribute)}"
        elif isinstance(item, MinLen | MaxLen):
            lengths[type(item)] = item.min_length if isinstance(item, MinLen) else item.max_length
    if lengths:
        yield f"{'-'.join(map(str, dict.fromkeys(lengths.values())))} items"


def _is_section(field: FieldInfo) -> bool:
    """Whether a field is a section that is always there, whose keys have a table of their own."""
    return inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type mentions, inside unions and lists too."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _list_items(annotation: Any) -> list[type[BaseModel]]:
    """The sections that are entries of a list."""
    if get_origin(annotation) is list:
        return _models(annotation)
    return [model for argument in get_args(annotation) for model in _list_items(argument)]
