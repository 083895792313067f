"""What a policy says of every token of preference pairs: log-ratio, state baseline, advantage.

Shape letters: P pairs, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tbpo_ray.data.tokenize import TokenizedPair
from tbpo_ray.evaluation.reference_kl import length_batches

_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class TokenCredit:
    """One answer, a number for each of its tokens, in nats.

    Attributes:
        log_ratio: r_t = log pi - log pi_ref of the token.
        baseline: c_t of the state it was taken in: the learned b_phi(s_t) where the policy was exported with
            one (TBPO-Q), the exact KL(pi_ref || pi) otherwise (TBPO-A's).
    """

    log_ratio: list[float]
    baseline: list[float]

    @property
    def advantage(self) -> list[float]:
        """r_t + c_t. With the KL as baseline it is how far the token's log-ratio lies above the mean that the
        reference expects in that state, E_ref[r] = -KL(pi_ref || pi); with the learned one it estimates
        Q / beta (arXiv 2605.12288)."""
        return [r + c for r, c in zip(self.log_ratio, self.baseline, strict=True)]


def token_credit(
    pairs: Sequence[TokenizedPair], policy: str, reference: str, device: str
) -> list[tuple[TokenCredit, TokenCredit]]:
    """Credit of the tokens of both answers, chosen and rejected, for each of P pairs.

    Policy and reference are held together and run in the same code and precision: float32 on a CPU, bfloat16
    on a GPU.

    Args:
        policy, reference: model folders that share their token ids.
    """
    import numpy as np
    import torch

    from tbpo_ray.models.baseline_head import load_state_baseline
    from tbpo_ray.models.load import inference_dtype, load_model, quiet_transformers
    from tbpo_ray.training.batch import collate
    from tbpo_ray.training.scorer import PairScorer

    quiet_transformers()
    dtype = inference_dtype(device)
    models: list[Any] = [load_model(folder, dtype=dtype) for folder in (policy, reference)]
    ours, theirs = (PairScorer(model.to(device)).eval() for model in models)
    head = load_state_baseline(policy)
    if head is not None:
        head.to(device).eval()
    sizes = [2 * (len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs]
    out: list[tuple[TokenCredit, TokenCredit]] = [(TokenCredit([], []),) * 2] * len(pairs)
    with torch.inference_mode():
        for batch in length_batches(sizes, _BATCH_TOKENS):
            answers = [[np.array(ids) for ids in (pairs[i].chosen_ids, pairs[i].rejected_ids)] for i in batch]
            tensors = collate(
                [np.array(pairs[i].prompt_ids) for i in batch],
                [[a[0] for a in answers], [a[1] for a in answers]],
                pad_id=0,
                shared=False,
                truncate_to_shorter=False,
            ).to(device)
            logp, _, kl, ref_logp, hidden = ours(
                tensors, outputs=("logp", "kl", "ref_logp"), reference=theirs.output_layer_inputs(tensors)
            )
            baseline = kl if head is None else head(hidden, kl)
            ratio = logp - ref_logp
            for row, i in enumerate(batch):
                sides = [
                    TokenCredit(ratio[s, row, : len(ids)].tolist(), baseline[s, row, : len(ids)].tolist())
                    for s, ids in enumerate(answers[row])
                ]
                out[i] = (sides[0], sides[1])
    return out
