"""Lengths of preference pairs as they occur in real data. Imports NumPy only."""

from __future__ import annotations

import math

import numpy as np

# fmt: off
_HH_QUANTILES = np.array([
    [9, 14, 16, 19, 22, 29, 41, 54, 63, 74, 86, 97, 109, 122, 135, 152, 173, 204, 250, 319, 385,
     506, 554, 780],
    [2, 7, 9, 11, 13, 15, 17, 19, 21, 24, 27, 30, 34, 39, 44, 51, 59, 71, 85, 113, 141, 183, 212, 250],
    [2, 7, 10, 12, 15, 18, 21, 24, 27, 31, 35, 40, 45, 51, 56, 63, 72, 85, 105, 137, 170, 232, 251, 546],
])
# fmt: on
_HH_SHARES = np.array([*np.arange(0, 100, 5), 97.5, 99, 99.5, 100]) / 100
"""Quantiles of the tokens of prompt, chosen and rejected, measured on HH-RLHF's harmless-base test split
(2,307 pairs with one prompt) with Llama 3's tokenizer, including BOS and EOS."""
_HH_RANK_CORRELATION = np.array([[1.0, 0.255, 0.251], [0.255, 1.0, 0.300], [0.251, 0.300, 1.0]])
"""Spearman rank correlations between the same three."""
LENGTHS = ("hh_rlhf", "ultrafeedback")


def sample_lengths(kind: str, pairs: int, seed: int = 0) -> np.ndarray:
    """[pairs, 3] tokens of prompt, chosen and rejected.

    `hh_rlhf`: evenly spaced quantiles of the measured distribution, joined by a Gaussian copula with the
    measured rank correlations. `ultrafeedback`: prompts of 150 tokens, answers of 150 to 600.
    """
    rng = np.random.default_rng(seed)
    if kind == "ultrafeedback":
        shares = (rng.permuted(np.tile(np.arange(pairs), (2, 1)), axis=1) + 0.5) / pairs
        answers = np.round(150 + 450 * shares).astype(int).T
        return np.column_stack([np.full(pairs, 150), answers])
    factor = np.linalg.cholesky(2 * np.sin(math.pi / 6 * _HH_RANK_CORRELATION))
    ranks = (rng.standard_normal((pairs, 3)) @ factor.T).argsort(axis=0).argsort(axis=0)
    shares = (ranks + 0.5) / pairs
    columns = [np.interp(shares[:, i], _HH_SHARES, _HH_QUANTILES[i]) for i in range(3)]
    return np.round(np.column_stack(columns)).astype(int)
