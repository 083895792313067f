"""Rows in the shapes of public preference sets, pairs of ranked and scored answers, ties and refusals."""

import json
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest

from tbpo_ray.config.schema import DataConfig, RecordFormat
from tbpo_ray.data.card import data_card
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.record_shapes import SHAPES
from tbpo_ray.data.records import ReadOptions, iter_prompts, iter_records, parse_prompt, parse_records
from tbpo_ray.data.rejection_reasons import REASONS, RecordError
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.stream import local_micro_batches
from tbpo_ray.data.window import decode, encode
from tbpo_ray.errors import InputError
from tbpo_ray.training.batch import BatchLayout, collate_columns

U, A, S = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system")
)
Q, GOOD, BAD = "Which sea is salty?", "All of them.", "None."
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "orca": ("pairs", {"system": "Be brief.", "question": Q, "chosen": GOOD, "rejected": BAD}),
    "distilabel orca": (
        "pairs",
        {"system": "Be brief.", "input": Q, "chosen": GOOD, "rejected": BAD, "status": "unchanged"},
    ),
    "truthy": ("pairs", {"id": 1, "system": "Be brief.", "prompt": Q, "chosen": GOOD, "rejected": BAD}),
    "orpo mix": (
        "pairs",
        {"question": Q, "prompt": Q, "chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)]},
    ),
    "ratings": (
        "pairs",
        {
            "prompt": Q,
            "chosen": [U(Q), A(GOOD)],
            "chosen-rating": 5.0,
            "rejected": [U(Q), A(BAD)],
            "rejected-rating": 2.0,
        },
    ),
    "response columns": ("pairs", {"prompt": Q, "chosen_response": GOOD, "rejected_response": BAD}),
    "sharegpt": (
        "messages",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    "messages": (
        "messages",
        {"messages": [S("Be brief."), U(Q)], "chosen": A(GOOD), "rejected": A(BAD)},
    ),
    "messages with a system turn beside conversations": (
        "messages",
        {"messages": [S("Be brief."), U(Q)], "chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)]},
    ),
    "shp a": ("shp", {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_A": 9}),
    "shp b": ("shp", {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}),
    "safe rlhf": (
        "safe_rlhf",
        {
            "prompt": Q,
            "response_0": BAD,
            "response_1": GOOD,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
    ),
    "helpsteer 2": (
        "helpsteer",
        {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -1},
    ),
    "helpsteer 3": (
        "helpsteer",
        {"context": [U(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 2},
    ),
    "webgpt": (
        "two_answers",
        {"question": {"full_text": Q}, "answer_0": BAD, "score_0": -0.5, "answer_1": GOOD, "score_1": 0.5},
    ),
    "arena": (
        "arena",
        {"conversation_a": [U(Q), A(BAD)], "conversation_b": [U(Q), A(GOOD)], "winner": "model_b"},
    ),
    "arena columns": (
        "arena_columns",
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([GOOD]),
            "response_b": json.dumps([BAD]),
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
    ),
    "nectar": (
        "ranked",
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [
                {"answer": BAD, "rank": 7.0},
                {"answer": "Some.", "rank": 2.0},
                {"answer": GOOD, "rank": 1.0},
            ],
        },
    ),
    "ultrafeedback": (
        "scored",
        {
            "instruction": Q,
            "completions": [
                {"response": BAD, "overall_score": 3.0},
                {"response": GOOD, "overall_score": 8.5},
            ],
        },
    ),
    "stack exchange, paired": (
        "pairs",
        {"qid": 1, "question": Q, "date": "2020", "metadata": ["url"], "response_j": GOOD, "response_k": BAD},
    ),
    "stack exchange, scored": (
        "scored",
        {
            "qid": 1,
            "question": Q,
            "answers": [
                {"answer_id": 1, "author": "x", "pm_score": 1, "selected": False, "text": BAD},
                {"answer_id": 2, "author": "y", "pm_score": 4, "selected": True, "text": GOOD},
            ],
        },
    ),
    "distilabel capybara": (
        "pairs",
        {
            "source": "s",
            "conversation": [{"input": Q, "output": GOOD}],
            "original_response": GOOD,
            "generation_prompt": [Q],
            "chosen": [U(Q), A(GOOD)],
            "rejected": [U(Q), A(BAD)],
            "rating_chosen": 5,
            "rating_rejected": 2,
        },
    ),
    "distilabel math": (
        "alpaca",
        {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD, "chosen_rating": 9},
    ),
    "skywork": (
        "pairs",
        {"chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)], "source": "s"},
    ),
    "ultrainteract": (
        "messages",
        {
            "id": "1",
            "task": "t",
            "trajectory": [{"from": "user", "value": Q}],
            "chosen": GOOD,
            "rejected": BAD,
        },
    ),
    "mt-bench human": (
        "arena",
        {
            "question_id": 81,
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "judge": "j",
            "conversation_a": [U(Q), A(BAD), U("Why?"), A("So.")],
            "conversation_b": [U(Q), A(GOOD), U("Why?"), A("Salt.")],
            "turn": 1,
        },
    ),
    "alpaca farm": (
        "labeled",
        {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2},
    ),
    "judge bench": (
        "labeled",
        {"pair_id": "1", "question": Q, "response_A": GOOD, "response_B": BAD, "label": "A>B"},
    ),
    "a and b": ("labeled", {"prompt": Q, "answer_a": BAD, "answer_b": GOOD, "winner": "b"}),
    "tldr preference": ("pairs", {"prompt": Q, "chosen": GOOD, "rejected": BAD}),
    "scores in a list": ("scored", {"prompt": Q, "responses": [BAD, GOOD], "scores": [1, "2.5"]}),
}


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


TIES: dict[str, dict[str, Any]] = {
    "helpsteer": {"context": [U(Q)], "response1": GOOD, "response2": BAD, "overall_preference": 0},
    "arena": {"conversation_a": [U(Q), A("a")], "conversation_b": [U(Q), A("b")], "winner": "tie"},
    "arena, both bad": {
        "conversation_a": [U(Q), A("a")],
        "conversation_b": [U(Q), A("b")],
        "winner": "tie (bothbad)",
    },
    "orca": {"system": "", "input": Q, "chosen": GOOD, "rejected": BAD, "status": "tie"},
    "ranked": {"prompt": Q, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
    "alpaca farm": {"instruction": Q, "output_1": "a", "output_2": "b", "preference": 1.5},
    "a and b": {"prompt": Q, "response_a": "a", "response_b": "b", "preference": "A=B"},
    "webgpt": {"prompt": Q, "answer_0": "a", "score_0": 0.0, "answer_1": "b", "score_1": 0.0},
}


@pytest.mark.parametrize("name", TIES)
def test_ties_give_no_pair(name):
    assert parse_records(TIES[name]) == []


@pytest.mark.parametrize("name", TIES)
def test_ties_that_are_kept_are_marked(name):
    (record,) = parse_records(TIES[name], options=ReadOptions(keep_ties=True))
    assert record.tie and answer_text(record.chosen) != answer_text(record.rejected)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_column_tie_marks_a_record_of_any_shape(name):
    row = PUBLIC[name][1]
    keep = ReadOptions(keep_ties=True)
    assert parse_records({**row, "tie": True}) == []
    (tied,) = parse_records({**row, "tie": True}, options=keep)
    (decided,) = parse_records({**row, "tie": False}, options=keep)
    assert tied.tie and not decided.tie and "tie" not in tied.metadata | decided.metadata
    assert decided.chosen == [A(GOOD)]


@pytest.mark.parametrize(
    ("value", "tie"),
    [(True, True), ("true", True), ("True", True), (1, True), ("1", True), (1.0, True),
     (False, False), ("false", False), (0, False), ("", False), (None, False)],
)  # fmt: skip
def test_a_tie_may_be_written_as_csv_files_write_it(value, tie):
    row = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "tie": value}
    assert [r.tie for r in parse_records(row, options=ReadOptions(keep_ties=True))] == [tie]
    assert len(parse_records(row)) == (not tie)


@pytest.mark.parametrize("value", ["maybe", 2, 0.5, [True], {}])
def test_another_value_of_tie_is_refused(value):
    with pytest.raises(RecordError, match="true or false") as caught:
        parse_records({"prompt": Q, "chosen": GOOD, "rejected": BAD, "tie": value})
    assert caught.value.reason == "label_malformed"


RANKED = {"prompt": Q, "responses": ["low", "top", "mid", "also mid"], "scores": [1, 5, 3, 3]}


@pytest.mark.parametrize(
    ("pairing", "gap", "expected"),
    [
        ("best_worst", 0, ["top>low"]),
        ("best_worst", 4.5, []),
        ("all", 0, ["top>mid", "top>also mid", "top>low", "mid>low", "also mid>low"]),
        ("all", 3, ["top>low"]),
        ("best_random", 3, ["top>low"]),
    ],
)
def test_ranked_answers_become_the_pairs_that_the_configuration_names(pairing, gap, expected):
    options = ReadOptions(pairing=pairing, pairing_gap=gap)
    records = parse_records(RANKED, options=options)
    assert [f"{answer_text(r.chosen)}>{answer_text(r.rejected)}" for r in records] == expected


@pytest.mark.parametrize(
    ("pairing", "gap", "expected"),
    [
        ("best_worst", 0, ["top>low"]),
        ("best_worst", 4.5, ["top=low"]),
        ("all", 3, ["top>low", "top=mid", "top=also mid", "mid=also mid", "mid=low", "also mid=low"]),
    ],
)
def test_kept_ties_of_ranked_answers(pairing, gap, expected):
    options = ReadOptions(pairing=pairing, pairing_gap=gap, keep_ties=True)
    records = parse_records(RANKED, options=options)
    assert [
        f"{answer_text(r.chosen)}{'=' if r.tie else '>'}{answer_text(r.rejected)}" for r in records
    ] == expected


def test_a_random_worse_answer_depends_on_seed_and_row_only():
    def drawn(seed):
        options = ReadOptions(pairing="best_random", seed=seed)
        return [answer_text(parse_records(RANKED, row=row, options=options)[0].rejected) for row in range(40)]

    assert drawn(1) == drawn(1) != drawn(2) and set(drawn(1)) == {"low", "mid", "also mid"}


def test_a_gap_applies_to_labeled_pairs_with_scores_but_not_to_labels():
    scored = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": 5, "score_rejected": 4}
    wide = ReadOptions(pairing_gap=2)
    assert parse_records(scored) and not parse_records(scored, options=wide)
    assert parse_records(PUBLIC["shp a"][1], options=wide)  # 0 and 1 are labels, not scores


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


@pytest.fixture
def build(write_rows, tokenizer_folder, tmp_path):
    def build(rows, keep_ties=False, **data):
        section = DataConfig(quarantine_limit=1, **data)
        spec = PairsSpec(write_rows(rows), section, tokenizer_folder, keep_ties=keep_ties)
        return prepare(spec, tmp_path / "cache", distributed=False)

    return build


def test_preparing_reports_the_shape_and_counts_the_ties(build, capsys):
    prepared = build([PUBLIC["helpsteer 3"][1], TIES["helpsteer"], PUBLIC["arena"][1]])
    assert (prepared.records, prepared.pairs, prepared.quarantined) == (3, 2, 0)
    assert (prepared.counts["ties"], prepared.counts["format/helpsteer"]) == (1, 2)
    said = capsys.readouterr().err
    assert "2 records as helpsteer" in said and "data.format" in said and "skipped 1 records" in said
    assert [row["row"] for row in prepared.rows()] == [0, 2]


def test_kept_ties_reach_the_batch_and_the_card(build, capsys):
    rows = [
        PUBLIC["helpsteer 3"][1],
        TIES["helpsteer"],
        {**PUBLIC["orca"][1], "tie": True},
        PUBLIC["orca"][1],
    ]
    dropped, kept = build(rows), build(rows, keep_ties=True)
    assert (dropped.pairs, kept.pairs) == (2, 4) and dropped.fingerprint != kept.fingerprint
    assert [row["tie"] for row in kept.rows()] == [False, True, True, False]
    assert "tie" not in next(dropped.rows())
    assert data_card(dropped)["ties"] == {"skipped": 2, "kept": 0}
    assert data_card(kept)["ties"] == {"skipped": 0, "kept": 2}
    assert "kept 2 pairs whose answers tie" in capsys.readouterr().err
    layout = BatchLayout(sides=2, pad_id=0, shared_prompt=True, truncate_to_shorter=False)

    def stream(prepared):
        schedule = Schedule(
            prepared.lengths(), seed=0, pairs_per_step=prepared.pairs, micro_batch_pairs=3, epochs=1
        )
        return list(decode(encode(list(local_micro_batches(prepared, schedule)))))

    micros = stream(kept)
    ids = np.concatenate([micro.pair_ids for micro in micros])

    def tie_of(columns):
        tie = collate_columns(columns, layout).tie
        assert tie is not None
        return tie.tolist()

    ties = [value for micro in micros for value in tie_of(micro.columns())]
    assert dict(zip(ids.tolist(), ties, strict=True)) == {0: False, 1: True, 2: True, 3: False}
    assert [collate_columns(micro.columns(), layout).tie for micro in stream(dropped)] == [None]
    columns = {name: [np.zeros(int(name == "prompt_ids"), np.int64)] for name in micros[0].columns()}
    assert tie_of(columns) == [False]  # a rank without pairs


def test_without_ties_the_fingerprint_is_that_of_earlier_versions(build):
    rows = [PUBLIC["orca"][1]]
    assert "keep_ties" not in build(rows).inputs and build(rows, keep_ties=True).inputs["keep_ties"] is True


def test_a_row_of_ranked_answers_gives_several_pairs_with_its_row_number(build):
    worst = build([RANKED, RANKED])
    prepared = build([RANKED, RANKED], pairing="all")
    assert (prepared.records, prepared.pairs, worst.pairs) == (2, 10, 2)
    assert [row["row"] for row in prepared.rows()] == [0] * 5 + [1] * 5
    assert prepared.fingerprint != worst.fingerprint


def test_a_file_without_a_preference_is_refused_by_its_columns(build):
    with pytest.raises(InputError, match="prompt, completion, label") as caught:
        build([REFUSED["unpaired"][0]] * 2)
    assert "none of its 2 records" in str(caught.value) and "chosen and rejected" in str(caught.value)
    with pytest.raises(InputError, match="2 of 2 records the answers tie"):
        build([TIES["arena"]] * 2)


def test_files_of_records_and_of_prompts_take_the_same_shapes(write_rows):
    file = write_rows([row for _, row in PUBLIC.values()])
    assert len(list(iter_records(file))) == len(list(iter_prompts(file))) == len(PUBLIC)
