import csv
import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from tbpo_ray.data import sources
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import iter_records
from tbpo_ray.data.sources import iter_chunks, iter_raw, resolve_source
from tbpo_ray.errors import InputError

from .conftest import pair

ROWS = [pair(i, language="de") for i in range(25)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(folder, kind):
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_bytes(LINES)
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(LINES))
    elif kind == "jsonl.zst":
        file.write_bytes(zstandard.compress(LINES))
    elif kind == "json":
        file.write_text(json.dumps(ROWS))
    elif kind == "csv":
        with open(file, "w", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=7)
    elif kind == "feather":
        pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(file))
    else:
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return str(file)


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "feather", "arrow"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows_in_order(tmp_path, kind):
    source = write(tmp_path, kind)
    records = list(iter_records(source))
    assert [r.row for r in records] == list(range(25))
    assert [
        (r.prompt[0]["content"], answer_text(r.chosen), answer_text(r.rejected), r.metadata) for r in records
    ] == [(row["prompt"], row["chosen"], row["rejected"], {"language": "de"}) for row in ROWS]
    assert len(list(iter_raw(source, 9))) == 9
    sizes = [chunk.rows for chunk in iter_chunks(resolve_source(source)[0], rows=4, limit=10)]
    assert sum(sizes) == 10 and max(sizes) <= 4


def test_long_lines_make_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BYTES_PER_CHUNK", 200)
    chunks = list(iter_chunks(resolve_source(write(tmp_path, "jsonl"))[0]))
    assert [chunk.first_row for chunk in chunks] == [3 * i for i in range(9)]
    assert [raw.row for chunk in chunks for raw in chunk] == list(range(25))


def test_folders_globs_and_remote_addresses(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "README.md").write_text("no data")
    for hidden in (".ipynb_checkpoints/a-checkpoint.jsonl", "sub/._c.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(LINES)
    assert [f.address.rsplit("/", 1)[1] for f in resolve_source(str(tmp_path))] == [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
    ]
    assert len(resolve_source(str(tmp_path / "*.jsonl"))) == 2
    with fsspec.open("memory://bucket/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(LINES))
    assert len(list(iter_records("memory://bucket/*.jsonl.gz"))) == 25
    digest = resolve_source("memory://bucket/rows.jsonl.gz")[0].digest()
    with fsspec.open("memory://bucket/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(LINES[: len(LINES) // 2]))
    assert resolve_source("memory://bucket/rows.jsonl.gz")[0].digest() != digest


def test_a_folder_saved_by_hugging_face(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        table = pa.Table.from_pylist(ROWS)
        name = "data-00000-of-00001.arrow"
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        (folder / "dataset_info.json").write_text("{}")
    assert len(list(iter_records(f"hf:{tmp_path}:test"))) == 25
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat", "parquet")
    (tmp_path / "flat" / "rows.parquet").rename(tmp_path / "flat" / "train-00000-of-00001.parquet")
    assert len(list(iter_records(f"hf:{tmp_path / 'flat'}:train"))) == 25
    with pytest.raises(InputError, match="no split 'dev'"):
        resolve_source(f"hf:{tmp_path / 'flat'}:dev")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "is empty"),
        ("rows.txt", LINES, "unknown format"),
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:60], "cannot be read"),
        ("noise.parquet", b"PAR1 noise", "cannot be read"),
        ("noise.arrow", b"noise", "cannot be read"),
        ("noise.jsonl.zst", b"noise", "cannot be read"),
        ("noise.json", b"[{]", "cannot be read"),
    ],
)
def test_unreadable_files_are_a_clear_error(tmp_path, name, content, says):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        list(iter_raw(str(file)))
    assert name in str(caught.value)


def test_other_invalid_sources():
    for source, says in [
        ("builtin:other", "no such builtin"),
        ("hf:", "hf:NAME"),
        ("xyz://a/b.jsonl", "reached"),
    ]:
        with pytest.raises(InputError, match=says):
            resolve_source(source)
