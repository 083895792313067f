"""The pool's input and output: prompts, and samples as Parquet parts with a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.errors import InputError
from tbpo_ray.storage.files import atomic_file, write_atomic
from tbpo_ray.storage.json_lines import read_object

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
_REMEDY = "restore it, or remove the folder, whose answers are then sampled again"


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as token ids, encoded by the same code as in training."""

    id: str
    """Unique among the prompts of a call."""
    token_ids: list[int]
    """Includes BOS and the generation prompt, which opens the assistant's message."""
    text: str
    """Readable form; the engine gets the token ids."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Copied to the samples, for checkers and for slicing the results. Must be JSON."""
    stop_ids: Sequence[int] = ()
    """Token ids that end an answer in addition to the model's own: another chat template has another end."""


@dataclass(frozen=True)
class Sample:
    """One row of the Parquet parts."""

    prompt_id: str
    sample: int
    """Number of the sample among those of its prompt, from 0."""
    prompt_text: str
    prompt_token_ids: list[int]
    answer: str
    """Decoded without special tokens."""
    token_ids: list[int]
    """Sampled tokens, including the final stop token."""
    logprobs: list[float]
    """log pi of each sampled token, in nats, before temperature and top-p are applied."""
    finish_reason: str
    """`stop` (a stop token), `length`, or `error`."""
    metadata: dict[str, Any]
    error: str
    """The engine's error if it gave no answer, otherwise empty."""


class Samples:
    """The samples in a folder, including those that failed."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_object(self.folder / MANIFEST, _REMEDY)
        """`fingerprint rows failed tokens seconds tokens_per_second complete`, and the settings."""

    def table(self) -> pa.Table:
        """Read all rows as an Arrow table, ordered by `index`; `metadata` is JSON text."""
        return read_parts(self.folder)

    def __iter__(self) -> Iterator[Sample]:
        table = self.table().drop_columns(["index"])
        for row in table.to_pylist():
            yield Sample(**(row | {"metadata": json.loads(row["metadata"])}))

    def answered(self) -> list[Sample]:
        """Return the samples that did not fail."""
        return [sample for sample in self if not sample.error]

    def by_prompt(self) -> dict[str, list[Sample]]:
        """Map prompt ids to their answered samples, in order; a prompt without any is skipped."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.answered():
            groups.setdefault(sample.prompt_id, []).append(sample)
        return groups


def schema() -> pa.Schema:
    """The Arrow schema of a Parquet part."""
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
    """Write one block of rows as an atomic Parquet part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema())
    with atomic_file(folder / f"part-{min(row['index'] for row in rows):08d}-{len(rows)}.parquet") as partial:
        pq.write_table(table, partial, compression="zstd")


def read_parts(folder: Path) -> pa.Table:
    """Read all parts of a folder, ordered by `index`, each index once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        return schema().empty_table()
    # A block that is sampled again after a crash may be cut differently, so that parts can overlap.
    table = pa.concat_tables([pq.read_table(part, schema=schema()) for part in parts]).sort_by("index")
    index = table["index"].to_numpy()
    return table.filter(pa.array([True, *(index[1:] != index[:-1]).tolist()]))


def done_indices(folder: Path) -> set[int]:
    """The indices of the rows that a folder already contains."""
    import pyarrow.parquet as pq

    parts = folder.glob("part-*.parquet")
    return {i for part in parts for i in pq.read_table(part, columns=["index"])["index"].to_pylist()}


def open_folder(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Return the manifest of a folder that is empty, or contains samples with the same fingerprint.

    Raises:
        InputError: the folder contains other samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MANIFEST
    if file.is_file():
        manifest = read_object(file, _REMEDY)
        if manifest.get("fingerprint") != fingerprint:
            raise InputError(
                f"{folder}: contains samples of another model, other prompts or settings; use another folder"
            )
        return manifest
    if any(folder.glob("part-*.parquet")):
        raise InputError(f"{folder}: contains Parquet parts without {MANIFEST}; use another folder")
    for leftover in folder.glob(".*.partial"):  # of a process that was killed while writing
        leftover.unlink()
    return {"fingerprint": fingerprint, "complete": False}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the folder's manifest."""
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))
