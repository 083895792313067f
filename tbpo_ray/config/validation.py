"""Check a nested mapping against a section; every fault names the dotted key, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tbpo_ray.errors import InputError

ModelT = TypeVar("ModelT", bound=BaseModel)

_UNION_BRANCHES = ("int", "float", "str", "list", "dict", "bool", "none", "constrained-int")


def validate_section(model: type[ModelT], tree: Any, prefix: str = "") -> ModelT:
    """Build a section from plain values.

    Args:
        prefix: dotted key of the section; empty for the whole configuration.

    Raises:
        InputError: one sentence per fault.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise InputError(*_faults(error, model, prefix)) from error


def section_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key below a section, nested sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *_alternatives(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from section_keys(kind, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The arguments of a type, without `Annotated`."""
    for kind in get_args(annotation):
        yield get_args(kind)[0] if get_origin(kind) is Annotated else kind


def unknown_key_message(key: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    # The right name in the wrong section is a likelier mistake than a misspelled name in this section.
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"{key}: unknown key; the nearest known one is {same_name[0] if same_name else near[0]}"


def _faults(error: ValidationError, model: type[BaseModel], prefix: str) -> list[str]:
    dotted_prefix = f"{prefix}." if prefix else ""
    known = set(section_keys(model, dotted_prefix))
    faults: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for item in error.errors():
        location = [*prefix.split("."), *map(str, item["loc"])] if prefix else [str(p) for p in item["loc"]]
        key = ".".join(_without_union_branches(location, known))
        if item["type"] == "extra_forbidden":
            faults.setdefault(unknown_key_message(key, section_keys(model, dotted_prefix)), [])
            continue
        if item["type"] == "value_error" and _names_key(item["msg"].removeprefix("Value error, "), key):
            for line in item["msg"].removeprefix("Value error, ").split("\n"):
                faults.setdefault(line, [])
            continue
        shown[key] = repr(item["input"])
        faults.setdefault(key, []).append(_reason(item))
    return [f"{k}={shown[k]}: {' or '.join(dict.fromkeys(v))}" if v else k for k, v in faults.items()]


def _names_key(message: str, key: str) -> bool:
    """Whether the message of a validator, such as one over a whole section, names the keys itself."""
    return not key or re.match(rf"{re.escape(key)}[.=: ]", message) is not None


def _reason(item: Mapping[str, Any]) -> str:
    if item["type"] in ("model_type", "model_attributes_type"):
        return "input should be a mapping"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if item["type"] == "literal_error":
        accepted = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = difflib.get_close_matches(str(item["input"]), accepted, n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    return message


def _without_union_branches(location: Sequence[str], known: Collection[str]) -> list[str]:
    """Drop the names of union branches that Pydantic puts into a location."""
    out: list[str] = []
    for part in location:
        inside_value = bool(out) and ".".join(out) in known and ".".join([*out, part]) not in known
        is_branch = part in _UNION_BRANCHES or not (part.isdigit() or part.isidentifier())
        if not (inside_value and is_branch):
            out.append(part)
    return out
