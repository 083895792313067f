"""Check a model folder's safetensors by their headers, without reading a weight."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
"""Largest header that the safetensors library accepts."""


def check_weight_files(folder: Path, name: str) -> None:
    """Check that every safetensors file that transformers will read exists and is complete.

    Args:
        name: the configuration key and its value, for messages.

    Raises:
        InputError: naming the first file that is absent or truncated.
    """
    if (folder / SINGLE).is_file():
        _read_header(folder / SINGLE, name)
        return
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        raise InputError(
            f"{name}: the weights are in {found}, but transformers reads {SINGLE}, or the files that {INDEX} "
            "lists; add the missing file"
        )
    files = _index(folder / INDEX, name)
    absent = sorted(file for file in files if not (folder / file).is_file())
    if absent:
        raise InputError(
            f"{name}: {len(absent)} of {len(files)} safetensors files that {INDEX} lists are missing: "
            f"{', '.join(absent[:5])}; download them again"
        )
    for file, tensors in files.items():
        lacking = sorted(tensors - _read_header(folder / file, name))
        if lacking:
            raise InputError(
                f"{name}: {file} does not contain {lacking[0]}, which {INDEX} assigns to it; the "
                "files belong to different safetensors checkpoints"
            )


def _index(file: Path, name: str) -> dict[str, set[str]]:
    """Names of the tensors in each file that an index lists."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            files.setdefault(str(shard), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: {file.name} is not an index of safetensors files ({error})") from error
    return files


def _read_header(file: Path, name: str) -> set[str]:
    """Names of a file's tensors."""
    size = file.stat().st_size
    damaged = InputError(f"{name}: {file.name} is not a complete safetensors file ({size} bytes)")
    with file.open("rb") as data:
        start = data.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise damaged
        try:
            header: dict[str, Any] = json.loads(data.read(length))
        except ValueError as error:
            raise damaged from error
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
    if 8 + length + end != size:
        raise damaged
    return set(tensors)
