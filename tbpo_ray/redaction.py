"""Keep secrets out of MLflow, reports and logs, judging by the name of a key and the form of a value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

# A key whose last words are among these has a secret value; `max_tokens` and `api_key_env` do not.
_SECRET_KEY = re.compile(
    r"(^|[._-])(secret|password|passwd|credentials?|authorization|bearer|token|"
    r"(api|access|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_LOOKS_SECRET = re.compile(r"\b(?:sk|hf|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}|\bBearer\s+\S+")


def redact(key: str, value: Any) -> str:
    """`value` as text, redacted if the key or the value indicates a secret."""
    if isinstance(value, Mapping | list):
        inner = redact_tree({key: value})[key]
        return inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False, default=str)
    return str(redact_tree({key: value})[key])


def strip_credentials(address: str) -> str:
    """An address without its user name and password."""
    return _USER_INFO.sub("", address)


def redact_text(text: str) -> str:
    """Text without the user names and passwords of addresses, and with access tokens redacted."""
    return _LOOKS_SECRET.sub(REDACTED, strip_credentials(text))


def redact_tree(tree: Any, key: str = "") -> Any:
    """A configuration tree with every secret replaced by `<redacted>`."""
    if key and _SECRET_KEY.search(key) and tree not in (None, "", {}, []):
        return REDACTED
    if isinstance(tree, Mapping):
        return {name: redact_tree(value, str(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [redact_tree(value) for value in tree]
    return redact_text(tree) if isinstance(tree, str) else tree
