"""Files and folders that are either complete or absent, on a file system that all nodes share."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path next to `target` to write to, which replaces `target` if the block ends without an error.

    The content reaches the disk before the name does: a reader sees the old file or the new one, never a
    partial one.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(target: Path, text: str) -> None:
    """Write a text file that is never seen half-written."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder next to `target`, which becomes `target` if the block ends without an error.

    Args:
        replace: remove an existing `target` first. Otherwise a `target` that another process completed in the
            meantime is kept, and this one is discarded.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it accessible to its owner only
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold an advisory lock on `file` (created if missing); others wait. Released when the process dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
