"""Prepared pairs on disk: Parquet shards in a folder named by what went into them, and their manifest.

Columns: `prompt_ids chosen_ids rejected_ids` list<int32>, `source` string, `row` int64, `metadata` JSON text.
A pair's id is its position over all shards in the manifest's order, which is the order of the sources. The
manifest is written last and the folder appears by one rename: a folder that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.errors import InputError

MANIFEST, LENGTHS, QUARANTINE = "manifest.json", "lengths.npy", "quarantine.jsonl"
ROWS_PER_GROUP = 64
"""Rows of a Parquet row group: the least that a random read decodes. Files joined to the shards do well to
use the same."""
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Prepared:
    """Prepared pairs, whole and readable.

    `counts` holds numbers by name, ready for a tracker; `shards` file names with their number of pairs.
    """

    path: str
    fingerprint: str
    pairs: int
    shards: tuple[tuple[str, int], ...]
    records: int
    counts: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the fingerprint covers: sources with digests, tokenizer, template, lengths, code version."""

    column: dict[str, int] = field(default_factory=dict)
    """Pairs by value of `data.card_column`, the most frequent first."""

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Prepared:
        """Read a prepared folder; `verify` also reads every shard and compares its digest.

        Raises:
            InputError: when the folder is not whole.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: no prepared pairs in it ({error})") from error
        for shard in manifest["shards"]:
            file = folder / shard["file"]
            whole = file.is_file() and file.stat().st_size == shard["bytes"]
            if not whole or (verify and file_digest(file) != shard["sha256"]):
                raise InputError(
                    f"{file}: missing or damaged; delete the folder {folder}, it will be built again"
                )
        return cls(
            path=str(folder.absolute()),
            fingerprint=manifest["fingerprint"],
            pairs=manifest["pairs"],
            shards=tuple((shard["file"], shard["pairs"]) for shard in manifest["shards"]),
            records=manifest["records"],
            counts=manifest["counts"],
            inputs=manifest["inputs"],
            column=manifest["column"],
        )

    @property
    def quarantined(self) -> int:
        return int(self.counts["quarantined"])

    @property
    def quarantine_file(self) -> Path | None:
        """JSON lines `{source, row, reason, detail, record}`; None when every record was a pair."""
        file = Path(self.path) / QUARANTINE
        return file if file.is_file() else None

    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected of every pair: [N, 3] int32, mapped from disk."""
        return np.load(Path(self.path) / LENGTHS, mmap_mode="r", allow_pickle=False)

    def starts(self) -> np.ndarray:
        """Id of each shard's first pair, and the number of pairs last: [shards + 1] int64."""
        return np.cumsum([0, *(pairs for _, pairs in self.shards)], dtype=np.int64)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Every pair in order, as Python values; `metadata` is decoded."""
        import pyarrow.parquet as pq

        for name, _ in self.shards:
            file = pq.ParquetFile(Path(self.path) / name)
            for batch in file.iter_batches(
                batch_size=ROWS_PER_GROUP, columns=list(columns) if columns else None
            ):
                for row in batch.to_pylist():
                    if "metadata" in row:
                        row["metadata"] = json.loads(row["metadata"])
                    yield row


def write_shard(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write one Parquet shard of the columns above."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokens = pa.list_(pa.int32())
    types = {"source": pa.string(), "row": pa.int64(), "metadata": pa.string()}
    table = pa.table({name: pa.array(values, types.get(name, tokens)) for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="lz4", use_dictionary=["source"])


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
