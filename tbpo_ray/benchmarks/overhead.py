"""What Ray Train, Ray Data and DeepSpeed add to a step: the worker loop over the bare PyTorch loop.

One worker, the same steps, batches and threads; step by step, the first two left out.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tbpo_ray.benchmarks import pairs as shapes
from tbpo_ray.benchmarks.bare_loop import run_bare, score_reference
from tbpo_ray.benchmarks.pairs import build_case, sample_lengths
from tbpo_ray.benchmarks.platform_loop import run_platform
from tbpo_ray.benchmarks.turns import (
    Measured,
    against,
    machine,
    median,
    section,
    spread,
    take_turns,
)
from tbpo_ray.config import Config

GOAL = 1.05
PAIRS, QUICK_PAIRS = 64, 32


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure both in turns.

    Args:
        quick: a tiny model, to see that it runs; its figures mean little.

    Returns:
        `{"machine", "steps", "parameters", "ways": {way: rows}, "ratio": {ratio, low, high}, "cpu_ratio": the
        same in CPU seconds of the worker}`.
    """
    about = machine()
    with tempfile.TemporaryDirectory(prefix="tbpo-overhead-") as name:
        folder = Path(name)
        lengths = sample_lengths("hh_rlhf", QUICK_PAIRS if quick else PAIRS)
        case = build_case(config, folder, lengths, shapes.TINY if quick else shapes.MODEL)
        score_reference(case, folder / "scores")
        ways = {
            "worker loop": partial(run_platform, case, "overhead", cluster__num_workers=1),
            "bare loop": partial(run_bare, case, folder / "scores"),
        }
        found = take_turns(ways, 1 if quick else 2)
    return {
        "machine": about,
        "steps": len(found["bare loop"][0]["step_seconds"]),
        "parameters": case.parameters,
        "ways": found,
        "ratio": step_ratio(found["worker loop"], found["bare loop"]),
        "cpu_ratio": cpu_ratio(found["worker loop"], found["bare loop"]),
    }


def step_ratio(platform: list[Measured], bare: list[Measured]) -> dict[str, float]:
    """Median over the steps of a step's time over the same step's in the bare loop; a value a turn."""
    each = []
    for over, under in zip(_compared(platform, 1), _compared(bare, 2), strict=True):
        each.append(statistics.median(a / b for a, b in zip(over, under, strict=True)))
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each)}


def _compared(rows: list[Measured], first: int) -> list[list[float]]:
    """Seconds of the steps from the third one on; the platform's times start with the second step."""
    return [row["step_seconds"][first:] for row in rows]


def cpu_ratio(platform: list[Measured], bare: list[Measured]) -> dict[str, float]:
    """CPU seconds of the worker over the bare loop's, both from the second step on; a value a turn."""
    each = []
    for over, under in zip(platform, bare, strict=True):
        each.append(over["worker_cpu_seconds"] / sum(under["step_cpu_seconds"][1:]))
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each)}


def others_share(platform: list[Measured]) -> str:
    """What the driver and Ray's own processes take meanwhile, in words; median of the turns."""
    share = statistics.median(row["other_cpu_seconds"] / row["seconds"] for row in platform)
    return f"{share:.0%} of a core"


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    ways = result["ways"]

    def step(way: str, first: int) -> str:
        return f"{statistics.median(s for row in _compared(ways[way], first) for s in row):.2f}"

    cells = [
        step("worker loop", 1),
        step("bare loop", 2),
        spread(result["ratio"], 3),
        against(result["ratio"]["ratio"], GOAL, at_most=True),
        spread(result["cpu_ratio"], 3),
        f"{median(ways['worker loop'], 'data_wait_share'):.2%}",
        others_share(ways["worker loop"]),
    ]
    head = [
        "worker loop, s/step",
        "bare loop, s/step",
        "ratio",
        "goal",
        "CPU-time ratio",
        "waiting for data",
        "driver and Ray's own processes",
    ]
    intro = (
        f"One worker, {result['steps']} steps of 8 pairs with HH-RLHF's lengths, "
        f"{result['parameters'] / 1e6:.0f} M parameters."
    )
    return section(intro, head, [cells], result["machine"])
