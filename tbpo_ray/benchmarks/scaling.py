"""Two training workers over one, a thread each: the same run, steps of 32 pairs dealt out to the workers."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_ray.benchmarks import pairs as shapes
from tbpo_ray.benchmarks.pairs import build_case, sample_lengths
from tbpo_ray.benchmarks.platform_loop import run_platform
from tbpo_ray.benchmarks.turns import against, machine, ratio, section, spread, take_turns
from tbpo_ray.config import Config

GOAL = 1.7
PAIRS, PAIRS_PER_STEP = 128, 32


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure both in turns.

    Args:
        quick: a tiny model, to see that it runs; its figures mean little.

    Returns:
        `{"machine", "steps", "tokens": through the model in the timed steps, "parameters", "ways": {"1
        worker", "2 workers": rows}, "ratio": {ratio, low, high} of tokens a second, "cpu_share": CPU seconds
        of one worker over what two take together}`.
    """
    about = machine()
    lengths = sample_lengths("hh_rlhf", PAIRS)
    with tempfile.TemporaryDirectory(prefix="tbpo-scaling-") as name:
        size = shapes.TINY if quick else shapes.MODEL
        case = build_case(config, Path(name), lengths, size, training__pairs_per_step=PAIRS_PER_STEP)
        ways = {
            f"{n} worker{'s'[: n - 1]}": partial(
                run_platform, case, f"scaling-{n}", cluster__num_workers=n, cluster__threads_per_worker=1
            )
            for n in (1, 2)
        }
        found = take_turns(ways, 1 if quick else 2)
    one, two = found["1 worker"], found["2 workers"]
    tokens = lengths[:, 0] + 2 * np.minimum(lengths[:, 1], lengths[:, 2])
    steps = len(one[0]["step_seconds"])
    return {
        "machine": about,
        "steps": steps,
        "tokens": float(tokens.mean() * steps * PAIRS_PER_STEP),
        "parameters": case.parameters,
        "ways": found,
        "ratio": ratio(one, two, "seconds"),
        "cpu_share": ratio(one, two, "worker_cpu_seconds"),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    cells = []
    for rows in result["ways"].values():
        cells.append(f"{result['tokens'] / statistics.median(row['seconds'] for row in rows):,.0f}")
    cells += [spread(result["ratio"]), against(result["ratio"]["ratio"], GOAL), spread(result["cpu_share"])]
    head = [*(f"{way}, tokens/s" for way in result["ways"]), "ratio", "goal", "CPU seconds, 1 over 2 workers"]
    intro = (
        f"{result['steps']} steps of {PAIRS_PER_STEP} pairs with HH-RLHF's lengths, "
        f"{result['parameters'] / 1e6:.0f} M parameters, ZeRO as configured, a thread for each worker."
    )
    return section(intro, head, [cells], result["machine"])
