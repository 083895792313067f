"""The section `objective`: which loss, and everything that belongs to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tbpo_ray.config.base import Count, NonNegative, Positive, Section

ObjectiveName = Literal[
    "tbpo_q", "tbpo_a", "dpo", "ipo", "simpo", "bpo", "tdpo1", "tdpo2", "tis_dpo", "sepo", "t_reg", "sft"
]
BaselineKind = Literal["none", "learned", "exact_kl", "k3", "k3_sampled", "mixed"]


class BregmanConfig(Section):
    generator: Literal["logistic", "kliep", "lsif", "ba", "sba"] = "sba"
    """The Bregman generator h."""
    lam: Annotated[float, Field(gt=-1, allow_inf_nan=False)] = 0.0
    """Power of `ba` and `sba`; ignored by the others."""
    scale: Positive = 4.0
    """Scale of `sba`; 4 gives it the gradient of `logistic` at u = 0."""


class StateBaselineConfig(Section):
    kind: BaselineKind | None = None
    """Default: `learned` for tbpo_q, `exact_kl` for tbpo_a."""
    center: bool = False
    """Subtract the baseline's mean over the pair's compared tokens."""
    clip: Positive | None = None
    """Clamp c^l - c^w to [-clip, clip]."""
    detach: bool = False
    """Stop the gradient through the baseline."""
    samples: Count = 1
    """Tokens drawn from the reference per state, for `k3_sampled`."""
    lr: Positive = 1e-3
    """AdamW learning rate of the learned head."""
    hidden: Annotated[int, Field(ge=0)] = 1024
    """Width of the learned head's hidden layer; 0 makes it linear."""


class TokenWeightsConfig(Section):
    """Where `tis_dpo`, `sepo` and `t_reg` have their token weights from."""

    source: Literal["models", "columns"] = "models"
    """`columns`: the records' own `chosen_weights` and `rejected_weights`, a number for each answer token."""
    positive: str | None = None
    """tis_dpo: a model trained towards chosen answers; sepo: the oracle; by default
    model.name_or_path."""
    negative: str | None = None
    """tis_dpo: a model trained towards rejected answers; sepo: the oracle's own reference; default
    model.name_or_path."""
    positive_instruction: str | None = None
    """Text put before the prompt for the positive side; t_reg has a default."""
    negative_instruction: str | None = None
    """The same for the negative side."""


class ObjectiveConfig(Section):
    name: ObjectiveName = "tbpo_q"
    """Which loss; see `tbpo_ray.objectives`."""
    beta: Positive | None = None
    """Strength of the pull towards the reference; default: the objective's own (tbpo, dpo ...: 0.1)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is the wrong way round."""
    alpha: NonNegative | None = None
    """tdpo2: weight of the sequential KL difference (0.5); t_reg: weight of the token regulariser (0.1)."""
    gamma: NonNegative = 0.5
    """simpo: target reward margin."""
    select_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    """sepo: share of the tokens selected from each answer."""
    bregman: BregmanConfig = BregmanConfig()
    """Generator of tbpo_q, tbpo_a and bpo."""
    state_baseline: StateBaselineConfig = StateBaselineConfig()
    """State baseline of tbpo_q and tbpo_a."""
    token_weights: TokenWeightsConfig = TokenWeightsConfig()
    """Token weights of tis_dpo, sepo and t_reg."""

    @property
    def baseline_kind(self) -> str:
        """The baseline in force: `none` for objectives that have none."""
        if not self.name.startswith("tbpo"):
            return "none"
        return self.state_baseline.kind or {"tbpo_q": "learned", "tbpo_a": "exact_kl"}[self.name]

    @property
    def needs_reference(self) -> bool:
        return self.name not in ("sft", "simpo", "sepo")

    @property
    def needs_distribution(self) -> bool:
        """Whether the reference's whole distribution is needed, not only its score of the label."""
        return self.name in ("tdpo1", "tdpo2") or self.baseline_kind in ("exact_kl", "k3_sampled", "mixed")
