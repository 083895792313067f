"""Diversity of a policy's answers. Pure Python."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from tbpo_ray.errors import InputError

Gram = tuple[Hashable, ...]
Counts = Counter[Gram]

_ORDER = 4
"""Longest n-grams that BLEU counts."""
# mteval-v13a, the tokenizer of the WMT scores.
_ENTITIES = (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"))
_ANGLES = (("&lt;", "<"), ("&gt;", ">"))
_SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def distinct_n(token_lists: Iterable[Sequence[Hashable]], n: int = 1) -> float:
    """Number of distinct n-grams divided by the number of n-grams of all answers (Li et al. 2016), in [0, 1].

    It decreases as the number of answers grows: compare policies on the same number of answers to the same
    prompts.

    Args:
        token_lists: one list of hashable tokens per answer.
        n: 1 or more.

    Returns:
        `nan` if no answer has n tokens.
    """
    if n < 1:
        raise InputError(f"n={n}: must be at least 1")
    grams: set[Gram] = set()
    total = 0
    for tokens in token_lists:
        answer_grams = list(_grams(tokens, n))
        total += len(answer_grams)
        grams.update(answer_grams)
    return len(grams) / total if total else math.nan


def self_bleu(texts_per_prompt: Iterable[Sequence[str]]) -> float:
    """Mean sentence BLEU of each answer against the other answers to its prompt (Zhu et al. 2018).

    In [0, 1]; a high value means that the answers repeat each other. Sentence BLEU is sacrebleu's with its
    defaults (13a tokens, up to 4-grams, exponential smoothing, effective order), divided by 100.

    Args:
        texts_per_prompt: for each prompt its sampled answers; prompts with a single answer are skipped.

    Returns:
        `nan` if no prompt has two answers.
    """
    scores: list[float] = []
    for texts in texts_per_prompt:
        answers = [_tokens(text) for text in texts]
        counts: list[list[Counts]] = [
            [Counter(_grams(tokens, n)) for n in range(1, _ORDER + 1)] for tokens in answers
        ]
        for i, tokens in enumerate(answers if len(answers) > 1 else []):
            others = [j for j in range(len(answers)) if j != i]
            lengths = [len(answers[j]) for j in others]
            scores.append(_bleu(len(tokens), counts[i], [counts[j] for j in others], lengths))
    return sum(scores) / len(scores) if scores else math.nan


def predictive_entropy(logprobs: Iterable[Sequence[float]], *, per_token: bool = False) -> float:
    """Monte-Carlo estimate of the entropy of the policy's answers, in nats: mean of -log pi(answer).

    Args:
        logprobs: for each answer *sampled from the policy at temperature 1* the log-probabilities of its
            tokens; their sum is log pi(answer). At another temperature it is a cross-entropy.
        per_token: divide the sum by the number of tokens instead of the number of answers.

    Returns:
        `nan` if there are no answers (or, per token, no tokens).
    """
    total, answers, tokens = 0.0, 0, 0
    for values in logprobs:
        total -= math.fsum(values)
        answers += 1
        tokens += len(values)
    count = tokens if per_token else answers
    return total / count if count else math.nan


def _grams(tokens: Sequence[Hashable], n: int) -> Iterable[Gram]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _tokens(text: str) -> list[str]:
    text = text.rstrip()
    for old, new in _ENTITIES:
        text = text.replace(old, new)
    if "&" in text:
        for old, new in _ANGLES:
            text = text.replace(old, new)
    text = f" {text} "
    for pattern, new in _SPLITS:
        text = pattern.sub(new, text)
    return text.split()


def _bleu(length: int, counts: list[Counts], others: list[list[Counts]], lengths: list[int]) -> float:
    """Sentence BLEU in [0, 1] from n-gram counts (index 0: unigrams) of a hypothesis and its references."""
    nearest = min(lengths, key=lambda size: (abs(size - length), size))
    log_sum, smooth, order = 0.0, 1.0, 0
    for n in range(_ORDER):
        total = sum(counts[n].values())
        if total == 0:
            break
        most: Counts = Counter()
        for other in others:
            most |= other[n]
        correct = sum((counts[n] & most).values())
        if n == 0 and correct == 0:
            return 0.0
        order += 1
        if correct == 0:
            smooth *= 2
        log_sum += math.log(correct / total if correct else 1 / (smooth * total))
    if order == 0:
        return 0.0
    brevity = min(0.0, 1 - nearest / length)
    return math.exp(brevity + log_sum / order)
