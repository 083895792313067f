"""The helper models that objectives need: their names, what each is for, and how it is trained by default.

Imports nothing, so that :mod:`tbpo_ray.config.objective` can use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class HelperTraits:
    """One model that an objective needs beside the policy."""

    side: Literal["positive", "negative"]
    """Which of the two models that are compared it is."""
    purpose: str
    """What the model is, for messages."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys in which its run differs from the policy's by default."""
    own_key: str = ""
    """The key that its export becomes, if it is not one of `objective.token_weights`."""

    @property
    def model_key(self) -> str:
        """The key that its export becomes."""
        return self.own_key or f"objective.token_weights.{self.side}"


HELPERS: Mapping[str, Mapping[str, HelperTraits]] = {
    # SePO trains its oracle on 30 % of the pairs (arXiv 2408.13518).
    "sepo": {
        "oracle": HelperTraits(
            "positive", "the oracle, a model trained with DPO", {"objective.name": "dpo", "data.share": 0.3}
        )
    },
    "arc_bpo": {
        "oracle": HelperTraits("positive", "the oracle, a model trained with DPO", {"objective.name": "dpo"})
    },
    "tgdpo": {
        "guide": HelperTraits(
            "positive",
            "the guide, a model trained with DPO",
            {"objective.name": "dpo"},
            "objective.guide.model",
        )
    },
    # The released TIS-DPO trains both models on all pairs (arXiv 2410.04350).
    "tis_dpo": {
        "positive": HelperTraits(
            "positive", "a model trained towards chosen answers", {"objective.name": "dpo"}
        ),
        "negative": HelperTraits(
            "negative",
            "a model trained towards rejected answers",
            {"objective.name": "dpo", "data.swap_answers": True},
        ),
    },
}
"""The helpers of each objective by name; an objective that is missing here needs none."""

HELPER_NAMES = tuple(dict.fromkeys(name for helpers in HELPERS.values() for name in helpers))


def check_helpers(settings: Mapping[str, Any]) -> None:
    """Refuse names of helpers that no objective has.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    faults = [
        f"objective.helpers.{name}: unknown helper model; the nearest known one is objective.helpers."
        + difflib.get_close_matches(str(name), HELPER_NAMES, n=1, cutoff=0.0)[0]
        for name in settings
        if name not in HELPER_NAMES
    ]
    if faults:
        raise ValueError("\n".join(faults))
