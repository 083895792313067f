"""Read prepared pairs by id, joined with further columns from folders that have the same shards.

The unit of a read is a Parquet row group. Decoded groups are cached up to a number of bytes, so that a small
data set is decoded once and a large one stays on disk.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import TIE_COLUMN, TOKEN_COLUMNS, PreparedPairs
from tbpo_ray.errors import InputError

CACHE_BYTES = 256 * 2**20
OPEN_FILES = 32
"""Maximum number of Parquet files that a reader keeps open, each with its footer in memory."""
OTHER_FILES = 64
"""Descriptors that a process needs for everything else: weights, checkpoints, connections."""


@dataclass(frozen=True)
class MicroBatch:
    """`n` pairs that go through the model together on one rank; 0 when the step has no pairs left for it.

    `index` runs from 0 to `count - 1` within `step`, on every rank alike, and `pairs_in_step` is the number
    of pairs over all ranks. Token columns are `n` arrays [tokens] int32; `extras` maps each joined column to
    `n` arrays [tokens] float32. Among them are the masks of answers with tokens that are context only, where
    there are any; the mask of an answer without such tokens is empty. Where ties are kept, `tie` has one
    value per pair, 1 for a tie.
    """

    step: int
    index: int
    count: int
    pairs_in_step: int
    pair_ids: np.ndarray
    prompt_ids: list[np.ndarray]
    chosen_ids: list[np.ndarray]
    rejected_ids: list[np.ndarray]
    extras: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def columns(self) -> dict[str, list[np.ndarray]]:
        """Token columns and joined columns by name."""
        return {name: getattr(self, name) for name in TOKEN_COLUMNS} | self.extras


@dataclass
class _File:
    parquet: Any
    columns: tuple[str, ...]
    group_starts: np.ndarray
    """First row of each row group, followed by the number of rows."""


class PairReader:
    """Reads pairs by id.

    Args:
        prepared: the pairs.
        extra_dirs: folders with Parquet files that have the names and rows of the shards; all list columns
            of these files are joined.
        cache_bytes: maximum size of the cache of decoded row groups.

    Raises:
        InputError: when an extra folder does not match the shards, or the process may not open enough files.
    """

    def __init__(
        self, prepared: PreparedPairs, extra_dirs: Sequence[str] = (), cache_bytes: int = CACHE_BYTES
    ):
        check_descriptors()
        self._folders = [Path(prepared.path), *map(Path, extra_dirs)]
        self._shards = prepared.shards
        self._starts = prepared.starts()
        further = (*prepared.mask_columns, *prepared.tie_columns)
        self._own_columns = (*TOKEN_COLUMNS, *further)
        self._files: OrderedDict[tuple[int, int], _File] = OrderedDict()
        self._max_files = max(OPEN_FILES, len(self._folders))
        self._groups: OrderedDict[tuple[int, int, int], dict[str, tuple[np.ndarray, np.ndarray]]] = (
            OrderedDict()
        )
        self._bytes, self._limit = 0, cache_bytes
        self.extra_columns = tuple(
            name for index in range(1, len(self._folders)) for name in self._file(index, 0).columns
        )
        self.extra_columns = (*further, *self.extra_columns)

    def fetch(self, pair_ids: np.ndarray) -> dict[str, list[np.ndarray]]:
        """The columns of these pairs by name, each with one array per pair in the order of `pair_ids`."""
        out: dict[str, list[Any]] = {
            name: [None] * len(pair_ids) for name in (*TOKEN_COLUMNS, *self.extra_columns)
        }
        # In the order of the shards, so that each row group is decoded once even if the cache is small.
        for at in np.argsort(pair_ids, kind="stable"):
            shard = int(np.searchsorted(self._starts, pair_ids[at], side="right")) - 1
            row = int(pair_ids[at] - self._starts[shard])
            for folder in range(len(self._folders)):
                starts = self._file(folder, shard).group_starts
                group = int(np.searchsorted(starts, row, side="right")) - 1
                local = row - int(starts[group])
                for name, (offsets, values) in self._group(folder, shard, group).items():
                    out[name][at] = values[offsets[local] : offsets[local + 1]]
        return out

    def micro_batches(
        self, schedule: Schedule, rank: int, world: int, first: int, last: int
    ) -> list[MicroBatch]:
        """The micro-batches of a rank in the steps `first` to `last - 1`, read together."""
        plan = [(step, schedule.micro_batches(step, rank, world)) for step in range(first, last)]
        ids = [part for _, parts in plan for part in parts]
        columns = self.fetch(np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64))
        out, at = [], 0
        for step, parts in plan:
            pairs_in_step = len(schedule.step_pairs(step))
            for index, part in enumerate(parts):
                extras = {name: values[at : at + len(part)] for name, values in columns.items()}
                tokens = {name: extras.pop(name) for name in TOKEN_COLUMNS}
                out.append(MicroBatch(step, index, len(parts), pairs_in_step, part, **tokens, extras=extras))
                at += len(part)
        return out

    def _file(self, folder: int, shard: int) -> _File:
        if (folder, shard) in self._files:
            self._files.move_to_end((folder, shard))
        else:
            import pyarrow.parquet as pq

            name, pairs = self._shards[shard]
            path = self._folders[folder] / name
            if not path.is_file():
                raise InputError(f"{path}: missing, but the prepared pairs have a shard of this name")
            parquet = pq.ParquetFile(path, memory_map=True)
            meta = parquet.metadata
            if meta.num_rows != pairs:
                raise InputError(
                    f"{path}: {meta.num_rows} rows for {pairs} pairs; delete its folder to rebuild it"
                )
            sizes = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
            import pyarrow as pa

            lists = tuple(item.name for item in parquet.schema_arrow if pa.types.is_list(item.type))
            columns = self._own_columns if folder == 0 else lists
            self._files[folder, shard] = _File(parquet, columns, np.cumsum([0, *sizes]))
            if len(self._files) > self._max_files:
                self._files.popitem(last=False)[1].parquet.close(force=True)
        return self._files[folder, shard]

    def _group(self, folder: int, shard: int, group: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        key = (folder, shard, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        file = self._file(folder, shard)
        table = file.parquet.read_row_group(group, columns=list(file.columns), use_threads=False)
        columns = {}
        for name in file.columns:
            array = table.column(name).combine_chunks()
            if name == TIE_COLUMN:
                columns[name] = (np.arange(len(array) + 1), array.to_numpy(zero_copy_only=False))
            else:
                columns[name] = (array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=False))
        self._groups[key] = columns
        self._bytes += _size(columns)
        while self._bytes > self._limit and len(self._groups) > 1:
            self._bytes -= _size(self._groups.popitem(last=False)[1])
        return columns


def check_descriptors() -> None:
    """Refuse a limit of open files with which a reader would fail in the middle of a run.

    Raises:
        InputError: with the calculation.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    in_use = len(os.listdir("/dev/fd"))
    needed = in_use + OPEN_FILES + OTHER_FILES
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise InputError(
            f"ulimit -n={limit}: too few open files; {in_use} are open, a reader of pairs opens up to "
            f"{OPEN_FILES}, and {OTHER_FILES} are for weights, checkpoints and connections: {in_use} + "
            f"{OPEN_FILES} + {OTHER_FILES} = {needed}. Raise it, for example with ulimit -n 1024"
        )


def _size(columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    return sum(offsets.nbytes + values.nbytes for offsets, values in columns.values())
