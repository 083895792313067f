"""The section `objective`, and what each objective reads. Imports no torch.

Defaults, limits and accepted values of the objectives exist here only: `tbpo_ray.objectives` builds its
losses from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StrictBool, field_validator, model_validator

from tbpo_ray.config.base import Count, CountOrZero, NonNegative, Number, Positive, Section
from tbpo_ray.config.helpers import check_helpers

ObjectiveName = Literal[
    "tbpo_q", "tbpo_a", "dpo", "ipo", "simpo", "bpo", "tdpo1", "tdpo2", "tis_dpo", "sepo", "t_reg", "sft"
]
GeneratorName = Literal["logistic", "kliep", "lsif", "ba", "sba"]
BaselineKind = Literal["none", "learned", "exact_kl", "k3", "k3_sampled", "mixed"]

OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
GENERATORS: tuple[GeneratorName, ...] = get_args(GeneratorName)
BASELINE_KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)

Input = Literal["reference", "kl", "weights"]


@dataclass(frozen=True)
class ObjectiveTraits:
    """What one objective reads and its own defaults.

    Attributes:
        inputs: per-token inputs beyond the policy's log-probs: the reference's log-probs, the exact KL from
            both distributions, token weights. A state baseline may add the KL, see `ObjectiveConfig`.
        settings: keys of `objective` that only some objectives read and this one does.
        beta, alpha: the defaults of its source.
        baseline: the default kind of state baseline.
    """

    inputs: tuple[Input, ...] = ("reference",)
    settings: tuple[str, ...] = ()
    beta: float = 0.1
    alpha: float = 0.5
    baseline: BaselineKind = "none"


TRAITS: Mapping[ObjectiveName, ObjectiveTraits] = {
    "tbpo_q": ObjectiveTraits(settings=("bregman", "state_baseline"), baseline="learned"),
    "tbpo_a": ObjectiveTraits(settings=("bregman", "state_baseline"), baseline="exact_kl"),
    "dpo": ObjectiveTraits(),
    "ipo": ObjectiveTraits(),
    "simpo": ObjectiveTraits(inputs=(), settings=("gamma",), beta=2.0),
    "bpo": ObjectiveTraits(settings=("bregman",)),
    "tdpo1": ObjectiveTraits(inputs=("reference", "kl")),
    "tdpo2": ObjectiveTraits(inputs=("reference", "kl"), settings=("alpha",)),
    "tis_dpo": ObjectiveTraits(inputs=("reference", "weights"), settings=("token_weights", "helpers")),
    "sepo": ObjectiveTraits(
        inputs=("weights",), settings=("select_ratio", "token_weights", "helpers"), beta=2.0
    ),
    "t_reg": ObjectiveTraits(inputs=("reference", "weights"), settings=("alpha", "token_weights"), alpha=0.1),
    "sft": ObjectiveTraits(inputs=()),
}

READ_BY: Mapping[str, tuple[ObjectiveName, ...]] = {
    f"objective.{setting}": tuple(name for name, traits in TRAITS.items() if setting in traits.settings)
    for setting in dict.fromkeys(setting for traits in TRAITS.values() for setting in traits.settings)
}
"""Keys and sections that only some objectives read, and the objectives that do."""


class BregmanConfig(Section):
    """The Bregman generator of `tbpo_q`, `tbpo_a` and `bpo`."""

    generator: GeneratorName = "sba"
    """The Bregman generator h."""
    lam: Annotated[float, Field(gt=-1, allow_inf_nan=False), Number] = 0.0
    """Order of `ba` and `sba`; the other generators ignore it."""
    scale: Positive = 4.0
    """Divisor of `sba`; 4 gives it the gradient of `logistic` at u = 0."""


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
    """Text placed before the prompt for the positive side; `t_reg` has a default."""
    negative_instruction: str | None = None
    """Text placed before the prompt for the negative side; `t_reg` has a default."""


class ObjectiveConfig(Section):
    """The loss that a run minimizes. A key that the named objective does not read has no effect."""

    name: ObjectiveName = "tbpo_q"
    """Name of the objective."""
    beta: Positive | None = None
    """Strength of the pull toward the reference; default: 2.0 for `simpo` and `sepo`, otherwise 0.1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), Number] = 0.0
    """Assumed probability that a preference label is flipped; must be 0 for `sft`."""
    alpha: NonNegative | None = None
    """For `tdpo2` the weight of the sequential KL difference (default 0.5), for `t_reg` the weight of the
    token regularizer (default 0.1)."""
    gamma: NonNegative = 0.5
    """Target reward margin of `simpo`."""
    select_ratio: Annotated[float, Field(gt=0, le=1), Number] = 0.3
    """Share of the tokens that `sepo` selects from each answer."""
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

    @property
    def traits(self) -> ObjectiveTraits:
        """What the named objective reads."""
        return TRAITS[self.name]

    @property
    def effective_beta(self) -> float:
        """`beta`, or the objective's own default."""
        return self.traits.beta if self.beta is None else self.beta

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or the objective's own default."""
        return self.traits.alpha if self.alpha is None else self.alpha

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
        return "reference" in self.traits.inputs

    @property
    def needs_weights(self) -> bool:
        """Whether token weights, oracle scores or self-given rewards are read."""
        return "weights" in self.traits.inputs

    @property
    def needs_kl(self) -> bool:
        """Whether the exact KL divergence from both distributions is read."""
        return "kl" in self.traits.inputs or self.effective_baseline.needs_kl

    @property
    def needed_samples(self) -> int:
        """Number of reference tokens to draw in each state; 0 for most objectives."""
        return self.effective_baseline.needed_samples

    @property
    def needs_distribution(self) -> bool:
        """Whether the reference's whole distribution is needed, not only its score of the label."""
        return self.needs_kl or self.needed_samples > 0
