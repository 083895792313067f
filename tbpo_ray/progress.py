"""Lines for the person who follows a job."""

from __future__ import annotations

import contextlib
import sys


def log_progress(text: str) -> None:
    """Print one line to stderr; a reader who has gone is no error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
