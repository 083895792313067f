"""Reduce a long error to the one sentence that explains it."""

from __future__ import annotations

import re

_NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b[^:]*:")
_FIELD = re.compile(r"(class_name|actor_id|pid|name|namespace|ip|node_id):( |$)")
"""The fields that Ray lists below the sentence about an actor that died."""
_WRAPPERS = re.compile("UserCodeException|RayTaskError|TrainingFailedError|WorkerGroupError")


def error_summary(error: BaseException) -> str:
    """The innermost sentence of an error, without its traceback, at most 500 characters."""
    lines = [line for line in map(str.strip, str(error).splitlines()) if line and not _FIELD.match(line)]
    named = list(filter(_NAMED.match, lines))
    # Ray wraps an error in errors of its own; the cause comes last.
    causes = [line for line in named if not _WRAPPERS.search(line)]
    candidates = causes or named or lines or [type(error).__name__]
    return candidates[-1][:500]
