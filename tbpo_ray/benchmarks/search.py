"""A study of eight trials over the same eight runs by hand, and over the same study with a live reference.

The runs by hand prepare the pairs, score the reference and start Ray each for itself; the study does so once.
Both go two at a time, a thread each.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from tbpo_ray.benchmarks import pairs as shapes
from tbpo_ray.benchmarks.pairs import Size, build_case, sample_lengths, write_pairs
from tbpo_ray.benchmarks.search_loop import run_study, run_training
from tbpo_ray.benchmarks.turns import (
    Measured,
    against,
    machine,
    median,
    ratio,
    section,
    spread,
    take_turns,
)
from tbpo_ray.config import Config
from tbpo_ray.configuration import stage_config
from tbpo_ray.tuning.space import Space

STUDY, BY_HAND, LIVE = "study, cached scores", "runs by hand", "study, live reference"
SPACE: dict[str, Any] = {
    "training.learning_rate": {"grid": [5.0e-7, 1.0e-6, 2.0e-6, 4.0e-6]},
    "objective.beta": {"grid": [0.05, 0.1]},
}
QUICK_SPACE: dict[str, Any] = {"training.learning_rate": {"grid": [1.0e-6, 2.0e-6]}}
AT_ONCE = 2
GOAL_BY_HAND, GOAL_LIVE = 1.3, 0.8
MODEL = Size(vocabulary=8192, width=256, layers=4, heads=4, intermediate=704)
PAIRS, HELD_OUT, EPOCHS = 256, 128, 2
QUICK_PAIRS, QUICK_HELD_OUT, QUICK_EPOCHS = 32, 16, 1


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Measure all three, once.

    Args:
        quick: a tiny model, few pairs and two trials, to see that it runs; its figures mean little.

    Returns:
        `{"machine", "trials", "pairs", "held_out", "epochs", "parameters", "ways": {way: rows}, "by_hand":
        {"time", "cpu_time": {ratio, low, high} of the runs by hand over the study}, "cached": the same of
        the study with cached scores over the one with a live reference}`.
    """
    about = machine()
    count, held_out, epochs = (
        (QUICK_PAIRS, QUICK_HELD_OUT, QUICK_EPOCHS) if quick else (PAIRS, HELD_OUT, EPOCHS)
    )
    space = QUICK_SPACE if quick else SPACE
    points = list(Space.parse(space).points())
    with tempfile.TemporaryDirectory(prefix="tbpo-search-") as name:
        folder = Path(name)
        case = build_case(
            config.model_copy(update={"sft": {}}),
            folder,
            sample_lengths("hh_rlhf", count),
            shapes.TINY if quick else MODEL,
        )
        write_pairs(folder / "held_out.jsonl", sample_lengths("hh_rlhf", held_out, seed=1), seed=1)
        settled = stage_config(
            case.config,
            {
                "data.eval": str(folder / "held_out.jsonl"),
                "training.epochs": epochs,
                "training.checkpoint_every": None,
                "cluster.num_workers": 1,
                "cluster.use_gpu": False,
                "cluster.resources_per_worker": {"CPU": 1},
                "cluster.threads_per_worker": 1,
                "tracking.uri": None,
                "tune.trials": len(points),
                "tune.metric": "eval/rewards/accuracy",
                "tune.mode": "max",
                "tune.algorithm": "grid",
                "tune.scheduler": "none",
                "tune.max_concurrent": AT_ONCE,
                "tune.repeats": 1,
                "tune.confirm": 0,
            },
        )
        ways = {
            STUDY: partial(measure_study, settled, space, folder / "study"),
            BY_HAND: partial(measure_by_hand, settled, points, folder / "by-hand"),
            LIVE: partial(
                measure_study,
                stage_config(settled, {"training.reference_scores": "live"}),
                space,
                folder / "live",
            ),
        }
        found = take_turns(ways, 1)  # each is eight runs
    return {
        "machine": about,
        "trials": len(points),
        "pairs": count,
        "held_out": held_out,
        "epochs": epochs,
        "parameters": case.parameters,
        "ways": found,
        **ratios(found),
    }


def measure_study(config: Config, space: Mapping[str, Any], folder: Path) -> Measured:
    """The study from nothing: pairs are prepared and, where they are cached, scores computed in its time."""
    shutil.rmtree(folder, ignore_errors=True)
    return run_study(_placed(config, folder, "study"), space)


def measure_by_hand(config: Config, points: Sequence[Mapping[str, Any]], folder: Path) -> Measured:
    """The runs as someone would launch them, AT_ONCE at a time, each with a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    runs = [stage_config(_placed(config, folder / f"r{i}", f"r{i}"), point) for i, point in enumerate(points)]
    began = perf_counter()
    with ThreadPoolExecutor(max_workers=AT_ONCE) as threads:
        rows = list(threads.map(run_training, runs))
    return {
        "seconds": perf_counter() - began,
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows),
        "scorings": sum(row["scorings"] for row in rows),
        "trials": len(rows),
    }


def ratios(found: Mapping[str, list[Measured]]) -> dict[str, dict[str, dict[str, float]]]:
    """The runs by hand over the study, and cached scores over a live reference."""
    keys = {"time": "seconds", "cpu_time": "cpu_seconds"}
    return {
        "by_hand": {name: ratio(found[BY_HAND], found[STUDY], key) for name, key in keys.items()},
        "cached": {name: ratio(found[STUDY], found[LIVE], key) for name, key in keys.items()},
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    ways, by_hand, cached = result["ways"], result["by_hand"], result["cached"]
    compared = {
        STUDY: ["-", "-", "-"],
        BY_HAND: [
            f"{spread(by_hand['time'])} of the study",
            against(by_hand["time"]["ratio"], GOAL_BY_HAND),
            spread(by_hand["cpu_time"]),
        ],
        LIVE: [
            f"cached over live {spread(cached['time'])}",
            against(cached["time"]["ratio"], GOAL_LIVE, at_most=True),
            spread(cached["cpu_time"]),
        ],
    }
    rows = [
        [
            way,
            f"{median(measured, 'seconds'):.0f}",
            f"{median(measured, 'cpu_seconds'):.0f}",
            f"{median(measured, 'scorings'):.0f}",
            *compared[way],
        ]
        for way, measured in ways.items()
    ]
    head = ["way", "seconds", "CPU s", "reference scorings", "ratio", "goal", "the same in CPU time"]
    intro = (
        f"{result['trials']} trials, {AT_ONCE} at a time, a thread each: {result['pairs']} pairs with "
        f"HH-RLHF's lengths, {result['held_out']} held out, {result['epochs']} epoch(s) in steps of 8, "
        f"{result['parameters'] / 1e6:.1f} M parameters, TBPO-A with the k3 baseline. The runs by hand are "
        f"processes of their own, also {AT_ONCE} at a time, each with its own folder and cache."
    )
    return section(intro, head, rows, result["machine"])


def _placed(config: Config, folder: Path, name: str) -> Config:
    return stage_config(
        config,
        {"run.output_dir": str(folder), "run.name": name, "data.cache_dir": str(folder / "cache")},
    )
