"""Prepared pairs on disk: Parquet shards and their manifest in a folder named by a fingerprint of its inputs.

The columns are `prompt_ids chosen_ids rejected_ids` list<int32>, `chosen_mask rejected_mask` list<bool>
(False at tokens that are context only; null if every token is trained), `source` string, `row` int64,
`metadata` JSON text and, where ties are kept, `tie` bool. The id of a pair is its position over all shards
in the order of the manifest, which is the order of the sources. The folder appears by one rename after
everything in it is written, so that it is complete whenever it exists.
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
"""Rows of a Parquet row group, the smallest unit that a random read decodes. Files that are joined to the
shards should use the same number."""
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
TIE_COLUMN = "tie"


@dataclass(frozen=True)
class PreparedPairs:
    """A complete folder of prepared pairs."""

    path: str
    fingerprint: str
    pairs: int
    shards: tuple[tuple[str, int], ...]
    """File name and number of pairs of each shard."""
    records: int
    """Number of records in the sources, including quarantined ones."""
    counts: dict[str, float] = field(default_factory=dict)
    """Statistics by name, ready to be logged."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Everything that the fingerprint covers: sources with digests, tokenizer, lengths, code version."""
    column: dict[str, int] = field(default_factory=dict)
    """Pairs by value of `data.card_column`, the most frequent first."""

    @classmethod
    def load(cls, path: str | Path, *, check_files: bool = False, verify: bool = False) -> PreparedPairs:
        """Open a prepared folder; by default only its manifest is read.

        Args:
            check_files: also look for every shard and compare its size. The driver does so once, and not each
                of the processes that read the pairs.
            verify: also compare the digest of every shard.

        Raises:
            InputError: when the folder is incomplete or damaged.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: contains no prepared pairs ({error})") from error
        for shard in manifest["shards"] if check_files or verify else ():
            file = folder / shard["file"]
            intact = file.is_file() and file.stat().st_size == shard["bytes"]
            if not intact or (verify and file_digest(file) != shard["sha256"]):
                raise InputError(f"{file}: missing or damaged; delete the folder {folder} to rebuild it")
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
    def mask_columns(self) -> tuple[str, ...]:
        """The mask columns, if there is a pair with tokens that are context only."""
        return MASK_COLUMNS if self.counts.get("masked_answers") else ()

    @property
    def tie_columns(self) -> tuple[str, ...]:
        """The column `tie`, if there is a pair in which neither answer is better."""
        return (TIE_COLUMN,) if self.counts.get("tie_pairs") else ()

    @property
    def quarantine_file(self) -> Path | None:
        """JSON lines `{source, row, reason, detail, record}`; None if there are no quarantined records."""
        file = Path(self.path) / QUARANTINE
        return file if file.is_file() else None

    def lengths(self) -> np.ndarray:
        """Sizes of every pair, first the tokens of prompt, chosen and rejected: [N, 3 or 9] int32, mapped.

        See :mod:`tbpo_ray.data.pair_sizes` for the other columns, of pairs with tokens that are context only.
        """
        lengths: np.ndarray = np.load(Path(self.path) / LENGTHS, mmap_mode="r", allow_pickle=False)
        return lengths

    def starts(self) -> np.ndarray:
        """The id of the first pair of each shard, followed by the number of pairs: [shards + 1] int64."""
        return np.cumsum([0, *(pairs for _, pairs in self.shards)], dtype=np.int64)

    def largest_token_id(self) -> int:
        """The largest token id of all pairs, from the statistics in the footers of the Parquet files."""
        import pyarrow.parquet as pq

        largest = 0
        for name, _ in self.shards:
            footer = pq.read_metadata(Path(self.path) / name)
            for group in range(footer.num_row_groups):
                for index in range(footer.num_columns):
                    column = footer.row_group(group).column(index)
                    if column.path_in_schema.split(".")[0] in TOKEN_COLUMNS and column.is_stats_set:
                        largest = max(largest, column.statistics.max or 0)
        return largest

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All pairs in order as Python values, with `metadata` decoded."""
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
    """Write one Parquet shard with the columns that the module describes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokens = pa.list_(pa.int32())
    types = {"source": pa.string(), "row": pa.int64(), "metadata": pa.string(), TIE_COLUMN: pa.bool_()}
    types |= dict.fromkeys(MASK_COLUMNS, pa.list_(pa.bool_()))
    table = pa.table({name: pa.array(values, types.get(name, tokens)) for name, values in columns.items()})
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="lz4", use_dictionary=["source"])


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
