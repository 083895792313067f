"""Read windows of a large prepared folder as a rank does; the child process of :mod:`benchmarks.scale`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from tbpo_ray.data.reader import PairReader, _size
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import PreparedPairs

WORLD, PAIRS_PER_STEP = 8, 64


class CountingReader(PairReader):
    """Counts the decoded bytes of the row groups that are read, and the shards that they come from."""

    decoded_bytes, open_files = 0, 0

    def __init__(self, prepared: PreparedPairs):
        super().__init__(prepared)
        self.shards_read: set[int] = set()

    def _group(self, folder: int, shard: int, group: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        is_cached = (folder, shard, group) in self._groups
        columns = super()._group(folder, shard, group)
        if not is_cached:
            self.decoded_bytes += _size(columns)
            self.shards_read.add(shard)
            self.open_files = max(self.open_files, len(self._files))
        return columns


def read_windows(folder: str, steps: int) -> dict[str, Any]:
    """Start as a reading process does, and read the first steps of rank 0 of 8.

    Returns:
        `start_seconds`, `read_seconds`, `pairs`, `open_files` (descriptors of shards), `shards_read`,
        `read_over_used` (decoded bytes over those of the pairs), and the private bytes that it took.
    """
    import pyarrow.parquet  # noqa: F401  (its own memory is not the reader's)

    before = private_bytes()
    began = perf_counter()
    prepared = PreparedPairs.load(folder)
    schedule = Schedule(
        prepared.lengths(), seed=0, pairs_per_step=PAIRS_PER_STEP, micro_batch_pairs=PAIRS_PER_STEP // WORLD
    )
    reader = CountingReader(prepared)
    rank_bytes = private_bytes() - before
    start_seconds = perf_counter() - began
    schedule.step_pairs(0)
    order_seconds = perf_counter() - began - start_seconds
    began = perf_counter()
    used = pairs = 0
    for micro in reader.micro_batches(schedule, 0, WORLD, 0, min(steps, schedule.steps_total)):
        pairs += len(micro.pair_ids)
        used += sum(values.nbytes for column in micro.columns().values() for values in column)
    return {
        "start_seconds": start_seconds,
        "order_seconds": order_seconds,
        "read_ms_per_pair": 1e3 * (perf_counter() - began) / pairs,
        "open_files": open_shards(),
        "shards_read": len(reader.shards_read),
        "read_over_used": reader.decoded_bytes / used,
        "rank_bytes": rank_bytes,
        "reader_bytes": private_bytes() - before,
    }


def open_shards() -> int:
    """The Parquet files that this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            count += os.readlink(f"/proc/self/fd/{name}").endswith(".parquet")
    return count


def private_bytes() -> int:
    """Memory of this process that no other one shares; pages of mapped files are shared."""
    return int(psutil.Process().memory_full_info().uss - _mapped_file_bytes())


def _mapped_file_bytes() -> int:
    """Resident pages of data files, which the system drops when memory is short."""
    maps = psutil.Process().memory_maps()
    return sum(m.rss for m in maps if m.path.endswith((".npy", ".parquet")))


if __name__ == "__main__":
    job = json.loads(sys.argv[-1])
    print(json.dumps(read_windows(job["folder"], job["steps"])))
