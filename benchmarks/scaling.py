"""Two training workers against one, with one thread each: the same run, with steps of 128 pairs.

The second epoch is timed. During the first one the memory of a process still grows with each new longest
pair, and fresh memory can cost seconds (a virtual machine requests it from its host) for which the other
worker waits.

For comparison, the limit of the machine itself is measured: two independent bare loops at the same time
against one alone.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pairs as shapes
from benchmarks.bare_loop import run_bare, score_reference
from benchmarks.measure import Measured, machine, ratio, run_in_rounds
from benchmarks.pairs import Case, build_case, sample_lengths
from benchmarks.platform_loop import driver_share, run_platform
from benchmarks.tables import goal_cell, ratio_cell, section
from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import Schedule, pair_tokens
from tbpo_ray.training.run_plan import make_schedule, resolve_run

GOAL = 1.7
PAIRS, PAIRS_PER_STEP = 384, 128
QUICK_PAIRS, QUICK_PAIRS_PER_STEP = 128, 32
BARE_PAIRS = 128


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure both in rounds.

    Args:
        quick: use a tiny model, to check that the benchmark runs.

    Returns:
        `{"machine", "steps", "tokens": through the model in the timed steps, "parameters", "variants": {"1
        worker", "2 workers": rows}, "ratio": {ratio, low, high} of tokens per second, "most": its upper
        bound, see :func:`distribution_bound`, "cpu_share": CPU seconds of one worker over those of two
        together, "machine_allows": {ratio, low, high} of two concurrent bare loops over one}`.
    """
    about = machine()
    count, pairs_per_step = (QUICK_PAIRS, QUICK_PAIRS_PER_STEP) if quick else (PAIRS, PAIRS_PER_STEP)
    lengths = sample_lengths("hh_rlhf", count)
    steps = count // pairs_per_step  # per epoch
    with tempfile.TemporaryDirectory(prefix="tbpo-scaling-") as name:
        size = shapes.TINY if quick else shapes.MODEL
        case = build_case(
            config, Path(name), lengths, size, training__pairs_per_step=pairs_per_step, training__epochs=2
        )
        variants = {
            f"{n} worker{'s'[: n - 1]}": partial(
                run_platform,
                case,
                f"scaling-{n}",
                untimed=steps,
                cluster__num_workers=n,
                cluster__threads_per_worker=1,
            )
            for n in (1, 2)
        }
        bare = build_case(config, Path(name, "bare"), lengths[:BARE_PAIRS], size)
        score_reference(bare, Path(name, "scores"))
        variants |= {f"{n} bare": partial(run_together, bare, Path(name, "scores"), n) for n in (1, 2)}
        found = run_in_rounds(variants, 1 if quick else 2)
        bound = distribution_bound(make_schedule(resolve_run(case.config), lengths))
    one, two = found["1 worker"], found["2 workers"]
    alone, together = found.pop("1 bare"), found.pop("2 bare")
    return {
        "machine": about,
        "steps": steps,
        "pairs_per_step": pairs_per_step,
        "tokens": float(pair_tokens(lengths, truncate_to_shorter=True).sum()),
        "parameters": case.parameters,
        "variants": found,
        "ratio": ratio(one, two, "seconds"),
        "most": bound,
        "cpu_share": ratio(one, two, "worker_cpu_seconds"),
        "machine_allows": {k: 2 * v for k, v in ratio(alone, together, "seconds").items()},
    }


def run_together(case: Case, scores: Path, copies: int) -> Measured:
    """Run `copies` bare loops at the same time, with a process and a thread each; mean seconds of a loop."""
    with ThreadPoolExecutor(copies) as threads:
        loops = [threads.submit(run_bare, case, scores, cluster__threads_per_worker=1) for _ in range(copies)]
    return {"seconds": statistics.fmean(loop.result()["seconds"] for loop in loops)}


def distribution_bound(schedule: Schedule) -> float:
    """The upper bound of two workers over one, if the time of a worker's step is proportional to its tokens.

    A step takes as long as its slower worker, and workers with equally many pairs differ in padded tokens.
    """
    steps = range(schedule.steps_per_epoch, schedule.steps_total)  # the timed ones
    alone = sum(schedule.padded_tokens(step, 0, 1) for step in steps)
    return alone / sum(max(schedule.padded_tokens(step, rank, 2) for rank in (0, 1)) for step in steps)


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    cells = []
    for rows in result["variants"].values():
        cells.append(f"{result['tokens'] / statistics.median(row['seconds'] for row in rows):,.0f}")
    cells += [ratio_cell(result["ratio"]), goal_cell(result["ratio"]["ratio"], GOAL), f"{result['most']:.2f}"]
    cells += [ratio_cell(result["machine_allows"]), ratio_cell(result["cpu_share"])]
    cells += [driver_share(rows) for rows in result["variants"].values()]
    head = [
        *(f"{variant}, tokens/s" for variant in result["variants"]),
        "ratio",
        "goal",
        "upper bound, as pairs are distributed across ranks",
        "two concurrent bare loops over one",
        "CPU seconds, 1 over 2 workers",
        *(f"driver and Ray's own processes, {variant}" for variant in result["variants"]),
    ]
    intro = (
        f"{result['steps']} steps of {result['pairs_per_step']} pairs with HH-RLHF's lengths, "
        f"the second epoch, {result['parameters'] / 1e6:.0f} M parameters, ZeRO as configured, one thread "
        "per worker."
    )
    return section(intro, head, [cells], result["machine"])
