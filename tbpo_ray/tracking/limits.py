"""MLflow's limits on names and values."""

from __future__ import annotations

import re

MAX_PARAM, MAX_TAG, MAX_DIGEST, MAX_DATASET_NAME = 6000, 5000, 36, 500
"""Maximum numbers of characters."""
MAX_METRICS_PER_CALL, MAX_ENTITIES_PER_CALL = 1000, 100
"""Maximum numbers of metrics, and of parameters or tags, in one `log_batch`."""

_MAX_METRIC_NAME = 250
_ILLEGAL_IN_METRIC = re.compile(r"[^\w\-. :/]")


def metric_name(name: str) -> str:
    """Return `name` as MLflow accepts it: letters, digits, `_-. :/`, at most 250 characters, and no path part
    that is empty or consists of dots."""
    clean = _ILLEGAL_IN_METRIC.sub("_", name)
    parts = ["_" if part in ("", ".", "..") else part for part in clean.split("/")]
    return "/".join(parts)[:_MAX_METRIC_NAME]


def truncate(text: str, limit: int) -> str:
    """Shorten `text` to `limit` characters; shortened text ends with its original length."""
    if len(text) <= limit:
        return text
    mark = f" ... ({len(text)} characters)"
    return text[: limit - len(mark)] + mark
