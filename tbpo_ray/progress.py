"""Progress messages for the person who watches a job."""

from __future__ import annotations

import contextlib
import sys


def log_progress(text: str) -> None:
    """Print one line to stderr; a closed pipe at its other end is not an error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
