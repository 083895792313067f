"""Forward passes for evaluation: load a model as a scorer, and batch sequences of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tbpo_ray.training.scorer import PairScorer

MAX_BATCH_TOKENS = 8192
"""Padded tokens of one forward pass; whole logits are never in memory, so the vocabulary does not matter."""


def load_scorer(model: str, device: str, attention: str = "sdpa") -> PairScorer:
    """Load a model folder in float32 on a CPU, in bfloat16 on a GPU.

    Args:
        attention: `model.attention`; see :func:`tbpo_ray.models.attention.choose_attention`.
    """
    import torch

    from tbpo_ray.models.attention import cpu_attention
    from tbpo_ray.models.load import inference_dtype, load_model, quiet_transformers
    from tbpo_ray.training.scorer import PairScorer

    quiet_transformers()
    if device == "cpu":
        attention = cpu_attention(attention)
    network = load_model(model, dtype=inference_dtype(device), attention=attention)
    network.to(torch.device(device))  # type: ignore[arg-type]
    return PairScorer(network).eval()


def length_batches(sizes: Sequence[int], max_tokens: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Group sequences of similar length so that a batch, padded to its longest one, has at most `max_tokens`.

    Returns:
        Indices of the sequences, the shortest first. A sequence longer than `max_tokens` forms its own batch;
        sequences of length 0 are skipped.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if not sizes[i]:
            continue
        if batches and sizes[i] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
