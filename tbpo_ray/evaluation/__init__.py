"""Judges, win rates, diversity, benchmarks and the report.

The metrics are imported here; they need neither torch nor Ray. The rest is imported by module.
"""

from tbpo_ray.evaluation.diversity import distinct_n, predictive_entropy, self_bleu
from tbpo_ray.evaluation.win_rates import (
    ControlledRate,
    Rate,
    Strength,
    StyleControlledRate,
    bradley_terry,
    length_controlled_win_rate,
    style_controlled_win_rate,
    win_rate,
)

__all__ = [
    "ControlledRate",
    "Rate",
    "Strength",
    "StyleControlledRate",
    "bradley_terry",
    "distinct_n",
    "length_controlled_win_rate",
    "predictive_entropy",
    "self_bleu",
    "style_controlled_win_rate",
    "win_rate",
]
