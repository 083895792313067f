"""Answers of plain text that repeat the prompt, as older versions of TRL expected them."""

from __future__ import annotations

from collections import Counter

import pytest

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.card import data_card
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.records import parse_prompt, parse_records
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.repeated_prompt import remove_prompt
from tbpo_ray.data.tokenize import PairTokenizer, TokenizedPair, TokenizerSpec
from tests.data.conftest import CHAT, decode_answer, make_tokenizer

Q = "What is the capital of France?"
USER = {"role": "user", "content": Q}
REPEATED = {
    "a space": (Q, " Paris.", " Rome."),
    "nothing": (f"{Q}\n\nAnswer:", "Paris.", "Rome."),
    "a line": (Q, "\nParis.", "\n\nRome."),
    "white space behind the prompt": (f"{Q}\n", "Paris.", "Rome."),
    "few words": ("question 1", " Paris.", " Rome."),
    "a full stop": (f"{Q} Tell me.", "Paris.", "Rome."),
    "a long beginning": ("The capital of France is, as everybody knows", ", Paris.", " Rome."),
    "Chinese": ("法国的首都是哪里？", "巴黎。", "罗马。"),
    "one long word": ("https://example.org/a", " Paris.", " Rome."),
}
OWN_WORDS = {
    "neither": (Q, "Paris.", "Rome."),
    "one": (Q, f"{Q} Paris.", "Rome."),
    "another word": ("A fruit", "A fruitcake.", "A fruitless one."),
    "other case": (Q, f"{Q.lower()} Paris.", f"{Q.lower()} Rome."),
}
UNCLEAR = {
    "a greeting": ("Hello", "Hello! How can I help?", "Hello there."),
    "a greeting of two words": ("Good morning", "Good morning! How can I help?", "Good morning, sir."),
    "a story": ("Once upon a time", "Once upon a time, there was a king.", "Once upon a time there was one."),
    "Chinese": ("你好", "你好！有什么可以帮您？", "你好，请问？"),
}


def texts(record):
    return answer_text(record.chosen), answer_text(record.rejected)


@pytest.mark.parametrize("name", REPEATED)
def test_the_prompt_is_taken_off_where_both_answers_begin_with_it(name):
    prompt, good, bad = REPEATED[name]
    counts: Counter[str] = Counter()
    row = {"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad}
    (record,) = parse_records(row, counts=counts)
    assert record.prompt == [{"role": "user", "content": prompt}] == parse_prompt(row).prompt
    assert texts(record) == (good, bad) and record.repeats_prompt
    assert counts["prompt_repeated"] == 1


@pytest.mark.parametrize("name", OWN_WORDS)
def test_answers_that_do_not_repeat_the_prompt_stay_as_they_are(name):
    prompt, chosen, rejected = OWN_WORDS[name]
    counts: Counter[str] = Counter()
    (record,) = parse_records({"prompt": prompt, "chosen": chosen, "rejected": rejected}, counts=counts)
    assert texts(record) == (chosen, rejected) and not record.repeats_prompt and not counts["prompt_repeated"]


@pytest.mark.parametrize("name", UNCLEAR)
def test_answers_that_may_begin_with_the_same_words_of_their_own_are_refused(name):
    prompt, chosen, rejected = UNCLEAR[name]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    with pytest.raises(RecordError, match="write answers without the prompt, or as messages") as caught:
        parse_records(row)
    assert caught.value.reason == "prompt_repeated_unclear"
    assert parse_prompt(row).prompt == [{"role": "user", "content": prompt}]
    as_messages = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    (record,) = parse_records({**row, **as_messages})
    assert texts(record) == (chosen, rejected)


def test_white_space_between_the_words_of_a_repeated_prompt_may_differ():
    prompt = "What is  the\ncapital of France?\n"
    (record,) = parse_records({"prompt": prompt, "chosen": f"{Q}\nParis.", "rejected": f" {Q} Rome."})
    assert texts(record) == ("\nParis.", " Rome.") and record.repeats_prompt
    joined = Q.replace(" ", "")
    (other,) = parse_records({"prompt": Q, "chosen": f"{joined} Paris.", "rejected": f"{joined} Rome."})
    assert texts(other) == (f"{joined} Paris.", f"{joined} Rome.")


def test_an_answer_that_is_the_prompt_alone_is_empty():
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        with pytest.raises(RecordError) as caught:
            parse_records({"prompt": Q, side: f"{Q} ", other: f"{Q} Paris."})
        assert caught.value.reason == f"{side}_empty"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER]},
        {"messages": [{"role": "system", "content": "Be brief."}, USER]},
        {"question": Q, "system": "Be brief."},
        {"instruction": Q},
        {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER]},
    ],
)
def test_every_form_of_an_explicit_prompt_is_recognized(row):
    (record,) = parse_records({**row, "chosen": f"{Q} Paris.", "rejected": f"{Q} Rome."})
    assert texts(record) == (" Paris.", " Rome.") and record.prompt[-1] == USER


@pytest.mark.parametrize("between", ["\n", "\n\n", " "])
@pytest.mark.parametrize(
    "row",
    [{"system": "Be brief.", "prompt": Q}, {"prompt": [{"role": "system", "content": "Be brief."}, USER]}],
)
def test_a_system_text_in_front_of_the_repeated_prompt_is_taken_off_too(row, between):
    start = f"Be brief.{between}{Q}"
    (record,) = parse_records({**row, "chosen": f"{start} Paris.", "rejected": f"{start} Rome."})
    assert texts(record) == (" Paris.", " Rome.")
    assert record.prompt == [{"role": "system", "content": "Be brief."}, USER]


def test_ranked_answers_repeat_the_prompt_too():
    row = {"prompt": Q, "responses": [f"{Q} Rome.", f"{Q} Paris."], "scores": [1, 5]}
    (record,) = parse_records(row)
    assert texts(record) == (" Paris.", " Rome.")


def test_transcripts_without_a_prompt_column_are_read_as_before():
    start = f"\n\nHuman: {Q}\n\nAssistant:"
    (record,) = parse_records({"chosen": f"{start} Paris.", "rejected": f"{start} Rome."})
    assert texts(record) == ("Paris.", "Rome.") and record.prompt == [USER] and not record.repeats_prompt
    (same,) = parse_records({"prompt": start, "chosen": f"{start} Paris.", "rejected": f"{start} Rome."})
    assert texts(same) == texts(record) and same.prompt == [USER]
    assert remove_prompt(Q, "Paris.", "Rome.") is None
    first = f"Human: {Q}"  # without the blank line in front that such transcripts have
    rows = {
        "prompt": first,
        "chosen": f"{first}\n\nAssistant: Paris.",
        "rejected": f"{first}\n\nAssistant: Rome.",
    }
    (named,) = parse_records(rows)
    assert texts(named) == texts(record) and named.prompt == [USER]
    (kept,) = parse_records({"prompt": first, "chosen": "Paris.", "rejected": "Rome."})
    assert kept.prompt == [{"role": "user", "content": first}]


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "template"])
def test_the_tokens_are_those_of_a_row_that_does_not_repeat_the_prompt(template):
    tokenizer = PairTokenizer(TokenizerSpec.of(make_tokenizer(template=template)), 200, 100)
    rows = [
        {"prompt": Q, "chosen": f"{Q} <s> Paris.", "rejected": f"{Q} Rome."},
        # Without a template nothing else separates a prompt from an answer.
        {"prompt": Q, "chosen": "<s> Paris." if template else " <s> Paris.",
         "rejected": "Rome." if template else " Rome."},
    ]  # fmt: skip
    repeated, plain = tokenizer.pairs([record for row in rows for record in parse_records(row)])
    assert repeated == plain and isinstance(repeated, TokenizedPair)
    assert decode_answer(tokenizer, repeated.chosen_ids).strip() == "<s> Paris."


def test_preparing_counts_and_says_what_was_taken_off(write_rows, tokenizer_folder, tmp_path, capsys):
    rows = [{"prompt": Q, "chosen": f"{Q} Paris {i}.", "rejected": f"{Q} Rome."} for i in range(3)]
    rows += [{"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello there."}]
    spec = PairsSpec(write_rows(rows), DataConfig(quarantine_limit=0.5), tokenizer_folder)
    prepared = prepare(spec, tmp_path / "cache", distributed=False)
    assert (prepared.pairs, prepared.counts["prompt_repeated"]) == (3, 3)
    card = data_card(prepared)
    assert card["rules"]["prompt_repeated"] == 3 and card["quarantined"]["prompt_repeated_unclear"] == 1
    assert "3 records whose answers repeat the prompt" in capsys.readouterr().err
