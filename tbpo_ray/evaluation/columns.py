"""The metrics that tables show: heading, unit and direction, stated once for the verdict and the report."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One metric of a table."""

    metric: str
    heading: str
    factor: int = 1
    """100 for shares, which are shown in percent."""
    direction: int = 0
    """1: higher is better, -1: lower is better, 0: neither."""
    in_verdict: bool = True
    """Whether the verdict's text table shows it too, and not only the report."""

    @property
    def label(self) -> str:
        """The heading with its unit."""
        return f"{self.heading} (%)" if self.factor == 100 else self.heading


COLUMNS = (
    Column("exact_match", "exact match", 100, 1),
    Column("score", "score", 1, 1),
    Column("win_rate", "win rate", 100, 1),
    Column("lc_win_rate", "win rate, length-controlled", 100, 1),
    Column("style_win_rate", "win rate, style-controlled", 100, 1),
    Column("length_tokens", "tokens per answer"),
    Column("rouge_l", "ROUGE-L", 1, 1),
    Column("implicit_accuracy", "implicit reward accuracy", 100, 1),
    Column("credit_auc", "credit AUC, log-ratio", 1, 1),
    Column("credit_auc_advantage", "credit AUC, advantage", 1, 1),
    Column("distinct_1", "distinct-1", 1, 1),
    Column("distinct_2", "distinct-2", 1, 1, in_verdict=False),
    Column("self_bleu", "self-BLEU", 1, -1, in_verdict=False),
    Column("predictive_entropy", "predictive entropy", in_verdict=False),
    Column("kl_k1", "KL from reference"),
    Column("truncated", "truncated", 100, in_verdict=False),
)
BY_METRIC = {column.metric: column for column in COLUMNS}

_QUALITY = ("exact_match", "score", "implicit_accuracy")


def quality_metric(metrics: Collection[str]) -> str:
    """The metric of a policy that measures its quality best: the judge's score, else the win rate."""
    return next((metric for metric in _QUALITY if metric in metrics), "win_rate")
