"""Random and hand-made token scores for the objectives' tests."""

from __future__ import annotations

import pytest
import torch
from objective_cases import random_scores

from tbpo_ray.objectives import TokenScores


@pytest.fixture
def scores() -> TokenScores:
    return random_scores()


@pytest.fixture
def hand_scores() -> TokenScores:
    """One pair of 3 and 2 tokens: r^w = (.5, -.2, .5), r^l = (-.4, .3), and a NaN where the mask is false."""
    nan = float("nan")

    def row(*values: float) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float64)

    return TokenScores(
        chosen_logps=row(-1.0, -2.0, -0.5),
        chosen_ref_logps=row(-1.5, -1.8, -1.0),
        rejected_logps=row(-2.0, -1.0, nan),
        rejected_ref_logps=row(-1.6, -1.3, nan),
        chosen_mask=torch.tensor([[True, True, True]]),
        rejected_mask=torch.tensor([[True, True, False]]),
        chosen_baseline=row(0.1, 0.2, 0.3),
        rejected_baseline=row(0.4, 0.1, nan),
        chosen_weights=row(1.0, 2.0, 0.5),
        rejected_weights=row(0.5, 1.0, nan),
        chosen_log_collision=row(-0.1, -0.2, -0.3),
        rejected_log_collision=row(-0.2, -0.4, nan),
        chosen_chunks=torch.tensor([[0, 0, 1]]),
        rejected_chunks=torch.tensor([[0, 1, -1]]),
        pair_margins=row(0.3)[0],
        pair_weights=row(2.0)[0],
    )
