"""Tensors in safetensors files, hashed while they are written.

The bytes are those that `safetensors.torch.save_file` writes, which offers no place to hash them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256, in hex, of a file."""

    size: int
    sha256: str

    @classmethod
    def read(cls, file: Path) -> Self:
        """Of a file on disk, which is read completely."""
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            return cls(handle.tell(), digest)

    @classmethod
    def of_text(cls, text: str) -> Self:
        """Of a text file with this content, in UTF-8."""
        data = text.encode()
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(int(value["bytes"]), str(value["sha256"]))

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sha256}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Write a safetensors file that has reached the disk when this returns.

    A thread hashes the same memory meanwhile, so that the file is not read again and the slower of hashing
    and writing decides.

    Args:
        tensors: contiguous tensors in host memory, which must not change until this returns.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor is on a device, is not contiguous, or has a dtype without a name in the format.
    """
    parts = _encode(tensors)
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as thread, file.open("wb") as out:
        digest = thread.submit(_sha256, parts)
        for part in parts:
            out.write(part)
        out.flush()
        os.fsync(out.fileno())
        return FileFacts(sum(len(part) for part in parts), digest.result())


def _encode(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The header and the memory of each tensor, in the order of the file."""
    # The widest first, so that every tensor is aligned to its width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    entries: dict[str, dict[str, Any]] = {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name, tensor in ordered:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: a {tensor.dtype} tensor on {tensor.device} with strides {tensor.stride()}; must be "
                "a contiguous one in host memory, of a dtype that safetensors has"
            )
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        values: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        parts.append(memoryview(values))
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return [struct.pack("<Q", len(header)) + header, *parts]


def _sha256(parts: Sequence[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
