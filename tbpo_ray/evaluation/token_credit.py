"""Per-token scores of preference pairs under a policy: log-ratio, state baseline, advantage.

Shape letters: S sides (chosen, rejected), P pairs of a batch, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tbpo_ray.data.tokenize import TokenizedPair
from tbpo_ray.evaluation.scoring import length_batches, load_scorer

if TYPE_CHECKING:
    import torch

    from tbpo_ray.training.batch import PairBatch
    from tbpo_ray.training.scorer import OutputLayerInputs, PairScorer

TURN_BATCHES = 64
"""Batches that one model scores before the other takes its turn; their hidden states wait on the host."""


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

    Policy and reference run the same code in the same precision, float32 on a CPU and bfloat16 on a GPU, so
    that equal models have log-ratios of exactly 0. They take turns on the device, so that it has to hold one
    of them and the output layer of the other.

    Args:
        policy, reference: model folders that share their token ids.
        attention: `model.attention`.
    """
    import torch

    models = _CreditModels(policy, reference, device, attention)
    sizes = [2 * (len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs]
    credits: list[tuple[TokenCredit, TokenCredit]] = [(TokenCredit([], []),) * 2] * len(pairs)
    batches = length_batches(sizes)
    with torch.inference_mode():
        for start in range(0, len(batches), TURN_BATCHES):
            turn = batches[start : start + TURN_BATCHES]
            scored = models.score([_collate([pairs[i] for i in indices]) for indices in turn])
            for indices, found in zip(turn, scored, strict=True):
                for i, credit in zip(indices, found, strict=True):
                    credits[i] = credit
    return credits


class _CreditModels:
    """A policy with its learned state baseline, if it has one, and the reference; one is on the device."""

    def __init__(self, policy: str, reference: str, device: str, attention: str):
        import torch

        from tbpo_ray.models.baseline_head import load_state_baseline

        self.device = torch.device(device)
        self.reference = load_scorer(reference, device, attention)
        self.reference.to("cpu")
        self.policy = load_scorer(policy, device, attention)
        self.policy.to("cpu")
        self.head: Any = load_state_baseline(policy)
        if self.head is not None:
            self.head.to(device).eval()

    def score(self, batches: Sequence[PairBatch]) -> list[list[tuple[TokenCredit, TokenCredit]]]:
        """The credits of chosen and rejected answers, for each pair of each batch."""
        with _on_device(self.reference, self.device):
            hidden = []
            for batch in batches:
                # Weight and bias stay on the device when the model leaves it.
                states, weight, bias = self.reference.output_layer_inputs(batch.to(self.device))
                hidden.append(states.cpu())
        with _on_device(self.policy, self.device):
            return [
                self._score_policy(batch.to(self.device), (states.to(self.device), weight, bias))
                for batch, states in zip(batches, hidden, strict=True)
            ]

    def _score_policy(
        self, batch: PairBatch, reference: OutputLayerInputs
    ) -> list[tuple[TokenCredit, TokenCredit]]:
        logp, _, kl, ref_logp, _, hidden = self.policy(
            batch, outputs=("logp", "kl", "ref_logp"), reference=reference
        )
        baseline = kl if self.head is None else self.head(hidden, kl)
        sides = []
        for ratios, baselines, lengths in zip(
            (logp - ref_logp).tolist(), baseline.tolist(), batch.mask.sum(-1).tolist(), strict=True
        ):
            rows = zip(ratios, baselines, lengths, strict=True)
            sides.append([TokenCredit(ratio[:n], base[:n]) for ratio, base, n in rows])
        return list(zip(*sides, strict=True))


@contextmanager
def _on_device(scorer: PairScorer, device: torch.device) -> Iterator[None]:
    """Keep the model on the device while the block runs, and on the host otherwise."""
    scorer.to(device)
    try:
        yield
    finally:
        scorer.to("cpu")


def _collate(pairs: Sequence[TokenizedPair]) -> PairBatch:
    import numpy as np

    from tbpo_ray.training.batch import collate

    answers = [[np.array(p.chosen_ids) for p in pairs], [np.array(p.rejected_ids) for p in pairs]]
    prompts = [np.array(p.prompt_ids) for p in pairs]
    return collate(prompts, answers, pad_id=0, shared=False, truncate_to_shorter=False)
