"""Prompts that go into the pool and samples that come out, as Parquet parts with a manifest."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the policy sees it: token ids from the very code that training uses."""

    id: str
    """Unique among the prompts of a call."""
    token_ids: list[int]
    """BOS and the opening of the assistant's turn included."""
    text: str
    """For people to read; the engine gets the token ids."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Travels along: what a checker needs and what results are sliced by. Must be JSON."""


@dataclass(frozen=True)
class Sample:
    """One row of the Parquet parts."""

    prompt_id: str
    sample: int
    """0-based number among the samples of its prompt."""
    prompt_text: str
    prompt_token_ids: list[int]
    answer: str
    """Decoded without special tokens."""
    token_ids: list[int]
    """Sampled tokens, the closing EOS included."""
    logprobs: list[float]
    """log pi of each sampled token, in nats, before temperature and nucleus."""
    finish_reason: str
    """`stop` (EOS or a stop word), `length`, or `error`."""
    metadata: dict[str, Any]
    error: str
    """Empty, or why the engine gave no answer."""


class Samples:
    """The samples in a folder, failed prompts included."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        """`fingerprint rows failed tokens seconds tokens_per_second complete` and what was asked for."""

    def table(self) -> pa.Table:
        """All rows as an Arrow table, ordered by `index`; `metadata` is JSON text."""
        return read_parts(self.folder)

    def __iter__(self) -> Iterator[Sample]:
        table = self.table().drop_columns(["index"])
        for row in table.to_pylist():
            yield Sample(**(row | {"metadata": json.loads(row["metadata"])}))

    def answered(self) -> list[Sample]:
        """The samples without the failed ones."""
        return [sample for sample in self if not sample.error]

    def by_prompt(self) -> dict[str, list[Sample]]:
        """Prompt id to its answered samples, in order; prompts of which all failed are left out."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.answered():
            groups.setdefault(sample.prompt_id, []).append(sample)
        return groups


def schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("index", pa.int64()),
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("prompt_text", pa.string()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("answer", pa.string()),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("finish_reason", pa.string()),
            ("metadata", pa.string()),
            ("error", pa.string()),
        ]
    )


def write_part(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one block of rows; the part appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema())
    partial = folder / f".{uuid.uuid4().hex}.tmp"
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, folder / f"part-{min(row['index'] for row in rows):08d}-{len(rows)}.parquet")


def read_parts(folder: Path) -> pa.Table:
    """All parts of a folder, ordered by `index`, each index once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        return schema().empty_table()
    table = pa.concat_tables([pq.read_table(part, schema=schema()) for part in parts]).sort_by("index")
    index = table["index"].to_numpy()
    return table.filter(pa.array([True, *(index[1:] != index[:-1]).tolist()]))


def done_indices(folder: Path) -> set[int]:
    """Which rows a folder holds already."""
    import pyarrow.parquet as pq

    parts = folder.glob("part-*.parquet")
    return {i for part in parts for i in pq.read_table(part, columns=["index"])["index"].to_pylist()}


def open_folder(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The manifest of a folder that holds nothing yet, or samples with the same fingerprint.

    Raises:
        InputError: the folder holds samples of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MANIFEST
    if file.is_file():
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest.get("fingerprint") != fingerprint:
            raise InputError(
                f"{folder}: holds samples of another model, other prompts or settings; name another folder"
            )
        return manifest
    if any(folder.glob("part-*.parquet")):
        raise InputError(f"{folder}: holds Parquet parts without {MANIFEST}; name another folder")
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    return {"fingerprint": fingerprint, "complete": False}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    partial = folder / f".{MANIFEST}.tmp"
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)
