"""Attention over rows [prompt][chosen][rejected], of one pair or several, in which each answer sees its
prompt and itself only.

All other layers run over such a row once. A dense mask over the whole row would make attention quadratic in
the row length in time and memory, and it rules out the fast causal kernels. So for rows that are long enough,
queries, keys and values are gathered into separate rows [prompt][chosen] and [prompt][rejected], which are
plainly causal, and the results are scattered back.

Shapes: R rows of length L, gathered into G rows of length K, one for each answer; D heads of size H.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

NAME = "pair_sdpa"
"""The name under which transformers finds this implementation."""


def use_pair_attention(model: Any) -> bool:
    """Switch a transformers model from SDPA to this implementation. Returns whether the model supports it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, pair_attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    model.set_attn_implementation(NAME)
    return True


def avoid_plans_per_shape() -> None:
    """Take cuDNN's attention out of PyTorch's choice, in this process.

    For every new shape of a micro-batch it builds a plan first, which takes about a second, and hardly two
    micro-batches have the same shape. PyTorch's own kernels need no plan.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


_rows_end_padded: ContextVar[bool] = ContextVar("rows_end_padded", default=False)


@contextmanager
def rows_end_padded() -> Iterator[None]:
    """Within the block, padding of two-dimensional masks comes after all tokens of a row."""
    token = _rows_end_padded.set(True)
    try:
        yield
    finally:
        _rows_end_padded.reset(token)


def padding_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask function that transformers calls, with the arguments and result of its `sdpa_mask`.

    With padding at the end, causal attention hides it from every token. `sdpa_mask` would look for padding in
    the mask first, which on an accelerator waits for the device, and then build a dense mask. On the CPU it
    still does: looking is free there, and the kernels for both cases round differently.
    """
    from transformers.masking_utils import sdpa_mask

    if attention_mask is not None and _rows_end_padded.get() and attention_mask.device.type != "cpu":
        attention_mask = None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **options)
    return mask


def gather_cost(device_type: str) -> float:
    """Gathering a position costs as much as this many query-key products.

    Measured on a CPU, and on an H100, where rows of up to about 1,300 tokens are faster with the dense mask.
    """
    return 100 if device_type == "cpu" else 400


def is_worthwhile(gather_index: Tensor, scatter_index: Tensor) -> bool:
    """Whether gathering costs less than masked attention over whole rows.

    Args:
        gather_index: [G, K], of rows with one answer.
        scatter_index: [R, L], of rows with more than one.
    """
    (gathered, single), (rows, length) = gather_index.shape, scatter_index.shape
    cost = gather_cost(gather_index.device.type)
    # Gathered rows are causal, which takes half of their query-key products.
    return rows * length**2 - gathered * single**2 / 2 > cost * gathered * single


def encode_indices(gather_index: Tensor, scatter_index: Tensor, window: int | None) -> Tensor:
    """Pack both indices and the window into the tensor that the model receives as its attention mask.

    Models pass four-dimensional masks on to every layer unchanged, which is the only channel from the caller
    to :func:`pair_attention`. The number of gathered rows and the window are encoded as the sizes of the
    second and the third axis, which take no memory because the tensor is expanded.

    Args:
        gather_index: [G, K] index into the R L positions.
        scatter_index: [R, L] index into the G K gathered positions.
        window: the most keys that a query sees, itself included; None for all of them.

    Returns:
        [1, G, window or 1, G K + R L] int64
    """
    gathered, longest = gather_index.shape
    windows = window if window is not None and window < longest else 1
    indices = torch.cat([gather_index.reshape(-1), scatter_index.reshape(-1)])
    return indices.expand(1, gathered, windows, -1)


def pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; plain SDPA unless the mask is from `encode_indices`.

    Args:
        query: [R, D, L, H]; key and value have as many heads or fewer.

    Returns:
        [R, L, D, H], and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, _, length, _ = query.shape
    indices, gathered, window = attention_mask[0, 0, 0], attention_mask.shape[1], attention_mask.shape[2]
    gather_index, scatter_index = indices[: -rows * length], indices[-rows * length :]
    query, key, value = (_gather(tensor, gather_index, gathered) for tensor in (query, key, value))
    mask = _band(query.shape[2], window, query.device) if window > 1 else None
    options["is_causal"] = True
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    heads, size = out.shape[2:]
    flat = out.reshape(-1, heads * size).index_select(0, scatter_index)
    return flat.view(rows, length, heads, size), None


def _gather(tensor: Tensor, gather_index: Tensor, gathered: int) -> Tensor:
    """[R, D, L, H] -> [G, D, K, H]"""
    rows, heads, length, size = tensor.shape
    flat = tensor.transpose(1, 2).reshape(rows * length, heads * size)
    return flat.index_select(0, gather_index).view(gathered, -1, heads, size).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[K, K] bool, True where the query (first axis) may see the key."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)
