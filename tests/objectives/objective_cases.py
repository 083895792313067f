"""Every objective's configuration, and random token scores, for the objectives' tests."""

from __future__ import annotations

from typing import Any

import torch

from tbpo_ray.objectives import TokenScores

FIELDS = ("logps", "ref_logps", "baseline", "weights")

CONFIGS = {
    "tbpo_q": {"name": "tbpo_q", "beta": 0.5},
    "tbpo_q_centered": {"name": "tbpo_q", "beta": 0.5, "state_baseline": {"center": True, "clip": 0.3}},
    "tbpo_a": {"name": "tbpo_a", "beta": 0.5, "bregman": {"generator": "lsif"}},
    "tbpo_a_k3": {"name": "tbpo_a", "beta": 0.5, "state_baseline": {"kind": "k3"}},
    "tbpo_none": {"name": "tbpo_q", "beta": 0.5, "state_baseline": {"kind": "none"}},
    "tbpo_smooth": {"name": "tbpo_q", "beta": 0.5, "label_smoothing": 0.2},
    "dpo": {"name": "dpo", "beta": 0.5},
    "dpo_smooth": {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    "ipo": {"name": "ipo", "beta": 0.5},
    "simpo": {"name": "simpo", "beta": 0.5, "gamma": 0.5},
    "bpo": {"name": "bpo", "beta": 0.5, "bregman": {"generator": "ba", "lam": 0.5}},
    "tdpo1": {"name": "tdpo1", "beta": 0.5},
    "tdpo2": {"name": "tdpo2", "beta": 0.5},
    "tis_dpo": {"name": "tis_dpo", "beta": 0.5},
    "sepo": {"name": "sepo", "beta": 0.5, "select_ratio": 0.5},
    "t_reg": {"name": "t_reg", "beta": 0.5},
    "sft": {"name": "sft"},
}


def random_scores(
    pairs: int = 5, tokens: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True
) -> TokenScores:
    """Scores of random lengths from 1 token up, every optional field given."""
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for side in ("chosen", "rejected"):
        lengths = torch.randint(1, tokens + 1, (pairs, 1), generator=rng)
        values[f"{side}_mask"] = torch.arange(tokens) < lengths
        for field in FIELDS:
            x = torch.randn(pairs, tokens, generator=rng, dtype=torch.float64)
            x = -x.abs() if "logps" in field else x
            values[f"{side}_{field}"] = x.to(dtype).requires_grad_(grad and field in ("logps", "baseline"))
    return TokenScores(**values)


def rows(scores: TokenScores, at: object) -> TokenScores:
    """Some pairs of a batch, or some of every pair's tokens (an index into [B, T])."""
    picked: dict[str, Any] = {k: None if v is None else v[at] for k, v in vars(scores).items()}  # type: ignore[index]
    return TokenScores(**picked)
