"""The data card: statistics of prepared pairs as JSON and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.data.pair_sizes import TOKEN_COUNTS, trained_tokens
from tbpo_ray.data.rejection_reasons import rejection_counts
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.storage.files import atomic_file, write_atomic
from tbpo_ray.storage.json_lines import dumps

CARD, FIGURE = "data_card.json", "data_card.png"
_SIDES = ("prompt", "chosen", "rejected")
_BINS = 40
_RULES = (
    "prompt_repeated", "bos_added", "bos_repeated", "special_text_in_prompt", "special_text_in_answer",
    "prompt_truncated", "chosen_truncated", "rejected_truncated", "masked_answers",
    "generation_prompt_differs", "turn_without_end", "prompt_altered_by_template",
    "answer_altered_by_template", "answer_rendered_plain", "tools_ignored_by_template",
)  # fmt: skip
"""Names of the counts of exceptional rules; see :mod:`tbpo_ray.data.tokenize` and its answers."""


def data_card(prepared: PreparedPairs, training: TrainingConfig | None = None) -> dict[str, Any]:
    """Statistics of prepared pairs, with lengths in tokens and shares from 0 to 1.

    The comparisons of chosen and rejected are about trained tokens, without those that are context only.

    Args:
        prepared: the pairs.
        training: also compute the padding share of its micro-batches, in random order and by length.
    """
    sizes, counts = np.asarray(prepared.lengths()), prepared.counts
    lengths = sizes[:, :TOKEN_COUNTS]
    chosen, rejected = trained_tokens(sizes).astype(np.int64).T
    edges = np.unique(np.linspace(0, lengths.max() + 1, _BINS + 1).astype(int))
    reasons = rejection_counts(counts)
    card: dict[str, Any] = {
        "fingerprint": prepared.fingerprint,
        "records": prepared.records,
        "pairs": prepared.pairs,
        "quarantined": {"total": prepared.quarantined, **reasons},
        "identical_answers": reasons.get("answers_identical", 0) + reasons.get("pair_same_tokens", 0),
        "duplicate_pairs": int(counts["duplicate_pairs"]),
        "ties": {"skipped": int(counts.get("ties", 0)), "kept": int(counts.get("tie_pairs", 0))},
        "tokens": {side: int(counts[f"{side}_tokens"]) for side in _SIDES},
        "context_tokens": {side: int(counts.get(f"{side}_context_tokens", 0)) for side in _SIDES[1:]},
        "lengths": {side: _summary(lengths[:, index]) for index, side in enumerate(_SIDES)},
        "histogram": {
            "edges": edges.tolist(),
            **{side: np.histogram(lengths[:, i], edges)[0].tolist() for i, side in enumerate(_SIDES)},
        },
        "length_bias": {
            "chosen_longer": float((chosen > rejected).mean()),
            "same_length": float((chosen == rejected).mean()),
            "mean_difference": float((chosen - rejected).mean()),
        },
        "truncated": {
            side: int(counts.get(f"{side}_truncated", 0)) / max(1, prepared.records) for side in _SIDES
        },
        "rules": {rule: int(counts[rule]) for rule in _RULES if counts.get(rule)},
        "tail_share": float(np.abs(chosen - rejected).sum() / (chosen + rejected).sum()),
        "sources": _by_source(prepared),
        "answers_swapped": bool(prepared.inputs.get("swap_answers", False)),
        "share": prepared.inputs.get("share", [0.0, 1.0]),
        "column": prepared.column,
    }
    if training is not None:
        card["padding_share"] = {
            name: _padding(sizes, training, name == "by_length") for name in ("random", "by_length")
        }
    return card


def card_metrics(card: dict[str, Any]) -> dict[str, float]:
    """The scalar entries of a card by name, for a tracker."""
    out = {
        "duplicate_pairs": float(card["duplicate_pairs"]),
        "identical_answers": float(card["identical_answers"]),
        "ties_skipped": float(card["ties"]["skipped"]),
        "ties_kept": float(card["ties"]["kept"]),
        "tail_share": card["tail_share"],
        "chosen_longer_share": card["length_bias"]["chosen_longer"],
    }
    out |= {f"{side}_truncated_share": share for side, share in card["truncated"].items()}
    return out | {f"padding_share/{name}": share for name, share in card.get("padding_share", {}).items()}


def write_card(
    prepared: PreparedPairs, folder: str | Path | None = None, training: TrainingConfig | None = None
) -> tuple[dict[str, Any], Path, Path]:
    """Write `data_card.json` and `data_card.png` to `folder`, by default beside the shards.

    Returns:
        The card and the paths of the two files.
    """
    target = Path(folder or prepared.path)
    target.mkdir(parents=True, exist_ok=True)
    card = data_card(prepared, training)
    write_atomic(target / CARD, dumps(card, indent=1))
    with atomic_file(target / FIGURE) as partial:
        _draw(card, prepared, partial)
    return card, target / CARD, target / FIGURE


def _summary(values: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": int(values.max())}


def _by_source(prepared: PreparedPairs) -> dict[str, int]:
    """The number of pairs by address; the name of a shard contains the number of its source file."""
    addresses = [item["address"] for item in prepared.inputs["sources"]]
    out = dict.fromkeys(addresses, 0)
    for name, pairs in prepared.shards:
        out[addresses[int(name.split("-")[1])]] += pairs
    return out


def _padding(lengths: np.ndarray, training: TrainingConfig, by_length: bool) -> float:
    schedule = Schedule(
        lengths,
        seed=0,
        pairs_per_step=training.pairs_per_step,
        micro_batch_pairs=training.scoring_pairs,
        length_batches=by_length,
    )
    return schedule.padding_share()


def _draw(card: dict[str, Any], prepared: PreparedPairs, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 2)
    edges = card["histogram"]["edges"]
    for side, color in zip(_SIDES, ("tab:gray", "tab:green", "tab:red"), strict=True):
        top[0].stairs(card["histogram"][side], edges, label=side, color=color)
    top[0].set(xlabel="tokens", ylabel="pairs", title="lengths")
    top[0].legend()
    chosen, rejected = trained_tokens(prepared.lengths()).astype(np.int64).T
    top[1].hist(chosen - rejected, bins=_BINS, color="tab:blue")
    longer = card["length_bias"]["chosen_longer"]
    top[1].set(
        xlabel="chosen - rejected, trained tokens", title=f"length bias: chosen is longer in {longer:.0%}"
    )
    shares = {f"{side} truncated": share for side, share in card["truncated"].items()}
    shares["tail beyond the shorter answer"] = card["tail_share"]
    shares |= {f"padding, {name}": share for name, share in card.get("padding_share", {}).items()}
    _bars(bottom[0], shares, "shares")
    reasons = {name: n for name, n in card["quarantined"].items() if name != "total"}
    parts = card["column"] or reasons or card["sources"]
    title = "pairs by value" if card["column"] else "quarantined records" if reasons else "pairs by source"
    _bars(bottom[1], dict(list(parts.items())[:12]), title)
    low, high = card["share"]
    share = f", share {low:g} to {high:g} of the records" if (low, high) != (0, 1) else ""
    figure.suptitle(
        f"{card['pairs']:,} pairs from {card['records']:,} records, "
        f"{card['quarantined']['total']:,} quarantined{share}"
        f"{', answers swapped' if card['answers_swapped'] else ''}"
    )
    figure.savefig(file, dpi=110, format="png")


def _bars(axes: Any, values: dict[str, float], title: str) -> None:
    names = [name if len(name) < 40 else "..." + name[-36:] for name in values]
    axes.barh(range(len(names)), list(values.values()), color="tab:blue")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title)
