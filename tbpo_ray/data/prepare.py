"""Prepare a source: a Ray Data pipeline from raw rows to tokenized Parquet shards, built once.

The folder is named by a fingerprint of everything that decides about its content. Whoever finds it whole uses
it; whoever does not builds in a folder of its own and renames it at the end, so a crash leaves nothing that
looks whole, and of two builders the first wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.config.schema import DataConfig, Sources
from tbpo_ray.data.ray_data import run_chunks
from tbpo_ray.data.shard_writer import JOB, TOKENIZER, BuildJob, ChunkResult, process_chunk
from tbpo_ray.data.shards import LENGTHS, MANIFEST, QUARANTINE, Prepared
from tbpo_ray.data.sources import ROWS_PER_CHUNK, SourceFile, iter_chunks, resolve
from tbpo_ray.data.tokenize import TokenizerSpec
from tbpo_ray.errors import InputError

CODE_VERSION = 1
"""Raise it when the same input would give other pairs, so that old shards are built again."""
_STALE_SECONDS = 24 * 3600
"""After so long without a new shard a build folder is left over from a killed process."""


def prepare(
    source: Sources,
    data: DataConfig,
    tokenizer_path: str,
    *,
    role: str = "train",
    cache_dir: str | Path,
    chat_template: str | None = None,
    max_pairs: int | None = None,
    progress: bool = True,
    seed: int = 0,
    distributed: bool | None = None,
    labels: Mapping[str, str] | None = None,
    before_build: Callable[[], None] = lambda: None,
) -> Prepared:
    """Tokenized pairs of a source, from the cache or built now.

    Args:
        source: one source, or several with weights (2 takes every record twice, 0.5 a seeded half).
        data: lengths, quarantine limit, card column.
        tokenizer_path: folder or hub name.
        role: which data this is, for messages: `train`, `eval`, `sft` ...
        cache_dir: where `pairs-<fingerprint>/` lies; shared by all nodes.
        chat_template: Jinja file instead of the tokenizer's own, or `none`.
        max_pairs: read only this many records, the first ones; default `data.max_pairs`, and
            `data.max_eval_pairs` for role `eval`.
        progress: tell on stderr how far it is.
        seed: of the sampling that fractional weights need.
        distributed: through Ray Data; by default where Ray is running.
        labels: that the nodes of a distributed build must carry.
        before_build: called when the pairs are not there yet; may wait for nodes.

    Raises:
        InputError: a source that is missing, empty or unreadable, or more bad records than
            `data.quarantine_limit` allows.
    """
    key = f"data.{role}" if role in ("train", "eval") else f"data.train ({role})"
    limit = max_pairs or (data.max_eval_pairs if role == "eval" else data.max_pairs)
    files, weights = find_sources(source, key)
    spec = TokenizerSpec.load(tokenizer_path, chat_template)
    inputs = {
        "code_version": CODE_VERSION,
        "sources": [
            {"address": file.address, "format": file.format, "digest": file.digest(), "weight": weight}
            for file, weight in zip(files, weights, strict=True)
        ],
        "tokenizer": spec.digest,
        "max_length": data.max_length,
        "prompt_limit": data.prompt_limit,
        "limit": limit,
        "seed": seed if any(weight != int(weight) for weight in weights) else 0,
        "card_column": data.card_column,
    }
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir).absolute() / f"pairs-{fingerprint}"
    prepared = _existing(folder)
    if prepared is None:
        job = BuildJob(
            files=[(file.address, file.format) for file in files],
            weights=weights,
            seed=seed,
            max_length=data.max_length,
            prompt_limit=data.prompt_limit,
            card_column=data.card_column,
            limit=limit,
            chunk_rows=ROWS_PER_CHUNK,
        )
        before_build()
        run = bind(_run, job, distributed=distributed, labels=labels)
        prepared = _build(job, run, spec, folder, fingerprint, inputs, key, data.quarantine_limit, progress)
    _check_share(prepared.records, prepared.counts, data.quarantine_limit, key, prepared.quarantine_file)
    return prepared


def find_sources(source: Sources, key: str = "data.train") -> tuple[list[SourceFile], list[float]]:
    """The files behind a configuration's sources, and each file's weight; cheap, and needs no Ray.

    Raises:
        InputError: one sentence for each source that is not there, or of no known format.
    """
    mix = [(source, 1.0)] if isinstance(source, str) else [(item.source, item.weight) for item in source]
    if not mix:
        raise InputError(f"{key}: the list of sources is empty")
    faults, files, weights = [], [], []
    for name, weight in mix:
        try:
            found = resolve(name)
        except InputError as error:
            faults += [f"{key}: {fault}" for fault in error.faults]
            continue
        files += found
        weights += [weight] * len(found)
    if faults:
        raise InputError(*faults)
    return files, weights


def _existing(folder: Path) -> Prepared | None:
    """The prepared folder if it is whole; a damaged one is put out of the way."""
    if not folder.is_dir():
        return None
    try:
        return Prepared.load(folder)
    except InputError:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-damaged-", dir=folder.parent))
        os.rename(folder, aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        return None


def _build(
    job: BuildJob,
    run: Callable[[Path], Iterator[ChunkResult]],
    spec: TokenizerSpec,
    folder: Path,
    fingerprint: str,
    inputs: dict[str, Any],
    key: str,
    quarantine_limit: float,
    progress: bool,
) -> Prepared:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        job.save(partial, spec)
        results = sorted(_watched(run(partial), key, progress), key=lambda r: (r.file, r.first_row))
        counts, records = _finish(partial, results)
        aside = folder.parent / f"quarantine-{fingerprint}.jsonl"
        if not records:
            names = ", ".join(address for address, _ in job.files)
            raise InputError(f"{key}={names}: it is empty; a preference source has at least one row")
        try:
            _check_share(records, counts, quarantine_limit, key, aside)
        except InputError:
            os.replace(partial / QUARANTINE, aside)
            raise
        _write_manifest(partial, results, counts, records, fingerprint, inputs)
        (partial / JOB).unlink()
        (partial / TOKENIZER).unlink()
        os.rename(partial, folder)
    except OSError:
        # A rename onto a folder that another builder has finished meanwhile fails: use that one.
        if not (folder / MANIFEST).is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared.load(folder)


def _run(
    job: BuildJob, partial: Path, *, distributed: bool | None, labels: Mapping[str, str] | None
) -> Iterator[ChunkResult]:
    if distributed is None:
        ray = sys.modules.get("ray")
        distributed = ray is not None and ray.is_initialized()
    if distributed:
        yield from run_chunks(job, str(partial), labels)
        return
    left = job.limit
    for index, (address, kind) in enumerate(job.files):
        for chunk in iter_chunks(SourceFile(address, kind), job.chunk_rows, left):
            yield process_chunk(str(partial), index, chunk)
            left = None if left is None else left - chunk.rows
        if left == 0:
            return


def _watched(results: Iterable[ChunkResult], key: str, progress: bool) -> Iterator[ChunkResult]:
    """Pass the results on and tell on stderr how far it is, every few seconds."""
    start = told = time.monotonic()
    records = bad = 0
    for result in results:
        records += result.records
        bad += sum(n for name, n in result.counts.items() if name.startswith("quarantined/"))
        now = time.monotonic()
        if progress and now - told > 3:
            told = now
            rate = records / (now - start)
            print(f"prepare {key}: {records:,} records, {bad:,} bad, {rate:,.0f} records/s", file=sys.stderr)
        yield result


def _finish(partial: Path, results: list[ChunkResult]) -> tuple[dict[str, float], int]:
    """Join the quarantine parts and add up the counts."""
    total: Counter[str] = Counter()
    with open(partial / QUARANTINE, "wb") as out:
        for result in results:
            total.update(result.counts)
            if result.quarantine:
                part = partial / result.quarantine
                out.write(part.read_bytes())
                part.unlink()
    records = sum(result.records for result in results)
    lengths = _lengths(results)
    np.save(partial / LENGTHS, lengths)
    hashes = np.concatenate(
        [np.frombuffer(r.hashes, dtype=np.uint64) for r in results] or [np.empty(0, dtype=np.uint64)]
    )
    quarantined = sum(number for name, number in total.items() if name.startswith("quarantined/"))
    if not quarantined:
        (partial / QUARANTINE).unlink()
    prompt, chosen, rejected = (int(number) for number in lengths.sum(axis=0, dtype=np.int64))
    counts: dict[str, float] = {
        "records": records,
        "pairs": len(lengths),
        "quarantined": quarantined,
        "prompt_tokens": prompt,
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "dead_tail_tokens": int(np.abs(lengths[:, 1] - lengths[:, 2]).sum(dtype=np.int64)),
        "duplicate_pairs": len(hashes) - len(np.unique(hashes)) - total["repeated_by_weight"],
        **{name: number for name, number in sorted(total.items())},
    }
    return counts, records


def _lengths(results: list[ChunkResult]) -> np.ndarray:
    parts = [np.frombuffer(result.lengths, dtype=np.int32).reshape(-1, 3) for result in results]
    return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.int32)


def _write_manifest(
    partial: Path,
    results: list[ChunkResult],
    counts: dict[str, float],
    records: int,
    fingerprint: str,
    inputs: dict[str, Any],
) -> None:
    column: Counter[str] = Counter()
    for result in results:
        column.update(result.column)
    manifest = {
        "fingerprint": fingerprint,
        "pairs": counts["pairs"],
        "records": records,
        "shards": [result.shard for result in results if result.shard],
        "counts": counts,
        "column": dict(column.most_common()),
        "inputs": inputs,
        "build": {
            "peak_worker_bytes": max(result.memory_bytes for result in results),
            "cpu_seconds": sum(result.cpu_seconds for result in results),
            "workers": len({result.process for result in results}),
        },
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _check_share(
    records: int, counts: dict[str, float], limit: float, key: str, quarantine: Path | None
) -> None:
    """Stop when too many records are bad, or nothing is left.

    Raises:
        InputError: with the count of every reason.
    """
    bad = int(counts["quarantined"])
    reasons = ", ".join(
        f"{name.removeprefix('quarantined/')} {int(number):,}"
        for name, number in sorted(counts.items(), key=lambda item: -item[1])
        if name.startswith("quarantined/")
    )
    where = f"; see {quarantine}" if quarantine else ""
    if bad == records:
        raise InputError(f"{key}: none of its {records:,} records is a preference pair ({reasons}){where}")
    if bad > limit * records:
        raise InputError(
            f"{key}: {bad:,} of {records:,} records ({bad / records:.1%}) are no preference pairs "
            f"({reasons}), more than data.quarantine_limit={limit} allows{where}"
        )
    if not counts["pairs"]:
        raise InputError(f"{key}: its weights leave no pair; make them larger")
