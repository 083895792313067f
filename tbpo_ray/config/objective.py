"""The section `objective`, and what each objective reads. Imports no torch.

Defaults, limits and accepted values of the objectives exist here only: `tbpo_ray.objectives` builds its
losses from these classes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, field_validator, model_validator

from tbpo_ray.config.base import Count, CountOrZero, NonNegative, Number, Positive, Section
from tbpo_ray.config.helpers import check_helpers
from tbpo_ray.config.objective_options import (
    ArcConfig,
    ChunksConfig,
    FDivergenceConfig,
    GuideConfig,
    LdReference,
    NllNormalization,
    PairColumn,
    PairMargins,
    PairWeights,
    SelectRatio,
    SelectRatioConfig,
    TokenWeightsConfig,
    WpoAlignment,
)
from tbpo_ray.config.objective_traits import BASELINE_KINDS as BASELINE_KINDS
from tbpo_ray.config.objective_traits import GENERATORS as GENERATORS
from tbpo_ray.config.objective_traits import OBJECTIVES as OBJECTIVES
from tbpo_ray.config.objective_traits import READ_BY as READ_BY
from tbpo_ray.config.objective_traits import TRAITS as TRAITS
from tbpo_ray.config.objective_traits import (
    BaselineKind,
    GeneratorName,
    Input,
    Normalization,
    ObjectiveName,
    ObjectiveTraits,
    TieModel,
)

_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")


def _check_function(value: str) -> str:
    if not _FUNCTION.fullmatch(value):
        raise ValueError("for a function of your own must be path.py:NAME")
    return value


Coordinate = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False), Number]


class BregmanConfig(Section):
    """The Bregman generator of `tbpo_q`, `tbpo_a`, `bpo` and `arc_bpo`."""

    generator: GeneratorName | Annotated[str, AfterValidator(_check_function)] = "sba"
    """The Bregman generator h; or `path.py:NAME`, a function of u made of torch operations, which is checked
    at the start: increasing, with finite gradients on [-20, 20]."""
    lam: Annotated[float, Field(gt=-1, allow_inf_nan=False), Number] | None = None
    """Order of `ba` and `sba`; the other generators ignore it. Default: 1.0 for `arc_bpo`, otherwise 0.0."""
    scale: Positive = 4.0
    """Divisor of `sba`; 4 gives it the gradient of `logistic` at u = 0."""
    a: Coordinate = 0.0
    """First exponent of `beta_family`, whose proper loss has the weight c^(a-1) (1-c)^(b-1)."""
    b: Coordinate = 0.0
    """Second exponent of `beta_family`; exchanging a and b gives the same loss."""
    a_plus_b: Coordinate | None = None
    """a + b of `beta_family`, instead of a and b: how the loss grows for large u. A search can set it."""
    a_minus_b: Coordinate | None = None
    """a - b of `beta_family`, instead of a and b; 0 if only a_plus_b is given, and the reverse."""

    @model_validator(mode="after")
    def _one_way_to_name_a_point(self) -> Self:
        if (self.a_plus_b is not None or self.a_minus_b is not None) and (self.a or self.b):
            name = "a" if self.a else "b"
            raise ValueError(
                f"objective.bregman.{name}={getattr(self, name)}: given beside a_plus_b or a_minus_b, which "
                "replace a and b; remove one of the two"
            )
        return self

    @property
    def point(self) -> tuple[float, float]:
        """The point (a, b) of `beta_family`, from either pair of keys."""
        if self.a_plus_b is None and self.a_minus_b is None:
            return self.a, self.b
        total, difference = self.a_plus_b or 0.0, self.a_minus_b or 0.0
        return (total + difference) / 2, (total - difference) / 2


class StateBaselineConfig(Section):
    """The state baseline c_t of `tbpo_q` and `tbpo_a`."""

    kind: BaselineKind | None = None
    """Which baseline; default: `learned` for `tbpo_q` and `exact_kl` for `tbpo_a`."""
    center: StrictBool = False
    """Subtract the baseline's mean over the compared tokens of the pair."""
    clip: Positive | None = None
    """Clamp c^l - c^w to [-clip, clip], after centering; null: no clamping."""
    detach: StrictBool = False
    """Stop the gradient through the baseline."""
    samples: Count = 1
    """Tokens drawn from the reference in each state, for `k3_sampled`."""
    lr: Positive = 1e-3
    """Learning rate of the learned head's own AdamW optimizer (`learned` and `mixed`)."""
    hidden: CountOrZero = 1024
    """Width of the learned head's hidden layer; 0 makes the head linear."""

    @property
    def learned(self) -> bool:
        """Whether the baseline has a head that must be trained."""
        return self.kind in ("learned", "mixed")

    @property
    def needs_kl(self) -> bool:
        """Whether the baseline reads the exact KL divergence from both distributions."""
        return self.kind in ("exact_kl", "mixed")

    @property
    def needed_samples(self) -> int:
        """Number of reference tokens to draw in each state; 0 unless the kind is `k3_sampled`."""
        return self.samples if self.kind == "k3_sampled" else 0


class ObjectiveConfig(Section):
    """The loss that a run minimizes. A key that the named objective does not read has no effect."""

    name: ObjectiveName = "tbpo_q"
    """Name of the objective."""
    beta: Positive | None = None
    """Strength of the pull toward the reference; default: 2.0 for `simpo` and for `t_reg` on `simpo`, 1.5
    for `confpo`, 1.0 for `sepo`, otherwise 0.1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), Number] = 0.0
    """Assumed probability that a preference label is flipped; must be 0 for `sft`."""
    alpha: NonNegative | None = None
    """For `tdpo2` the weight of the sequential KL difference (default 0.5), for `tgdpo` that of the guide's
    rewards (default 0.5), for `t_reg` the weight of the
    token rewards (default 0.25), for `tis_dpo` the weight of the KL from the reference (default 0: without
    it)."""
    base: Literal["dpo", "simpo"] = "dpo"
    """The objective that `t_reg` adds its token rewards to."""
    gamma: NonNegative | None = None
    """Target reward margin of `simpo`, of `t_reg` on `simpo` (default 0.5) and of `confpo` (default 1.6)."""
    normalization: Normalization | None = None
    """Whether `dpo`, `ipo` and `bpo` take the sum of an answer's token log-ratios or their mean
    (`token_mean`); default: `token_mean` for `ipo`, otherwise `sum`."""
    select_ratio: SelectRatio = 0.3
    """Share of the tokens that `sepo` selects from each answer, or one for each side:
    `{chosen: 0.3, rejected: 0.1}`."""
    ties: TieModel = "drop"
    """How pairs marked as ties are learned from, by objectives with one logistic loss per pair: by the model
    of Rao and Kupper, by Davidson's, or not at all (`drop`)."""
    tie_strength: Positive | None = None
    """How likely ties are: greater than 1 for `rao_kupper` (default 3), greater than 0 for `davidson`
    (default 1). With the defaults, equally good answers tie half the time."""
    nll_weight: NonNegative = 0.0
    """Weight of the chosen answer's negative log-likelihood, which is added to the loss of each pair; 0 for
    `sft`."""
    nll_normalization: NllNormalization = "token_mean"
    """Whether this term is the mean over the answer's tokens or their sum."""
    pair_margins: PairMargins = "none"
    """`data`: the score difference of a pair has to exceed the number in its record's column `margin`
    (ODPO), for objectives with one logistic loss per pair; for `arc_bpo` it replaces `arc.delta`."""
    pair_weights: PairWeights = "none"
    """`data`: the loss of a pair is multiplied by the number in its record's column `weight`. `wpo`: its
    preference loss, without the NLL, is multiplied by how likely the policy is to write its answers (WPO).
    The mean over the pairs is not divided by the sum of the weights."""
    wpo_alignment: WpoAlignment = "sampled"
    """`sampled`: `wpo` divides each token's probability by what the policy's own samples have on average, so
    that they have a weight of about 1; `none`: without it, and without its statistic of the vocabulary."""
    f_divergence: FDivergenceConfig = FDivergenceConfig()
    """The f-divergence that `dpo` regularizes with."""
    ld_alpha: Annotated[float, Field(ge=0, le=1), Number] | None = None
    """Weight in `dpo` of the tokens beyond the shorter answer's length (LD-DPO); 1, like null, is plain
    DPO."""
    ld_reference: LdReference = "weighted"
    """Whether `ld_alpha` weighs the reference's log-probs too (`weighted`) or only the policy's (`full`),
    which favors shorter answers."""
    bregman: BregmanConfig = BregmanConfig()
    """Bregman generator of `tbpo_q`, `tbpo_a`, `bpo` and `arc_bpo`, for which it must be `sba`."""
    arc: ArcConfig = ArcConfig()
    """Targets of the chunks of `arc_bpo`."""
    chunks: ChunksConfig = ChunksConfig()
    """How `arc_bpo` cuts an answer into chunks."""
    guide: GuideConfig = GuideConfig()
    """The guide of `tgdpo`."""
    state_baseline: StateBaselineConfig = StateBaselineConfig()
    """State baseline of `tbpo_q` and `tbpo_a`."""
    helpers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides, dotted or nested, for the runs of the models that an objective needs and that
    `jobs/pipeline.py` and `jobs/tune.py` train: `oracle` for `sepo` and for `arc_bpo` with
    `arc.shape: advantage`, `positive` and `negative` for `tis_dpo`, `guide` for `tgdpo`.
    Example: `{oracle: {data.share: 0.5, training.max_steps: 200}}`."""
    token_weights: TokenWeightsConfig = TokenWeightsConfig()
    """Token weights of `tis_dpo`, `sepo` and `t_reg`, and of `arc_bpo` with `arc.shape: advantage`."""

    @field_validator("helpers")
    @classmethod
    def _check_helpers(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        check_helpers(value)
        return value

    @model_validator(mode="after")
    def _no_smoothing_without_a_pair(self) -> Self:
        if self.name == "sft" and self.label_smoothing:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing}: objective.name=sft has no preference "
                "labels to smooth; use 0"
            )
        return self

    @model_validator(mode="after")
    def _chunks_have_one_loss(self) -> Self:
        if self.name != "arc_bpo":
            return self
        if self.label_smoothing:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing}: objective.name=arc_bpo has targets "
                "instead of labels to smooth; use 0"
            )
        if self.bregman.generator != "sba":
            raise ValueError(
                f"objective.bregman.generator={self.bregman.generator}: objective.name=arc_bpo is defined "
                "for sba only; use sba"
            )
        return self

    @model_validator(mode="after")
    def _ties_can_be_read(self) -> Self:
        if self.ties != "drop" and "ties" not in self.traits.settings:
            readers = ", ".join(READ_BY["objective.ties"])
            raise ValueError(
                f"objective.ties={self.ties}: objective.name={self.name} cannot learn from ties; use drop, "
                f"or one of {readers}"
            )
        if self.ties == "rao_kupper" and self.tie_strength is not None and self.tie_strength <= 1:
            raise ValueError(
                f"objective.tie_strength={self.tie_strength}: must be greater than 1 for "
                "objective.ties=rao_kupper"
            )
        return self

    @model_validator(mode="after")
    def _terms_can_be_added(self) -> Self:
        for key, off in (("nll_weight", 0.0), ("pair_margins", "none"), ("pair_weights", "none")):
            value = getattr(self, key)
            if value != off and key not in self.traits.settings:
                readers = ", ".join(READ_BY[f"objective.{key}"])
                raise ValueError(
                    f"objective.{key}={value}: objective.name={self.name} has no use for it; use {off}, or "
                    f"one of {readers}"
                )
        if self.pair_margins != "none" and self.ties != "drop":
            raise ValueError(
                f"objective.pair_margins={self.pair_margins}: objective.ties={self.ties} has a model of its "
                "own of how far apart answers are; use none, or objective.ties=drop"
            )
        return self

    @model_validator(mode="after")
    def _one_form_of_dpo(self) -> Self:
        if self.name != "dpo":
            return self
        given = {
            f"objective.f_divergence.kind={self.f_divergence.kind}": self.f_divergence.kind != "reverse_kl",
            f"objective.ld_alpha={self.ld_alpha}": self.ld_alpha is not None,
            f"objective.normalization={self.normalization}": self.normalization == "token_mean",
        }
        named = [text for text, is_given in given.items() if is_given]
        if len(named) > 1:
            raise ValueError(
                f"{named[0]}: cannot be combined with {named[1]}; use objective.normalization=sum, "
                "objective.ld_alpha=null or objective.f_divergence.kind=reverse_kl"
            )
        return self

    @property
    def traits(self) -> ObjectiveTraits:
        """What the named objective reads."""
        return TRAITS[self.name]

    @property
    def effective_beta(self) -> float:
        """`beta`, or the objective's own default."""
        default = TRAITS["simpo"].beta if self.name == "t_reg" and self.base == "simpo" else self.traits.beta
        return default if self.beta is None else self.beta

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or the objective's own default."""
        return self.traits.alpha if self.alpha is None else self.alpha

    @property
    def effective_gamma(self) -> float:
        """`gamma`, or the objective's own default."""
        return self.traits.gamma if self.gamma is None else self.gamma

    @property
    def effective_bregman(self) -> BregmanConfig:
        """`bregman` with the order filled in."""
        lam = self.traits.lam if self.bregman.lam is None else self.bregman.lam
        return self.bregman.model_copy(update={"lam": lam})

    @property
    def guide_beta(self) -> float:
        """`guide.beta`, or the run's own beta."""
        return self.effective_beta if self.guide.beta is None else self.guide.beta

    @property
    def effective_normalization(self) -> Normalization:
        """`normalization`, or the objective's own default; `sum` for an objective that does not read it."""
        read = self.normalization if "normalization" in self.traits.settings else None
        return read or self.traits.normalization

    @property
    def effective_f_divergence(self) -> FDivergenceConfig:
        """`f_divergence`; the reverse KL for an objective that does not read it."""
        return self.f_divergence if "f_divergence" in self.traits.settings else FDivergenceConfig()

    @property
    def effective_ld_alpha(self) -> float | None:
        """`ld_alpha`; None for an objective that does not read it."""
        return self.ld_alpha if "ld_alpha" in self.traits.settings else None

    @property
    def pair_columns(self) -> tuple[PairColumn, ...]:
        """The columns of the records, one number per pair, that are read: `margin` and `weight`."""
        margin: tuple[PairColumn, ...] = ("margin",) if self.pair_margins == "data" else ()
        weight: tuple[PairColumn, ...] = ("weight",) if self.pair_weights == "data" else ()
        return (*margin, *weight)

    @property
    def effective_tie_strength(self) -> float:
        """`tie_strength`, or the default of the model of ties."""
        default = 3.0 if self.ties == "rao_kupper" else 1.0
        return default if self.tie_strength is None else self.tie_strength

    @property
    def select_ratios(self) -> tuple[float, float]:
        """The shares of the chosen and of the rejected answer's tokens that `sepo` selects."""
        ratio = self.select_ratio
        if isinstance(ratio, SelectRatioConfig):
            return ratio.chosen, ratio.rejected
        return ratio, ratio

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The per-token inputs that the objective reads with its settings, without its state baseline."""
        inputs = self._own_inputs
        if self.pair_weights == "wpo" and self.wpo_alignment == "sampled":
            return (*inputs, "collision")
        return inputs

    @property
    def _own_inputs(self) -> tuple[Input, ...]:
        """The inputs without those of the pair's weight."""
        inputs = self.traits.inputs
        if self.name == "t_reg" and self.base == "simpo":
            return tuple(name for name in inputs if name != "reference")
        if self.name == "arc_bpo" and self.arc.shape == "advantage":
            return (*inputs, "weights")
        if self.name == "tis_dpo" and self.effective_alpha > 0:
            return (*inputs, "reverse_kl")
        return inputs

    @property
    def effective_baseline(self) -> StateBaselineConfig:
        """The state baseline with its kind filled in: `none` for an objective that has no baseline."""
        return self.state_baseline.model_copy(update={"kind": self.baseline_kind})

    @property
    def baseline_kind(self) -> BaselineKind:
        """The effective kind of state baseline: `none` for an objective that has no baseline."""
        if "state_baseline" not in self.traits.settings:
            return "none"
        return self.state_baseline.kind or self.traits.baseline

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs of the answer tokens are read."""
        return "reference" in self.inputs

    @property
    def needs_weights(self) -> bool:
        """Whether token weights, oracle scores or self-given rewards are read."""
        return "weights" in self.inputs

    @property
    def weights_from_records(self) -> bool:
        """Whether the token weights are columns of the records."""
        reads_source = self.needs_weights and "token_weights" in self.traits.settings
        return reads_source and self.token_weights.source == "columns"

    @property
    def needs_collision(self) -> bool:
        """Whether the policy's log collision probability of each state is read."""
        return "collision" in self.inputs

    @property
    def needs_chunks(self) -> bool:
        """Whether the chunks of the answers are read."""
        return "chunks" in self.inputs

    @property
    def needs_kl(self) -> bool:
        """Whether the exact KL divergence of the policy from the reference, KL(ref || policy), is read."""
        return "kl" in self.inputs or self.effective_baseline.needs_kl

    @property
    def needs_reverse_kl(self) -> bool:
        """Whether the exact KL(policy || ref) is read."""
        return "reverse_kl" in self.inputs

    @property
    def needed_samples(self) -> int:
        """Number of reference tokens to draw in each state; 0 for most objectives."""
        return self.effective_baseline.needed_samples

    @property
    def needs_distribution(self) -> bool:
        """Whether the reference's whole distribution is needed, not only its score of the label."""
        return self.needs_kl or self.needs_reverse_kl or self.needed_samples > 0
