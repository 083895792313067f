"""An objective: token scores in, a loss per pair and metrics out.

Shapes: B pairs, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.objectives import losses, metrics
from tbpo_ray.objectives.baseline import StateBaseline, side_baseline
from tbpo_ray.objectives.generators import Generator
from tbpo_ray.objectives.losses import Params
from tbpo_ray.objectives.types import FIELDS, ObjectiveOutput, Side, TokenScores, clean_side, masked_mean


@dataclass(frozen=True)
class Family:
    """What sets one named objective apart from the others.

    Attributes:
        u: its log model ratio (None for `sft`), from `losses`.
        link: "bregman" (the configured generator), or the function put on u.
        token_level: u is [B, T] and averaged over the tokens both answers have; otherwise u is [B].
        reads: fields of a side beyond `logps` and `mask`.
        beta, alpha: the source's defaults.
        source: where the formula comes from.
    """

    u: Callable[[Side, Side, Params], Tensor] | None
    link: Callable[[Tensor, float], Tensor] | str = losses.softplus
    token_level: bool = False
    reads: tuple[str, ...] = ("ref_logps",)
    beta: float = 0.1
    alpha: float = 0.5
    source: str = ""


WITH_KL = ("ref_logps", "baseline")
WITH_WEIGHTS = ("ref_logps", "weights")

FAMILIES: dict[str, Family] = {
    "tbpo_q": Family(losses.tbpo, "bregman", token_level=True, source="arXiv 2605.12288"),
    "tbpo_a": Family(losses.tbpo, "bregman", token_level=True, source="arXiv 2605.12288"),
    "dpo": Family(losses.dpo, source="arXiv 2305.18290"),
    "ipo": Family(losses.ipo, losses.ipo_square, source="arXiv 2310.12036"),
    "simpo": Family(losses.simpo, reads=(), beta=2.0, source="arXiv 2405.14734"),
    "bpo": Family(losses.dpo, "bregman", source="arXiv 2505.19601"),
    "tdpo1": Family(losses.tdpo1, reads=WITH_KL, source="arXiv 2404.11999"),
    "tdpo2": Family(losses.tdpo2, reads=WITH_KL, source="arXiv 2404.11999"),
    "tis_dpo": Family(losses.tis_dpo, reads=WITH_WEIGHTS, source="arXiv 2410.04350"),
    "sepo": Family(losses.sepo, reads=("weights",), beta=2.0, source="arXiv 2408.13518"),
    "t_reg": Family(losses.dpo, reads=WITH_WEIGHTS, alpha=0.1, source="arXiv 2412.02685"),
    "sft": Family(None, reads=()),
}


class Objective:
    """A named objective, called on `TokenScores`. Build one with `build_objective`.

    Attributes:
        name: its configured name.
        params: beta, label_smoothing, alpha, gamma, select_ratio and the state baseline.
        generator: the Bregman generator, None where the loss of u is fixed.
        needs_reference: reads per-token reference log-probs.
        needs_kl: reads (or its head reads) the exact KL from both distributions.
        needs_samples: reference tokens to draw per state (`k3_sampled`), otherwise 0.
        needs_weights: reads `*_weights`: token weights, oracle scores or self-given rewards.
        needs_rejected: reads the rejected answer (all but `sft`).
        compares_to_shorter: reads tokens up to the shorter answer only: the rest may be cut off.
        learned_baseline: a head from `build_state_baseline` has to be trained beside the policy.
    """

    def __init__(self, name: str, params: Params, generator: Generator | None):
        self.name = name
        self.params = params
        self.family = FAMILIES[name]
        self.generator = generator
        tbpo = self.family.u is losses.tbpo
        baseline = params.baseline
        self.needs_reference: bool = "ref_logps" in self.family.reads
        self.needs_kl: bool = baseline.needs_kl if tbpo else "baseline" in self.family.reads
        self.needs_samples: int = baseline.samples if tbpo and baseline.kind == "k3_sampled" else 0
        self.needs_weights: bool = "weights" in self.family.reads
        self.needs_rejected: bool = self.family.u is not None
        self.compares_to_shorter: bool = self.family.token_level
        self.learned_baseline: bool = tbpo and baseline.learned

    def __repr__(self) -> str:
        return f"Objective({self.name!r}, {self.params}, {self.generator})"

    @property
    def state_baseline(self) -> StateBaseline:
        """The state baseline's settings."""
        return self.params.baseline

    def __call__(self, scores: TokenScores) -> ObjectiveOutput:
        """Loss of each pair, their mean, and metrics.

        A pair with nothing to compare (an answer without tokens) has loss 0 and gradient 0. A NaN at a
        masked-in position makes the loss of its pair NaN, never a number; `check` names the culprit.

        Raises:
            InputError: a field this objective reads is missing, or shapes disagree.
        """
        reads = ("logps", "mask", *self.family.reads)
        chosen = clean_side(scores, "chosen", reads)
        if self.family.u is None:
            return self._sft(chosen)
        rejected = clean_side(scores, "rejected", reads)
        u = self.family.u(chosen, rejected, self.params)
        per_pair, compared = self._reduce(self._smoothed(u), chosen, rejected)
        extra: dict[str, Tensor] = {}
        if self.name == "t_reg":
            penalty = torch.where(compared, losses.t_reg_penalty(chosen, rejected, self.params), 0)
            per_pair = per_pair + penalty
            extra["loss/t_reg"] = penalty.detach().mean()
        return ObjectiveOutput(per_pair, mean(per_pair), self._metrics(u, chosen, rejected, compared) | extra)

    def _smoothed(self, u: Tensor) -> Tensor:
        """(1 - eps) loss(u) + eps loss(-u). Same shape."""
        eps = self.params.label_smoothing
        return (1 - eps) * self._link(u) + eps * self._link(-u) if eps else self._link(u)

    def _link(self, u: Tensor) -> Tensor:
        """The loss of u, elementwise."""
        if callable(self.family.link):
            return self.family.link(u, self.params.beta)
        assert self.generator is not None
        return self.generator.loss(u)

    def _reduce(self, loss: Tensor, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor]:
        """Loss per pair [B], and which pairs have something to compare [B]."""
        compared = chosen.mask.any(-1) & rejected.mask.any(-1)
        if self.family.token_level:
            return masked_mean(loss, chosen.mask & rejected.mask), compared
        return torch.where(compared, loss, 0), compared

    def _sft(self, chosen: Side) -> ObjectiveOutput:
        per_pair = losses.sft(chosen)
        with torch.no_grad():
            found = {
                "logps/chosen": chosen.logps.sum(-1).mean(),
                "token_nll": metrics.token_mean(-chosen.logps, chosen.mask),
            }
            if chosen.ref_logps is not None:
                found["logps/chosen_drift"] = chosen.log_ratio.sum(-1).mean()
        return ObjectiveOutput(per_pair, mean(per_pair), {k: v.detach() for k, v in found.items()})

    @torch.no_grad()
    def _metrics(self, u: Tensor, chosen: Side, rejected: Side, compared: Tensor) -> dict[str, Tensor]:
        both = chosen.mask & rejected.mask
        over = both if self.family.token_level else compared
        found = metrics.pair_metrics(chosen, rejected, self.params.beta, self.needs_reference)
        found["u/mean"] = metrics.token_mean(u, over)
        if self.generator is not None:
            clamped = self.generator.is_clamped(u).to(u.dtype)
            found["u/clamped_share"] = metrics.token_mean(clamped, over)
        if self.family.token_level:
            token_u = u
        elif self.needs_reference:
            token_u = rejected.log_ratio - chosen.log_ratio
        else:
            token_u = rejected.logps - chosen.logps
        found["rewards/token_accuracy"] = metrics.token_mean((token_u < 0).to(u.dtype), both)
        if self.family.u is losses.tbpo and self.params.baseline.kind != "none":
            c = [side_baseline(self.params.baseline, side, "") for side in (chosen, rejected)]
            found |= metrics.baseline_metrics(c[0], c[1], chosen, rejected)
        elif chosen.baseline is not None and rejected.baseline is not None and self.needs_kl:
            found |= metrics.baseline_metrics(chosen.baseline, rejected.baseline, chosen, rejected)
        return {name: value.detach() for name, value in found.items()}

    def check(self, scores: TokenScores) -> None:
        """Look for NaN at masked-in positions. Waits for the device: a diagnosis, not for every step.

        Raises:
            InputError: naming each field with a NaN, its first pair and token, and how many there are.
        """
        faults = []
        for side in ("chosen", "rejected") if self.needs_rejected else ("chosen",):
            mask = getattr(scores, f"{side}_mask")
            for name in FIELDS:
                values = getattr(scores, f"{side}_{name}")
                if name == "mask" or values is None or mask is None:
                    continue
                at = (values.isnan() & mask.to(torch.bool)).nonzero()
                if len(at):
                    pair, token = at[0].tolist()
                    faults.append(
                        f"{side}_{name}: nan at pair {pair}, token {token} ({len(at)} in all) where the mask "
                        "is true; the model's outputs have to be finite there"
                    )
        if faults:
            raise InputError(*faults)


def mean(per_pair: Tensor) -> Tensor:
    """Mean over pairs; a zero that can be differentiated for an empty batch. Scalar."""
    return per_pair.sum() / max(1, per_pair.shape[0])
