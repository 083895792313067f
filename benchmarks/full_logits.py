"""The scorer that ours is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.scorer import PairScorer, ScorerOutputs


class FullLogitsScorer(PairScorer):
    """The plain output layer: logits of every position, log-softmax over them, then the labels' values."""

    def label_logps(self, batch: PairBatch) -> Tensor:
        """[S, B, T]"""
        logits = self.output_layer(self.states(batch))
        logp = torch.log_softmax(logits.float(), -1).view(-1, logits.shape[-1])
        return logp[batch.predict, batch.labels] * batch.mask

    def forward(self, batch: PairBatch, *_: Any, reference: Any = None, **__: Any) -> ScorerOutputs:
        logp = self.label_logps(batch)
        zeros = torch.zeros_like(logp)
        return logp, zeros, zeros, reference[0] if reference is not None else zeros, zeros, zeros[..., None]

    @torch.no_grad()
    def output_layer_inputs(self, batch: PairBatch, **_: Any) -> Any:
        return self.label_logps(batch), None, None
