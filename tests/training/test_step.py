"""What a step asks of the scorer for each objective, and what reaches the objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tbpo_ray.objectives import TokenScores, build_objective
from tbpo_ray.training.batch import PairBatch, collate
from tbpo_ray.training.step import PreferenceStep


def make_batch(tie: Tensor | None = None) -> PairBatch:
    """Two pairs of 3 and 2, and of 1 and 3 answer tokens, with token weights and cached reference scores."""
    ids = [[np.arange(3), np.arange(1)], [np.arange(2), np.arange(3)]]
    values = [[np.linspace(-1, 0.5, len(row)) for row in side] for side in ids]
    batch = collate(
        [np.arange(4), np.arange(2)],
        ids,
        pad_id=0,
        shared=False,
        truncate_to_shorter=False,
        ref_logps=values,
        weights=values,
    )
    batch.tie = tie
    return batch


class Scorer:
    """Random scores, and a note of what was asked for."""

    def __init__(self, batch: PairBatch):
        rng = torch.Generator().manual_seed(0)
        shape = batch.labels.shape
        self.tensors = [(-torch.rand(*shape, generator=rng)).requires_grad_() for _ in range(5)]
        self.hidden = torch.rand(*shape, 8, generator=rng)
        self.outputs: tuple[str, ...] = ()

    def __call__(self, batch: PairBatch, outputs: tuple[str, ...], **options: Any) -> Any:
        self.outputs = outputs
        return (*self.tensors, self.hidden)


@pytest.mark.parametrize(
    ("section", "outputs", "metric"),
    [
        ({"name": "dpo"}, ("logp",), None),
        ({"name": "tis_dpo"}, ("logp",), None),
        (
            {"name": "tis_dpo", "alpha": 0.5},
            ("logp", "entropy", "reverse_kl", "ref_logp"),
            "kl/exact_reverse",
        ),
        ({"name": "tdpo2"}, ("logp", "entropy", "kl", "ref_logp"), "kl/exact"),
        ({"name": "t_reg", "base": "simpo"}, ("logp",), None),
        ({"name": "dpo", "pair_weights": "wpo"}, ("logp", "log_collision"), None),
        ({"name": "dpo", "pair_weights": "wpo", "wpo_alignment": "none"}, ("logp",), None),
        (
            {"name": "tdpo2", "pair_weights": "wpo"},
            ("logp", "entropy", "kl", "log_collision", "ref_logp"),
            "kl/exact",
        ),
    ],
)
def test_what_is_asked_of_the_scorer(section: dict, outputs: tuple[str, ...], metric: str | None) -> None:
    objective = build_objective(section)
    batch = make_batch()
    scorer = Scorer(batch)
    step = PreferenceStep(objective, None, "adapter_off" if objective.needs_distribution else None)
    loss, metrics = step(scorer, batch)
    assert scorer.outputs == outputs
    assert {name for name in metrics if name.startswith("kl/exact")} == ({metric} if metric else set())
    loss.backward()
    divergence = scorer.tensors[2].grad
    assert (divergence is not None and bool(divergence.any())) == (metric is not None)


def test_the_reverse_kl_is_the_baseline_of_tis_dpo() -> None:
    batch = make_batch()
    scorer = Scorer(batch)
    objective = build_objective({"name": "tis_dpo", "alpha": 0.5})
    loss, _ = PreferenceStep(objective, None, "adapter_off")(scorer, batch)
    logp, _, kl, ref, _, _ = scorer(batch, ())
    assert batch.weights is not None
    fields = {"logps": logp, "ref_logps": ref, "mask": batch.mask, "baseline": kl, "weights": batch.weights}
    sides = {f"{side}_{k}": v[i] for i, side in enumerate(("chosen", "rejected")) for k, v in fields.items()}
    torch.testing.assert_close(loss, objective(TokenScores(**sides)).per_pair_loss.sum())


def test_ties_of_the_batch_reach_the_objective() -> None:
    section = {"name": "dpo", "ties": "davidson"}
    tied, decided = make_batch(torch.tensor([True, False])), make_batch()
    loss, metrics = PreferenceStep(build_objective(section))(Scorer(tied), tied)
    other, plain = PreferenceStep(build_objective(section))(Scorer(decided), decided)
    assert metrics["ties/share"] == 0.5 and "ties/share" not in plain
    assert not torch.allclose(loss, other)
    dropped, _ = PreferenceStep(build_objective({"name": "dpo"}))(Scorer(tied), tied)
    whole, _ = PreferenceStep(build_objective({"name": "dpo"}))(Scorer(decided), decided)
    assert 0 < dropped < whole
