"""The margin and the weight of each pair, from its record, stored next to the prepared pairs.

They are checked once, before training, and joined to the pairs like token weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tbpo_ray.config.objective_options import PairColumn
from tbpo_ray.data.shards import ROWS_PER_GROUP, PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.training.joined_columns import folder_name, joined_columns
from tbpo_ray.training.run_plan import RunPlan

VERSION = 1


def pair_columns(plan: RunPlan, prepared: PreparedPairs) -> Path:
    """Read the numbers of the prepared pairs that the objective reads, or find them in the cache.

    Returns:
        A folder of Parquet files with the names and rows of the prepared shards and the columns
        `pair_margin` and `pair_weight` (list<float32>, one number), as far as they are read.

    Raises:
        InputError: a record has no such number, or a negative one.
    """
    names = plan.objective.pair_columns
    folder = plan.cache_dir / folder_name("pair-numbers", prepared, version=VERSION, columns=list(names))
    types = {f"pair_{name}": pa.float32() for name in names}
    return joined_columns(folder, prepared, types, lambda file: _from_records(file, names))


def _from_records(file: Path, names: tuple[PairColumn, ...]) -> Iterator[list[list[np.ndarray]]]:
    parquet = pq.ParquetFile(file)
    for batch in parquet.iter_batches(ROWS_PER_GROUP, columns=["source", "row", "metadata"]):
        rows = batch.to_pylist()
        metadata = [json.loads(row["metadata"]) for row in rows]
        yield [
            [_number(row, values, name) for row, values in zip(rows, metadata, strict=True)] for name in names
        ]


def _number(row: dict[str, Any], metadata: dict[str, Any], name: PairColumn) -> np.ndarray:
    value = metadata.get(name)
    try:
        # A table's cells may be text.
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number) and number >= 0:
        return np.array([number], dtype=np.float32)
    key = "objective.pair_margins" if name == "margin" else "objective.pair_weights"
    found = "missing" if name not in metadata else repr(value)
    raise InputError(
        f"{key}=data: {row['source']} row {row['row']}: {name}: {found}; must be a finite number that is not "
        f"negative, in every record; or set {key}=none"
    )
