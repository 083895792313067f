"""ROUGE-L between sampled answers and reference answers, by Google's `rouge-score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.measures import Estimate, Groups, mean_estimate


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The F-measure of the longest common subsequence of words, in [0, 1], for each answer.

    Words are stemmed runs of the letters a to z and digits in lower case, as in the reference implementation
    (Lin 2004): text in other scripts has no words, and scores 0.

    Args:
        references: for each answer one or several texts, of which the most similar one counts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        max(float(scorer.score(text, answer)["rougeL"].fmeasure) for text in texts)
        for answer, texts in zip(answers, references, strict=True)
    ]


def rouge_metrics(groups: Groups, column: str) -> dict[str, Estimate]:
    """Mean ROUGE-L over the prompts that have a reference, and their number; empty if none has one.

    Args:
        groups: prompt id to the answers of one policy.
        column: the metadata column with the reference.
    """
    referenced = {key: references_of(group[0].metadata, column) for key, group in groups.items()}
    means = [
        float(np.mean(rouge_l([s.answer for s in groups[key]], [texts] * len(groups[key]))))
        for key, texts in referenced.items()
        if texts
    ]
    return {"rouge_l": mean_estimate(means), "rouge_l_prompts": Estimate(len(means))} if means else {}


def references_of(metadata: Mapping[str, Any], column: str) -> list[str]:
    """The reference answers in a metadata column: a text, or a list of texts."""
    value = metadata.get(column)
    texts = value if isinstance(value, list | tuple) else [value]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def check_references(prompts: Sequence[Mapping[str, Any]], column: str) -> int:
    """The number of prompts with a reference.

    Args:
        prompts: the metadata of each prompt.

    Raises:
        InputError: no prompt has one.
    """
    found = sum(bool(references_of(metadata, column)) for metadata in prompts)
    if not found:
        columns = ", ".join(dict.fromkeys(name for metadata in prompts for name in metadata)) or "none"
        raise InputError(
            f"evaluation.reference_column={column}: none of the {len(prompts)} prompts has a text there; "
            f"their columns are {columns}"
        )
    return found
