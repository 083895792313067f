"""Read a :class:`tbpo_ray.config.schema.Config` from a YAML file and dotted overrides, and write it back."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tbpo_ray.config import field_types, yaml_limits, yaml_text
from tbpo_ray.config.deepspeed_options import OPEN_TYPES as DEEPSPEED_TYPES
from tbpo_ray.config.open_values import OPEN_TYPES
from tbpo_ray.config.schema import RENAMED_KEYS, Config
from tbpo_ray.config.validation import ModelT, section_keys, unknown_key_message, validate_section
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import strip_credentials

_TYPES = OPEN_TYPES | DEEPSPEED_TYPES
_SHOWN = 400
"""Characters of each end of a message that are shown."""
STAGES = ("sft",)
"""Keys that hold overrides of the whole tree."""
_WHOLE_TREE = re.compile(r"(?:sft|objective\.helpers\.[^.]+)\.")
"""What the dotted keys below an override of the whole tree begin with."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a YAML file, apply overrides and validate the result.

    Args:
        path: the file; None: all defaults.
        overrides: `dotted.key=value` as on a command line, or a mapping of dotted keys to values.

    Raises:
        InputError: the file is missing or unreadable, or its content is invalid; one sentence per fault.
    """
    tree = read_yaml(path) if path is not None else {}
    over = expand_dotted(overrides) if isinstance(overrides, Mapping) else overrides_to_tree(overrides)
    for stage in STAGES:
        # Keys below a stage may be dotted in the file, and are nested in an override: one form, so that the
        # override replaces the value and the resolved configuration names each key once.
        if isinstance(tree.get(stage), Mapping) and over.get(stage):
            tree = {**tree, stage: expand_dotted(tree[stage])}
    merged = merge(tree, over)
    return validate(merged)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the configuration in a YAML file as a nested mapping; an empty file is an empty mapping.

    Strings are taken as typed: `run: {name: 007}` is the name "007".
    """
    return expand_dotted(_typed_config(_parse_file(path, "--config", "jobs/configs/tiny.yaml")))


def read_stored(path: str | Path) -> dict[str, Any]:
    """Read the configuration that a run has written, as :func:`read_yaml`, and accept what it accepted.

    Earlier versions took a key of `sft` in its dotted and its nested form at once; the later one counted.
    """
    repeated: list[tuple[str, int]] = []
    tree = expand_dotted(_typed_config(_parse_file(path, "--config", "jobs/configs/tiny.yaml", repeated)))
    for key, line in repeated:
        log_progress(f"{path}: line {line}: the key {key!r} is given twice; the run used this second value")
    return tree | {stage: expand_dotted(tree[stage]) for stage in STAGES if isinstance(tree.get(stage), dict)}


def read_space(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file whose keys are dotted configuration keys, with a search space for each.

    The values that a search space lists, and those of its conditions, have the types of their keys.
    """
    tree = _parse_file(path, "--space", "tune_spaces/joint.yaml")
    typed, _ = yaml_text.split_written({key: _typed_entry(key, entry) for key, entry in tree.items()})
    return dict(typed)


def read_section(path: str | Path, model: type[ModelT], option: str, example: str) -> ModelT:
    """Read a YAML file that holds one section of its own, such as a suite of prompts.

    Args:
        option: the key that names the file, for messages.
        example: a file of this kind, for messages.

    Raises:
        InputError: the file cannot be read, or does not fit the section.
    """
    typed, _ = yaml_text.split_written(yaml_text.typed(_parse_file(path, option, example), model))
    return validate_section(model, typed, option)


def _parse_file(
    path: str | Path, option: str, example: str, repeated: list[tuple[str, int]] | None = None
) -> dict[str, Any]:
    """The mapping in a YAML file, with :class:`tbpo_ray.config.yaml_text.PlainScalar` values.

    Args:
        option: the command-line option that named the file, for messages.
        example: a file of this kind that exists, for messages.
        repeated: see :func:`tbpo_ray.config.yaml_text.parse_yaml`.

    Raises:
        InputError: the file does not exist, is not YAML, or does not contain a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{option} {path}: no such file; give a YAML file such as {example}")
    text = _read_text(file)
    try:
        tree = yaml_text.parse_yaml(text, STAGES, repeated)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{path}: not valid YAML, line {line}: the character {error.character!r} is not allowed"
        ) from error
    except yaml.YAMLError as error:
        where = f", {yaml_limits.place(error)}" if yaml_limits.place(error) else ""
        raise InputError(f"{path}: not valid YAML{where}: {_problem(error)}") from error
    if tree is None or (isinstance(tree, yaml_text.PlainScalar) and tree.value is None):
        return {}
    if not isinstance(tree, dict):
        kind = type(yaml_text.typed(tree)).__name__
        raise InputError(f"{path}: {option} must contain a mapping, not a {kind}")
    return tree


def _read_text(file: Path) -> str:
    size = file.stat().st_size
    if size > yaml_limits.MAX_BYTES:
        raise InputError(
            f"{file}: {size} bytes; must be a configuration, which has at most {yaml_limits.MAX_BYTES} bytes"
        )
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}: not valid YAML, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8"
        ) from error


def _typed_entry(key: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return yaml_text.typed(entry)
    values: Any = list[_type_of(RENAMED_KEYS.get(key, key))]  # type: ignore[misc] # known at run time only
    out = {}
    for name, value in entry.items():
        if name == "when" and isinstance(value, dict):
            out[name] = {
                other: yaml_text.typed(
                    wanted,
                    _type_of(other) | list[_type_of(other)],  # type: ignore[misc]
                    f"{other}.",
                )
                for other, wanted in value.items()
            }
        else:
            out[name] = yaml_text.typed(value, values, f"{key}.")
    return out


def overrides_to_tree(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn overrides such as `["a.b=1", "c=[x]"]` into a nested mapping.

    Values are parsed as YAML, except that a key which may take a string gets such a text as typed.
    """
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"override {item!r}: write it as dotted.key=value")
        tree = merge(tree, expand_dotted({key: _override_value(key, text.strip())}))
    return tree


def _override_value(key: str, text: str) -> Any:
    annotation = _type_of(key)
    if not text:
        return None if field_types.takes_null(annotation) else ""
    accepts_text = field_types.takes_text(annotation) or field_types.is_open(annotation)
    try:
        parsed = yaml_text.parse_yaml(text)
        if parsed is None:  # a comment or a document marker, which must not stand for null
            return text
    except yaml.YAMLError as error:
        # Valid text need not be valid YAML: `data.train=[ab]*.jsonl`.
        if accepts_text:
            return text
        raise InputError(
            f"{_shortened(f'{key}={text!r}')}: the value is not valid YAML ({_problem(error)})"
        ) from error
    if accepts_text and _is_verbatim(text, parsed, annotation):
        return text
    return _typed_config({key: parsed})[key]


def _is_verbatim(text: str, parsed: Any, annotation: Any) -> bool:
    """Whether a text for a key that takes strings is the value itself, not YAML that stands for one.

    YAML would otherwise drop what follows ` #`, or read `a: b` as a mapping.
    """
    if isinstance(parsed, yaml_text.PlainScalar):
        return parsed.text != text
    if isinstance(parsed, list | dict):
        return text[0] not in "[{" or not field_types.takes_collection(annotation)
    return text[0] not in "'\""


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or first_line(error))


def _type_of(key: str) -> Any:
    """The type of a dotted key; Any where the schema leaves it open."""
    stage = _WHOLE_TREE.match(key)
    return field_types.type_at(Config, key[stage.end() :] if stage else key, hints=_TYPES)


def _typed_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Replace the plain scalars of a configuration, nested or dotted, by values of their keys' types.

    Args:
        prefix: the dotted key of the tree with a trailing dot, if it is a section.
    """
    out = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and _WHOLE_TREE.fullmatch(f"{dotted}."):
            out[key] = _typed_config(value)
        elif isinstance(value, dict) and is_at_or_below("objective.helpers", dotted):
            out[key] = _typed_config(value, f"{dotted}.")
        else:
            out[key] = yaml_text.typed(value, _type_of(dotted), f"{dotted}.", _TYPES)
    return out


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

    An empty mapping clears the section. Where `over` chooses the other of two alternatives, it replaces the
    one in `base`: a judge of another kind, or DeepSpeed's `stage` and `zero_optimization`.
    """
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value:
            out[key] = merge(_without_alternatives(key, old, value), value)
        else:
            out[key] = value
    return out


_ZERO_KEYS = ("stage", "zero_optimization")


def _without_alternatives(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of `old` that remains valid beside `new`."""
    if key == "judge" and "kind" in new:
        # A function belongs to a checker, which is the default kind.
        old_kind = old.get("kind", "checker" if "function" in old else new["kind"])
        return old if new["kind"] == old_kind else {}
    if key == "deepspeed" and any(name in new for name in _ZERO_KEYS):
        return {name: value for name, value in old.items() if name not in _ZERO_KEYS or name in new}
    return old


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
        # JSON has no such number, so it would be null in the run's config.yaml.
        if any(isinstance(item, float) and not math.isfinite(item) for item in texts) and field_types.is_open(
            _type_of(key)
        ):
            raise InputError(f"{key}={value!r}: must be a finite number")
    plain, spellings = yaml_text.split_written(tree)
    try:
        return validate_section(Config, plain)
    except InputError as error:
        raise InputError(*(_shortened(_as_written(fault, spellings)) for fault in error.faults)) from error


def _shortened(text: str) -> str:
    """A message without the middle of a value that is too long to show."""
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} … {text[-_SHOWN:]}"


def _as_written(fault: str, spellings: Mapping[str, tuple[str, str]]) -> str:
    """A fault that shows each number as it was written, `007` and not 7."""
    for key, (shown, written) in spellings.items():
        typed = re.escape(f"{key}={shown}")
        fault = re.sub(rf"(?<![\w.]){typed}(?![\w.])", f"{key}={written}", fault)
    return fault


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


def sft_config(config: Config, **fixed: Any) -> Config:
    """The configuration of supervised fine-tuning: the `sft` section, then `fixed` as :func:`stage_config`.

    What describes preferences alone is not inherited: label smoothing, ties, swapped answers, and the share
    of the pairs.
    """
    own = stage_config(
        config,
        {},
        objective__label_smoothing=0.0,
        objective__ties="drop",
        data__swap_answers=False,
        data__share=1.0,
    )
    return stage_config(own, config.sft, objective__name="sft", **fixed)


def to_tree(config: BaseModel) -> dict[str, Any]:
    """Return a configuration as a plain nested mapping with every default written out."""
    return config.model_dump(mode="json")


def to_yaml(config: BaseModel) -> str:
    """Write a configuration as YAML, without the user names and passwords in its addresses."""
    return strip_credentials(
        yaml.dump(to_tree(config), Dumper=yaml_text.Dumper, sort_keys=False, allow_unicode=True, width=10_000)
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
