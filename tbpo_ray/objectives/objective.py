"""The objectives: token scores in, a loss per pair and metrics out.

Shapes: B pairs, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tbpo_ray.config.objective import ObjectiveConfig, StateBaselineConfig
from tbpo_ray.config.objective_traits import ObjectiveName
from tbpo_ray.errors import InputError
from tbpo_ray.objectives import arc, losses, metrics, pair_terms, ties
from tbpo_ray.objectives.baseline import side_baseline
from tbpo_ray.objectives.generators import Generator
from tbpo_ray.objectives.losses import Params
from tbpo_ray.objectives.types import FIELDS, ObjectiveOutput, Side, TokenScores, clean_side, masked_mean


@dataclass(frozen=True)
class Family:
    """The formula of one objective. What it reads and its defaults are in `tbpo_ray.config.objective`.

    Attributes:
        u: the log model ratio (None for `sft`), from `losses`.
        link: "bregman" for the configured generator, "chunks" for the loss of `arc`, which u is only reported
            beside, or the function that is applied to u.
        token_level: u is [B, T] and averaged over the tokens that both answers have; otherwise u is [B].
        is_compared: which pairs have a preference loss, where an answer with tokens is not enough; the
            others have 0 and still count in the mean.
        source: where the formula comes from.
    """

    u: Callable[[Side, Side, Params], Tensor] | None
    link: Callable[[Tensor, float], Tensor] | str = losses.softplus
    token_level: bool = False
    is_compared: Callable[[Side, Side], Tensor] | None = None
    source: str = ""


FAMILIES: dict[ObjectiveName, Family] = {
    "tbpo_q": Family(losses.tbpo, "bregman", token_level=True, source="arXiv 2605.12288"),
    "tbpo_a": Family(losses.tbpo, "bregman", token_level=True, source="arXiv 2605.12288"),
    "dpo": Family(losses.dpo, source="arXiv 2305.18290"),
    "ipo": Family(losses.ipo, losses.ipo_square, source="arXiv 2310.12036"),
    "simpo": Family(losses.simpo, source="arXiv 2405.14734"),
    "bpo": Family(losses.dpo, "bregman", source="arXiv 2505.19601"),
    "tdpo1": Family(losses.tdpo1, source="arXiv 2404.11999"),
    "tdpo2": Family(losses.tdpo2, source="arXiv 2404.11999"),
    "tis_dpo": Family(losses.tis_dpo, source="arXiv 2410.04350"),
    "sepo": Family(losses.sepo, source="arXiv 2408.13518"),
    "t_reg": Family(losses.t_reg, source="arXiv 2412.02685"),
    "confpo": Family(losses.confpo, is_compared=losses.confpo_is_compared, source="arXiv 2506.08712"),
    "tgdpo": Family(losses.tgdpo, source="arXiv 2506.14574"),
    "arc_bpo": Family(losses.dpo, "chunks", source="repository Thang1703hrsh/ARC-BPO"),
    "sft": Family(None),
}
FIELD_OF_INPUT = {
    "reference": "ref_logps",
    "kl": "baseline",
    "reverse_kl": "baseline",
    "weights": "weights",
    "collision": "log_collision",
    "chunks": "chunks",
}
"""Which field of a side carries each input of an objective."""


class Objective:
    """A named objective, called on `TokenScores`. Build one with `build_objective`.

    Attributes:
        name: its configured name.
        params: beta, label_smoothing, alpha, gamma, select_ratio, normalization and the state baseline.
        generator: the Bregman generator; None if the loss of u is fixed.
        needs_reference: reads the reference's log-probs of the answer tokens.
        ties, tie_strength: what becomes of pairs marked as ties.
        needs_kl: reads (or its head reads) the exact KL(ref || policy) from both distributions.
        needs_reverse_kl: reads the exact KL(policy || ref).
        needs_samples: number of reference tokens to draw per state (`k3_sampled`), otherwise 0.
        needs_weights: reads `*_weights`: token weights, oracle scores or self-assigned rewards.
        needs_collision: reads the policy's log collision probability of each state.
        needs_chunks: reads which chunk of its answer each token belongs to.
        needs_rejected: reads the rejected answer (all but `sft`).
        pair_columns: which of `margin` and `weight` it reads, one number for each pair.
        compares_to_shorter: reads tokens only up to the shorter answer's length, so that the rest can be
            truncated. Every term of the loss decides: the NLL reads the chosen answer to its end.
        learned_baseline: a head from `build_state_baseline` must be trained with the policy.
    """

    def __init__(self, config: ObjectiveConfig, generator: Generator | None):
        self.name = config.name
        self.params = Params.from_config(config)
        self.family = FAMILIES[config.name]
        self.generator = generator
        self.ties, self.tie_strength = config.ties, config.effective_tie_strength
        self.fields = ("logps", "mask", *(FIELD_OF_INPUT[name] for name in config.inputs))
        self.needs_reference: bool = config.needs_reference
        self.needs_kl: bool = config.needs_kl
        self.needs_reverse_kl: bool = config.needs_reverse_kl
        self.needs_samples: int = config.needed_samples
        self.needs_weights: bool = config.needs_weights
        self.needs_collision: bool = config.needs_collision
        self.needs_chunks: bool = config.needs_chunks
        self.weighs_by_likelihood = config.pair_weights == "wpo"
        self.needs_rejected: bool = self.family.u is not None
        self.pair_columns = config.pair_columns
        self.compares_to_shorter: bool = self._reads_to_shorter()
        self.learned_baseline: bool = config.effective_baseline.learned

    def _reads_to_shorter(self) -> bool:
        p = self.params
        drops_rest = p.ld_alpha == 0 and p.ld_reference == "weighted"
        whole = p.nll_weight > 0 or self.weighs_by_likelihood
        return (self.family.token_level or drops_rest) and not whole

    def __repr__(self) -> str:
        return f"Objective({self.name!r}, {self.params}, {self.generator})"

    @property
    def needs_distribution(self) -> bool:
        """Whether the reference's whole distribution is needed, not only its score of the label."""
        return self.needs_kl or self.needs_reverse_kl or self.needs_samples > 0

    @property
    def state_baseline(self) -> StateBaselineConfig:
        """The settings of the state baseline, with its kind filled in."""
        return self.params.baseline

    def __call__(self, scores: TokenScores) -> ObjectiveOutput:
        """Return the loss of each pair, their mean, and metrics.

        Fields that the objective does not read may be None, for `sft` the whole rejected side. A pair with
        nothing to compare (an answer without tokens) has loss 0 and gradient 0. A NaN at a position that the
        mask selects makes the loss of its pair NaN, never a number; `check` finds its field.

        Raises:
            InputError: a field that this objective reads is None, or shapes disagree.
        """
        chosen = clean_side(scores, "chosen", self.fields)
        if self.family.u is None:
            return self._sft(chosen)
        rejected = clean_side(scores, "rejected", self.fields)
        tie = clean_tie(scores)
        u, extra = self._with_margin(self.family.u(chosen, rejected, self.params), scores)
        if self.family.link == "chunks":
            loss = self._chunk_loss(chosen, rejected, scores, extra)
        else:
            loss = self._smoothed(u, tie)
        per_pair, compared = self._reduce(loss, chosen, rejected)
        if self.family.is_compared is not None:
            selected = compared & self.family.is_compared(chosen, rejected)
            per_pair = torch.where(selected, per_pair, 0)
            extra["pairs/skipped_share"] = metrics.token_mean((~selected).to(u.dtype), compared)
        if self.name == "t_reg":
            pull = torch.where(compared, losses.t_reg_pull(u, chosen, rejected, self.params), 0)
            per_pair = per_pair + pull
            extra["loss/t_reg"] = pull.detach().mean()
        if self.weighs_by_likelihood:
            likelihood = pair_terms.wpo_weight(*self._for_likelihood(chosen, rejected))
            # A selection, as an answer without tokens has no likelihood.
            per_pair = torch.where(compared, likelihood * per_pair, per_pair)
            extra["pairs/wpo_weight"] = metrics.token_mean(likelihood, compared)
        per_pair = self._with_terms(per_pair, compared, chosen, scores, extra)
        counted: Tensor | None = None
        if tie is not None:
            extra["ties/share"] = tie.to(u.dtype).mean()
            if self.ties == "drop":
                counted = ~tie
                per_pair = torch.where(counted, per_pair, 0)
        found = self._metrics(u, chosen, rejected, compared)
        return ObjectiveOutput(per_pair, mean(per_pair, counted), found | extra)

    def _chunk_loss(
        self, chosen: Side, rejected: Side, scores: TokenScores, extra: dict[str, Tensor]
    ) -> Tensor:
        """The loss of `arc`, with its metric in `extra`. [B]"""
        margins = None
        if "margin" in self.pair_columns:
            margins = pair_terms.pair_values(scores, "pair_margins", chosen.logps.dtype)
        loss, clamped = arc.loss(chosen, rejected, margins, self.params)
        extra["arc/clamped_share"] = clamped.mean()
        return loss

    def _for_likelihood(self, chosen: Side, rejected: Side) -> tuple[Side, Side]:
        """The sides, without a collision probability that the caller gives but the settings leave out."""
        if self.needs_collision:
            return chosen, rejected
        return replace(chosen, log_collision=None), replace(rejected, log_collision=None)

    def _with_margin(self, u: Tensor, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        """u plus the margin of each pair, and the metric of the margins."""
        if "margin" not in self.pair_columns:
            return u, {}
        margins = pair_terms.pair_values(scores, "pair_margins", u.dtype)
        if self.family.link == "chunks":  # a target, not a part of u
            return u, {"pairs/margin": margins.mean()}
        return u + margins, {"pairs/margin": margins.mean()}

    def _with_terms(
        self,
        per_pair: Tensor,
        compared: Tensor,
        chosen: Side,
        scores: TokenScores,
        extra: dict[str, Tensor],
    ) -> Tensor:
        """The preference loss with the NLL term and the weight of each pair; adds metrics to `extra`. [B]"""
        if self.params.nll_weight:
            nll = torch.where(compared, pair_terms.nll(chosen, self.params.nll_normalization), 0)
            per_pair = per_pair + self.params.nll_weight * nll
            extra["loss/nll"] = nll.detach().mean()
        if "weight" in self.pair_columns:
            weights = pair_terms.pair_values(scores, "pair_weights", per_pair.dtype)
            # Not a product where there is nothing to compare: the weight of such a pair is not read.
            per_pair = torch.where(compared, weights * per_pair, per_pair)
            extra["pairs/weight"] = weights.mean()
        return per_pair

    def _smoothed(self, u: Tensor, tie: Tensor | None) -> Tensor:
        """(1 - eps) loss(u) + eps loss(-u). Same shape."""
        eps = self.params.label_smoothing
        if not eps:
            return self._link(u, tie)
        return (1 - eps) * self._link(u, tie) + eps * self._link(-u, tie)

    def _link(self, u: Tensor, tie: Tensor | None) -> Tensor:
        """The loss of u, elementwise."""
        if self.ties != "drop":
            tied = torch.zeros_like(u, dtype=torch.bool) if tie is None else tie
            return ties.loss(u, tied, self.ties, self.tie_strength)
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
            if self.generator.name == "beta_family":
                outliers = self.generator.is_outlier(u).to(u.dtype)
                found["u/outlier_share"] = metrics.token_mean(outliers, over)
        exponents = [
            losses.f_exponent(side.log_ratio.sum(-1), self.params.f_divergence)
            for side in (chosen, rejected)
            if self.params.f_divergence.kind != "reverse_kl"
        ]
        present = [exponent for exponent in exponents if exponent is not None]
        if present:
            clamped = (torch.cat(present) > losses.MAX_EXPONENT).to(u.dtype)
            found["f_divergence/clamped_share"] = metrics.token_mean(clamped, torch.cat([compared, compared]))
        if self.name == "tgdpo":
            negative = [
                (losses.stretch(side, sign, self.params) < 0)
                for side, sign in ((chosen, 1.0), (rejected, -1.0))
            ]
            found["tgdpo/negative_share"] = metrics.token_mean(
                torch.cat(negative).to(u.dtype), torch.cat([chosen.mask, rejected.mask])
            )
        token_u = self._token_u(u, chosen, rejected)
        found["rewards/token_accuracy"] = metrics.token_mean((token_u < 0).to(u.dtype), both)
        found |= self._baseline_metrics(chosen, rejected)
        return {name: value.detach() for name, value in found.items()}

    def _token_u(self, u: Tensor, chosen: Side, rejected: Side) -> Tensor:
        """A log model ratio per token, also for sequence-level objectives. [B, T]"""
        if self.family.token_level:
            return u
        if self.needs_reference:
            return rejected.log_ratio - chosen.log_ratio
        return rejected.logps - chosen.logps

    def _baseline_metrics(self, chosen: Side, rejected: Side) -> dict[str, Tensor]:
        if self.family.u is losses.tbpo and self.params.baseline.kind != "none":
            c = [side_baseline(self.params.baseline, side, "") for side in (chosen, rejected)]
            return metrics.baseline_metrics(c[0], c[1], chosen, rejected)
        if (
            (self.needs_kl or self.needs_reverse_kl)
            and chosen.baseline is not None
            and rejected.baseline is not None
        ):
            return metrics.baseline_metrics(chosen.baseline, rejected.baseline, chosen, rejected)
        return {}

    def check(self, scores: TokenScores) -> None:
        """Look for NaN at positions that the mask selects. Waits for the device, so not for every step.

        Raises:
            InputError: names each field with a NaN, its first pair and token, and how many there are.
        """
        faults = []
        for side in ("chosen", "rejected") if self.needs_rejected else ("chosen",):
            mask = getattr(scores, f"{side}_mask")
            for name in FIELDS:
                values = getattr(scores, f"{side}_{name}")
                if name in ("mask", "chunks") or values is None or mask is None:
                    continue
                at = (values.isnan() & mask.to(torch.bool)).nonzero()
                if len(at):
                    pair, token = at[0].tolist()
                    faults.append(
                        f"{side}_{name}: nan at pair {pair}, token {token} ({len(at)} in all) where the mask "
                        "is true; the model's outputs must be finite there"
                    )
        if faults:
            raise InputError(*faults)


def mean(per_pair: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over pairs, or over the counted ones; for an empty batch a zero with a gradient. Scalar."""
    if counted is None:
        return per_pair.sum() / max(1, per_pair.shape[0])
    return per_pair.sum() / counted.sum().clamp(min=1)


def clean_tie(scores: TokenScores) -> Tensor | None:
    """Which pairs are ties, [B] bool; None if the scores do not say.

    Raises:
        InputError: a shape other than [B].
    """
    if scores.tie is None:
        return None
    pairs = scores.chosen_logps.shape[0]
    if scores.tie.shape != (pairs,):
        raise InputError(f"tie: shape {tuple(scores.tie.shape)}, expected ({pairs},) (one value per pair)")
    return scores.tie.to(torch.bool)
