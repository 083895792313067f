"""Two training workers over one, a thread each: the same run, steps of 128 pairs dealt out to the workers.

Its second epoch is timed. In the first one the memory of a process still grows with each longest pair so far,
and fresh memory can cost seconds (a virtual machine asks its host for it), for which the other worker waits.

Beside it stands what the machine allows: two bare loops at once, which have nothing to do with one another,
over one alone.
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
from benchmarks.pairs import Case, build_case, sample_lengths
from benchmarks.platform_loop import others_share, run_platform
from benchmarks.turns import Measured, against, machine, ratio, section, spread, take_turns
from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import Schedule, pair_tokens
from tbpo_ray.training.plan import make_schedule

GOAL = 1.7
PAIRS, PAIRS_PER_STEP = 384, 128
QUICK_PAIRS, QUICK_PAIRS_PER_STEP = 128, 32
BARE_PAIRS = 128


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure both in turns.

    Args:
        quick: a tiny model, to see that it runs; its figures mean little.

    Returns:
        `{"machine", "steps", "tokens": through the model in the timed steps, "parameters", "ways": {"1
        worker", "2 workers": rows}, "ratio": {ratio, low, high} of tokens a second, "most": what that can be
        at most, as :func:`most` says, "cpu_share": CPU seconds of one worker over what two take together,
        "machine_allows": {ratio, low, high} of two bare loops at once over one}`.
    """
    about = machine()
    count, a_step = (QUICK_PAIRS, QUICK_PAIRS_PER_STEP) if quick else (PAIRS, PAIRS_PER_STEP)
    lengths = sample_lengths("hh_rlhf", count)
    steps = count // a_step  # of an epoch
    with tempfile.TemporaryDirectory(prefix="tbpo-scaling-") as name:
        size = shapes.TINY if quick else shapes.MODEL
        case = build_case(
            config, Path(name), lengths, size, training__pairs_per_step=a_step, training__epochs=2
        )
        ways = {
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
        ways |= {f"{n} bare": partial(run_together, bare, Path(name, "scores"), n) for n in (1, 2)}
        found = take_turns(ways, 1 if quick else 2)
        bound = most(make_schedule(case.config, lengths))
    one, two = found["1 worker"], found["2 workers"]
    alone, together = found.pop("1 bare"), found.pop("2 bare")
    return {
        "machine": about,
        "steps": steps,
        "pairs_per_step": a_step,
        "tokens": float(pair_tokens(lengths, cut_tail=True).sum()),
        "parameters": case.parameters,
        "ways": found,
        "ratio": ratio(one, two, "seconds"),
        "most": bound,
        "cpu_share": ratio(one, two, "worker_cpu_seconds"),
        "machine_allows": {k: 2 * v for k, v in ratio(alone, together, "seconds").items()},
    }


def run_together(case: Case, scores: Path, copies: int) -> Measured:
    """So many bare loops at once, a process and a thread each: mean seconds of a loop."""
    with ThreadPoolExecutor(copies) as threads:
        loops = [threads.submit(run_bare, case, scores, cluster__threads_per_worker=1) for _ in range(copies)]
    return {"seconds": statistics.fmean(loop.result()["seconds"] for loop in loops)}


def most(schedule: Schedule) -> float:
    """Two workers over one if a step took as long as its padded tokens say and its slower worker.

    Both have equally many pairs, so one has more tokens than the other.
    """
    steps = range(schedule.steps_per_epoch, schedule.steps_total)  # as they are timed
    alone = sum(schedule.padded_tokens(step, 0, 1) for step in steps)
    return alone / sum(max(schedule.padded_tokens(step, rank, 2) for rank in (0, 1)) for step in steps)


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    cells = []
    for rows in result["ways"].values():
        cells.append(f"{result['tokens'] / statistics.median(row['seconds'] for row in rows):,.0f}")
    cells += [spread(result["ratio"]), against(result["ratio"]["ratio"], GOAL), f"{result['most']:.2f}"]
    cells += [spread(result["machine_allows"]), spread(result["cpu_share"])]
    cells += [others_share(rows) for rows in result["ways"].values()]
    head = [
        *(f"{way}, tokens/s" for way in result["ways"]),
        "ratio",
        "goal",
        "at most, as the pairs are dealt out",
        "two bare loops at once over one",
        "CPU seconds, 1 over 2 workers",
        *(f"driver and Ray's own processes, {way}" for way in result["ways"]),
    ]
    intro = (
        f"{result['steps']} steps of {result['pairs_per_step']} pairs with HH-RLHF's lengths, "
        f"the second epoch, {result['parameters'] / 1e6:.0f} M parameters, ZeRO as configured, a thread for "
        "each worker."
    )
    return section(intro, head, [cells], result["machine"])
