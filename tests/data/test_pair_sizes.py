"""Sizes of pairs with tokens that are context only agree with the rows that are made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.card import data_card
from tbpo_ray.data.deal import align
from tbpo_ray.data.pair_sizes import compact, measure_pairs, row_spans, trained_tokens
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.schedule import Schedule, pair_tokens, row_tokens
from tbpo_ray.training.batch import collate
from tbpo_ray.training.estimate import estimate_data
from tbpo_ray.training.memory_plan import dummy_batch
from tbpo_ray.training.run_plan import resolve_run


def masked_pairs(count=40, seed=0, *, whole=False):
    """Prompts, answers and masks whose first token is trained; some answers have no mask."""
    rng = np.random.default_rng(seed)
    prompts = [np.ones(n, dtype=np.int64) for n in rng.integers(1, 30, count)]
    answers = [[np.ones(n, dtype=np.int64) for n in rng.integers(1, 60, count)] for _ in range(2)]
    masks = [[_mask(rng, len(answer), whole) for answer in side] for side in answers]
    return prompts, answers, masks


def _mask(rng, size, whole):
    if whole or rng.random() < 0.2:
        return None
    mask = rng.random(size) < 0.4
    mask[0] = True
    return mask


def test_sizes_of_a_pair():
    masks: list[list[np.ndarray | None]] = [[np.array([True, False, False, True, False])], [None]]
    sizes = measure_pairs([[1, 2]], [[[1, 2, 3, 4, 5]], [[1]]], masks)
    assert sizes.dtype == np.int32 and sizes.tolist() == [[2, 5, 1, 2, 1, 4, 1, 1, 1]]
    assert trained_tokens(sizes).tolist() == [[2, 1]] and compact(sizes) is sizes
    assert row_spans(sizes, truncate_to_shorter=False).tolist() == [[4, 1]]
    assert row_spans(sizes, truncate_to_shorter=True).tolist() == [[1, 1]]
    empty = measure_pairs([[1]], [[[1, 2]], [[1]]], [[()], [None]])
    assert compact(empty).tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("rows", ["shared", "separate", "packed"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_tokens_of_rows_are_those_of_the_batch(rows, cut, whole):
    prompts, answers, masks = masked_pairs(whole=whole)
    sizes = compact(measure_pairs(prompts, answers, masks))
    assert sizes.shape[1] == (3 if whole else 9)
    counted = row_tokens(sizes, truncate_to_shorter=cut, rows=rows)
    trained = [[np.zeros(0) if mask is None else mask for mask in side] for side in masks]
    for b in range(len(prompts)):
        batch = collate(
            [prompts[b]], [[side[b]] for side in answers], pad_id=0, shared=rows != "separate",
            packed=rows == "packed", truncate_to_shorter=cut, trained=[[side[b]] for side in trained],
        )  # fmt: skip
        if rows == "separate":
            assert batch.input_ids.shape[1] == align(counted[b] // 2)
        else:
            assert batch.real_tokens == counted[b]
    whole_row = pair_tokens(sizes, cut)
    assert (whole_row >= row_tokens(sizes, truncate_to_shorter=cut)).all()


def test_a_budget_of_tokens_holds_for_pairs_with_context():
    """A long result of a tool between two short turns is in the row, whatever the other answer's length."""
    long = np.r_[np.ones(4, bool), np.zeros(500, bool), np.ones(4, bool)]
    masks = [[long] * 16, [None] * 16]
    sizes = measure_pairs([[1] * 10] * 16, [[[1] * 508] * 16, [[1] * 8] * 16], masks)
    schedule = Schedule(
        sizes, seed=0, pairs_per_step=16, micro_batch_tokens=2048, truncate_to_shorter=True, rows="packed"
    )
    parts = schedule.micro_batches(0, 0, 1)
    assert max(map(len, parts)) == 3 and sum(map(len, parts)) == 16  # 10 + 507 + 7 tokens each


@pytest.mark.parametrize("objective", ["tbpo_q", "dpo", "sft"])
def test_the_memory_plan_traces_the_rows_and_labels_of_pairs_with_context(objective):
    plan = resolve_run(load_config(None, [f"objective.name={objective}"]))
    prompts, answers, masks = masked_pairs(6, seed=3)
    sizes = measure_pairs(prompts, answers, masks)
    traced = dummy_batch(plan, sizes)
    trained = [[np.zeros(0) if mask is None else mask for mask in side] for side in masks]
    real = collate(
        prompts, answers[: plan.sides], pad_id=0, shared=plan.sides == 2,
        truncate_to_shorter=plan.truncate_to_shorter, trained=trained[: plan.sides],
    )  # fmt: skip
    assert traced.input_ids.shape == real.input_ids.shape and traced.labels.shape == real.labels.shape
    assert (traced.real_tokens, int(traced.mask.sum())) == (real.real_tokens, int(real.mask.sum()))


def conversation(results: int) -> dict[str, object]:
    chosen = [
        {"role": "assistant", "content": "look"},
        {"role": "user", "content": "found " * results},
        {"role": "assistant", "content": "yes"},
    ]
    return {"prompt": "is it there?", "chosen": chosen, "rejected": "no, it is not there at all"}


@pytest.fixture
def prepared(write_rows, tokenizer_folder, tmp_path):
    spec = PairsSpec(write_rows([conversation(30), conversation(2)]), DataConfig(), tokenizer_folder)
    return prepare(spec, tmp_path / "cache", distributed=False, progress=False)


def test_statistics_of_prepared_pairs_are_about_trained_tokens(prepared):
    sizes = np.asarray(prepared.lengths())
    rows = list(prepared.rows())
    assert sizes.shape == (2, 9)
    trained = trained_tokens(sizes)
    assert trained[:, 0].tolist() == [sum(row["chosen_mask"]) for row in rows]
    assert trained[0, 0] == trained[1, 0] < trained[0, 1]
    assert (sizes[:, 1] > sizes[:, 2]).tolist() == [True, True]
    card = data_card(prepared)
    assert card["length_bias"]["chosen_longer"] == 0 and card["tokens"]["chosen"] == sizes[:, 1].sum()
    assert card["length_bias"]["mean_difference"] == float((trained[:, 0] - trained[:, 1]).mean())
    assert card["context_tokens"] == {"chosen": int((sizes[:, 1] - trained[:, 0]).sum()), "rejected": 0}
    assert prepared.counts["tail_tokens"] == np.abs(trained[:, 0] - trained[:, 1]).sum()
    json.dumps(card)


def test_a_dry_run_measures_what_preparing_does(prepared, write_rows, tokenizer_folder):
    source = write_rows([conversation(30), conversation(2)])
    config = load_config(None, [f"data.train={source}", f"model.name_or_path={tokenizer_folder}"])
    assert np.array_equal(estimate_data(config, tokenizer_folder).lengths, prepared.lengths())
