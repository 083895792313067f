"""One micro-batch through scorer, baseline and objective. Plain torch: the same under every loop.

B pairs, S sides (chosen, rejected), T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tbpo_ray.objectives import Objective, distribution_metrics
from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.scorer import PairScorer, to_scores


class PreferenceStep:
    """Turns a batch into a loss.

    Args:
        objective: from `build_objective`.
        head: learned state baseline, where the objective has one.
        reference: a scorer of the frozen reference; `None` with cached scores, or when none is needed.
        adapter_off: the reference is the policy itself with its adapter off.
        seed: of the tokens drawn for `k3_sampled`.
    """

    def __init__(
        self,
        objective: Objective,
        head: nn.Module | None = None,
        reference: PairScorer | None = None,
        *,
        adapter_off: bool = False,
        seed: int = 0,
    ):
        self.objective = objective
        self.head = head
        self.reference = reference
        self.adapter_off = adapter_off
        self.want: tuple[str, ...] = ("logp",)
        if objective.needs_kl:
            self.want = ("logp", "entropy", "kl")
        elif objective.needs_samples:
            self.want = ("logp", "k3")
        self.seed = seed
        self.sides = 2 if objective.needs_rejected else 1
        self.needs_distribution = objective.needs_kl or objective.needs_samples > 0

    def __call__(
        self, forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], batch: PairBatch, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of the batch's per-pair losses (differentiable) and its metrics (means).

        Args:
            forward: the scorer, or an engine around it.
            step: optimizer step, which seeds what is drawn in it.
        """
        reference, ref_logps = self._reference(batch)
        generator = None
        if self.objective.needs_samples:
            generator = torch.Generator(batch.labels.device).manual_seed(self.seed * 1_000_003 + step)
        out = forward(
            batch,
            want=self.want,
            reference=reference,
            samples=self.objective.needs_samples,
            generator=generator,
        )
        _, entropy, divergence, hidden = out
        baseline: Tensor | None = None
        if self.head is not None:
            baseline = self.head(hidden, divergence if self.objective.needs_kl else None)
        elif self.needs_distribution:
            baseline = divergence
        result = self.objective(to_scores(out, batch, baseline, ref_logps))
        metrics = dict(result.metrics)
        if self.objective.needs_kl:
            names = ("chosen", "rejected")
            metrics |= distribution_metrics(
                dict(zip(names, entropy, strict=True)),
                dict(zip(names, divergence, strict=True)),
                dict(zip(names, batch.mask, strict=True)),
            )
        metrics |= getattr(self.head, "metrics", {})
        return result.per_pair_loss.sum(), metrics

    def _reference(self, batch: PairBatch) -> tuple[Any, Tensor | None]:
        """The reference's output triple where its distribution is needed, and its log-probs [S, B, T]."""
        if self.reference is None or not self.objective.needs_reference:
            return None, None
        with torch.no_grad():
            if self.needs_distribution:
                triple = self.reference.as_reference(batch, adapter_off=self.adapter_off)
                logp = self.reference.score_hidden(triple, batch)
                return triple, logp
            return None, self.reference.reference_logps(batch, adapter_off=self.adapter_off)
