"""The token credit map: a page with the scores that policies give each token of preference pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.data.messages import content_text
from tbpo_ray.data.tokenize import TokenizerSpec
from tbpo_ray.evaluation.held_out_pairs import ScoredPair, damaged_tokens
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.evaluation.verdict import format_estimate
from tbpo_ray.storage.files import write_atomic

QUANTITIES = {
    "advantage": "advantage r + c",
    "log_ratio": "log-ratio r = log π − log π_ref",
    "baseline": "state baseline c",
}
"""Attribute of TokenCredit and its label; the page colors tokens by the first one until another is chosen."""


def write_credit_map(
    file: Path,
    scored: Mapping[str, Sequence[ScoredPair]],
    spec: TokenizerSpec,
    aucs: Mapping[str, Sequence[Estimate]],
    pairs: int,
) -> None:
    """Write the self-contained page with the first `pairs` pairs under every policy.

    Args:
        aucs: for each policy the areas under the ROC curve of its log-ratio and of its advantage; empty if
            the damaged tokens are unknown.
    """
    from jinja2 import Environment, PackageLoader
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(spec.backend)
    scales = {policy: {name: _scale(group, name) for name in QUANTITIES} for policy, group in scored.items()}
    first = next(iter(scored.values()))
    shown = [
        {
            "prompt": "\n".join(content_text(message) for message in pair.record.prompt)[:2000],
            "policies": [
                {"name": name, "sides": _sides(group[i], spec, backend, scales[name])}
                for name, group in scored.items()
            ],
        }
        for i, pair in enumerate(first[:pairs])
    ]
    environment = Environment(loader=PackageLoader("tbpo_ray.evaluation", "."), autoescape=True)
    page = environment.get_template("credit.html.jinja").render(
        pairs=shown,
        quantities=list(QUANTITIES.items()),
        aucs=[(name, *(format_estimate(value) for value in values)) for name, values in aucs.items()],
    )
    write_atomic(file, page)


def _scale(group: Sequence[ScoredPair], quantity: str) -> float:
    """The magnitude with the full color: the 99th percentile over a policy's tokens."""
    sizes = [
        abs(value)
        for pair in group
        for side in (pair.chosen, pair.rejected)
        for value in getattr(side, quantity)
    ]
    return max(float(np.quantile(sizes, 0.99)), 1e-6) if sizes else 1.0


def _sides(
    pair: ScoredPair, spec: TokenizerSpec, backend: Any, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    known = "damage" in pair.record.metadata
    rejected = pair.tokens.rejected_ids
    marks = damaged_tokens(pair.record, pair.tokens, spec) if known else [False] * len(rejected)
    sides = (
        ("chosen", pair.tokens.chosen_ids, pair.chosen, [False] * len(pair.tokens.chosen_ids)),
        ("rejected", rejected, pair.rejected, marks),
    )
    return [
        {
            "name": name,
            "tokens": [
                _token(text, dict(zip(QUANTITIES, values, strict=True)), mark, scales)
                for text, mark, *values in zip(
                    _texts(ids, backend), flags, *(getattr(credit, q) for q in QUANTITIES), strict=True
                )
            ],
        }
        for name, ids, credit, flags in sides
    ]


def _texts(ids: Sequence[int], backend: Any) -> list[str]:
    """The text that each token adds; decoded alone, many tokens lose the space before them."""
    texts, before = [], ""
    for t, token in enumerate(ids):
        after = backend.decode(list(ids[: t + 1]), skip_special_tokens=False)
        if after.startswith(before):
            texts.append(after[len(before) :])
        else:  # the last token of a character that consists of several tokens
            texts.append(backend.decode([token], skip_special_tokens=False))
        before = after
    return texts


def _token(
    text: str, values: Mapping[str, float], damaged: bool, scales: Mapping[str, float]
) -> dict[str, Any]:
    scores = ", ".join(f"{name.replace('_', '-')} {value:+.4f}" for name, value in values.items())
    colors = [
        f"--{name}: rgba(var(--{'up' if value >= 0 else 'down'}), {_strength(value / scales[name])})"
        for name, value in values.items()
    ]
    return {
        "text": text,
        "title": f"{text!r}: {scores} nats" + (", damaged" if damaged else ""),
        "damaged": damaged,
        "style": "; ".join(colors),
    }


def _strength(share: float) -> str:
    """Opacity of a value that is `share` of the magnitude with the full color."""
    return f"{min(abs(share), 1.0) * 0.85:.2f}"
