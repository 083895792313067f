"""Check a model folder's safetensors by their headers, without reading a weight."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
"""Largest header that the safetensors library accepts."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F4": 4, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""The dtypes of the safetensors format, and the bits of one value."""


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


def file_of_tensor(folder: Path, tensor: str) -> str | None:
    """The name of the safetensors file that holds a tensor of a model; None if that cannot be told.

    Args:
        tensor: its name in the model; that in the file may lack the prefix of the base model.
    """
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    names = {file.name: _read_header(file, str(folder)) for file in files}
    bare = tensor.split(".", 1)[-1]
    for matches in (lambda known: known == tensor, lambda known: known == bare):
        for file, tensors in names.items():
            if any(map(matches, tensors)):
                return file
    return None


def _index(file: Path, name: str) -> dict[str, set[str]]:
    """Names of the tensors in each file that an index lists."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            if Path(shard).name != shard:
                raise ValueError(f"{shard!r} is not the name of a file")
            files.setdefault(shard, set()).add(tensor)
        if not files:
            raise ValueError("it lists no tensor")
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
    try:
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        unknown = sorted(key for key, value in tensors.items() if value["dtype"] not in _BITS)
        ranges = [_byte_range(value) for key, value in tensors.items() if key not in unknown]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged from error
    if unknown:
        raise InputError(
            f"{name}: {file.name}: {unknown[0]} has the unknown dtype {tensors[unknown[0]]['dtype']!r}; must "
            "be one of the safetensors format, such as F32 or BF16"
        )
    if 8 + length + max((end for _, end in ranges), default=0) != size:
        raise damaged
    return set(tensors)


def _byte_range(entry: dict[str, Any]) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end, which has to agree with its shape.

    Raises:
        ValueError: it does not.
    """
    begin, end = entry["data_offsets"]
    if begin < 0 or (end - begin) * 8 != math.prod(entry["shape"]) * _BITS[entry["dtype"]]:
        raise ValueError("the bytes do not fit the shape")
    return begin, end
