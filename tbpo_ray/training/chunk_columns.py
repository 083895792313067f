"""The chunk of each answer token, for `arc_bpo`, stored next to the prepared pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tbpo_ray.config.objective_options import ChunksConfig
from tbpo_ray.data.chunks import chunk_ids, token_texts
from tbpo_ray.data.shards import MASK_COLUMNS, ROWS_PER_GROUP, PreparedPairs
from tbpo_ray.models.load import load_tokenizer
from tbpo_ray.training.joined_columns import folder_name, joined_columns
from tbpo_ray.training.run_plan import RunPlan

VERSION = 1
SIDES = ("chosen", "rejected")


def chunk_columns(plan: RunPlan, prepared: PreparedPairs, model: str) -> Path:
    """Cut the answers of the prepared pairs into chunks, or find them in the cache.

    Args:
        model: folder of the policy, whose tokenizer the pairs were prepared with.

    Returns:
        A folder of Parquet files with the names and rows of the prepared shards and the columns
        `chosen_chunks` and `rejected_chunks` (list<int32>, one number per trained token, from 0).
    """
    settings = plan.config.objective.chunks
    identity = {"version": VERSION, "chunks": settings.model_dump()}
    folder = plan.cache_dir / folder_name("chunks", prepared, **identity)

    def batches(file: Path) -> Iterator[list[list[np.ndarray]]]:
        texts = token_texts(load_tokenizer(model))
        return _chunks(file, settings, texts)

    return joined_columns(folder, prepared, {f"{side}_chunks": pa.int32() for side in SIDES}, batches)


def _chunks(
    file: Path, settings: ChunksConfig, texts: Callable[[Sequence[int]], list[str]]
) -> Iterator[list[list[np.ndarray]]]:
    wanted = (*(f"{side}_ids" for side in SIDES), *MASK_COLUMNS)
    present = set(pq.read_schema(file).names)
    names = [name for name in wanted if name in present]
    for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_GROUP, columns=names):
        rows = batch.to_pylist()
        yield [
            [
                chunk_ids(texts(_trained(row[f"{side}_ids"], row.get(f"{side}_mask"))), settings)
                for row in rows
            ]
            for side in SIDES
        ]


def _trained(ids: list[int], mask: list[bool] | None) -> list[int]:
    """The tokens that are not context only."""
    return [token for token, trained in zip(ids, mask, strict=True) if trained] if mask else ids
