"""The token credit map: which tokens of preference pairs training raised or lowered, page and number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.data.tokenize import TokenizerSpec
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.evaluation.pairs import ScoredPair, damaged_tokens
from tbpo_ray.evaluation.verdict import show


def write_credit_map(
    file: Path,
    scored: Mapping[str, Sequence[ScoredPair]],
    spec: TokenizerSpec,
    aucs: Mapping[str, Estimate],
    pairs: int,
) -> None:
    """Write the self-contained page with the first `pairs` pairs under every policy."""
    from jinja2 import Environment, PackageLoader
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(spec.backend)
    sizes = [abs(v) for group in scored.values() for p in group for v in (*p.chosen, *p.rejected)]
    scale = max(float(np.quantile(sizes, 0.99)), 1e-6) if sizes else 1.0
    first = next(iter(scored.values()))
    shown = [
        {
            "prompt": "\n".join(message["content"] for message in pair.record.prompt)[:2000],
            "policies": [
                {"name": name, "sides": _sides(group[i], spec, backend, scale)}
                for name, group in scored.items()
            ],
        }
        for i, pair in enumerate(first[:pairs])
    ]
    environment = Environment(loader=PackageLoader("tbpo_ray.evaluation", "."), autoescape=True)
    page = environment.get_template("credit.html.jinja").render(
        pairs=shown, scale=scale, aucs=[(name, show(value)) for name, value in aucs.items()]
    )
    file.write_text(page, encoding="utf-8")


def _sides(pair: ScoredPair, spec: TokenizerSpec, backend: Any, scale: float) -> list[dict[str, Any]]:
    known = "damage" in pair.record.metadata
    marks = damaged_tokens(pair.record, pair.tokens, spec) if known else [False] * len(pair.rejected)
    sides = (
        ("chosen", pair.tokens.chosen_ids, pair.chosen, [False] * len(pair.chosen)),
        ("rejected", pair.tokens.rejected_ids, pair.rejected, marks),
    )
    return [
        {
            "name": name,
            "tokens": [
                _token(backend.decode([i], skip_special_tokens=False), value, mark, scale)
                for i, value, mark in zip(ids, values, flags, strict=True)
            ],
        }
        for name, ids, values, flags in sides
    ]


def _token(text: str, value: float, damaged: bool, scale: float) -> dict[str, Any]:
    return {
        "text": text,
        "title": f"{text!r}: {value:+.4f} nats" + (", damaged" if damaged else ""),
        "damaged": damaged,
        "way": "up" if value >= 0 else "down",
        "strength": f"{min(abs(value) / scale, 1.0) * 0.85:.2f}",
    }
