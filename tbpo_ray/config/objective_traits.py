"""The objectives: their names, what each reads, and its own defaults. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

ObjectiveName = Literal[
    "tbpo_q",
    "tbpo_a",
    "dpo",
    "ipo",
    "simpo",
    "bpo",
    "tdpo1",
    "tdpo2",
    "tis_dpo",
    "sepo",
    "t_reg",
    "confpo",
    "tgdpo",
    "arc_bpo",
    "sft",
]
GeneratorName = Literal["logistic", "kliep", "lsif", "ba", "sba", "beta_family"]
BaselineKind = Literal["none", "learned", "exact_kl", "k3", "k3_sampled", "mixed"]

Normalization = Literal["sum", "token_mean"]
TieModel = Literal["rao_kupper", "davidson", "drop"]
WeightTransform = Literal["exp", "rank", "scaled"]

OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
GENERATORS: tuple[GeneratorName, ...] = get_args(GeneratorName)
BASELINE_KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)

Input = Literal["reference", "kl", "reverse_kl", "weights", "collision", "chunks"]


@dataclass(frozen=True)
class ObjectiveTraits:
    """What one objective reads and its own defaults.

    Attributes:
        inputs: per-token inputs beyond the policy's log-probs: the reference's log-probs, the exact KL from
            both distributions in either direction, token weights, the policy's collision probability, chunks.
            Settings may add to them, see `ObjectiveConfig.inputs`.
        settings: keys of `objective` that only some objectives read and this one does.
        beta, alpha, gamma, lam, normalization: the defaults of its source.
        baseline: the default kind of state baseline.
        definition: number of its formula, raised when the formula changes; a run resumes only with the
            definition that it was started with.
    """

    inputs: tuple[Input, ...] = ("reference",)
    settings: tuple[str, ...] = ()
    beta: float = 0.1
    alpha: float = 0.5
    gamma: float = 0.5
    lam: float = 0.0
    normalization: Normalization = "sum"
    baseline: BaselineKind = "none"
    definition: int = 1


_TIES = ("ties", "tie_strength")
# What may be added to the loss of any pair, and the margin, which a loss of z = -u can take.
_PAIRS = ("nll_weight", "nll_normalization", "pair_weights", "wpo_alignment")
_LOGISTIC = (*_PAIRS, "pair_margins")

TRAITS: Mapping[ObjectiveName, ObjectiveTraits] = {
    "tbpo_q": ObjectiveTraits(settings=("bregman", "state_baseline", *_PAIRS), baseline="learned"),
    "tbpo_a": ObjectiveTraits(settings=("bregman", "state_baseline", *_PAIRS), baseline="exact_kl"),
    "dpo": ObjectiveTraits(
        settings=("normalization", "f_divergence", "ld_alpha", "ld_reference", *_LOGISTIC, *_TIES)
    ),
    "ipo": ObjectiveTraits(settings=("normalization", *_PAIRS), normalization="token_mean", definition=2),
    "simpo": ObjectiveTraits(inputs=(), settings=("gamma", *_LOGISTIC, *_TIES), beta=2.0),
    "bpo": ObjectiveTraits(settings=("bregman", "normalization", *_PAIRS)),
    "tdpo1": ObjectiveTraits(inputs=("reference", "kl"), settings=(*_LOGISTIC, *_TIES)),
    "tdpo2": ObjectiveTraits(inputs=("reference", "kl"), settings=("alpha", *_LOGISTIC, *_TIES)),
    "tis_dpo": ObjectiveTraits(
        inputs=("reference", "weights"),
        settings=("alpha", "token_weights", "helpers", *_LOGISTIC, *_TIES),
        alpha=0.0,
        definition=2,
    ),
    "sepo": ObjectiveTraits(
        inputs=("weights",),
        settings=("select_ratio", "token_weights", "helpers", *_LOGISTIC, *_TIES),
        beta=1.0,
        definition=2,
    ),
    "t_reg": ObjectiveTraits(
        inputs=("reference", "weights"),
        settings=("base", "alpha", "gamma", "token_weights", *_LOGISTIC),
        alpha=0.25,
        definition=2,
    ),
    "confpo": ObjectiveTraits(inputs=(), settings=("gamma", *_LOGISTIC, *_TIES), beta=1.5, gamma=1.6),
    "tgdpo": ObjectiveTraits(
        inputs=("reference", "weights"), settings=("alpha", "guide", "helpers", *_LOGISTIC, *_TIES)
    ),
    "arc_bpo": ObjectiveTraits(
        inputs=("reference", "chunks"),
        settings=("bregman", "arc", "chunks", "token_weights", "helpers", *_PAIRS, "pair_margins"),
        lam=1.0,
    ),
    "sft": ObjectiveTraits(inputs=()),
}

READ_BY: Mapping[str, tuple[ObjectiveName, ...]] = {
    f"objective.{setting}": tuple(name for name, traits in TRAITS.items() if setting in traits.settings)
    for setting in dict.fromkeys(setting for traits in TRAITS.values() for setting in traits.settings)
}
"""Keys and sections that only some objectives read, and the objectives that do."""
