"""Per-token scores of preference pairs under a policy: log-ratio, state baseline, advantage.

Shape letters: S sides (chosen, rejected), P pairs of a batch, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tbpo_ray.data.tokenize import TokenizedPair
from tbpo_ray.evaluation.scoring import length_batches, load_scorer

if TYPE_CHECKING:
    from torch import Tensor

    from tbpo_ray.training.batch import PairBatch


@dataclass(frozen=True)
class TokenCredit:
    """The scores of one answer, one number per token, in nats.

    Attributes:
        log_ratio: r_t = log pi - log pi_ref of the token.
        baseline: c_t of the state before the token: the learned b_phi(s_t) where the policy was exported with
            one (TBPO-Q), otherwise the exact KL(pi_ref || pi) (TBPO-A).
    """

    log_ratio: list[float]
    baseline: list[float]

    @property
    def advantage(self) -> list[float]:
        """r_t + c_t.

        With the KL as baseline this is the token's log-ratio minus its expectation under the reference in
        that state, E_ref[r] = -KL(pi_ref || pi). With the learned baseline it estimates Q / beta
        (arXiv 2605.12288).
        """
        return [r + c for r, c in zip(self.log_ratio, self.baseline, strict=True)]


def token_credit(
    pairs: Sequence[TokenizedPair], policy: str, reference: str, device: str, attention: str = "sdpa"
) -> list[tuple[TokenCredit, TokenCredit]]:
    """Score the tokens of both answers, chosen and rejected, of each pair.

    Policy and reference are in memory together and run the same code in the same precision, float32 on a CPU
    and bfloat16 on a GPU, so that equal models have log-ratios of exactly 0.

    Args:
        policy, reference: model folders that share their token ids.
        attention: `model.attention`.
    """
    import torch

    models = _CreditModels(policy, reference, device, attention)
    sizes = [2 * (len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs]
    credits: list[tuple[TokenCredit, TokenCredit]] = [(TokenCredit([], []),) * 2] * len(pairs)
    with torch.inference_mode():
        for indices in length_batches(sizes):
            batch = _collate([pairs[i] for i in indices]).to(device)
            ratios, baselines = models.score(batch)
            lengths = batch.mask.sum(-1).tolist()
            for row, i in enumerate(indices):
                chosen, rejected = (
                    TokenCredit(
                        ratios[s, row, : lengths[s][row]].tolist(),
                        baselines[s, row, : lengths[s][row]].tolist(),
                    )
                    for s in range(2)
                )
                credits[i] = (chosen, rejected)
    return credits


class _CreditModels:
    """A policy with its learned state baseline, if it has one, and the reference."""

    def __init__(self, policy: str, reference: str, device: str, attention: str):
        from tbpo_ray.models.baseline_head import load_state_baseline

        self.policy = load_scorer(policy, device, attention)
        self.reference = load_scorer(reference, device, attention)
        self.head: Any = load_state_baseline(policy)
        if self.head is not None:
            self.head.to(device).eval()

    def score(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Log-ratios and baselines of the answer tokens, both [S, P, T]."""
        logp, _, kl, ref_logp, hidden = self.policy(
            batch, outputs=("logp", "kl", "ref_logp"), reference=self.reference.output_layer_inputs(batch)
        )
        return logp - ref_logp, kl if self.head is None else self.head(hidden, kl)


def _collate(pairs: Sequence[TokenizedPair]) -> PairBatch:
    import numpy as np

    from tbpo_ray.training.batch import collate

    answers = [[np.array(p.chosen_ids) for p in pairs], [np.array(p.rejected_ids) for p in pairs]]
    prompts = [np.array(p.prompt_ids) for p in pairs]
    return collate(prompts, answers, pad_id=0, shared=False, truncate_to_shorter=False)
