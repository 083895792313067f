"""Sections of `objective` that one or a few objectives read, and the accepted words of its keys.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, StrictBool, Tag, model_validator

from tbpo_ray.config.base import Count, Number, Positive, Section
from tbpo_ray.config.objective_traits import WeightTransform

NllNormalization = Literal["token_mean", "sum"]
PairMargins = Literal["none", "data"]
PairWeights = Literal["none", "data", "wpo"]
WpoAlignment = Literal["sampled", "none"]
PairColumn = Literal["margin", "weight"]
LdReference = Literal["weighted", "full"]
FDivergenceKind = Literal["reverse_kl", "forward_kl", "js", "alpha"]

Ratio = Annotated[float, Field(gt=0, le=1), Number]


class FDivergenceConfig(Section):
    """The f-divergence between policy and reference that `dpo` regularizes with."""

    kind: FDivergenceKind = "reverse_kl"
    """Which divergence; `reverse_kl` is plain DPO."""
    alpha: Annotated[float, Field(gt=0, lt=1), Number] = 0.5
    """Order of `alpha`, between the reverse KL (0) and the forward KL (1)."""


class ArcConfig(Section):
    """The targets that `arc_bpo` gives the chunks of an answer."""

    delta: Positive = 2.0
    """Margin between the answers to reach, in units of beta times nats; `pair_margins` replaces it."""
    shape: Literal["uniform", "advantage"] = "uniform"
    """How an answer's half of the margin is spread over its chunks: evenly, or by the sum of their token
    weights (`token_weights`)."""
    temperature: Positive = 2.0
    """Temperature of the softmax over the chunks' advantages, for `advantage`."""
    winsorize: StrictBool = True
    """Clip the advantages of an answer's chunks to their median +- kappa times their median absolute
    deviation."""
    kappa: Positive = 2.0
    """Width of this range."""


class ChunksConfig(Section):
    """How `arc_bpo` cuts an answer into chunks."""

    kind: Literal["semantic", "fixed", "answer"] = "semantic"
    """`semantic`: after newlines, sentences, semicolons and colons; `fixed`: every `max_tokens` tokens;
    `answer`: the whole answer is one chunk."""
    min_tokens: Count = 4
    """Shorter chunks are merged with the next one, the last with the one before it."""
    max_tokens: Count = 64
    """Longer chunks are split, before short ones are merged."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"objective.chunks.min_tokens={self.min_tokens}: must not exceed "
                f"objective.chunks.max_tokens={self.max_tokens}"
            )
        return self


class GuideConfig(Section):
    """The model that `tgdpo` takes token rewards from."""

    model: str | None = None
    """A model that was tuned with DPO from the same reference; without one, `jobs/pipeline.py` and
    `jobs/tune.py` train it."""
    beta: Positive | None = None
    """The guide's own beta, by which its log-ratios become rewards; null: `objective.beta`."""


class TokenWeightsConfig(Section):
    """Where `tis_dpo`, `sepo`, `t_reg` and `arc_bpo` get their token weights from."""

    source: Literal["models", "columns"] = "models"
    """`models`: computed by the models below; `columns`: read from the records' own `chosen_weights` and
    `rejected_weights`, one number for each answer token."""
    positive: str | None = None
    """For `tis_dpo` a model trained toward chosen answers, for `sepo` and `arc_bpo` the oracle; default:
    `model.name_or_path`."""
    negative: str | None = None
    """For `tis_dpo` a model trained toward rejected answers, for the others the oracle's reference; default:
    `model.name_or_path`."""
    positive_instruction: str | None = None
    """Text placed before the prompt for the positive side, or a template with `{prompt}` and, optionally,
    `{answer}`; `t_reg` has a default, which asks for a better answer."""
    negative_instruction: str | None = None
    """The same for the negative side; the default of `t_reg` asks for a worse answer."""
    transform: WeightTransform = "exp"
    """How `tis_dpo` turns the difference d of two log-probs into a weight: `exp`, e^d with d clamped to
    [-0.5, 1.5]; `rank`, from 0.7 to 1.3 by the rank of d within the answer; `scaled`, d clamped to
    [-1.5, 1.5] and mapped to 0.7 to 1.3."""


class SelectRatioConfig(Section):
    """The shares of tokens that `sepo` selects, for each side of a pair."""

    chosen: Ratio = 0.3
    """Share of the chosen answer's tokens: those that the oracle scores highest."""
    rejected: Ratio = 0.3
    """Share of the rejected answer's tokens: those that the oracle scores lowest."""


# Which of the two a value is meant to be decides whose fault is reported. The tags are hidden in messages.
SelectRatio = Annotated[
    Annotated[Ratio, Tag("float")] | Annotated[SelectRatioConfig, Tag("dict")],
    Discriminator(lambda value: "dict" if isinstance(value, Mapping | SelectRatioConfig) else "float"),
]
