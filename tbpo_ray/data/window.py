"""A window of the training stream as one Arrow table, and the Ray Data task that reads it.

This is separate from the stream itself so that reading processes import little.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from tbpo_ray.data.reader import MicroBatch, PairReader
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import TOKEN_COLUMNS, PreparedPairs

_SCALARS = ("step", "index", "count", "pairs_in_step")
_ROW = pa.schema({"window": pa.large_binary()})


def read_window(
    batch: pa.Table, path: str, params: dict[str, Any], extra_dirs: list[str], rank: int, world: int
) -> pa.Table:
    """Read the steps of a rank from `first` to `last - 1`, both given in `batch`, into one row of bytes.

    The window is serialized because Ray Data splits and merges tables, but never a single value.
    """
    window = batch.to_pylist()[0]
    if window["first"] == window["last"]:
        return pa.table({"window": [b""]}, schema=_ROW)
    reader, schedule = _open(path, tuple(sorted(params.items())), tuple(extra_dirs))
    table = encode(reader.micro_batches(schedule, rank, world, window["first"], window["last"]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.table({"window": [sink.getvalue().to_pybytes()]}, schema=_ROW)


def decode_windows(batch: pa.Table) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each window in the rows of :func:`read_window`."""
    for value in batch.column("window"):
        if len(value.as_buffer()):
            yield list(decode(pa.ipc.open_stream(value.as_buffer()).read_all()))


def encode(micro_batches: list[MicroBatch]) -> pa.Table:
    """One row per micro-batch; token columns are lists of lists."""
    first = micro_batches[0]
    sizes = np.cumsum([0, *(len(micro.pair_ids) for micro in micro_batches)], dtype=np.int32)
    ids = np.concatenate([micro.pair_ids for micro in micro_batches]).astype(np.int64)
    columns: dict[str, Any] = {name: [getattr(micro, name) for micro in micro_batches] for name in _SCALARS}
    columns["pair_ids"] = pa.ListArray.from_arrays(sizes, ids)
    for name in TOKEN_COLUMNS:
        columns[name] = _nested([getattr(micro, name) for micro in micro_batches], sizes, np.int32)
    for name in first.extras:
        columns[name] = _nested([micro.extras[name] for micro in micro_batches], sizes, np.float32)
    return pa.table(columns)


def decode(table: pa.Table) -> Iterator[MicroBatch]:
    """The micro-batches in a table of :func:`encode`; their arrays are views of the table."""
    table = table.combine_chunks()
    scalars = [table.column(name).to_pylist() for name in _SCALARS]
    extras = [name for name in table.column_names if name not in (*_SCALARS, "pair_ids", *TOKEN_COLUMNS)]
    ids = table.column("pair_ids").chunk(0)
    bounds, values = ids.offsets.to_numpy(), ids.values.to_numpy()
    lists = {name: _unnest(table.column(name).chunk(0)) for name in (*TOKEN_COLUMNS, *extras)}
    for row in range(table.num_rows):
        step, index, count, pairs_in_step = (column[row] for column in scalars)
        pairs = int(bounds[row + 1] - bounds[row])
        columns = {name: _row_arrays(*nested, row, pairs) for name, nested in lists.items()}
        prompt, chosen, rejected = (columns.pop(name) for name in TOKEN_COLUMNS)
        pair_ids = values[bounds[row] : bounds[row + 1]]
        yield MicroBatch(step, index, count, pairs_in_step, pair_ids, prompt, chosen, rejected, columns)


def _nested(lists: list[list[np.ndarray]], sizes: np.ndarray, dtype: type) -> pa.ListArray:
    # Built from flat arrays and offsets: pyarrow converts nested Python lists value by value.
    flat = [array for group in lists for array in group]
    offsets = np.cumsum([0, *map(len, flat)], dtype=np.int32)
    values = np.concatenate(flat).astype(dtype, copy=False) if flat else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(sizes, pa.ListArray.from_arrays(offsets, values))


def _unnest(outer: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inner = outer.values
    return outer.offsets.to_numpy(), inner.offsets.to_numpy(), inner.values.to_numpy()


def _row_arrays(
    outer: np.ndarray, inner: np.ndarray, values: np.ndarray, row: int, pairs: int
) -> list[np.ndarray]:
    start = int(outer[row])
    return [values[inner[at] : inner[at + 1]] for at in range(start, start + pairs)]


@lru_cache(maxsize=2)
def _open(
    path: str, params: tuple[tuple[str, Any], ...], extra_dirs: tuple[str, ...]
) -> tuple[PairReader, Schedule]:
    """The reader and the schedule, opened once per reading process."""
    prepared = PreparedPairs.load(path)
    return PairReader(prepared, extra_dirs), Schedule(prepared.lengths(), **dict(params))
