"""Read raw rows from files of any accepted format at any fsspec address, and from generated tasks.

A source is read in chunks of a fixed number of rows. Each chunk is small, self-contained and serialized as
plain bytes, so that one reader can feed many tokenizing workers and memory does not grow with the size of a
file. Imports neither torch nor ray.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from tbpo_ray.data import copyedit
from tbpo_ray.data.line_formats import delimited_rows, json_rows, refuse_duplicates
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.table_rows import TableRow, nested_schema
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.progress import log_progress

ROWS_PER_CHUNK, BYTES_PER_CHUNK = 1024, 16 * 2**20
"""Maximum number of rows of a chunk, and the approximate maximum of bytes if its rows are lines."""

_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_HUB_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_COMPRESSIONS = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
"""Beginnings of compressed content, and fsspec's names of its compression."""
_OTHER_CONTENT = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"SQLite": "an SQLite database",
    b"version https://": "a pointer of Git LFS",
}


@dataclass(frozen=True)
class SourceFile:
    """One file (or generated task) of a source: its fsspec address and its format."""

    address: str
    format: str

    def digest(self) -> str:
        """SHA-256 of a local file; for a remote file its metadata in the store (size, time, ETag)."""
        if self.format == "copyedit":
            return f"{self.address}|{copyedit.parse_source(self.address).describe()}"
        fs, path = _filesystem(self.address)
        if "file" not in fs.protocol:
            return f"{self.address}|{sorted((k, str(v)) for k, v in fs.info(path).items())}"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file."""

    source: str
    first_row: int
    rows: int
    kind: Literal["lines", "table", "generated"]
    payload: bytes = b""
    """Lines, an Arrow stream, or nothing for generated rows."""

    def __iter__(self) -> Iterator[RawRow]:
        schema: Any = None
        if self.kind == "generated":
            settings = copyedit.parse_source(self.source)
            values: Any = (copyedit.example(settings, self.first_row + i) for i in range(self.rows))
        elif self.kind == "table":
            import pyarrow as pa

            table = pa.ipc.open_stream(self.payload).read_all()
            values, schema = table.to_pylist(), nested_schema(table.schema)
        else:
            values = self.payload.split(b"\n")
        for index, value in enumerate(values):
            # An empty line is not a record, but it counts as a row.
            if not isinstance(value, bytes) or value.strip():
                yield RawRow(self.source, self.first_row + index, value, schema)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        double = sorted({repr(name) for name in names if names.count(name) > 1})
        raise RecordError("duplicate_keys", ", ".join(double))
    return columns


# NaN and Infinity are not JSON, although Python writes them: they stand for missing values.
_ROWS = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=lambda name: None)


@dataclass(frozen=True)
class RawRow:
    """A row as it was read: its columns, or the bytes of a JSON line."""

    source: str
    row: int
    value: dict[str, Any] | bytes
    schema: Any = None
    """The Arrow schema of a table with nested columns, whose absent fields are null in `value`."""

    def load(self) -> Any:
        """The row's columns; those of a table are a :class:`TableRow` where they are nested.

        Raises:
            RecordError: when the line is not JSON in UTF-8, or an object or map has a key twice.
        """
        if not isinstance(self.value, bytes):
            return self.value if self.schema is None else TableRow(self.value, self.schema)
        try:
            return _ROWS.decode(self.value.decode("utf-8"))
        except RecordError:
            raise
        except UnicodeDecodeError as error:
            raise RecordError("not_utf8", f"byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise RecordError("not_json", str(error)[:200]) from None

    def as_read(self) -> Any:
        """The row for the quarantine file: its columns, or the text if it cannot be parsed."""
        if not isinstance(self.value, bytes):
            return self.value
        try:
            return self.load()
        except RecordError:
            return self.value.decode("utf-8", "backslashreplace")


def resolve_source(source: str) -> list[SourceFile]:
    """The files of a source, in a fixed order.

    Raises:
        InputError: when it does not exist, cannot be reached or has an unknown format.
    """
    if source.startswith("builtin:"):
        copyedit.parse_source(source)
        return [SourceFile(source, "copyedit")]
    if not source.strip():
        # An empty path would be the working directory.
        raise InputError(f"source {source!r}: is empty; must be a path, glob, fsspec address or hf:NAME")
    if source.startswith("hf:") and not source.startswith("hf://"):
        return _resolve_hub(source)
    try:
        fs, path = _filesystem(source)
        if fs.isdir(path):
            names = _data_files(fs, path)
        elif fs.exists(path):  # literally, even if the name has glob characters
            names = [path]
        else:
            names = sorted(fs.glob(path)) if any(c in path for c in "*?[") else []
    except Exception as error:  # every store client has its own exceptions
        raise InputError(f"{source}: cannot be reached: {first_line(error)}") from error
    if not names:
        raise InputError(
            f"{source}: no such file; must be a path, glob, fsspec address, builtin:... or hf:NAME"
        )
    local = "file" in fs.protocol
    return [_source_file(name if local else fs.unstrip_protocol(name)) for name in names]


def iter_chunks(file: SourceFile, rows: int = ROWS_PER_CHUNK, limit: int | None = None) -> Iterator[Chunk]:
    """The rows of a file in order, `rows` at a time and at most `limit` in total.

    Raises:
        InputError: when the file cannot be read completely.
    """
    remaining = limit
    try:
        for chunk in _chunks(file, rows):
            if remaining is not None and chunk.rows >= remaining:
                if remaining:
                    yield _first_rows(chunk, remaining)
                return
            yield chunk
            remaining = None if remaining is None else remaining - chunk.rows
    except InputError:
        raise
    except Exception as error:  # every file reader and store client has its own exceptions
        raise InputError(f"{file.address}: cannot be read as {file.format}: {first_line(error)}") from error


def iter_raw(source: str, limit: int | None = None) -> Iterator[RawRow]:
    """The first `limit` raw rows of a source in order, read in this process.

    Raises:
        InputError: when the source cannot be read or is empty.
    """
    seen = 0
    for file in resolve_source(source):
        for chunk in iter_chunks(file, limit=None if limit is None else limit - seen):
            for raw in chunk:
                seen += 1
                yield raw
        if limit is not None and seen >= limit:
            return
    if not seen:
        raise InputError(f"{source}: is empty; a preference source must have at least one row")


def _chunks(file: SourceFile, rows: int) -> Iterator[Chunk]:
    if file.format == "copyedit":
        total = copyedit.parse_source(file.address).rows
        for start in range(0, total, rows):
            yield Chunk(file.address, start, min(rows, total - start), "generated")
    elif file.format in ("parquet", "arrow"):
        yield from _table_chunks(file, rows)
    else:
        yield from _line_chunks(file, rows)


@contextmanager
def _open_text(address: str) -> Iterator[Any]:
    """The bytes of a text file, decompressed as its name or else its content says.

    Raises:
        InputError: the content is that of another format.
    """
    import fsspec

    fs, path = _filesystem(address)
    with fs.open(path, "rb") as raw:
        start = raw.read(16)
        raw.seek(0)
        method = fsspec.utils.infer_compression(address)
        if method is None:
            kind = next((name for magic, name in _OTHER_CONTENT.items() if start.startswith(magic)), None)
            if kind is not None:
                raise InputError(f"{address}: its content is {kind}, which its name does not say")
            method = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)
            if method is not None:
                log_progress(f"{address}: its content is compressed ({method}), which its name does not say")
        if method is None:
            yield raw
            return
        if method == "zstd":
            import pyarrow as pa

            # The zstandard package takes the end of a file that was cut off for the end of its content.
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
            return
        with fsspec.compression.compr[method](raw, mode="rb") as stream:
            yield stream


def _line_chunks(file: SourceFile, rows: int) -> Iterator[Chunk]:
    with _open_text(file.address) as stream:
        if file.format == "json":
            lines = json_rows(stream, file.address)
        else:
            lines = delimited_rows(stream, file.address, tabs=file.format == "tsv")
        buffered: list[bytes] = []
        first = size = 0
        for line in lines:
            line = line.rstrip(b"\r\n")
            buffered.append(line)
            size += len(line)
            if len(buffered) == rows or size > BYTES_PER_CHUNK:
                yield Chunk(file.address, first, len(buffered), "lines", b"\n".join(buffered))
                first += len(buffered)
                buffered, size = [], 0
        if buffered:
            yield Chunk(file.address, first, len(buffered), "lines", b"\n".join(buffered))


def _table_chunks(file: SourceFile, rows: int) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = _filesystem(file.address)
    with fs.open(path, "rb") as stream:
        if file.format == "parquet":
            parquet = pq.ParquetFile(stream)
            _refuse_duplicate_fields(parquet.schema_arrow, file.address)
            batches: Any = parquet.iter_batches(batch_size=rows)
        else:
            batches = _arrow_batches(pa, stream, rows)
        first = 0
        for batch in batches:
            if not first:
                _refuse_duplicate_fields(batch.schema, file.address)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield Chunk(file.address, first, batch.num_rows, "table", sink.getvalue().to_pybytes())
            first += batch.num_rows


def _refuse_duplicate_fields(fields: Any, address: str) -> None:
    """Refuse columns, or fields of a struct column, that have the same name."""
    import pyarrow as pa

    refuse_duplicates([field.name for field in fields], address)
    for field in fields:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _refuse_duplicate_fields([kind.field(i) for i in range(kind.num_fields)], address)


def _arrow_batches(pa: Any, stream: Any, rows: int) -> Iterator[Any]:
    """Record batches of an Arrow IPC file, or of an IPC stream as written by Hugging Face `datasets`."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(stream)
        batches: Any = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        batches = pa.ipc.open_stream(stream)
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _first_rows(chunk: Chunk, rows: int) -> Chunk:
    """A chunk of the first `rows` rows."""
    if chunk.kind == "lines":
        payload = b"\n".join(chunk.payload.split(b"\n", rows)[:rows])
        return Chunk(chunk.source, chunk.first_row, rows, "lines", payload)
    if chunk.kind == "table":
        import pyarrow as pa

        table = pa.ipc.open_stream(chunk.payload).read_all().slice(0, rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return Chunk(chunk.source, chunk.first_row, rows, "table", sink.getvalue().to_pybytes())
    return Chunk(chunk.source, chunk.first_row, rows, "generated")


def _source_file(address: str) -> SourceFile:
    name = address.lower()
    compressed = name.endswith(_COMPRESSED)
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    for ending, kind in _FORMATS.items():
        if name.endswith(ending):
            if compressed and kind in ("parquet", "arrow"):
                raise InputError(f"{address}: compressed as a whole; {ending} files are compressed inside")
            return SourceFile(address, kind)
    raise InputError(
        f"{address}: unknown format; must be one of {', '.join(_FORMATS)} (text files also with "
        f"{', '.join(_COMPRESSED)})"
    )


def _data_files(fs: Any, path: str) -> list[str]:
    """The data files below a folder; in a folder saved by Hugging Face `datasets`, those in its state.

    Hidden files and those in hidden folders are copies that editors and downloads leave behind.
    """
    state = f"{path}/state.json"
    if fs.exists(state):
        with fs.open(state) as file:
            return [f"{path}/{entry['filename']}" for entry in json.load(file)["_data_files"]]
    endings = tuple(ending + compression for ending in _FORMATS for compression in ("", *_COMPRESSED))
    skip = ("dataset_info.json", "dataset_dict.json")
    found = (f for f in fs.find(path) if f.lower().endswith(endings) and not f.endswith(skip))
    return sorted(f for f in found if "/." not in f[len(path.rstrip("/")) :])


def _resolve_hub(source: str) -> list[SourceFile]:
    """`hf:NAME[:SPLIT]`: a local folder, or the Parquet conversion of a data set on the hub."""
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name:
        raise InputError(f"{source!r}: must be hf:NAME or hf:NAME:SPLIT")
    fs, path = _filesystem(name)
    if fs.isdir(path):
        below = f"{path}/{split}" if split else path
        if fs.isdir(below):
            return resolve_source(below)
        # Hub exports name their files `train-00000-of-00001.parquet`.
        names = [name for name in _data_files(fs, path) if split in Path(name).name.split(".")[0].split("-")]
        if not names:
            raise InputError(f"{source}: the folder has no split {split!r}")
        return [_source_file(name) for name in names]
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"{source!r}: neither a folder nor a hub name; must be hf:OWNER/NAME of letters, digits, '.', "
            "'_' and '-'"
        )
    # The hub converts every data set to Parquet on this branch, so that no loading script has to run.
    converted = f"hf://datasets/{name}@refs%2Fconvert%2Fparquet/default/{split or 'train'}"
    return resolve_source(f"{converted}/*.parquet")


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    # A name may look like two fsspec addresses that are joined by `::`.
    joined = "://" in address or address.partition("::")[0] in fsspec.available_protocols()
    if os.path.exists(address) or ("::" in address and not joined):
        return fsspec.filesystem("file"), os.path.abspath(address)
    return _remote(address)


@lru_cache(maxsize=256)
def _remote(address: str) -> tuple[Any, str]:
    import fsspec

    fs, path = fsspec.core.url_to_fs(address)
    return fs, path
