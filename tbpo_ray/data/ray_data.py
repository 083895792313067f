"""The Ray Data pipeline of `prepare`: one light reader per file feeds tokenizing tasks, chunk by chunk."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, cast

import pyarrow as pa

from tbpo_ray.data.shard_writer import BuildJob, ChunkResult, load_job, private_bytes, process_chunk
from tbpo_ray.data.sources import Chunk, SourceFile, iter_chunks
from tbpo_ray.errors import InputError

READ_CPUS, TOKENIZE_CPUS = 0.1, 0.9
"""Together one core, so that a two-core machine tokenizes on both; different, so that the stages stay two."""


def run_chunks(job: BuildJob, folder: str, labels: Mapping[str, str] | None = None) -> Iterator[ChunkResult]:
    """Prepare every chunk of a build in Ray Data tasks, in any order.

    Args:
        labels: that the tasks' nodes must carry.

    Raises:
        InputError: when a file cannot be read.
    """
    import ray

    labels = dict(labels or {})
    # With a limit the files are read one after the other: how many rows are left depends on those before.
    indices = list(range(len(job.files)))
    items = [{"files": part} for part in ([indices] if job.limit is not None else [[i] for i in indices])]
    with quiet_data_context() as context:
        context.target_max_block_size = 1  # every chunk is a block of its own, and so a task of its own
        read, work = cast(Any, _read), cast(Any, _prepare)
        options: dict[str, Any] = {
            "batch_size": 1,
            "batch_format": "pyarrow",
            "label_selector": labels,
            "fn_kwargs": {"folder": folder},
        }
        files = ray.data.from_items(items, override_num_blocks=len(items))
        chunks = files.map_batches(read, num_cpus=READ_CPUS, **options)
        results = chunks.map_batches(work, num_cpus=TOKENIZE_CPUS, **options)
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in cast(pa.Table, table).to_pylist():
                yield _result(row)


@contextmanager
def quiet_data_context() -> Iterator[Any]:
    """A Ray Data context of one's own, without progress bars and start messages."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with DataContext.current(context):
            yield context
    finally:
        logger.setLevel(before)


def _read(batch: pa.Table, folder: str) -> Iterator[pa.Table]:
    """Chunks of the batch's files; a file that cannot be read ends in a row that says so."""
    job = load_job(folder)
    left = job.limit
    for index in batch["files"].to_pylist()[0]:
        file = SourceFile(*job.files[index])
        try:
            for chunk in iter_chunks(file, job.chunk_rows, left):
                left = None if left is None else left - chunk.rows
                row = {"file": index, "fault": "", "reader_bytes": private_bytes(), **asdict(chunk)}
                yield pa.table({name: [value] for name, value in row.items()})
        except InputError as error:
            empty = asdict(Chunk(file.address, 0, 0, "generated"))
            row = {"file": index, "fault": str(error), "reader_bytes": 0, **empty}
            yield pa.table({name: [value] for name, value in row.items()})
            return
        if left == 0:
            return


def _prepare(batch: pa.Table, folder: str) -> pa.Table:
    row = batch.to_pylist()[0]
    file, fault, reader_bytes = (row.pop(name) for name in ("file", "fault", "reader_bytes"))
    if fault:
        return pa.table({"fault": [fault], "result": [""], "lengths": [b""], "hashes": [b""]})

    values = asdict(process_chunk(folder, file, Chunk(**row)))
    values["memory_bytes"] = max(values["memory_bytes"], reader_bytes)
    lengths, hashes = values.pop("lengths"), values.pop("hashes")
    return pa.table({"fault": [""], "result": [json.dumps(values)], "lengths": [lengths], "hashes": [hashes]})


def _result(row: dict[str, Any]) -> ChunkResult:
    if row["fault"]:
        raise InputError(row["fault"])
    return ChunkResult(lengths=row["lengths"], hashes=row["hashes"], **json.loads(row["result"]))
