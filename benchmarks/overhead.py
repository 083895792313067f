"""What Ray Train, Ray Data and DeepSpeed add to a step: the worker loop against the bare PyTorch loop.

Both run one worker with the same steps, batches and threads. They are compared step by step in the second of
two epochs, when the memory of each has reached its final size. This is done once with as many threads as
there are cores, where Ray's own processes compete with the training threads, and once with one thread fewer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pairs as shapes
from benchmarks.bare_loop import run_bare, score_reference
from benchmarks.measure import Measured, machine, median, run_in_rounds, summarize_ratios
from benchmarks.pairs import build_case, sample_lengths
from benchmarks.platform_loop import driver_share, run_platform
from benchmarks.tables import goal_cell, ratio_cell, section
from tbpo_ray.config.schema import Config

GOAL = 1.05
PAIRS, QUICK_PAIRS = 64, 32
PLATFORM, BARE = "worker loop", "bare loop"


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure both loops in rounds.

    Args:
        quick: use a tiny model, to check that the benchmark runs.

    Returns:
        `{"machine", "steps", "parameters", "threads": {number: {"variants": {variant: rows}, "ratio": {ratio,
        low, high} of a step's time over the same step's in the bare loop, "cpu_ratio": the same in CPU
        seconds of the worker}}}`.
    """
    about = machine()
    pairs = QUICK_PAIRS if quick else PAIRS
    with tempfile.TemporaryDirectory(prefix="tbpo-overhead-") as name:
        folder = Path(name)
        size = shapes.TINY if quick else shapes.MODEL
        case = build_case(config, folder, sample_lengths("hh_rlhf", pairs), size, training__epochs=2)
        score_reference(case, folder / "scores")
        steps = pairs // case.config.training.pairs_per_step
        threads = sorted({about["cores"], max(1, about["cores"] - 1)}, reverse=True)
        variants: dict[str, Callable[[], Measured]] = {}
        for number in threads:
            change: dict[str, Any] = {"cluster__threads_per_worker": number}
            variants[f"{PLATFORM} {number}"] = partial(
                run_platform, case, "overhead", untimed=steps, cluster__num_workers=1, **change
            )
            variants[f"{BARE} {number}"] = partial(run_bare, case, folder / "scores", **change)
        found = run_in_rounds(variants, 1 if quick else 2)
    return {
        "machine": about,
        "steps": steps,
        "parameters": case.parameters,
        "threads": {n: compare(found[f"{PLATFORM} {n}"], found[f"{BARE} {n}"], steps) for n in threads},
    }


def compare(platform: list[Measured], bare: list[Measured], steps: int) -> dict[str, Any]:
    """Compare the last `steps` steps of each round: the median over steps, and the sums of CPU seconds."""
    wall, cpu = [], []
    for over, under in zip(platform, bare, strict=True):
        same = zip(over["step_seconds"][-steps:], under["step_seconds"][-steps:], strict=True)
        wall.append(statistics.median(a / b for a, b in same))
        cpu.append(over["worker_cpu_seconds"] / sum(under["step_cpu_seconds"][-steps:]))
    return {
        "variants": {PLATFORM: platform, BARE: bare},
        "ratio": summarize_ratios(wall),
        "cpu_ratio": summarize_ratios(cpu),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table with a row for each number of threads."""
    rows: list[list[str]] = []
    for number, found in result["threads"].items():
        seconds = {
            variant: statistics.median(s for row in rounds for s in row["step_seconds"][-result["steps"] :])
            for variant, rounds in found["variants"].items()
        }
        goal = None if rows else GOAL
        rows.append(
            [
                str(number),
                f"{seconds[PLATFORM]:.2f}",
                f"{seconds[BARE]:.2f}",
                ratio_cell(found["ratio"], 3),
                goal_cell(found["ratio"]["ratio"], goal, at_most=True),
                ratio_cell(found["cpu_ratio"], 3),
                f"{median(found['variants'][PLATFORM], 'data_wait_share'):.2%}",
                driver_share(found["variants"][PLATFORM]),
            ]
        )
    head = [
        "threads",
        "worker loop, s/step",
        "bare loop, s/step",
        "ratio",
        "goal",
        "CPU-time ratio",
        "waiting for data",
        "driver and Ray's own processes",
    ]
    intro = (
        f"One worker, {result['steps']} steps of 8 pairs with HH-RLHF's lengths, the second epoch, "
        f"{result['parameters'] / 1e6:.0f} M parameters."
    )
    return section(intro, head, rows, result["machine"])
