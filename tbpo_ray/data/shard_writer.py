"""Prepare one chunk of a source: parse it, tokenize it, and write its shard and its quarantine file.

This runs in Ray Data tasks or in the calling process. Workers read the settings and the tokenizer from the
build folder, once per process, so that a task carries only its chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.data.pair_sizes import measure_pairs
from tbpo_ray.data.records import BadRecord, ReadOptions, Record, parse_records
from tbpo_ray.data.rejection_reasons import COUNT_PREFIX, RecordError
from tbpo_ray.data.shards import TIE_COLUMN, file_digest, write_shard
from tbpo_ray.data.sources import Chunk
from tbpo_ray.data.tokenize import PairTokenizer, TokenizedPair, TokenizerSpec
from tbpo_ray.storage.json_lines import dumps

JOB, TOKENIZER = "job.json", "tokenizer.json"


@dataclass(frozen=True)
class BuildJob:
    """The settings of one build, stored in its folder."""

    files: list[tuple[str, str]]
    """Address and format of each file."""
    weights: list[float]
    """How many copies of each record to take, by file; fractions are sampled."""
    seed: int
    max_length: int
    prompt_limit: int
    card_column: str | None
    limit: int | None
    chunk_rows: int
    format: str = "auto"
    pairing: str = "best_worst"
    pairing_gap: float = 0.0
    keep_ties: bool = False
    swap_answers: bool = False
    share: tuple[float, float] = (0.0, 1.0)
    """Interval of the draws of the records to take."""

    @property
    def reading(self) -> ReadOptions:
        """How rows become pairs."""
        options = (self.format, self.pairing, self.pairing_gap, self.seed, self.keep_ties, self.swap_answers)
        return ReadOptions(*options)

    def save(self, folder: Path, spec: TokenizerSpec) -> None:
        (folder / JOB).write_text(json.dumps(asdict(self)), encoding="utf-8")
        (folder / TOKENIZER).write_text(spec.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class ChunkResult:
    """The outcome of preparing a chunk."""

    file: int
    first_row: int
    records: int
    pairs: int
    shard: dict[str, Any] | None
    quarantine: str | None
    counts: dict[str, int]
    column: dict[str, int]
    lengths: bytes = b""
    """Sizes of the pairs as the bytes of a [pairs, 9] int32 array, see :mod:`tbpo_ray.data.pair_sizes`."""
    hashes: bytes = b""
    """Hashes of the records, to find duplicates, as the bytes of a [pairs] uint64 array."""
    memory_bytes: int = 0
    """Private memory of the worker at the end of the chunk, while its data is still in memory."""
    cpu_seconds: float = 0.0
    process: int = 0


@dataclass
class _Columns:
    prompt_ids: list[list[int]] = field(default_factory=list)
    chosen_ids: list[list[int]] = field(default_factory=list)
    rejected_ids: list[list[int]] = field(default_factory=list)
    chosen_mask: list[list[bool] | None] = field(default_factory=list)
    rejected_mask: list[list[bool] | None] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tie: list[bool] = field(default_factory=list)

    def add(self, record: Record, pair: TokenizedPair, copies: int) -> None:
        self.prompt_ids += [pair.prompt_ids] * copies
        self.chosen_ids += [pair.chosen_ids] * copies
        self.rejected_ids += [pair.rejected_ids] * copies
        self.chosen_mask += [pair.chosen_mask] * copies
        self.rejected_mask += [pair.rejected_mask] * copies
        self.source += [record.source] * copies
        self.row += [record.row] * copies
        self.metadata += [dumps(record.metadata, default=str)] * copies
        self.tie += [record.tie] * copies

    def sizes(self) -> np.ndarray:
        """[pairs, 9] int32, see :mod:`tbpo_ray.data.pair_sizes`."""
        answers, masks = (self.chosen_ids, self.rejected_ids), (self.chosen_mask, self.rejected_mask)
        return measure_pairs(self.prompt_ids, answers, masks)


@lru_cache(maxsize=2)
def load_job(folder: str) -> BuildJob:
    """The settings of a build, read once per process."""
    return BuildJob(**json.loads((Path(folder) / JOB).read_text(encoding="utf-8")))


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> PairTokenizer:
    """The tokenizer of a build, loaded once per process."""
    # There is a worker for each core already; threads inside of them would oversubscribe the machine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    job = load_job(folder)
    spec = TokenizerSpec.from_json((Path(folder) / TOKENIZER).read_text(encoding="utf-8"))
    return PairTokenizer(spec, job.max_length, job.prompt_limit)


def process_chunk(folder: str, file: int, chunk: Chunk) -> ChunkResult:
    """Prepare one chunk and write its pairs to `part-*.parquet` and its bad records to `bad-*.jsonl`."""
    job, tokenizer = load_job(folder), load_tokenizer(folder)
    start = time.process_time()
    counts: Counter[str] = Counter()
    tokenizer.counts = counts
    records, bad, num_records = _parse(chunk, job.reading, counts)
    columns, hashes, column_values = _Columns(), [], Counter[str]()
    copies, in_share = _copies(job, file, chunk), _in_share(job, file, chunk)
    for record, pair in zip(records, tokenizer.pairs(records), strict=True):
        if isinstance(pair, RecordError):
            bad.append(_rejected_pair(record, pair))
            continue
        if not in_share[record.row - chunk.first_row]:
            counts["skipped_by_share"] += 1
            continue
        times = int(copies[record.row - chunk.first_row])
        columns.add(record, pair, times)
        hashes += [_hash(record)] * times
        counts["repeated_by_weight"] += max(times - 1, 0)
        counts["skipped_by_weight"] += times == 0
        counts["tie_pairs"] += times if record.tie else 0
        if job.card_column is not None:
            column_values[str(record.metadata.get(job.card_column))] += times
    counts.update(f"{COUNT_PREFIX}{record.reason}" for record in bad)
    return ChunkResult(
        file=file,
        first_row=chunk.first_row,
        records=num_records,
        pairs=len(columns.row),
        shard=_write_shard(folder, file, chunk, columns, with_ties=job.keep_ties),
        quarantine=_write_quarantine(folder, file, chunk, bad),
        counts={name: number for name, number in counts.items() if number},
        column=dict(column_values),
        lengths=columns.sizes().tobytes(),
        hashes=np.array(hashes, dtype=np.uint64).tobytes(),
        memory_bytes=private_bytes(),
        cpu_seconds=time.process_time() - start,
        process=os.getpid(),
    )


def _parse(
    chunk: Chunk, options: ReadOptions, counts: Counter[str]
) -> tuple[list[Record], list[BadRecord], int]:
    """The pairs of a chunk, its bad rows and the number of all its rows; counts the rows that tie."""
    records: list[Record] = []
    bad = []
    rows = 0
    for raw in chunk:
        rows += 1
        try:
            parsed = parse_records(raw.load(), raw.source, raw.row, options, counts)
            counts["ties"] += not parsed
            records += parsed
        except RecordError as error:
            bad.append(BadRecord(raw.source, raw.row, error.reason, error.detail, raw.as_read()))
    return records, bad, rows


def _rejected_pair(record: Record, error: RecordError) -> BadRecord:
    # A single turn of text is written as it usually was in the source.
    answers = {
        name: turns[0]["content"] if len(turns) == 1 and set(turns[0]) == {"role", "content"} else turns
        for name, turns in (("chosen", record.chosen), ("rejected", record.rejected))
    }
    row = {"prompt": record.prompt} | answers | record.metadata
    return BadRecord(record.source, record.row, error.reason, error.detail, row)


def _copies(job: BuildJob, file: int, chunk: Chunk) -> np.ndarray:
    """The number of copies of each row of the chunk, `weight` on average: [rows] int."""
    weight = job.weights[file]
    whole = int(weight)
    if weight == whole:
        return np.full(chunk.rows, whole)
    # Seeded by the position of the chunk, so that the sample does not depend on the order of the tasks.
    draws = np.random.default_rng([job.seed, file, chunk.first_row]).random(chunk.rows)
    return whole + (draws < weight - whole)


def _in_share(job: BuildJob, file: int, chunk: Chunk) -> np.ndarray:
    """Whether each row of the chunk is in `data.share`: [rows] bool."""
    low, high = job.share
    # A stream of its own: the weights of a source must not change which rows a share takes.
    draws = np.random.default_rng([job.seed, file, chunk.first_row, 1]).random(chunk.rows)
    return (low <= draws) & (draws < high)


def _hash(record: Record) -> int:
    text = json.dumps([record.prompt, record.chosen, record.rejected, record.tools], default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _write_shard(
    folder: str, file: int, chunk: Chunk, columns: _Columns, *, with_ties: bool
) -> dict[str, Any] | None:
    if not columns.row:
        return None
    path = Path(folder) / f"part-{file:05d}-{chunk.first_row:012d}.parquet"
    # Without ties the shards are those that earlier versions wrote, and are shared with them.
    write_shard(path, {k: v for k, v in columns.__dict__.items() if with_ties or k != TIE_COLUMN})
    size = path.stat().st_size
    return {"file": path.name, "pairs": len(columns.row), "bytes": size, "sha256": file_digest(path)}


def _write_quarantine(folder: str, file: int, chunk: Chunk, bad: list[BadRecord]) -> str | None:
    if not bad:
        return None
    path = Path(folder) / f"bad-{file:05d}-{chunk.first_row:012d}.jsonl"
    lines = [item.to_json() + "\n" for item in sorted(bad, key=lambda item: item.row)]
    path.write_text("".join(lines), encoding="utf-8")
    return path.name


def private_bytes() -> int:
    """Memory of this process without shared pages, such as those of the object store."""
    import psutil

    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))
