"""Keeps secrets out of MLflow, reports and logs: by the name of a key, and by the shape of a value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

# The last words of a key that make its value a secret; `max_tokens` and `api_key_env` are none.
_SECRET_KEY = re.compile(
    r"(^|[._-])(secret|password|passwd|credentials?|authorization|bearer|token|"
    r"(api|access|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_LOOKS_SECRET = re.compile(r"\b(?:sk|hf|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}|\bBearer\s+\S+")


def redact(key: str, value: Any) -> str:
    """`value` as text, hidden where the key or the value says that it is a secret."""
    if isinstance(value, Mapping | list):
        inner = redact_tree({key: value})[key]
        return inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False, default=str)
    return str(redact_tree({key: value})[key])


def without_user(address: str) -> str:
    """An address without user and password."""
    return _USER_INFO.sub("", address)


def redact_text(text: str) -> str:
    """Text without the user and password of addresses and without what looks like an access token."""
    return _LOOKS_SECRET.sub(REDACTED, without_user(text))


def redact_tree(tree: Any, key: str = "") -> Any:
    """A configuration tree with every secret replaced by `<redacted>`."""
    if key and _SECRET_KEY.search(key) and tree not in (None, "", {}, []):
        return REDACTED
    if isinstance(tree, Mapping):
        return {name: redact_tree(value, str(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [redact_tree(value) for value in tree]
    return redact_text(tree) if isinstance(tree, str) else tree
