"""An append-only file of numbered JSON lines, which a crash can shorten but not corrupt.

An entry is one line, so that writing it costs the same however many there are. A line that a crash cut off
has no line break: it is dropped when the file is read, and removed before the next one is appended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError, first_line
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.json_lines import dumps

NUMBER = "n"
"""Key of an entry's number; entries are numbered from 1 without gaps."""
REMEDY = "restore it, or use another run.name for a new study"


class Ledger:
    """The entries of a file, of which one process at a time appends to it."""

    def __init__(self, file: Path):
        self.file = file
        self.count = 0
        """Number of the last entry."""
        self._size: int | None = None
        """Bytes of the complete lines; None until the file has been read."""
        self._handle: Any = None

    def read(self, after: int = 0) -> list[dict[str, Any]]:
        """The entries with a number above `after`, in order; an incomplete last line is dropped.

        Raises:
            InputError: a complete line is damaged, or an entry is missing; naming file and line.
        """
        content = self.file.read_bytes() if self.file.is_file() else b""
        self._size = content.rfind(b"\n") + 1
        if self._size < len(content):
            log_progress(f"{self.file}: dropped the incomplete last line, which an interruption left")
        self.count = after
        entries = []
        for place, line in enumerate(content[: self._size].splitlines(), 1):
            entry = self._parse(line, place)
            if entry[NUMBER] <= after:
                continue
            if entry[NUMBER] != self.count + 1:
                raise InputError(
                    f"{self.file}: line {place} is entry {entry[NUMBER]}, but entry {self.count + 1} must "
                    f"come next; {REMEDY}"
                )
            self.count += 1
            entries.append(entry)
        return entries

    def _parse(self, line: bytes, place: int) -> dict[str, Any]:
        try:
            entry = json.loads(line.decode("utf-8"))
            problem = "" if isinstance(entry, dict) and isinstance(entry.get(NUMBER), int) else "no number"
        except (ValueError, RecursionError) as error:
            problem = first_line(error, 80)
        if problem:
            raise InputError(f"{self.file}: line {place} is not an entry ({problem}); {REMEDY}")
        return dict(entry)

    def append(self, entry: Mapping[str, Any], *, durable: bool) -> None:
        """Append an entry under the next number.

        Args:
            durable: return only once it is on the disk. Otherwise it survives the end of this process, but
                not always that of its node.
        """
        if self._size is None:
            self.read(self.count)
        assert self._size is not None
        if self._handle is None:
            self._handle = open(self.file, "ab", buffering=0)  # noqa: SIM115  (open until the study ends)
            self._handle.truncate(self._size)
        line = (dumps({NUMBER: self.count + 1, **entry}) + "\n").encode()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._handle.write(rest) :]
        except OSError:
            self._handle.truncate(self._size)  # a full disk must not leave half a line before the next one
            raise
        if durable:
            os.fsync(self._handle.fileno())
        self._size += len(line)
        self.count += 1
