"""Rows of Arrow tables: absent struct fields do not reach a template as null, maps are mappings."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbpo_ray.data.records import BadRecord, iter_prompts, iter_records
from tbpo_ray.data.tokenize import PairTokenizer, TokenizedPair, TokenizerSpec

from .conftest import make_tokenizer


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def row(name, *, kwargs, schema, **arguments):
    return {
        "prompt": [{"role": "user", "content": "the cat"}],
        "chosen": [{"role": "assistant", "content": "sat", "tool_calls": [call(name, **arguments)]}],
        "rejected": [{"role": "assistant", "content": "mat"}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        "chat_template_kwargs": kwargs,
        "info": {name: 1},
    }


ROWS = [
    row(
        "look", kwargs={"quiet": True}, schema={"type": "object", "city": {"type": "string"}}, city="the mat"
    ),
    row("say", kwargs={"loud": 2}, schema={"type": "object", "word": {"enum": ["a"]}}, word="on", times=[1]),
]


def write(folder, ending, rows=ROWS, schema=None):
    file = str(folder / f"rows.{ending}")
    if ending == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    table = pa.Table.from_pylist(rows, schema)
    if ending == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return file


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_gives_the_records_of_its_json_lines(tmp_path, ending):
    lines, table = (list(iter_records(write(tmp_path, kind))) for kind in ("jsonl", ending))
    for a, b in zip(lines, table, strict=True):
        assert (a.prompt, a.chosen, a.rejected, a.tools, a.template_kwargs) == (
            b.prompt, b.chosen, b.rejected, b.tools, b.template_kwargs,
        )  # fmt: skip
    assert table[0].chosen[0]["tool_calls"] == [call("look", city="the mat")]
    assert table[1].template_kwargs == {"loud": 2}
    # What only a checker function reads is as other readers of the table give it.
    assert [record.metadata for record in table] == [
        {"info": {"look": 1, "say": None}}, {"info": {"look": None, "say": 1}},
    ]  # fmt: skip
    prompts = list(iter_prompts(write(tmp_path, ending)))
    assert [p.tools for p in prompts] == [r["tools"] for r in ROWS]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_tokens_of_a_table_are_those_of_its_json_lines(tmp_path, ending):
    template = (
        "{{ tools | tojson }}{{ 'quiet' if quiet is defined }}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    )
    tokenizer = make_tokenizer(template=template)
    pairs = PairTokenizer(TokenizerSpec.of(tokenizer), 2048, 1024)
    found = pairs.pairs(list(iter_records(write(tmp_path, ending))))
    good = [pair for pair in found if isinstance(pair, TokenizedPair)]
    texts = [tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids]) for pair in good]
    assert "null" not in "".join(texts) and ["quiet" in text for text in texts] == [True, False]
    assert texts[1].endswith('sat{"word": "on", "times": [1]}</s>')


def test_nulls_of_the_author_s_own_stay(tmp_path):
    rows = [row("look", kwargs={"quiet": None}, schema={"default": None}, city=None, many=[None, 1])]
    (record,) = iter_records(write(tmp_path, "jsonl", rows))
    assert record.chosen[0]["tool_calls"] == [call("look", city=None, many=[None, 1])]
    assert record.template_kwargs == {"quiet": None}
    assert record.tools == rows[0]["tools"]
    (record,) = iter_records(write(tmp_path, "parquet", rows))
    assert record.chosen[0]["tool_calls"] == [call("look", many=[None, 1])]


MAPPED = {
    "prompt": "the cat",
    "chosen": [{"role": "assistant", "content": "sat", "calls": [("city", "Oslo"), ("unit", None)]}],
    "rejected": "mat",
    "info": [("a", 1)],
}
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string()),
                     ("calls", pa.map_(pa.string(), pa.string()))])  # fmt: skip
SCHEMA = pa.schema([("prompt", pa.string()), ("chosen", pa.list_(MESSAGE)), ("rejected", pa.string()),
                    ("info", pa.map_(pa.string(), pa.int64()))])  # fmt: skip


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_maps_are_mappings(tmp_path, ending):
    twice = {**MAPPED, "info": [("a", 1), ("a", 2)]}
    bad: list[BadRecord] = []
    source = write(tmp_path, ending, [MAPPED, twice], SCHEMA)
    (record,) = iter_records(source, on_bad=bad.append)
    assert record.chosen == [{"role": "assistant", "content": "sat", "calls": {"city": "Oslo", "unit": None}}]
    assert record.metadata == {"info": {"a": 1}}
    assert [(b.row, b.reason, b.detail) for b in bad] == [(1, "duplicate_keys", "'a'")]
    assert json.loads(bad[0].to_json())["record"]["prompt"] == "the cat"
