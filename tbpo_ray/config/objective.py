"""The section `objective`, and what each objective reads. Imports no torch.

Defaults, limits and accepted values of the objectives exist here only: `tbpo_ray.objectives` builds its
losses from these classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Discriminator, Field, StrictBool, Tag, field_validator, model_validator

from tbpo_ray.config.base import Count, CountOrZero, NonNegative, Number, Positive, Section
from tbpo_ray.config.helpers import check_helpers

ObjectiveName = Literal[
    "tbpo_q", "tbpo_a", "dpo", "ipo", "simpo", "bpo", "tdpo1", "tdpo2", "tis_dpo", "sepo", "t_reg", "sft"
]
GeneratorName = Literal["logistic", "kliep", "lsif", "ba", "sba", "beta_family"]
BaselineKind = Literal["none", "learned", "exact_kl", "k3", "k3_sampled", "mixed"]

Normalization = Literal["sum", "token_mean"]
TieModel = Literal["rao_kupper", "davidson", "drop"]
WeightTransform = Literal["exp", "rank", "scaled"]

OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
GENERATORS: tuple[GeneratorName, ...] = get_args(GeneratorName)
BASELINE_KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)

Input = Literal["reference", "kl", "reverse_kl", "weights"]


@dataclass(frozen=True)
class ObjectiveTraits:
    """What one objective reads and its own defaults.

    Attributes:
        inputs: per-token inputs beyond the policy's log-probs: the reference's log-probs, the exact KL from
            both distributions in either direction, token weights. Settings may add to them, see
            `ObjectiveConfig.inputs`.
        settings: keys of `objective` that only some objectives read and this one does.
        beta, alpha, normalization: the defaults of its source.
        baseline: the default kind of state baseline.
        definition: number of its formula, raised when the formula changes; a run resumes only with the
            definition that it was started with.
    """

    inputs: tuple[Input, ...] = ("reference",)
    settings: tuple[str, ...] = ()
    beta: float = 0.1
    alpha: float = 0.5
    normalization: Normalization = "sum"
    baseline: BaselineKind = "none"
    definition: int = 1


_TIES = ("ties", "tie_strength")

TRAITS: Mapping[ObjectiveName, ObjectiveTraits] = {
    "tbpo_q": ObjectiveTraits(settings=("bregman", "state_baseline"), baseline="learned"),
    "tbpo_a": ObjectiveTraits(settings=("bregman", "state_baseline"), baseline="exact_kl"),
    "dpo": ObjectiveTraits(settings=("normalization", *_TIES)),
    "ipo": ObjectiveTraits(settings=("normalization",), normalization="token_mean", definition=2),
    "simpo": ObjectiveTraits(inputs=(), settings=("gamma", *_TIES), beta=2.0),
    "bpo": ObjectiveTraits(settings=("bregman", "normalization")),
    "tdpo1": ObjectiveTraits(inputs=("reference", "kl"), settings=_TIES),
    "tdpo2": ObjectiveTraits(inputs=("reference", "kl"), settings=("alpha", *_TIES)),
    "tis_dpo": ObjectiveTraits(
        inputs=("reference", "weights"),
        settings=("alpha", "token_weights", "helpers", *_TIES),
        alpha=0.0,
        definition=2,
    ),
    "sepo": ObjectiveTraits(
        inputs=("weights",),
        settings=("select_ratio", "token_weights", "helpers", *_TIES),
        beta=1.0,
        definition=2,
    ),
    "t_reg": ObjectiveTraits(
        inputs=("reference", "weights"),
        settings=("base", "alpha", "gamma", "token_weights"),
        alpha=0.25,
        definition=2,
    ),
    "sft": ObjectiveTraits(inputs=()),
}

READ_BY: Mapping[str, tuple[ObjectiveName, ...]] = {
    f"objective.{setting}": tuple(name for name, traits in TRAITS.items() if setting in traits.settings)
    for setting in dict.fromkeys(setting for traits in TRAITS.values() for setting in traits.settings)
}
"""Keys and sections that only some objectives read, and the objectives that do."""


_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")


def _check_function(value: str) -> str:
    if not _FUNCTION.fullmatch(value):
        raise ValueError("for a function of your own must be path.py:NAME")
    return value


Coordinate = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False), Number]
Ratio = Annotated[float, Field(gt=0, le=1), Number]


class BregmanConfig(Section):
    """The Bregman generator of `tbpo_q`, `tbpo_a` and `bpo`."""

    generator: GeneratorName | Annotated[str, AfterValidator(_check_function)] = "sba"
    """The Bregman generator h; or `path.py:NAME`, a function of u made of torch operations, which is checked
    at the start: increasing, with finite gradients on [-20, 20]."""
    lam: Annotated[float, Field(gt=-1, allow_inf_nan=False), Number] = 0.0
    """Order of `ba` and `sba`; the other generators ignore it."""
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


class TokenWeightsConfig(Section):
    """Where `tis_dpo`, `sepo` and `t_reg` get their token weights from."""

    source: Literal["models", "columns"] = "models"
    """`models`: computed by the models below; `columns`: read from the records' own `chosen_weights` and
    `rejected_weights`, one number for each answer token."""
    positive: str | None = None
    """For `tis_dpo` a model trained toward chosen answers, for `sepo` the oracle; default:
    `model.name_or_path`."""
    negative: str | None = None
    """For `tis_dpo` a model trained toward rejected answers, for `sepo` the oracle's own reference; default:
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


class ObjectiveConfig(Section):
    """The loss that a run minimizes. A key that the named objective does not read has no effect."""

    name: ObjectiveName = "tbpo_q"
    """Name of the objective."""
    beta: Positive | None = None
    """Strength of the pull toward the reference; default: 2.0 for `simpo` and for `t_reg` on `simpo`, 1.0
    for `sepo`, otherwise 0.1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), Number] = 0.0
    """Assumed probability that a preference label is flipped; must be 0 for `sft`."""
    alpha: NonNegative | None = None
    """For `tdpo2` the weight of the sequential KL difference (default 0.5), for `t_reg` the weight of the
    token rewards (default 0.25), for `tis_dpo` the weight of the KL from the reference (default 0: without
    it)."""
    base: Literal["dpo", "simpo"] = "dpo"
    """The objective that `t_reg` adds its token rewards to."""
    gamma: NonNegative = 0.5
    """Target reward margin of `simpo`, and of `t_reg` on `simpo`."""
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
    bregman: BregmanConfig = BregmanConfig()
    """Bregman generator of `tbpo_q`, `tbpo_a` and `bpo`."""
    state_baseline: StateBaselineConfig = StateBaselineConfig()
    """State baseline of `tbpo_q` and `tbpo_a`."""
    helpers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides, dotted or nested, for the runs of the models that an objective needs and that
    `jobs/pipeline.py` and `jobs/tune.py` train: `oracle` for `sepo`, `positive` and `negative` for `tis_dpo`.
    Example: `{oracle: {data.share: 0.5, training.max_steps: 200}}`."""
    token_weights: TokenWeightsConfig = TokenWeightsConfig()
    """Token weights of `tis_dpo`, `sepo` and `t_reg`."""

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
    def effective_normalization(self) -> Normalization:
        """`normalization`, or the objective's own default; `sum` for an objective that does not read it."""
        read = self.normalization if "normalization" in self.traits.settings else None
        return read or self.traits.normalization

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
        inputs = self.traits.inputs
        if self.name == "t_reg" and self.base == "simpo":
            return tuple(name for name in inputs if name != "reference")
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
