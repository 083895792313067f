"""What cached reference scores save: training with them against training with a live reference model.

The cost of computing the scores is included, over one epoch and over three. One epoch is measured per round,
the second of two, when memory has reached its final size; three epochs are counted as three times that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pairs as shapes
from benchmarks.bare_loop import run_bare, score_reference
from benchmarks.measure import Measured, machine, median, ratio, run_in_rounds
from benchmarks.pairs import build_case, sample_steps
from benchmarks.tables import goal_cell, ratio_cell, section
from tbpo_ray.config.schema import Config

GOALS = {1: 1.1, 3: 1.25}
STEPS, QUICK_STEPS = 6, 2


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure scoring, an epoch with the scores, and an epoch with the live reference, in rounds.

    Args:
        quick: use a tiny model, to check that the benchmark runs.

    Returns:
        `{"machine", "pairs", "parameters", "variants": {variant: rows}, "ratios": {epochs: {"time",
        "cpu_time": {ratio, low, high} of live over cached}}}`.
    """
    about = machine()
    lengths = sample_steps("hh_rlhf", QUICK_STEPS if quick else STEPS)
    with tempfile.TemporaryDirectory(prefix="tbpo-reference-") as name:
        folder = Path(name)
        size = shapes.TINY if quick else shapes.MODEL
        case = build_case(config, folder, lengths, size, training__epochs=2)
        variants: dict[str, Callable[[], Measured]] = {
            "scoring": partial(score_reference, case, folder / "scores"),
            "cached": lambda: last_epoch(run_bare(case, folder / "scores")),
            "live": lambda: last_epoch(run_bare(case, training__reference_scores="live")),
        }
        found = run_in_rounds(variants, 1 if quick else 2)
    return {
        "machine": about,
        "pairs": len(lengths),
        "parameters": case.parameters,
        "variants": found,
        "ratios": epoch_ratios(found),
    }


def last_epoch(row: Measured) -> Measured:
    """Seconds and CPU seconds of the second of two epochs."""
    half = len(row["step_seconds"]) // 2
    return {"seconds": sum(row["step_seconds"][half:]), "cpu_seconds": sum(row["step_cpu_seconds"][half:])}


def epoch_ratios(found: Mapping[str, list[Measured]]) -> dict[int, dict[str, dict[str, float]]]:
    """Live over cached, including the cost of scoring, for each number of epochs."""
    ratios = {}
    for epochs in GOALS:
        cached = [
            {key: scoring[key] + epochs * epoch[key] for key in ("seconds", "cpu_seconds")}
            for scoring, epoch in zip(found["scoring"], found["cached"], strict=True)
        ]
        live = [{key: epochs * row[key] for key in ("seconds", "cpu_seconds")} for row in found["live"]]
        ratios[epochs] = {
            "time": ratio(live, cached, "seconds"),
            "cpu_time": ratio(live, cached, "cpu_seconds"),
        }
    return ratios


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    rows = []
    seconds = {variant: median(measured, "seconds") for variant, measured in result["variants"].items()}
    for epochs, values in result["ratios"].items():
        rows.append(
            [
                str(epochs),
                f"{seconds['scoring']:.1f} + {epochs * seconds['cached']:.1f}",
                f"{epochs * seconds['live']:.1f}",
                ratio_cell(values["time"]),
                goal_cell(values["time"]["ratio"], GOALS[epochs]),
                ratio_cell(values["cpu_time"]),
            ]
        )
    head = ["epochs", "scoring + cached, s", "live, s", "live over cached", "goal", "the same in CPU time"]
    intro = (
        f"{result['pairs']} pairs with HH-RLHF's lengths, {result['parameters'] / 1e6:.0f} M parameters, "
        "TBPO-A with the k3 baseline."
    )
    return section(intro, head, rows, result["machine"])
