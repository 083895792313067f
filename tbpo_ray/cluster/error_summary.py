"""The one sentence of a long error that says what happened."""

from __future__ import annotations

import re

_NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b[^:]*:")
_FIELD = re.compile(r"(class_name|actor_id|pid|name|namespace|ip|node_id):( |$)")
"""What Ray lists below the sentence of an actor that died."""
_WRAPPERS = ("UserCodeException", "RayTaskError", "TrainingFailedError", "WorkerGroupError")


def error_summary(error: BaseException) -> str:
    """The innermost sentence of an error, without the traceback, at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _FIELD.match(line)]
    named = [line for line in lines if _NAMED.match(line)]
    useful = [line for line in named if not any(w in line for w in _WRAPPERS)]
    chosen = (useful or named or lines or [""])[-1]
    return (chosen or type(error).__name__)[:500]
