"""Attention over rows [prompt][chosen][rejected]: each answer attends to the prompt as if alone with it.

All other layers run over such a row once. A mask over the whole row would make attention cost its length
squared, hold as much, and keep the fast causal kernels away; so where rows are long enough for it to pay,
queries, keys and values are picked into rows [prompt][chosen] and [prompt][rejected], which are causal like
any other, and the results are put back.

R rows of length L, picked into 2 R rows of length K; D heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "pair_sdpa"
"""Under which transformers finds it."""
PICKING = 100
"""Picking a position costs as much as this many queries that attend to a key; measured on a CPU."""


def use_pair_attention(model: Any) -> bool:
    """Let a transformers model with SDPA attention take :func:`plan`; whether it can."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, pair_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def pays(length: int, alone: int) -> bool:
    """Whether picking costs less than attention over whole rows with a mask.

    Args:
        length: L, of rows with both answers.
        alone: K, of rows with one.
    """
    return length**2 - alone**2 > PICKING * 2 * alone


def plan(pick: Tensor, back: Tensor, window: int | None) -> Tensor:
    """[1, 1, window or 1, 2 R K + R L] int64: what a model gets as its mask, and hands on to every layer.

    Models hand on four-dimensional masks as they are. The third axis takes no memory: its size alone counts.

    Args:
        pick: [2 R, K] index into the R L positions.
        back: [R, L] index into the 2 R K picked ones.
        window: keys that a query sees at most, itself included; None: all.
    """
    longest = pick.shape[1]
    windows = window if window is not None and window < longest else 1
    return torch.cat([pick.reshape(-1), back.reshape(-1)]).expand(1, 1, windows, -1)


def pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [R, D, L, H], key and value of as many or fewer heads -> [R, L, D, H].

    Where `attention_mask` is no :func:`plan`, this is SDPA as it was.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, _, length, _ = query.shape
    index, window = attention_mask[0, 0, 0], attention_mask.shape[2]
    pick, back = index[: -rows * length], index[-rows * length :]
    query, key, value = (_picked(tensor, pick) for tensor in (query, key, value))
    mask = _band(query.shape[2], window, query.device) if window > 1 else None
    options["is_causal"] = True
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    heads, size = out.shape[2:]
    return out.reshape(-1, heads * size).index_select(0, back).view(rows, length, heads, size), None


def _picked(tensor: Tensor, pick: Tensor) -> Tensor:
    """[R, D, L, H] -> [2 R, D, K, H]"""
    rows, heads, length, size = tensor.shape
    flat = tensor.transpose(1, 2).reshape(rows * length, heads * size)
    return flat.index_select(0, pick).view(2 * rows, -1, heads, size).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[K, K] bool, True where the query (first axis) may see the key."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)
