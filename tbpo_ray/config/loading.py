"""From a YAML file and dotted overrides to a checked :class:`tbpo_ray.config.schema.Config`, and back."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.redaction import without_user


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides, validate.

    Raises:
        InputError: for a missing or unreadable file and for every fault of its content.
    """
    tree = read_yaml(path) if path is not None else {}
    merged = merge(tree, overrides_to_tree(overrides))
    return validate(merged)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The configuration in a YAML file, nested (an empty file is an empty mapping)."""
    return expand_dotted(read_yaml_mapping(path))


def read_yaml_mapping(
    path: str | Path, *, option: str = "--config", example: str = "jobs/configs/tiny.yaml"
) -> dict[str, Any]:
    """The mapping in a YAML file as it is written.

    Raises:
        InputError: no such file, not YAML, or no mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{option} {path}: no such file; give a YAML file such as {example}")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(getattr(error, "problem_mark", "") or "").strip()
        raise InputError(f"{path}: not YAML {where}: {getattr(error, 'problem', error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: {option} wants a mapping, this is a {type(tree).__name__}")
    return tree


def overrides_to_tree(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[x]"]` as a nested mapping; values are read as YAML."""
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"override {item!r}: write it as dotted.key=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise InputError(f"{key}={text!r}: the value is not YAML") from error
        tree = merge(tree, expand_dotted({key: value}))
    return tree


def expand_dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turn top-level dotted keys into nested mappings."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        nested: Any = value
        for part in reversed(str(key).split(".")):
            nested = {part: nested}
        out = merge(out, nested)
    return out


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid onto `base`, mapping by mapping; neither is changed.

    An empty mapping clears what was there, and a judge of another kind takes the place of the whole section.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value
            and not _other_judge(key, old, value)
        ):
            out[key] = merge(old, value)
        else:
            out[key] = value
    return out


def _other_judge(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key == "judge" and new.get("kind", old.get("kind")) != old.get("kind")


def validate(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping against the typed tree."""
    for key, value in flatten(tree).items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise InputError(f"{key}={value!r}: holds a NUL character, which no path or name can")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(*_faults(error)) from error


def stage_config(config: Config, stage: Mapping[str, Any], **fixed: Any) -> Config:
    """`config` with a stage's overrides (dotted or nested) and then `fixed` dotted keys (`__` for `.`)."""
    tree = merge(to_tree(config), expand_dotted(stage))
    tree = merge(tree, expand_dotted({key.replace("__", "."): value for key, value in fixed.items()}))
    return validate(tree)


def to_tree(config: BaseModel) -> dict[str, Any]:
    """Plain nested mapping of a configuration, every default written out."""
    return config.model_dump(mode="json")


def to_yaml(config: BaseModel) -> str:
    """The configuration as it is shown and kept: addresses without the user and password in them."""
    return without_user(yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=10_000))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys; empty mappings and lists are kept as values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flatten(value, dotted + ".")
        else:
            out[dotted] = value
    return out


def digest(value: Any) -> str:
    """Short content digest of anything JSON can write."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def unknown_key(key: str) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    known = list(known_keys())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    last = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = last[0] if last else near[0]
    return f"{key}: unknown key; the nearest known one is {hint}"


def _faults(error: ValidationError) -> list[str]:
    faults: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        key = ".".join(_visible(loc))
        if item["type"] == "extra_forbidden":
            faults.setdefault(unknown_key(key), [])
            continue
        message = item["msg"].removeprefix("Value error, ")
        if not loc or (isinstance(item["input"], Mapping) and item["type"] == "value_error"):
            faults.setdefault(message, [])
            continue
        shown[key] = repr(item["input"])
        faults.setdefault(key, []).append(message[0].lower() + message[1:])
    return [f"{k}={shown[k]}: {' or '.join(dict.fromkeys(v))}" if v else k for k, v in faults.items()]


def _visible(loc: Sequence[str]) -> list[str]:
    """Drop the union branch names that pydantic puts into a location."""
    known = set(known_keys())
    out: list[str] = []
    for part in loc:
        inside_value = bool(out) and ".".join(out) in known and ".".join([*out, part]) not in known
        if not (inside_value and (part in _BRANCHES or not (part.isdigit() or part.isidentifier()))):
            out.append(part)
    return out


_BRANCHES = ("int", "float", "str", "list", "dict", "bool", "none", "constrained-int")


def is_at_or_below(key: str, section: str) -> bool:
    """Whether a dotted key is `section` or lies below it; a trailing dot of `section` does not matter."""
    section = section.rstrip(".")
    return key == section or key.startswith(f"{section}.")
