import gzip
import json

import pytest

from tbpo_ray.data import record_shapes
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.record_shapes import RawPair
from tbpo_ray.data.records import BadRecord, iter_prompts, iter_records, parse_prompt, parse_records
from tbpo_ray.data.rejection_reasons import REASONS, RecordError

U, A, S = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system")
)

SHAPES = {
    "plain": {"prompt": "Q", "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": [U("Q")], "chosen": [A("yes")], "rejected": [A("no")]},
    "mixed": {"prompt": [U("Q")], "chosen": "yes", "rejected": [A("no")]},
    "implicit": {"chosen": [U("Q"), A("yes")], "rejected": [U("Q"), A("no")]},
    "ultrafeedback": {
        "prompt": "Q",
        "messages": [U("Q"), A("yes")],
        "chosen": [U("Q"), A("yes")],
        "rejected": [U("Q"), A("no")],
    },
    "messages column": {"messages": [U("Q"), A("yes")], "chosen": "yes", "rejected": "no"},
    "transcript": {"chosen": "\n\nHuman: Q\n\nAssistant: yes", "rejected": "\n\nHuman: Q\n\nAssistant: no"},
    "transcript prompt": {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": "yes", "rejected": "no"},
    "transcript all": {
        "prompt": "\n\nHuman: Q\n\nAssistant:",
        "chosen": "\n\nHuman: Q\n\nAssistant: yes",
        "rejected": "\n\nHuman: Q\n\nAssistant: no",
    },
    "from and value": {
        "chosen": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "yes"}],
        "rejected": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "no"}],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_accepted_shape_gives_the_same_pair(shape):
    (record,) = parse_records(SHAPES[shape], "s", 3)
    assert (record.prompt, record.chosen, record.rejected) == ([U("Q")], [A("yes")], [A("no")])
    assert (record.source, record.row) == ("s", 3)


def test_turns_system_message_and_further_columns_are_kept():
    talk = [S("be brief"), U("a"), A("b"), U("c")]
    (record,) = parse_records(
        {"chosen": [*talk, A("yes")], "rejected": [*talk, A("no")], "language": "de", "messages": 1}
    )
    assert record.prompt == talk and record.metadata == {"language": "de", "messages": 1}
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    assert parse_records({"chosen": text + "x y", "rejected": text + "z"})[0].prompt == talk[1:]


def test_a_further_shape_is_one_reader(monkeypatch):
    def read_ranked(columns):
        if "ranked" not in columns:
            return None
        best, worst = columns["ranked"][0], columns["ranked"][-1]
        return RawPair(columns["question"], best, worst, frozenset({"question", "ranked"}))

    monkeypatch.setattr(record_shapes, "SHAPES", {"mine": read_ranked, **record_shapes.SHAPES})
    (record,) = parse_records({"question": "Q", "ranked": ["yes", "maybe", "no"], "language": "de"})
    assert (record.prompt, record.chosen, record.rejected) == ([U("Q")], [A("yes")], [A("no")])
    assert record.metadata == {"language": "de"}


def test_answers_keep_their_whitespace():
    (record,) = parse_records({"prompt": " Q\n", "chosen": " yes\n", "rejected": "no\t"})
    assert record.prompt[0]["content"] == " Q\n"
    assert (answer_text(record.chosen), answer_text(record.rejected)) == (" yes\n", "no\t")


BAD = {
    "not_object": [1, 2],
    "prompt_missing": {"chosen": "a", "rejected": "b"},
    "prompt_not_text": {"prompt": 7, "chosen": "a", "rejected": "b"},
    "prompt_empty": {"prompt": " \n", "chosen": "a", "rejected": "b"},
    "prompts_differ": {"chosen": [U("Q"), A("a")], "rejected": [U("R"), A("b")]},
    "chosen_missing": {"prompt": "Q", "rejected": "b"},
    "rejected_missing": {"prompt": "Q", "chosen": "a", "rejected": None},
    "chosen_not_text": {"prompt": "Q", "chosen": 5, "rejected": "b"},
    "rejected_not_text": {"prompt": "Q", "chosen": "a", "rejected": {"x": 1}},
    "chosen_empty": {"prompt": "Q", "chosen": "", "rejected": "b"},
    "rejected_empty": {"prompt": "Q", "chosen": "a", "rejected": []},
    "no_final_answer": {"chosen": [U("Q"), A("a"), U("more")], "rejected": [U("Q"), A("b")]},
    "answers_identical": {"prompt": "Q", "chosen": "same", "rejected": "same "},
    "message_malformed": {"prompt": [{"role": "wizard", "content": "Q"}], "chosen": "a", "rejected": "b"},
    "text_not_unicode": {"prompt": "Q", "chosen": "half \ud800", "rejected": "b"},
}


@pytest.mark.parametrize("reason", BAD)
def test_every_malformed_kind_has_its_reason(reason):
    with pytest.raises(RecordError) as caught:
        parse_records(BAD[reason])
    assert caught.value.reason == reason and reason in REASONS


def test_unreadable_lines_are_quarantined_with_their_row(write_rows):
    rows = [SHAPES["plain"], b"{not json", b"\xff\xfe", b"", b'"text"', b"[" * 100_000, SHAPES["messages"]]
    bad: list[BadRecord] = []
    good = list(iter_records(write_rows(rows), on_bad=bad.append))
    assert [r.row for r in good] == [0, 6]
    assert [(b.row, b.reason) for b in bad] == [
        (1, "not_json"),
        (2, "not_utf8"),
        (4, "not_object"),
        (5, "not_json"),
    ]
    assert json.loads(bad[0].to_json())["record"] == "{not json"


def test_prompts_are_read_from_prompts_alone_or_from_pairs(write_rows):
    file = write_rows([{"prompt": "Q", "language": "fr"}, SHAPES["transcript"], SHAPES["implicit"], {"x": 1}])
    bad: list[BadRecord] = []
    prompts = list(iter_prompts(file, on_bad=bad.append))
    assert [p.prompt for p in prompts] == [[U("Q")]] * 3 and prompts[0].metadata == {"language": "fr"}
    assert [b.reason for b in bad] == ["prompt_missing"]
    assert len(list(iter_prompts(file, 2))) == 2
    assert parse_prompt({"messages": [U("Q")]}).prompt == [U("Q")]


@pytest.mark.shared
def test_real_transcripts(real_data):
    bad: list[BadRecord] = []
    records = list(iter_records(str(real_data), on_bad=bad.append))
    assert len(records) == 2303
    assert sorted(b.reason for b in bad) == ["chosen_empty"] * 4 + ["prompts_differ"] * 5
    with gzip.open(real_data) as file:
        lines = [json.loads(line) for line in file]
    for record in records[:200]:
        again = "".join(
            f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
            for m in [*record.prompt, *record.chosen]
        )
        assert again.split() == lines[record.row]["chosen"].split()
