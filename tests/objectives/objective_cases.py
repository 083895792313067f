"""Every objective's configuration, and random token scores, for the objectives' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tbpo_ray.objectives import TokenScores

FIELDS = ("logps", "ref_logps", "baseline", "weights")
PAIR_FIELDS = ("tie", "pair_margins", "pair_weights")

CONFIGS = {
    "tbpo_q": {"name": "tbpo_q", "beta": 0.5},
    "tbpo_q_centered": {"name": "tbpo_q", "beta": 0.5, "state_baseline": {"center": True, "clip": 0.3}},
    "tbpo_a": {"name": "tbpo_a", "beta": 0.5, "bregman": {"generator": "lsif"}},
    "tbpo_a_k3": {"name": "tbpo_a", "beta": 0.5, "state_baseline": {"kind": "k3"}},
    "tbpo_none": {"name": "tbpo_q", "beta": 0.5, "state_baseline": {"kind": "none"}},
    "tbpo_smooth": {"name": "tbpo_q", "beta": 0.5, "label_smoothing": 0.2},
    "dpo": {"name": "dpo", "beta": 0.5},
    "dpo_smooth": {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    "dpo_mean": {"name": "dpo", "beta": 0.5, "normalization": "token_mean"},
    "dpo_rao_kupper": {"name": "dpo", "beta": 0.5, "ties": "rao_kupper"},
    "dpo_davidson": {"name": "dpo", "beta": 0.5, "ties": "davidson", "label_smoothing": 0.1},
    "ipo": {"name": "ipo", "beta": 0.5},
    "ipo_sum": {"name": "ipo", "beta": 0.5, "normalization": "sum"},
    "simpo": {"name": "simpo", "beta": 0.5, "gamma": 0.5},
    "bpo": {"name": "bpo", "beta": 0.5, "bregman": {"generator": "ba", "lam": 0.5}},
    "bpo_plane": {
        "name": "bpo",
        "beta": 0.5,
        "normalization": "token_mean",
        "bregman": {"generator": "beta_family", "a": 0.5, "b": 2.0},
    },
    "tbpo_plane": {"name": "tbpo_q", "beta": 0.5, "bregman": {"generator": "beta_family", "a": 1, "b": 1}},
    "tdpo1": {"name": "tdpo1", "beta": 0.5},
    "tdpo2": {"name": "tdpo2", "beta": 0.5},
    "tis_dpo": {"name": "tis_dpo", "beta": 0.5},
    "tis_dpo_kl": {"name": "tis_dpo", "beta": 0.5, "alpha": 0.5},
    "sepo": {"name": "sepo", "beta": 0.5, "select_ratio": 0.7},
    "sepo_sides": {"name": "sepo", "beta": 0.5, "select_ratio": {"chosen": 0.6, "rejected": 0.2}},
    "t_reg": {"name": "t_reg", "beta": 0.5},
    "t_reg_simpo": {"name": "t_reg", "base": "simpo", "beta": 0.5, "gamma": 0.3},
    "t_reg_smooth": {"name": "t_reg", "beta": 0.5, "label_smoothing": 0.1},
    "sft": {"name": "sft"},
    "confpo": {"name": "confpo", "beta": 0.5, "gamma": 0.4},
    "confpo_smooth": {"name": "confpo", "beta": 0.5, "label_smoothing": 0.1, "nll_weight": 0.2},
    "tgdpo": {"name": "tgdpo", "beta": 0.5, "guide": {"beta": 0.8}},
    "tgdpo_smooth": {"name": "tgdpo", "beta": 0.5, "alpha": 1.5, "label_smoothing": 0.1},
    "arc_bpo": {"name": "arc_bpo", "beta": 0.5},
    "arc_bpo_advantage": {
        "name": "arc_bpo", "beta": 0.5, "arc": {"shape": "advantage", "temperature": 0.5},
        "bregman": {"lam": 0.5}, "pair_margins": "data",
    },
    "arc_bpo_lam_0": {
        "name": "arc_bpo", "beta": 0.5, "bregman": {"lam": 0, "scale": 1}, "nll_weight": 0.1,
        "arc": {"shape": "advantage", "winsorize": False},
    },
    "dpo_nll": {"name": "dpo", "beta": 0.5, "nll_weight": 0.2},
    "dpo_nll_sum": {"name": "dpo", "beta": 0.5, "nll_weight": 0.01, "nll_normalization": "sum"},
    "tbpo_nll": {"name": "tbpo_q", "beta": 0.5, "nll_weight": 0.2, "state_baseline": {"kind": "none"}},
    "dpo_margins": {"name": "dpo", "beta": 0.5, "pair_margins": "data", "label_smoothing": 0.1},
    "simpo_margins": {"name": "simpo", "beta": 0.5, "gamma": 0.5, "pair_margins": "data"},
    "t_reg_margins": {"name": "t_reg", "beta": 0.5, "pair_margins": "data"},
    "dpo_weights": {"name": "dpo", "beta": 0.5, "pair_weights": "data", "nll_weight": 0.2},
    "tbpo_weights": {
        "name": "tbpo_q", "beta": 0.5, "pair_weights": "data", "state_baseline": {"kind": "none"},
    },
    "dpo_wpo": {"name": "dpo", "beta": 0.5, "pair_weights": "wpo", "nll_weight": 0.2},
    "dpo_wpo_none": {"name": "dpo", "beta": 0.5, "pair_weights": "wpo", "wpo_alignment": "none"},
    "tbpo_wpo": {
        "name": "tbpo_q", "beta": 0.5, "pair_weights": "wpo", "state_baseline": {"kind": "none"},
    },
    "dpo_forward_kl": {"name": "dpo", "beta": 0.5, "f_divergence": {"kind": "forward_kl"}},
    "dpo_js": {"name": "dpo", "beta": 0.5, "f_divergence": {"kind": "js"}},
    "dpo_alpha": {"name": "dpo", "beta": 0.5, "f_divergence": {"kind": "alpha", "alpha": 0.3}},
    "dpo_ld": {"name": "dpo", "beta": 0.5, "ld_alpha": 0.3},
    "dpo_ld_0": {"name": "dpo", "beta": 0.5, "ld_alpha": 0},
    "dpo_ld_full": {"name": "dpo", "beta": 0.5, "ld_alpha": 0.3, "ld_reference": "full"},
    "dpo_ld_0_full": {"name": "dpo", "beta": 0.5, "ld_alpha": 0, "ld_reference": "full"},
    "dpo_ld_0_nll": {"name": "dpo", "beta": 0.5, "ld_alpha": 0, "nll_weight": 0.2},
}  # fmt: skip


def random_scores(
    pairs: int = 5,
    tokens: int = 7,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
    *,
    ties: bool = False,
) -> TokenScores:
    """Scores of random lengths from 1 token up, every optional field given; with `ties`, every second pair is
    one."""
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for side in ("chosen", "rejected"):
        lengths = torch.randint(1, tokens + 1, (pairs, 1), generator=rng)
        values[f"{side}_mask"] = torch.arange(tokens) < lengths
        for field in FIELDS:
            x = torch.randn(pairs, tokens, generator=rng, dtype=torch.float64)
            x = -x.abs() if "logps" in field else x
            values[f"{side}_{field}"] = x.to(dtype).requires_grad_(grad and field in ("logps", "baseline"))
    # Their own stream, so that the values above do not depend on them.
    rng = torch.Generator().manual_seed(seed + 1_000)
    for side in ("chosen", "rejected"):
        values[f"{side}_log_collision"] = -torch.rand(pairs, tokens, generator=rng, dtype=torch.float64).to(
            dtype
        )
        steps = torch.rand(pairs, tokens, generator=rng) < 0.5
        values[f"{side}_chunks"] = steps.cumsum(1) - steps[:, :1].long()
    for name in ("pair_margins", "pair_weights"):
        values[name] = torch.rand(pairs, generator=rng, dtype=torch.float64).to(dtype)
    if ties:
        values["tie"] = torch.arange(pairs) % 2 == 1
    return TokenScores(**values)


def rows(scores: TokenScores, at: object) -> TokenScores:
    """Some pairs of a batch, or some of every pair's tokens (an index into [B, T])."""
    pairs = at[0] if isinstance(at, tuple) else at
    picked: dict[str, Any] = {
        k: None if v is None else v[pairs if k in PAIR_FIELDS else at] for k, v in vars(scores).items()
    }
    return TokenScores(**picked)


def map_sides(scores: TokenScores, change: Callable[[str, torch.Tensor], torch.Tensor]) -> TokenScores:
    """Scores whose [B, T] fields are `change(name, field)`."""
    fields: dict[str, Any] = vars(scores)
    return TokenScores(**{k: v if v is None or k in PAIR_FIELDS else change(k, v) for k, v in fields.items()})
