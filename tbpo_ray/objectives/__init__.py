"""The mathematics of preference optimization: pure functions of tensors.

Imports torch and the typed `objective` section of the configuration, nothing else.

    scores = TokenScores(chosen_logps=..., rejected_logps=..., ...)
    objective = build_objective({"name": "tbpo_q", "beta": 0.1})
    out = objective(scores)          # out.per_pair_loss [B], out.loss, out.metrics

`token_log_probs` turns hidden states into scores without ever materializing [tokens, vocabulary].
"""

from tbpo_ray.config.objective import BASELINE_KINDS, GENERATORS, OBJECTIVES
from tbpo_ray.objectives.baseline import k3
from tbpo_ray.objectives.factory import build_objective
from tbpo_ray.objectives.generators import Generator, make_generator
from tbpo_ray.objectives.heads import LearnedBaseline, MixedBaseline, build_state_baseline
from tbpo_ray.objectives.metrics import distribution_metrics
from tbpo_ray.objectives.objective import Objective
from tbpo_ray.objectives.token_stats import TokenStats, token_log_probs
from tbpo_ray.objectives.token_weights import contrastive_weights, oracle_scores, self_rewards
from tbpo_ray.objectives.types import ObjectiveOutput, TokenScores

__all__ = [
    "BASELINE_KINDS",
    "GENERATORS",
    "OBJECTIVES",
    "Generator",
    "LearnedBaseline",
    "MixedBaseline",
    "Objective",
    "ObjectiveOutput",
    "TokenScores",
    "TokenStats",
    "build_objective",
    "build_state_baseline",
    "contrastive_weights",
    "distribution_metrics",
    "k3",
    "make_generator",
    "oracle_scores",
    "self_rewards",
    "token_log_probs",
]
