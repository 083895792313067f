"""Progress messages for the person who watches a job."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any, TextIO

_lock = threading.RLock()
_bar: Any = None
"""The live bar on the terminal; at most one."""


def log_progress(text: str, stream: TextIO | None = None) -> None:
    """Print one line to stderr, above the live bar; a closed pipe at its other end is not an error."""
    with contextlib.suppress(BrokenPipeError), _lock:
        if _bar is None:
            print(text, file=stream or sys.stderr, flush=True)
        else:
            _bar.write(text, file=_bar.fp)


def is_live(stream: TextIO | None = None) -> bool:
    """Whether progress is shown as a live bar: on a terminal, and not in the log of a job."""
    return (stream or sys.stderr).isatty()


def show_bar(stage: str, done: int, total: int, note: str = "", stream: TextIO | None = None) -> None:
    """Show a live bar on the terminal, which replaces that of another stage; it ends when `done` is `total`.

    Args:
        stage: name of the stage, in front of the bar.
        note: what stands behind it, such as the loss.
    """
    from tqdm import tqdm

    global _bar
    with contextlib.suppress(BrokenPipeError), _lock:
        if _bar is not None and (_bar.desc.removesuffix(": ") != stage or _bar.total != total):
            close_bar()
        if _bar is None:
            # What a resumed run did earlier does not count as its speed.
            _bar = tqdm(total=total, initial=done, desc=stage, file=stream or sys.stderr, dynamic_ncols=True)
        _bar.set_postfix_str(note, refresh=False)
        _bar.update(done - _bar.n)
        _bar.refresh()
        if done >= total:
            close_bar()


def close_bar() -> None:
    """End the live bar, whose last state stays on the terminal; nothing if there is none."""
    global _bar
    with contextlib.suppress(BrokenPipeError), _lock:
        if _bar is not None:
            bar, _bar = _bar, None
            bar.close()
