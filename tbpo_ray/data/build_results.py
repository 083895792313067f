"""Combine the results of all chunks of a build: lengths, quarantine file, statistics and manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.data.pair_sizes import ALL_COUNTS, TOKEN_COUNTS, compact, trained_tokens
from tbpo_ray.data.rejection_reasons import rejection_counts
from tbpo_ray.data.shard_writer import ChunkResult
from tbpo_ray.data.shards import LENGTHS, MANIFEST, QUARANTINE


def merge_results(folder: Path, results: Sequence[ChunkResult]) -> dict[str, float]:
    """Write the lengths and the quarantine file of a build, and return its statistics by name.

    Args:
        folder: the build folder, with the quarantine files of the chunks.
        results: in the order of the sources.
    """
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.counts)
    _merge_quarantine(folder, results)
    chunks = [np.frombuffer(result.lengths, np.int32).reshape(-1, ALL_COUNTS) for result in results]
    lengths = np.concatenate([np.zeros((0, ALL_COUNTS), np.int32), *chunks])
    np.save(folder / LENGTHS, compact(lengths))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(np.frombuffer(r.hashes, np.uint64) for r in results)])
    prompt, chosen, rejected = lengths[:, :TOKEN_COUNTS].sum(axis=0, dtype=np.int64).tolist()
    trained = trained_tokens(lengths).astype(np.int64)
    context = dict(zip(("chosen", "rejected"), (chosen, rejected) - trained.sum(axis=0), strict=True))
    return {
        "records": sum(result.records for result in results),
        "pairs": len(lengths),
        "quarantined": sum(rejection_counts(total).values()),
        "prompt_tokens": prompt,
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        **{f"{side}_context_tokens": int(number) for side, number in context.items() if number},
        "tail_tokens": int(np.abs(trained[:, 0] - trained[:, 1]).sum()),
        # Copies that a weight asks for are not duplicates in the source.
        "duplicate_pairs": len(hashes) - len(np.unique(hashes)) - total["repeated_by_weight"],
        **dict(sorted(total.items())),
    }


def write_manifest(
    folder: Path,
    results: Sequence[ChunkResult],
    counts: Mapping[str, float],
    fingerprint: str,
    inputs: Mapping[str, Any],
) -> None:
    """Write the manifest of a build, which makes its folder readable as prepared pairs."""
    column: Counter[str] = Counter()
    for result in results:
        column.update(result.column)
    manifest = {
        "fingerprint": fingerprint,
        "pairs": counts["pairs"],
        "records": counts["records"],
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
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _merge_quarantine(folder: Path, results: Sequence[ChunkResult]) -> None:
    """Join the quarantine files of the chunks; there is no file if there are no bad records."""
    names = [result.quarantine for result in results if result.quarantine]
    if not names:
        return
    with open(folder / QUARANTINE, "wb") as out:
        for name in names:
            out.write((folder / name).read_bytes())
            (folder / name).unlink()
