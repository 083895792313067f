"""The Ray Data pipeline that prepares pairs: a light reader per file feeds chunks to tokenizing tasks."""

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
"""They add up to one core, so that a machine with two cores tokenizes on both. They differ because Ray
Data would fuse two stages with the same resources into one."""


def run_chunks(job: BuildJob, folder: str, labels: Mapping[str, str] | None = None) -> Iterator[ChunkResult]:
    """Prepare every chunk of a build in Ray Data tasks, and yield the results in any order.

    Args:
        job: the settings, which must be saved in `folder` too.
        folder: the build folder, on storage that all nodes share.
        labels: node labels that the tasks require.

    Raises:
        InputError: when a file cannot be read.
    """
    import ray

    labels = dict(labels or {})
    # With a limit one task reads all files in turn, since each file may only use the rows that remain.
    indices = list(range(len(job.files)))
    groups = [indices] if job.limit is not None else [[index] for index in indices]
    items = [{"files": group} for group in groups]
    with quiet_data_context() as context:
        context.target_max_block_size = 1  # one block per chunk, and therefore one task per chunk
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
    """Apply a copy of the Ray Data context within the block, without progress bars and start messages."""
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
    """Yield the chunks of the files in the batch; an unreadable file ends in a row with the error message.

    An exception would reach the caller as a RayTaskError, and the message would be lost in its traceback.
    """
    job = load_job(folder)
    remaining = job.limit
    for index in batch["files"].to_pylist()[0]:
        file = SourceFile(*job.files[index])
        try:
            for chunk in iter_chunks(file, job.chunk_rows, remaining):
                remaining = None if remaining is None else remaining - chunk.rows
                row = {"file": index, "error": "", "reader_bytes": private_bytes(), **asdict(chunk)}
                yield pa.table({name: [value] for name, value in row.items()})
        except InputError as error:
            empty = asdict(Chunk(file.address, 0, 0, "generated"))
            row = {"file": index, "error": str(error), "reader_bytes": 0, **empty}
            yield pa.table({name: [value] for name, value in row.items()})
            return
        if remaining == 0:
            return


def _prepare(batch: pa.Table, folder: str) -> pa.Table:
    row = batch.to_pylist()[0]
    file, error, reader_bytes = (row.pop(name) for name in ("file", "error", "reader_bytes"))
    if error:
        return pa.table({"error": [error], "result": [""], "lengths": [b""], "hashes": [b""]})

    values = asdict(process_chunk(folder, file, Chunk(**row)))
    values["memory_bytes"] = max(values["memory_bytes"], reader_bytes)
    lengths, hashes = values.pop("lengths"), values.pop("hashes")
    return pa.table({"error": [""], "result": [json.dumps(values)], "lengths": [lengths], "hashes": [hashes]})


def _result(row: dict[str, Any]) -> ChunkResult:
    if row["error"]:
        raise InputError(row["error"])
    return ChunkResult(lengths=row["lengths"], hashes=row["hashes"], **json.loads(row["result"]))
