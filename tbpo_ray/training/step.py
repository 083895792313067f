"""One micro-batch through scorer, baseline and objective. Plain torch: every loop runs this code.

Shapes: B pairs, S sides (chosen, rejected), T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tbpo_ray.objectives import Objective, distribution_metrics
from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.scorer import PairScorer, ScorerOutputs, to_scores


class PreferenceStep:
    """Turns a batch into a loss.

    Args:
        objective: from `build_objective`.
        head: learned state baseline, if the objective has one.
        reference: a scorer of the frozen reference, or `adapter_off` for the policy itself with its LoRA
            adapter disabled; None with cached scores or without a reference.
        seed: seeds the tokens drawn for `k3_sampled`.
    """

    def __init__(
        self,
        objective: Objective,
        head: nn.Module | None = None,
        reference: PairScorer | Literal["adapter_off"] | None = None,
        *,
        seed: int = 0,
    ):
        self.objective = objective
        self.head = head
        self.is_live = reference is not None and objective.needs_reference
        self.reference = reference if self.is_live else None
        self.outputs = self._outputs()
        self.seed = seed
        self.sides = 2 if objective.needs_rejected else 1
        self.needs_distribution = objective.needs_distribution

    def _outputs(self) -> tuple[str, ...]:
        """What the scorer has to return for this objective."""
        names: tuple[str, ...] = ("logp",)
        if self.objective.needs_kl:
            names = ("logp", "entropy", "kl")
        elif self.objective.needs_reverse_kl:
            names = ("logp", "entropy", "reverse_kl")
        elif self.objective.needs_samples:
            names = ("logp", "k3")
        if self.objective.needs_collision:
            names = (*names, "log_collision")
        return (*names, "ref_logp") if self.is_live else names

    def __call__(
        self, forward: Callable[..., ScorerOutputs], batch: PairBatch, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of the batch's per-pair losses (differentiable) and its metrics (means).

        Args:
            forward: the scorer, or an engine around it.
            step: the optimizer step, from which random draws are seeded.
        """
        reference: Any = self.reference
        if isinstance(reference, PairScorer):
            reference = reference.output_layer_inputs(batch)
        generator = None
        if self.objective.needs_samples:
            generator = torch.Generator(batch.labels.device).manual_seed(self.seed * 1_000_003 + step)
        logp, entropy, divergence, ref_logp, log_collision, hidden = forward(
            batch,
            outputs=self.outputs,
            reference=reference,
            samples=self.objective.needs_samples,
            generator=generator,
        )
        baseline: Tensor | None = None
        if self.head is not None:
            baseline = self.head(hidden, divergence if self.objective.needs_kl else None, batch.mask)
        elif self.needs_distribution:
            baseline = divergence
        scores = to_scores(
            logp,
            batch,
            baseline,
            ref_logp if self.is_live else None,
            log_collision if self.objective.needs_collision else None,
        )
        result = self.objective(scores)
        metrics = dict(result.metrics)
        if self.objective.needs_kl or self.objective.needs_reverse_kl:
            names = ("chosen", "rejected")
            metrics |= distribution_metrics(
                dict(zip(names, entropy, strict=True)),
                dict(zip(names, divergence, strict=True)),
                dict(zip(names, batch.mask, strict=True)),
                kl_name="kl/exact" if self.objective.needs_kl else "kl/exact_reverse",
            )
        metrics |= getattr(self.head, "metrics", {})
        return result.per_pair_loss.sum(), metrics
