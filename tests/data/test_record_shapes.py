"""Rows in the shapes of public preference sets, and rows that are refused."""

import json
from collections import Counter
from typing import Any, get_args

import pytest

from tbpo_ray.config.schema import RecordFormat
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.record_shapes import SHAPES
from tbpo_ray.data.records import ReadOptions, iter_prompts, iter_records, parse_prompt, parse_records
from tbpo_ray.data.rejection_reasons import REASONS, RecordError
from tests.data.public_rows import BAD, GOOD, PUBLIC, RANKED, TIES, A, Q, S, U


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("explicit", [False, True])
def test_the_shape_of_a_public_set_gives_its_pair(name, explicit):
    form, row = PUBLIC[name]
    counts: Counter[str] = Counter()
    (record,) = parse_records(
        {**row, "language": "en"}, "s", 5, ReadOptions(form if explicit else "auto"), counts
    )
    start = [S("Be brief.")] if "Be brief." in json.dumps(row) else []
    assert (record.prompt, record.chosen, record.rejected) == ([*start, U(Q)], [A(GOOD)], [A(BAD)])
    assert record.metadata["language"] == "en" and (record.source, record.row) == ("s", 5)
    assert counts == {f"format/{form}": 1}


@pytest.mark.parametrize("name", PUBLIC)
def test_prompts_alone_are_read_from_every_shape(name):
    start = [S("Be brief.")] if "Be brief." in json.dumps(PUBLIC[name][1]) else []
    assert parse_prompt(PUBLIC[name][1]).prompt == [*start, U(Q)]


def test_an_instruction_its_input_and_its_history_are_one_prompt():
    row = {"instruction": "Translate.", "input": "Haus", "history": [["Hello", "Hi"]], "system": "Be brief."}
    (record,) = parse_records({**row, "chosen": "house", "rejected": "mouse"})
    expected = [S("Be brief."), U("Hello"), A("Hi"), U("Translate.\nHaus")]
    assert record.prompt == parse_prompt(row).prompt == expected
    assert record.metadata == {}


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen_response": "house", "rejected_response": "mouse"},
        {"answer_0": "house", "score_0": 1, "answer_1": "mouse", "score_1": 0},
    ],
)
def test_the_parts_of_an_instruction_belong_to_every_pair_of_answers(answers):
    row = {"instruction": "Translate.", "input": "Haus", "history": [["Hello", "Hi"]], **answers}
    (record,) = parse_records(row)
    assert record.prompt == [U("Hello"), A("Hi"), U("Translate.\nHaus")] and record.metadata == {}
    assert (answer_text(record.chosen), answer_text(record.rejected)) == ("house", "mouse")
    for part, reason in (
        ({"input": ["Haus"]}, "prompt_not_text"),
        ({"history": "Hello"}, "message_malformed"),
    ):
        with pytest.raises(RecordError) as caught:
            parse_records({**row, **part})
        assert caught.value.reason == reason


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_column_gives_way_to_the_filled_one(empty):
    answers = {"chosen_response": GOOD, "rejected_response": BAD, "chosen": empty, "rejected": empty}
    prompts = ({"prompt": Q}, {"messages": [U(Q)]}, {"instruction": Q})
    responses = {"response_1": empty, "response_2": empty, "response1": GOOD, "response2": BAD}
    labels = {"preference_strength": empty, "overall_preference": -1, "context": empty, "prompt": Q}
    for row in (*({**prompt, **answers} for prompt in prompts), {**responses, **labels}):
        (record,) = parse_records(row)
        assert (record.prompt, record.chosen, record.rejected) == ([U(Q)], [A(GOOD)], [A(BAD)])


def test_a_summary_is_asked_for_as_in_openai_s_comparisons():
    row = {
        "info": {"id": "1", "post": "A day at sea.", "title": "Sea", "subreddit": "sailing"},
        "summaries": [{"text": "Long.", "policy": "p"}, {"text": "Sea day.", "policy": "p"}],
        "choice": 1,
        "worker": "w",
    }
    (record,) = parse_records(row)
    assert (answer_text(record.chosen), answer_text(record.rejected)) == ("Sea day.", "Long.")
    assert record.prompt == [U("SUBREDDIT: r/sailing\n\nTITLE: Sea\n\nPOST: A day at sea.\n\nTL;DR:")]
    assert record.metadata == {"worker": "w"}
    article = {**row, "info": {"article": "News.", "post": None}}
    assert parse_records(article)[0].prompt == [U("ARTICLE: News.\n\nTL;DR:")]


def test_arena_conversations_of_several_turns_are_answers_of_several_turns():
    a, b = [U("x"), A("1"), U("y"), A("2")], [U("x"), A("3"), U("y"), A("4")]
    (record,) = parse_records({"conversation_a": a, "conversation_b": b, "winner": "model_a"})
    assert (record.prompt, record.chosen, record.rejected) == ([U("x")], a[1:], b[1:])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unpaired": ({"prompt": Q, "completion": GOOD, "label": True}, "chosen_missing"),
    "text": ({"text": Q}, "chosen_missing"),
    "rated": ({"prompt": Q, "response": GOOD, "helpfulness": 3}, "chosen_missing"),
    "safety": ({"prompt": Q, "response": GOOD, "is_safe": True, "category": {}}, "chosen_missing"),
    "fine-tuning": ({"instruction": Q, "output": GOOD}, "chosen_missing"),
    "conversation": ({"messages": [U(Q), A(GOOD)]}, "chosen_missing"),
    "axis": ({"info": {"post": "p"}, "summary": {"text": "s", "axes": {"overall": 7}}}, "chosen_missing"),
    "oasst": ({"message_id": "1", "parent_id": "0", "text": Q, "rank": 0}, "chosen_missing"),
    "which of two": ({"prompt": Q, "response_A": "a", "response_B": "b", "label": 0}, "label_malformed"),
    "two questions": ({"question": Q, "context": "c", "chosen": "a", "rejected": "b"}, "prompt_ambiguous"),
    "label": ({**PUBLIC["shp a"][1], "labels": 2}, "label_malformed"),
    "winner": ({**TIES["arena"], "winner": "model_c"}, "label_malformed"),
    "score": ({**RANKED, "scores": [1, None, 2, 3]}, "label_malformed"),
    "nan": ({**RANKED, "scores": [1, float("nan"), 2, 3]}, "label_malformed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_without_a_preference_are_refused_with_what_was_found(name):
    row, reason = REFUSED[name]
    with pytest.raises(RecordError) as caught:
        parse_records(row)
    assert caught.value.reason == reason in REASONS and caught.value.detail
    if reason == "chosen_missing":
        assert all(column in caught.value.detail for column in [*row, "chosen and rejected", "winner"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unpaired", "unpaired: one answer in completion, rated by label"),
        ("rated", "unpaired: one answer in response, rated by helpfulness"),
        ("safety", "unpaired: one answer in response, rated by is_safe"),
        ("fine-tuning", "one answer in output without a second one"),
        ("conversation", "one conversation without a second answer"),
        ("axis", "one summary with its ratings"),
        ("oasst", "one message of a tree"),
    ],
)
def test_what_is_not_a_preference_is_named(name, words):
    with pytest.raises(RecordError, match=words):
        parse_records(REFUSED[name][0])


def test_the_second_turn_of_mt_bench_is_an_answer_of_two_turns():
    row = PUBLIC["mt-bench human"][1] | {"turn": 2}
    (record,) = parse_records(row)
    assert record.prompt == [U(Q)] and record.chosen == row["conversation_b"][1:]


def test_a_named_format_reads_only_its_shape():
    with pytest.raises(RecordError, match=r"data\.format=shp") as caught:
        parse_records(PUBLIC["arena"][1], options=ReadOptions("shp"))
    assert caught.value.reason == "chosen_missing" and "conversation_a" in caught.value.detail


def test_the_configuration_names_every_shape():
    assert set(get_args(RecordFormat)) == {"auto", *SHAPES}


def test_files_of_records_and_of_prompts_take_the_same_shapes(write_rows):
    file = write_rows([row for _, row in PUBLIC.values()])
    assert len(list(iter_records(file))) == len(list(iter_prompts(file))) == len(PUBLIC)
