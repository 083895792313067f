"""Held-out preference pairs: the policy's implicit reward, and how well its token credit finds mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from tbpo_ray.config.schema import Config
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import BadRecord, ReadOptions, Record, iter_records
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.tokenize import PairTokenizer, TokenizedPair, TokenizerSpec
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.gpu_task import run_on_gpu
from tbpo_ray.evaluation.measures import Estimate, mean_estimate
from tbpo_ray.evaluation.prompts import prompt_sources
from tbpo_ray.evaluation.suites import prompt_limit
from tbpo_ray.evaluation.token_credit import TokenCredit, token_credit
from tbpo_ray.evaluation.win_rates import win_rate


@dataclass(frozen=True)
class ScoredPair:
    """One pair with a policy's token credit of both answers."""

    record: Record
    tokens: TokenizedPair
    chosen: TokenCredit
    rejected: TokenCredit


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out preference pairs, tokenized as in training."""

    source: str
    records: list[Record]
    tokens: list[TokenizedPair]
    spec: TokenizerSpec
    skipped: int
    """Rows that are not a pair, or that the tokenizer rejects."""


def read_pairs(config: Config, model: str, limit: int | None = None) -> HeldOutPairs:
    """Read the first pairs of `evaluation.prompts`, else of `data.eval`, in this model's tokens.

    Args:
        limit: number of pairs; default `evaluation.max_prompts`.

    Raises:
        InputError: no source is configured, or it contains no pair.
    """
    names = prompt_sources(config)
    spec = TokenizerSpec.load(model, config.model.chat_template, config.data.template_kwargs)
    tokenizer = PairTokenizer(spec, config.data.max_length, config.data.prompt_limit)
    bad: list[BadRecord] = []
    limit = limit or prompt_limit(config)
    # Also a policy that was trained in reverse is measured by the preferences as they are.
    reading = replace(ReadOptions.of(config.data, config.run.seed), swap_answers=False)
    records = [record for name in names for record in iter_records(name, limit, bad.append, reading)][:limit]
    encoded = list(zip(records, tokenizer.pairs(records), strict=True))
    kept = [(r, t) for r, t in encoded if not isinstance(t, RecordError)]
    if not kept:
        raise InputError(f"evaluation.prompts={', '.join(names)}: contains no preference pair")
    skipped = len(bad) + len(encoded) - len(kept)
    return HeldOutPairs(", ".join(names), [r for r, _ in kept], [t for _, t in kept], spec, skipped)


def score_pairs(
    pairs: HeldOutPairs,
    policy: str,
    reference: str,
    *,
    attention: str = "sdpa",
    gpu_labels: Mapping[str, str] | None = None,
) -> list[ScoredPair]:
    """Token credit of both answers under `policy` (see :func:`token_credit`).

    Args:
        gpu_labels: as for :func:`tbpo_ray.evaluation.reference_kl.reference_logprobs`.
    """
    if gpu_labels is not None:
        credits = run_on_gpu(gpu_labels, token_credit, pairs.tokens, policy, reference, "cuda", attention)
    else:
        credits = token_credit(pairs.tokens, policy, reference, "cpu", attention)
    return [
        ScoredPair(record, tokens, chosen, rejected)
        for record, tokens, (chosen, rejected) in zip(pairs.records, pairs.tokens, credits, strict=True)
    ]


def implicit_rewards(
    scored: Sequence[ScoredPair], *, beta: float, truncate_to_shorter: bool
) -> dict[str, Estimate]:
    """How often, and by how much, the policy's implicit reward prefers the chosen answer.

    The reward of an answer is beta times the sum of its log-ratios (DPO, arXiv 2305.18290).

    Args:
        truncate_to_shorter: sum only the first min(T_w, T_l) tokens of both answers, as TBPO compares them.
    """
    margins = []
    for pair in scored:
        chosen = _trained(pair.chosen.log_ratio, pair.tokens.chosen_mask)
        rejected = _trained(pair.rejected.log_ratio, pair.tokens.rejected_mask)
        n = min(len(chosen), len(rejected)) if truncate_to_shorter else None
        margins.append(beta * (math.fsum(chosen[:n]) - math.fsum(rejected[:n])))
    wins = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    return {"implicit_accuracy": Estimate.of_rate(win_rate(wins)), "implicit_margin": mean_estimate(margins)}


def _trained(values: Sequence[float], mask: Sequence[bool] | None) -> Sequence[float]:
    """The values of the tokens that are not context only."""
    return values if mask is None else [value for value, kept in zip(values, mask, strict=True) if kept]


def has_known_damage(pairs: HeldOutPairs) -> bool:
    """Whether every pair tells where the mistake in its rejected answer is."""
    return all("damage" in record.metadata for record in pairs.records)


def damaged_tokens(record: Record, tokens: TokenizedPair, spec: TokenizerSpec) -> list[bool]:
    """Which tokens of the rejected answer overlap its known damage.

    In an answer that ends too early, the damaged token is its EOS.

    Raises:
        InputError: the record has no `damage` spans.
    """
    spans: Any = record.metadata.get("damage")
    if spans is None:
        raise InputError("evaluation.credit_pairs: these pairs have no known damage; use builtin:copyedit")
    backend, text = _backend(spec.backend), answer_text(record.rejected)
    encoded = backend.encode(text, add_special_tokens=False)
    offsets = list(encoded.offsets)
    if encoded.ids[: len(tokens.rejected_ids)] != tokens.rejected_ids[: len(encoded.ids)]:
        # The chat template writes more than the text, such as a space in front of it.
        offsets = _decoded_offsets(tokens.rejected_ids[:-1], text, backend)
    end = len(text)
    marks = [any(start < e and stop > s for s, e in spans) for start, stop in offsets]
    marks.append(any(s == e == end for s, e in spans))  # the end token
    return marks[: len(tokens.rejected_ids)]


def _decoded_offsets(ids: Sequence[int], text: str, backend: Any) -> list[tuple[int, int]]:
    """For each token the part of `text` that it decodes to; (-1, -1) for tokens before and behind it."""
    bounds = [
        len(backend.decode(list(ids[:count]), skip_special_tokens=False)) for count in range(len(ids) + 1)
    ]
    decoded = backend.decode(list(ids), skip_special_tokens=False)
    first = max(decoded.find(text), 0)
    spans = [(start - first, stop - first) for start, stop in pairwise(bounds)]
    return [(a, b) if b > 0 and a < len(text) else (-1, -1) for a, b in spans]


@lru_cache(maxsize=2)
def _backend(text: str) -> Any:
    """The parsed tokenizer; cached, because every pair is marked for every policy and signal."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(text)
    backend.encode_special_tokens = True
    return backend


def credit_auc(
    scored: Sequence[ScoredPair],
    spec: TokenizerSpec,
    signal: Literal["log_ratio", "advantage"] = "log_ratio",
    *,
    resamples: int = 300,
) -> Estimate:
    """Area under the ROC curve of a low signal as a detector of the damaged tokens of rejected answers.

    0.5 is chance. The interval is a seeded bootstrap over pairs.

    Raises:
        InputError: pairs without known damage.
    """
    signals = [-np.asarray(getattr(pair.rejected, signal)) for pair in scored]
    marks = [np.asarray(damaged_tokens(pair.record, pair.tokens, spec), dtype=bool) for pair in scored]
    if not any(mark.any() for mark in marks) or all(mark.all() for mark in marks):
        raise InputError(
            "evaluation.credit_pairs: needs both damaged and undamaged tokens; all of these are alike"
        )
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(scored), len(scored))
        value = _auc(np.concatenate([signals[i] for i in chosen]), np.concatenate([marks[i] for i in chosen]))
        draws.append(value)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(_auc(np.concatenate(signals), np.concatenate(marks)), float(low), float(high))


def _auc(signal: np.ndarray, marked: np.ndarray) -> float:
    """Mann-Whitney: how often a marked token's signal exceeds an unmarked one's; ties count half."""
    from scipy.stats import rankdata

    positives = int(marked.sum())
    negatives = len(marked) - positives
    if not positives or not negatives:
        return math.nan
    return float((rankdata(signal)[marked].sum() - positives * (positives + 1) / 2) / (positives * negatives))
