"""Reduce a long error to the one sentence that explains it."""

from __future__ import annotations

import re

_NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b[^:]*:")
_FIELD = re.compile(r"(class_name|actor_id|pid|name|namespace|ip|node_id):( |$)")
"""The fields that Ray lists below the sentence about an actor that died."""
_WRAPPERS = re.compile(
    "UserCodeException|RayTaskError|TrainingFailedError|WorkerGroupError|EngineDeadError|"
    "Engine core initialization failed|ActorDiedError|RayActorError"
)
"""Errors that only report another error."""
_LOG_PREFIX = re.compile(r"^(\x1b\[[\d;]*m|\([^)]*pid=\d+\)\s*|[A-Z]+ [\d-]+ [\d:,.]+ \[[^\]]*\]\s?)+")
"""What loggers print in front of a message: color, process, level, time and place."""
_CRASH = re.compile(r"^(Fatal Python error|terminate called|\*\*\* (SIG|Aborted)|Aborted|Segmentation fault)")


def error_summary(error: BaseException) -> str:
    """The innermost sentence of an error, without its traceback, at most 500 characters."""
    lines = [line for line in map(str.strip, str(error).splitlines()) if line and not _FIELD.match(line)]
    named = list(filter(_NAMED.match, lines))
    # Ray wraps an error in errors of its own; the cause comes last.
    causes = [line for line in named if not _WRAPPERS.search(line)]
    candidates = causes or named or lines or [type(error).__name__]
    return candidates[-1][:500]


def last_error(log: str) -> str | None:
    """The last error in what a process printed, at most 500 characters; None if there is none."""
    lines = [_LOG_PREFIX.sub("", line).strip() for line in log.splitlines()]
    causes = [line for line in lines if _NAMED.match(line) and not _WRAPPERS.search(line)]
    crashes = [line for line in lines if _CRASH.match(line)]
    found = causes or crashes
    return found[-1][:500] if found else None
