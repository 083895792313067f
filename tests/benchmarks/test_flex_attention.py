"""FlexAttention over shared and packed rows: the values of the dense mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.flex_attention import answer_block_mask, flex_pair_attention
from tbpo_ray.training.batch import PairBatch, collate


def batch(*, packed: bool) -> PairBatch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, rng.integers(3, 30)) for _ in range(4)]
    answers = [[rng.integers(0, 50, rng.integers(2, 40)) for _ in range(4)] for _ in range(2)]
    return collate(prompts, answers, pad_id=0, shared=True, packed=packed, truncate_to_shorter=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_the_mask_is_that_of_the_batch(packed: bool, window: int | None) -> None:
    pairs = batch(packed=packed)
    mask = answer_block_mask(pairs, window)
    length = pairs.input_ids.shape[1]
    dense = create_mask(mask.mask_mod, pairs.input_ids.shape[0], 1, length, length, device="cpu")
    assert torch.equal(dense, pairs.attention_mask(window))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_values_are_those_of_the_dense_mask(packed: bool, window: int | None, key_value_heads: int) -> None:
    pairs = batch(packed=packed)
    rows, length = pairs.input_ids.shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, heads, length, 16) for heads in (4, key_value_heads, key_value_heads))
    mask, real = pairs.attention_mask(window), pairs.segment >= 0
    dense = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
    flex, weights = flex_pair_attention(nn.Module(), q, k, v, answer_block_mask(pairs, window), scaling=0.3)
    assert weights is None and flex.shape == (rows, length, 4, 16)
    torch.testing.assert_close(flex[real], dense.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)


def test_dropout_is_refused() -> None:
    pairs = batch(packed=False)
    q = torch.randn(*pairs.input_ids.shape, 1, 16).transpose(1, 2)
    with pytest.raises(ValueError, match="attention_dropout"):
        flex_pair_attention(nn.Module(), q, q, q, answer_block_mask(pairs), dropout=0.1)
