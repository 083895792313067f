"""FlexAttention over rows with both answers: a candidate for `tbpo_ray.training.pair_attention` on GPUs.

The mask of a shared row is a function of two positions. Blocks of the score matrix that it rules out are
skipped, so that the prompt is attended to once and neither a dense mask nor gathered copies of queries, keys
and values exist. On a GPU the kernel is compiled on first use. On the CPU the reference implementation runs,
which has no backward pass; `gpu_check` compares the gradients with the dense mask's and takes the time.

Shapes: R rows of length L; D heads of size H.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tbpo_ray.training.batch import PairBatch


def answer_block_mask(batch: PairBatch, window: int | None = None) -> BlockMask:
    """`PairBatch.attention_mask` of a batch in the form that FlexAttention takes: [R, 1, L, L] in blocks."""
    segment, positions, pair = batch.segment, batch.position_ids, batch.pair

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        asked, asking = segment[row, key], segment[row, query]
        visible = (key <= query) & (asked >= 0) & ((asked == 0) | (asked == asking))
        if pair is not None:
            visible = visible & (pair[row, key] == pair[row, query])
        if window is not None:
            visible = visible & (positions[row, query] - positions[row, key] < window)
        # Padding sees itself: a softmax over no key at all would be NaN.
        return visible | (key == query)

    rows, length = segment.shape
    return create_block_mask(is_visible, rows, None, length, length, device=segment.device)


def flex_pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls.

    Args:
        query: [R, D, L, H]; key and value have as many heads or fewer.
        scaling: factor on the scores; default: H ** -0.5.

    Returns:
        [R, L, D, H], and None for the attention weights.

    Raises:
        ValueError: dropout on the attention weights, which FlexAttention does not have.
    """
    if options.get("dropout", 0.0) > 0:
        raise ValueError("FlexAttention has no dropout; set the model's attention_dropout to 0")
    kernel: Any = flex_attention if query.device.type == "cpu" else _compiled()
    grouped = key.shape[1] != query.shape[1]
    out: Tensor = kernel(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
