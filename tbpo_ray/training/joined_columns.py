"""Further columns of prepared pairs, in a folder of their own in the cache, which the reader joins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tbpo_ray.config.loading import digest
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.storage.files import atomic_file, file_lock, write_atomic

MANIFEST = "manifest.json"
Batches = Callable[[Path], Iterator[list[list[np.ndarray]]]]
"""From a shard, for each of its row groups a list for each column, with an array for each pair."""


def joined_columns(
    folder: Path, prepared: PreparedPairs, types: Mapping[str, pa.DataType], batches: Batches
) -> Path:
    """Write the columns, or find them.

    Args:
        folder: where they belong; its name has the digest of everything that they depend on.
        types: the name of each column and the type of its numbers.
        batches: computes the columns of a shard.

    Returns:
        `folder`, with Parquet files that have the names and rows of the prepared shards.
    """
    with file_lock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            schema = pa.schema([(name, pa.list_(kind)) for name, kind in types.items()])
            for file, _ in prepared.shards:
                _write(folder / file, schema, batches(Path(prepared.path) / file))
            write_atomic(folder / MANIFEST, json.dumps({"pairs": prepared.fingerprint}))
    return folder


def folder_name(kind: str, prepared: PreparedPairs, **identity: Any) -> str:
    """The name of a folder of columns of these pairs."""
    return f"{kind}-{digest({'pairs': prepared.fingerprint, **identity})}"


def _write(file: Path, schema: pa.Schema, batches: Iterator[list[list[np.ndarray]]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for columns in batches:
            arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
