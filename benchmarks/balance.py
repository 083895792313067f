"""How busy the GPUs are while a step's pairs are of different lengths, from the schedule alone.

busy = real tokens of all ranks / (ranks x sum over the micro-batch indices of the slowest rank's tokens,
padding included). ZeRO stages 2 and 3 synchronize at every micro-batch, so all ranks wait for the slowest one
of each index. Time is counted in tokens; the overlap of communication is not.

No step can be shorter than its longest pair, which limits what is possible with few pairs per GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lengths import sample_lengths
from benchmarks.tables import goal_cell, table
from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.training.run_plan import resolve_run

SIZES = ((8, 128), (64, 1024), (64, 128))
"""GPUs and pairs per step."""
GOAL, GOAL_OF_ALLOWED = 0.95, 0.97
STEPS, QUICK_STEPS = 64, 4
MICRO_BATCH_TOKENS, MICRO_BATCH_PAIRS = 8192, 4
LENGTHS = ("hh_rlhf", "ultrafeedback")


def run(config: Config, *, quick: bool = False) -> list[dict[str, Any]]:
    """Distribute the pairs of some steps, packed into rows and padded to the longest pair.

    Returns:
        A row for each kind of lengths and each size: `lengths`, `gpus`, `pairs_per_step`, `busy` with packed
        rows, `longest_pair_allows`: the most that `busy` can be, `busy_padded` with rows padded to the
        longest pair and limited in pairs, and `milliseconds` to distribute a step.
    """
    rows = []
    steps = QUICK_STEPS if quick else STEPS
    truncated = resolve_run(config).truncate_to_shorter
    for kind in LENGTHS:
        for gpus, pairs_per_step in SIZES:
            lengths = pair_lengths(kind, steps * pairs_per_step)
            settings: dict[str, Any] = {
                "seed": config.run.seed,
                "pairs_per_step": pairs_per_step,
                "truncate_to_shorter": truncated,
            }
            packed = Schedule(lengths, **settings, micro_batch_tokens=MICRO_BATCH_TOKENS, rows="packed")
            padded = Schedule(lengths, **settings, micro_batch_pairs=MICRO_BATCH_PAIRS)
            packed.step_pairs(0)  # the permutation of the epoch is computed once
            began = time.perf_counter()
            busy = mean_busy(packed, gpus)
            seconds = (time.perf_counter() - began) / steps
            rows.append(
                {
                    "lengths": kind,
                    "gpus": gpus,
                    "pairs_per_step": pairs_per_step,
                    "busy": busy,
                    "longest_pair_allows": float(
                        np.mean([packed.busy_bound(step, gpus) for step in range(steps)])
                    ),
                    "busy_padded": mean_busy(padded, gpus),
                    "milliseconds": 1000 * seconds,
                }
            )
    return rows


def mean_busy(schedule: Schedule, gpus: int) -> float:
    """The mean over all steps of a schedule."""
    return float(np.mean([schedule.busy_share(step, gpus) for step in range(schedule.steps_total)]))


def pair_lengths(kind: str, pairs: int) -> np.ndarray:
    """[pairs, 3] tokens of prompt, chosen and rejected: HH-RLHF's as measured, or a model of UltraFeedback's.

    The latter has log-normal lengths of about 145, 320 and 270 tokens on average, with the long tail that
    keeps ranks waiting, and answers to one prompt that are similar in length.
    """
    if kind == "hh_rlhf":
        return sample_lengths(kind, pairs)
    rng = np.random.default_rng(0)
    correlation = np.array([[1.0, 0.2, 0.2], [0.2, 1.0, 0.6], [0.2, 0.6, 1.0]])
    normal = rng.standard_normal((pairs, 3)) @ np.linalg.cholesky(correlation).T
    lengths = np.exp(np.log([80, 270, 220]) + np.array([1.1, 0.6, 0.65]) * normal)
    return np.clip(np.round(lengths), 2, 1024).astype(np.int64)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table."""
    cells = []
    for row in rows:
        few = row["pairs_per_step"] < 4 * row["gpus"]
        share = row["busy"] / row["longest_pair_allows"]
        goal = goal_cell(share, GOAL_OF_ALLOWED) if few else goal_cell(row["busy"], GOAL)
        cells.append(
            [
                row["lengths"],
                f"{row['gpus']} x {row['pairs_per_step']}",
                f"{row['busy']:.3f}",
                f"{row['longest_pair_allows']:.3f}",
                f"{share:.3f}",
                f"{goal} ({'share' if few else 'busy'})",
                f"{row['busy_padded']:.3f}",
                f"{row['milliseconds']:.1f}",
            ]
        )
    head = [
        "lengths",
        "GPUs x pairs per step",
        "busy",
        "the longest pair allows",
        "share of that",
        "goal",
        f"padded rows, {MICRO_BATCH_PAIRS} pairs",
        "ms per step to distribute",
    ]
    intro = (
        "Share of time that GPUs compute real tokens, in lockstep: real tokens of all ranks / (ranks x sum "
        "over micro-batch indices of the slowest rank's tokens, padding included), from the schedule, with "
        f"training.micro_batch_tokens={MICRO_BATCH_TOKENS} and packed rows."
    )
    return f"{intro}\n\n{table(head, cells)}"
