"""Read a :class:`tbpo_ray.config.schema.Config` from a YAML file and dotted overrides, and write it back."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tbpo_ray.config.schema import RENAMED_KEYS, Config
from tbpo_ray.config.validation import section_keys, unknown_key_message, validate_section
from tbpo_ray.errors import InputError
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import strip_credentials

STAGES = ("sft",)
"""Keys that hold overrides of the whole tree."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides and validate the result.

    Raises:
        InputError: the file is missing or unreadable, or its content is invalid; one sentence per fault.
    """
    tree = read_yaml(path) if path is not None else {}
    merged = merge(tree, overrides_to_tree(overrides))
    return validate(merged)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the configuration in a YAML file as a nested mapping; an empty file is an empty mapping."""
    return expand_dotted(read_yaml_mapping(path))


def read_yaml_mapping(
    path: str | Path, *, option: str = "--config", example: str = "jobs/configs/tiny.yaml"
) -> dict[str, Any]:
    """Read the mapping in a YAML file as it is written.

    Args:
        option: the command-line option that named the file, for messages.
        example: a file of this kind that exists, for messages.

    Raises:
        InputError: the file does not exist, is not YAML, or does not contain a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{option} {path}: no such file; give a YAML file such as {example}")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(getattr(error, "problem_mark", "") or "").strip()
        raise InputError(f"{path}: not valid YAML {where}: {getattr(error, 'problem', error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: {option} must contain a mapping, not a {type(tree).__name__}")
    return tree


def overrides_to_tree(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn overrides such as `["a.b=1", "c=[x]"]` into a nested mapping; values are parsed as YAML."""
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"override {item!r}: write it as dotted.key=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise InputError(f"{key}={text!r}: the value is not valid YAML") from error
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
    """Merge `over` into `base`, mapping by mapping, and return the result; neither argument is changed.

    An empty mapping clears the section, and a judge of another kind replaces the whole judge section.
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
    """Check a nested mapping against the typed tree.

    Raises:
        InputError: one sentence per fault.
    """
    tree = rename_deprecated_keys(tree)
    for key, value in flatten(tree).items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise InputError(f"{key}={value!r}: contains a NUL character, which no path or name may")
    return validate_section(Config, tree)


def rename_deprecated_keys(tree: Mapping[str, Any], *, log: bool = True) -> dict[str, Any]:
    """Return a configuration, nested or dotted, with every deprecated key replaced by its present name.

    Args:
        log: print one line for each deprecated key that is found.

    Raises:
        InputError: a key is given under both names with different values.
    """
    out = dict(tree)
    for key in STAGES:
        if isinstance(out.get(key), Mapping):
            out[key] = rename_deprecated_keys(out[key], log=log)
    for old, new in RENAMED_KEYS.items():
        found, present = _find(out, old), _find(out, new)
        if not found:
            continue
        if present and present != found:
            raise InputError(
                f"{old}={found[0]!r}: deprecated name of {new}, which is also given, as {present[0]!r}; "
                f"remove {old}"
            )
        if log:
            _log_deprecated(old, new)
        out = _rename(out, old, new)
    return out


def _find(tree: Mapping[str, Any], wanted: str, prefix: str = "") -> list[Any]:
    """The values that a tree, nested or dotted, has for a key."""
    found = []
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted == wanted:
            found.append(value)
        elif isinstance(value, Mapping) and wanted.startswith(f"{dotted}."):
            found += _find(value, wanted, f"{dotted}.")
    return found


def _rename(tree: Mapping[str, Any], old: str, new: str, prefix: str = "") -> dict[str, Any]:
    """Replace `old` by `new` wherever the tree has it; both names are keys of the same section."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted == old:
            out[new.removeprefix(prefix)] = value
        elif isinstance(value, Mapping) and old.startswith(f"{dotted}."):
            out[key] = _rename(value, old, new, f"{dotted}.")
        else:
            out[key] = value
    return out


@functools.cache  # one line per process, however often the configuration is validated
def _log_deprecated(old: str, new: str) -> None:
    log_progress(f"{old} is deprecated; use {new}")


def stage_config(config: Config, stage: Mapping[str, Any], **fixed: Any) -> Config:
    """Apply a stage's overrides (dotted or nested), then `fixed` dotted keys (with `__` for `.`)."""
    # The tree has every default written out under the present name, so deprecated names go before merging.
    tree = merge(to_tree(config), rename_deprecated_keys(expand_dotted(stage)))
    last = expand_dotted({key.replace("__", "."): value for key, value in fixed.items()})
    return validate(merge(tree, rename_deprecated_keys(last)))


def to_tree(config: BaseModel) -> dict[str, Any]:
    """Return a configuration as a plain nested mapping with every default written out."""
    return config.model_dump(mode="json")


def to_yaml(config: BaseModel) -> str:
    """Write a configuration as YAML, without the user names and passwords in its addresses."""
    return strip_credentials(
        yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=10_000)
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn a nested mapping into one with dotted keys; empty mappings and lists stay values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flatten(value, dotted + ".")
        else:
            out[dotted] = value
    return out


def digest(value: Any) -> str:
    """Return a short content digest of a value that JSON can represent."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def known_keys() -> Iterator[str]:
    """Every dotted key of the configuration, sections included."""
    return section_keys(Config)


def unknown_key(key: str) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    return unknown_key_message(key, known_keys())


def is_at_or_below(key: str, section: str) -> bool:
    """Whether a dotted key is `section` itself or one of its keys; `section` may have a trailing dot."""
    section = section.rstrip(".")
    return key == section or key.startswith(f"{section}.")
