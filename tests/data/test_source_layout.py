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


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ('"open,b,c\nd,e,f\ng",h,i\n', "lines 2 to 4"),
        ('a,b,c\n"open,b,c\n\ng",h,i\n', "lines 3 to 5"),
        ('a,"b, c",d\na,"open,c\nd,e",f\n', "lines 3 to 4"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_quote_that_may_join_rows_is_refused(tmp_path, ending, rows, lines):
    text = HEAD + rows
    file = tmp_path / f"rows.{ending}"
    file.write_text(text if ending == "csv" else text.replace(",", "\t"))
    said = refusal(str(file))
    assert lines in said and "quote" in said


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ('Q,"Yes, sure\nof course, yes",no\n', ["Q", "Yes, sure\nof course, yes", "no"]),
        ('"Q","f(1,2\na,b","no"\n', ["Q", "f(1,2\na,b", "no"]),
        ('Q,"one\n\ntwo",no\n', ["Q", "one\n\ntwo", "no"]),
        ('Q,"[1,2,3,4]\n[5]",no\n', ["Q", "[1,2,3,4]\n[5]", "no"]),
    ],
)
def test_text_of_several_lines_stays_one_row(tmp_path, row, fields):
    (tmp_path / "rows.csv").write_text(HEAD + row)
    assert [list(row.values()) for row in values(str(tmp_path / "rows.csv"))] == [fields]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + 'a, "b", "c"\n', ["line 2", "field 2", "space"]),
        (HEAD + 'a,b,c\n "a",b,c\n', ["line 3", "field 1"]),
        (HEAD + 'a,b,\t"c"\n', ["line 2", "field 3"]),
        (HEAD + '"a, ""x""",b, "c"\n', ["line 2", "field 3"]),
        ('"prompt", "chosen", "rejected"\na,b,c\n', ["line 1", "field 2"]),
    ],
)
def test_a_quote_behind_a_space_is_refused(packed, text, words):
    said = refusal(packed("rows.csv", text))
    assert all(word in said for word in words), said


def test_a_quoted_field_may_begin_with_a_space_and_a_quote(packed):
    source = packed("rows.csv", HEAD + '" ""b"" x","he said, ""hi""",c\n')
    assert [list(row.values()) for row in values(source)] == [[' "b" x', 'he said, "hi"', "c"]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_content_under_a_plain_name_is_read_and_reported(tmp_path, capsys, name, ending):
    file = tmp_path / name
    text = HEAD + "a,b,c\n" if name.endswith("csv") else LINES
    file.write_bytes(PACK[ending](text.encode()))
    expected = [{"prompt": "a", "chosen": "b", "rejected": "c"}] if name.endswith("csv") else ROWS
    assert values(str(file)) == expected
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_whole_or_refused(tmp_path, ending):
    rows = [
        {"prompt": "p", "chosen": "a" * 99, "rejected": str(i), "noise": hash(str(i))} for i in range(9000)
    ]
    first, second = ("".join(json.dumps(row) + "\n" for row in part).encode() for part in (rows, ROWS))
    file = tmp_path / f"rows.jsonl{ending}"
    file.write_bytes(PACK[ending](first) + PACK[ending](second))
    assert values(str(file)) == [*rows, *ROWS]
    whole = PACK[ending](first + second)
    for size in (len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "cannot be read" in refusal(str(file))


def test_content_of_another_format_is_refused_by_name(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.jsonl")
    with pa.OSFile(str(tmp_path / "b.csv"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.json").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "d.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, kind in (("a.jsonl", "Parquet"), ("b.csv", "Arrow"), ("c.json", "ZIP"), ("d.jsonl", "Git LFS")):
        assert kind in refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    ("first", "delimiter"),
    [("sep=;\n", ";"), ('"sep=;"\r\n', ";"), ("SEP=,\n", ","), ("sep=\t\n", "\t"), ("\nsep=|\n", "|")],
)
def test_the_separator_that_excel_states(packed, first, delimiter):
    text = first + HEAD.replace(",", delimiter) + delimiter.join(["a b", '"c\nd"', "e"]) + "\n"
    (row,) = values(packed("rows.csv", text))
    assert row == {"prompt": "a b", "chosen": "c\nd", "rejected": "e"}
    assert "line 2" in refusal(packed("rows.tsv", "\nsep=;\nprompt;chosen;rejected\n"))
    line = 2 + first.count("\n")
    assert f"line {line}" in refusal(packed("rows.csv", first + HEAD.replace(",", delimiter) + "a b\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt;chosen;rejected;score, raw\na, b;c;d;1\n", ["a, b", "c", "d", "1"]),
        ('"prompt";"chosen";"rejected";"a,b,c,d"\na;b;c;d\n', ["a", "b", "c", "d"]),
        ("prompt,chosen,rejected,a;b\na,b,c,d;e\n", ["a", "b", "c", "d;e"]),
    ],
)
def test_the_separator_is_the_one_that_gives_the_columns_of_a_preference(packed, text, expected):
    (row,) = values(packed("rows.csv", text))
    assert list(row.values()) == expected and list(row)[:3] == ["prompt", "chosen", "rejected"]


def test_another_separator_is_refused_with_the_columns_seen(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt|chosen|rejected\na, b|c|d\n")
    assert "prompt|chosen|rejected" in refusal(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.tsv").write_text("prompt;chosen;rejected\na;b\tc;d\n")
    assert "prompt;chosen;rejected" in refusal(str(tmp_path / "rows.tsv"))


@pytest.mark.parametrize("name", ["a::b.jsonl", "zip::c.jsonl", "data:d.jsonl", "file::e.jsonl"])
def test_a_local_file_may_be_named_like_an_address(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text(LINES)
    for source in (str(tmp_path / name), str(tmp_path), str(tmp_path / "*.jsonl")):
        assert values(source) == ROWS and resolve_source(source)[0].digest()
    monkeypatch.chdir(tmp_path)
    assert values(name) == ROWS
    folder = tmp_path / "x::y"
    folder.mkdir()
    (folder / "f.jsonl").write_text(LINES)
    assert values(str(folder / "*.jsonl")) == ROWS == values("x::y/*.jsonl")
    assert "no such file" in refusal("x::y/g.jsonl")


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
