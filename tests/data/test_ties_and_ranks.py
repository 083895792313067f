"""Ties, and the pairs of ranked and scored answers."""

import numpy as np
import pytest

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.card import data_card
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.records import ReadOptions, parse_records
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.stream import local_micro_batches
from tbpo_ray.data.window import decode, encode
from tbpo_ray.errors import InputError
from tbpo_ray.training.batch import BatchLayout, collate_columns
from tests.data.public_rows import BAD, GOOD, PUBLIC, RANKED, TIES, A, Q


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
        build([{"prompt": Q, "completion": GOOD, "label": True}] * 2)
    assert "none of its 2 records" in str(caught.value) and "chosen and rejected" in str(caught.value)
    with pytest.raises(InputError, match="2 of 2 records the answers tie"):
        build([TIES["arena"]] * 2)
