"""Layout faults of files are found: rows in equal rows out, or a refusal that names the file and the line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tbpo_ray.data.records import BadRecord, iter_records
from tbpo_ray.data.sources import iter_raw, resolve_source
from tbpo_ray.errors import InputError

ROWS = [{"prompt": f"copy : {c}", "chosen": c, "rejected": "blue"} for c in ("red", "green", "Ä\u2028ß")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
BOM = "\ufeff"
PACK = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": zstandard.compress}  # fmt: skip


@pytest.fixture(params=PACK, ids=lambda ending: ending or "plain")
def packed(request, tmp_path):
    """Write a text file, plain and in every compression."""

    def write(name, text):
        file = tmp_path / f"{name}{request.param}"
        file.write_bytes(PACK[request.param](text.encode()))
        return str(file)

    return write


def values(source):
    return [raw.load() for raw in iter_raw(source)]


def refusal(source):
    with pytest.raises(InputError) as caught:
        values(source)
    assert len(caught.value.faults) == 1 and source.rsplit("/", 1)[1] in caught.value.faults[0]
    return caught.value.faults[0]


PRETTY = json.dumps(ROWS, indent=2)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        BOM + LINES,
        "\n \n" + LINES,
        LINES.replace("\n", "\r\n"),
        LINES.rstrip("\n"),
        PRETTY,
        BOM + PRETTY,
        "\n\n" + PRETTY,
        BOM + "\r\n\r\n" + PRETTY.replace("\n", "\r\n") + "\r\n",
        json.dumps(ROWS),
        json.dumps(ROWS) + "\n\n",
        "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    ],
)
def test_json_arrays_and_lines_under_every_name(packed, name, text):
    assert values(packed(name, text)) == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PRETTY[:-2], ["JSON array", "line 16"]),
        (PRETTY.replace("},", "}", 1), ["line 7", "','"]),
        ('[{"prompt": "a"},\n]', ["line 2", "comma"]),
        (PRETTY + "\n[]", ["line 18", "follows the array"]),
        (json.dumps({"data": ROWS}), ["'data'", "array"]),
        (json.dumps({"version": 1, "data": ROWS}, indent=1), ["'data'", "array"]),
        (json.dumps(ROWS[0], indent=1), ["line 5", "one object per line"]),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), ["one object per line"]),
    ],
)
def test_other_json_layouts_are_refused(packed, name, text, words):
    said = refusal(packed(name, text))
    assert all(word in said for word in words), said


def test_rows_that_are_arrays_or_broken_stay_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('["a", "b"]\n' + LINES)
    assert values(str(tmp_path / "a.jsonl"))[1:] == ROWS
    for broken in ('{"prompt": "cut', '{"prompt":', "{", "nonsense", '{"data": 1}'):
        (tmp_path / "b.jsonl").write_text(f"{broken}\n{LINES}")
        assert len(list(iter_raw(str(tmp_path / "b.jsonl")))) == 4
        assert len(list(iter_records(str(tmp_path / "b.jsonl"), on_bad=lambda bad: None))) == 3


def test_keys_that_occur_twice_and_numbers_that_are_not_json(tmp_path):
    lines = [
        '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}',
        '{"prompt": "p", "chosen": [{"role": "user", "content": "p"}, '
        '{"role": "assistant", "content": "a", "content": "b"}], "rejected": "c"}',
        '{"prompt": "p", "chosen": NaN, "rejected": "c"}',
        '{"prompt": "p", "chosen": "a", "rejected": "c", "score": NaN, "other": [-Infinity]}',
    ]
    for name, text in (("a.jsonl", "\n".join(lines)), ("a.json", "[" + ",\n".join(lines) + "]")):
        bad: list[BadRecord] = []
        (tmp_path / name).write_text(text)
        good = list(iter_records(str(tmp_path / name), on_bad=bad.append))
        assert [(b.row, b.reason) for b in bad] == [
            (0, "duplicate_keys"), (1, "duplicate_keys"), (2, "chosen_missing"),
        ]  # fmt: skip
        assert "'chosen'" in bad[0].detail and lines[0] == bad[0].record
        assert [record.metadata for record in good] == [{"score": None, "other": [None]}]


HEAD = "prompt,chosen,rejected\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + 'a,"red\nblue, ""x""",c\n', [["a", 'red\nblue, "x"', "c"]]),
        (HEAD + "a,b,c", [["a", "b", "c"]]),
        (HEAD + "a,b,c\n\n  \n\nd,e,f\n", [["a", "b", "c"], ["d", "e", "f"]]),
        ((HEAD + 'a,"b\nx",c\n').replace("\n", "\r\n"), [["a", "b\r\nx", "c"]]),
        ((HEAD + "a,b,c\nd,e,f\n").replace("\n", "\r"), [["a", "b", "c"], ["d", "e", "f"]]),
        (BOM + HEAD + "a,b,c\n", [["a", "b", "c"]]),
        ("\n\n" + HEAD + "a,b,c\n", [["a", "b", "c"]]),
        (HEAD + "5\" disk,it's,c\n", [['5" disk', "it's", "c"]]),
        (HEAD + ",,\n", [["", "", ""]]),
        (HEAD.replace(",", ";") + "a,b;c;d\n", [["a,b", "c", "d"]]),
        (HEAD.replace(",", "\t") + "a,b\tc\td\n", [["a,b", "c", "d"]]),
        (HEAD + '"a\nb",c,\u2028\n', [["a\nb", "c", "\u2028"]]),
    ],
)
def test_csv_files(packed, text, expected):
    source = packed("rows.csv", text)
    assert [list(row.values()) for row in values(source)] == expected
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in values(source))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + 'a,b,c\na,"open,b\nd,e,f\ng,h,i\n', ["lines 3 to 5", "not closed"]),
        (HEAD + 'a,b,"open\n', ["line 2", "not closed"]),
        (HEAD + 'a,b,"open', ["line 2", "not closed"]),
        (HEAD + 'a,b,c\n"open,b,c\nd,e,f\n"g,h,i\n', ["lines 3 to 5", "closing quote"]),
        (HEAD + 'a,"he said "hi"",c\n', ["line 2", "doubled"]),
        (HEAD + "a,b,c\nd,e\n", ["line 3", "2 fields", "3"]),
        (HEAD + "a,b,c,d\n", ["line 2", "4 fields", "3"]),
        (HEAD + 'a, "b, c", d\n', ["line 2", "4 fields"]),
        ("\n\n" + HEAD + "\na,b\n", ["line 5"]),
        (HEAD + 'a,"x\ny",c\nd,"e\nf"\n', ["lines 4 to 5", "2 fields"]),
        ("prompt,chosen,chosen,rejected\na,b,c,d\n", ["'chosen'", "more than once"]),
        ("prompt,,chosen,\na,b,c,d\n", ["''", "more than once"]),
    ],
)
def test_csv_faults_name_the_line(packed, text, words):
    said = refusal(packed("rows.csv", text))
    assert all(word in said for word in words), said


def test_a_quote_that_may_join_rows_is_reported(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    file.write_text(HEAD + '"open,b,c\nd,e,f\ng",h,i\n')
    assert len(values(str(file))) == 1
    assert "lines 2 to 4" in capsys.readouterr().err
    tsv = tmp_path / "rows.tsv"
    tsv.write_text(file.read_text().replace(",", "\t"))
    assert "lines 2 to 4" in refusal(str(tsv))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt\tchosen\trejected\tscore, raw\na, b\tc\td\t1\n", ["a, b", "c", "d", "1"]),
        ("prompt\tchosen\trejected, x\na\tb, c\td\n", ["a", "b, c", "d"]),
        ('prompt\tchosen\trejected\na "quoted" word\t5"\t"b\tc"\n', ['a "quoted" word', '5"', "b\tc"]),
    ],
)
def test_tsv_means_tabs(packed, text, expected):
    (row,) = values(packed("rows.tsv", text))
    assert list(row.values()) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt\tchosen\trejected\na\tb\n", ["line 2", "2 fields"]),
        ('prompt\tchosen\trejected\n"Hi" he said\tb\tc\n', ["line 2", "quote"]),
        ('prompt\tchosen\trejected\na\tb\tc\n"Hi\tb\tc\nd\te\tf\n', ["lines 3 to 4", "not closed"]),
        ("prompt\tprompt\tchosen\trejected\na\tb\tc\td\n", ["'prompt'", "more than once"]),
    ],
)
def test_tsv_faults_name_the_line(packed, text, words):
    said = refusal(packed("rows.tsv", text))
    assert all(word in said for word in words), said


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.tsv"])
def test_other_encodings_are_refused(tmp_path, name):
    file = tmp_path / name
    text = LINES if name.endswith("json") else HEAD + "a,b,c\n"
    file.write_bytes(text.encode("utf-16"))
    assert "UTF-16" in refusal(str(file))
    if not name.endswith("json"):
        file.write_bytes((HEAD + "a,b,c\nä,b,c\n").encode("latin-1"))
        assert "line 3" in refusal(str(file)) and "UTF-8" in refusal(str(file))


@pytest.mark.parametrize("ending", ["parquet", "feather", "arrow"])
@pytest.mark.parametrize("nested", [False, True])
def test_columnar_files_with_a_column_twice(tmp_path, ending, nested):
    text = pa.array(["a"])
    struct = pa.StructArray.from_arrays([text, text], ["role", "role"])
    columns = [text, struct, text] if nested else [text, text, text]
    names = ["prompt", "chosen", "rejected"] if nested else ["prompt", "chosen", "chosen"]
    table = pa.Table.from_arrays(columns, names=names)
    file = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(table, file)
    elif ending == "feather":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    said = refusal(str(file))
    assert ("'role'" if nested else "'chosen'") in said and "more than once" in said


def test_names_with_glob_characters_that_exist_are_literal(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl", "b*.jsonl", "b2.jsonl", "c?.jsonl.gz", "c3.jsonl.gz"):
        data = (json.dumps({**ROWS[0], "name": name}) + "\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for name in ("a[1].jsonl", "b*.jsonl", "c?.jsonl.gz"):
        assert [row["name"] for row in values(str(tmp_path / name))] == [name]
        assert resolve_source(str(tmp_path / name))[0].digest()
    assert [row["name"] for row in values(str(tmp_path / "a*.jsonl"))] == ["a1.jsonl", "a[1].jsonl"]
    folder = tmp_path / "f[1]"
    folder.mkdir()
    (folder / "x.jsonl").write_text(LINES)
    assert values(str(folder)) == ROWS


@pytest.mark.parametrize("source", ["", " ", "\n"])
def test_an_empty_source_is_not_the_working_directory(tmp_path, monkeypatch, source):
    (tmp_path / "stray.jsonl").write_text(LINES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        resolve_source(source)


@pytest.mark.parametrize("name", ["rows.parquet.gz", "rows.arrow.zst"])
def test_a_columnar_file_that_is_compressed_as_a_whole(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert "compressed as a whole" in refusal(str(tmp_path / name))
