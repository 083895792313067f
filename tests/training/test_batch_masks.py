"""Tokens of an answer that are context only: in the rows, but not trained, compared or counted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tbpo_ray.training.batch import BatchLayout, collate, collate_columns
from tbpo_ray.training.scorer import PairScorer
from tests.device.step_cases import llama
from tests.training.layout_checks import MODELS, pairs, plain_logps


def masks(answers, seed=1):
    """Masks whose first token is trained; every third answer is trained whole."""
    rng = np.random.default_rng(seed)
    out: list[list[np.ndarray]] = []
    for side in answers:
        out.append([])
        for index, answer in enumerate(side):
            mask = rng.random(len(answer)) < 0.6
            mask[0] = True
            out[-1].append(np.zeros(0, dtype=bool) if index % 3 == 0 else mask)
    return out


def trained_tokens(answer, mask):
    return np.arange(len(answer)) if not len(mask) else np.flatnonzero(mask)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_those_of_the_trained_tokens_behind_all_tokens(make, shared, cut):
    model = make().eval()
    prompts, answers = pairs(6, seed=5)
    trained = masks(answers)
    batch = collate(prompts, answers, pad_id=0, shared=shared, truncate_to_shorter=cut, trained=trained)
    logp = PairScorer(model)(batch)[0]
    for b, prompt in enumerate(prompts):
        kept = [trained_tokens(answers[s][b], trained[s][b]) for s in range(2)]
        n = min(map(len, kept)) if cut else None
        for s in range(2):
            index = kept[s][:n]
            expected = plain_logps(model, prompt, answers[s][b])[index]
            assert batch.mask[s, b].sum() == len(index) and batch.mask[s, b, : len(index)].all()
            assert batch.labels[s, b, : len(index)].tolist() == answers[s][b][index].tolist()
            torch.testing.assert_close(logp[s, b, : len(index)], expected, atol=2e-5, rtol=1e-5)
            assert not logp[s, b, len(index) :].any()


def test_rows_end_with_the_last_trained_token():
    prompts, answers = [np.array([5])], [[np.arange(10, 40)], [np.arange(10, 20)]]
    mask = np.zeros(30, dtype=bool)
    mask[[0, 3]] = True
    trained = [[mask], [np.zeros(0, dtype=bool)]]
    batch = collate(prompts, answers, pad_id=0, shared=False, truncate_to_shorter=True, trained=trained)
    assert int((batch.segment[0] >= 0).sum()) == 1 + 3 and int((batch.segment[1] >= 0).sum()) == 1 + 1
    assert batch.labels[0, 0, :2].tolist() == [10, 13] and batch.labels[1, 0, :2].tolist() == [10, 11]


def test_values_belong_to_trained_tokens():
    prompts, answers = [np.array([5])], [[np.array([6, 7, 8])], [np.array([9, 10])]]
    columns = {
        "prompt_ids": prompts, "chosen_ids": answers[0], "rejected_ids": answers[1],
        # As they come from the stream: numbers, and nothing where all tokens are trained.
        "chosen_mask": [np.array([1, 0, 1], dtype=np.float32)],
        "rejected_mask": [np.zeros(0, dtype=np.float32)],
        "chosen_ref_logps": [np.array([-1.0, -3.0])], "rejected_ref_logps": [np.array([-4.0, -5.0])],
    }  # fmt: skip
    batch = collate_columns(columns, BatchLayout(2, 0, shared_prompt=True, truncate_to_shorter=False))
    assert batch.ref_logps is not None
    assert batch.ref_logps[0, 0, :3].tolist() == [-1.0, -3.0, 0.0]
    assert batch.ref_logps[1, 0, :2].tolist() == [-4.0, -5.0]
    columns["chosen_mask"] = [np.array([True])]
    with pytest.raises(ValueError, match="1 values for 3 tokens"):
        collate_columns(columns, BatchLayout(2, 0, shared_prompt=True, truncate_to_shorter=False))


def test_masks_that_train_everything_change_nothing():
    prompts, answers = pairs(5)
    whole = [[np.ones(len(a), dtype=bool) for a in side] for side in answers]
    padded = partial(collate, prompts, answers, pad_id=0, shared=True, truncate_to_shorter=True)
    one, two = padded(), padded(trained=whole)
    for name, value in one.__dict__.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(two, name)), name


def test_no_gradient_comes_from_the_labels_of_context():
    """Another token as the last context token changes what follows it, but is itself no label."""
    prompts, answers = [np.array([5, 6])], [[np.array([7, 8, 9])]]
    grads = []
    for mask in (np.array([True, False, False]), np.array([True, False, True])):
        model = llama().train()
        batch = collate(prompts, answers, pad_id=0, shared=False, truncate_to_shorter=False, trained=[[mask]])
        assert 8 not in batch.labels[batch.mask].tolist()
        PairScorer(model)(batch)[0].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.allclose(grads[0], grads[1])
