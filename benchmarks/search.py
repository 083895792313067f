"""A study of eight trials over the same eight runs by hand, and over the same study with a live reference.

The runs by hand prepare the pairs, score the reference and start Ray each for itself; the study does so once.
Both go two at a time, a thread each. With answers of UltraFeedback's lengths, and evaluated as a scheduler
needs it, the two studies are compared alone.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import pairs as shapes
from benchmarks.pairs import Size, build_case, sample_lengths, write_pairs
from benchmarks.search_loop import run_study, run_training
from benchmarks.turns import (
    Measured,
    against,
    machine,
    median,
    ratio,
    section,
    spread,
    take_turns,
)
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
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


@dataclass(frozen=True)
class Trials:
    """What each trial does.

    Attributes:
        lengths: of whose pairs, as :func:`benchmarks.pairs.sample_lengths` names them.
        eval_every: steps between evaluations on the held-out pairs; None: at the end alone.
    """

    lengths: str
    pairs: int
    held_out: int
    epochs: int
    eval_every: int | None = None


CASES = {
    "hh_rlhf": Trials("hh_rlhf", pairs=256, held_out=128, epochs=2),
    "ultrafeedback": Trials("ultrafeedback", pairs=96, held_out=48, epochs=3, eval_every=4),
}
NAMES = {"hh_rlhf": "HH-RLHF's", "ultrafeedback": "UltraFeedback-like"}
QUICK = Trials("hh_rlhf", pairs=32, held_out=16, epochs=1)


def run(config: Config, *, quick: bool = False, only: str = "hh_rlhf") -> dict[str, Any]:
    """Measure each way once.

    Args:
        quick: a tiny model, few pairs and two trials, to see that it runs; its figures mean little.
        only: `hh_rlhf`, all three ways; `ultrafeedback`, the two studies.

    Returns:
        `{"machine", "trials", "lengths", "pairs", "held_out", "epochs", "eval_every", "parameters", "ways":
        {way: rows}, "by_hand": {"time", "cpu_time": {ratio, low, high} of the runs by hand over the study},
        "cached": the same of the study with cached scores over the one with a live reference}`; `by_hand` is
        not there where that was not measured.

    Raises:
        InputError: for an unknown case.
    """
    if only not in CASES:
        raise InputError(f"--only search:{only}: no such case; use {' or '.join(CASES)}")
    about = machine()
    trials = QUICK if quick else CASES[only]
    space = QUICK_SPACE if quick else SPACE
    points = list(Space.parse(space).points())
    with tempfile.TemporaryDirectory(prefix="tbpo-search-") as name:
        folder = Path(name)
        case = build_case(
            config.model_copy(update={"sft": {}}),
            folder,
            sample_lengths(trials.lengths, trials.pairs),
            shapes.TINY if quick else MODEL,
        )
        held_out = sample_lengths(trials.lengths, trials.held_out, seed=1)
        write_pairs(folder / "held_out.jsonl", held_out, seed=1)
        settled = stage_config(
            case.config,
            {
                "data.eval": str(folder / "held_out.jsonl"),
                "training.epochs": trials.epochs,
                "training.eval_every": trials.eval_every,
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
        live = stage_config(settled, {"training.reference_scores": "live"})
        ways: dict[str, Callable[[], Measured]] = {
            STUDY: partial(measure_study, settled, space, folder / "study"),
            LIVE: partial(measure_study, live, space, folder / "live"),
        }
        if only == "hh_rlhf":
            ways[BY_HAND] = partial(measure_by_hand, settled, points, folder / "by-hand")
        found = take_turns(ways, 1)  # each is eight runs
    return {
        "machine": about,
        "trials": len(points),
        **asdict(trials),
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
    """The runs by hand over the study, where they were measured, and cached scores over a live reference."""
    keys = {"time": "seconds", "cpu_time": "cpu_seconds"}
    compared = {"by_hand": (BY_HAND, STUDY), "cached": (STUDY, LIVE)}
    return {
        what: {name: ratio(found[over], found[under], key) for name, key in keys.items()}
        for what, (over, under) in compared.items()
        if over in found
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    ways, cached = result["ways"], result["cached"]
    compared = {
        STUDY: ["-", "-", "-"],
        LIVE: [
            f"cached over live {spread(cached['time'])}",
            against(cached["time"]["ratio"], GOAL_LIVE, at_most=True),
            spread(cached["cpu_time"]),
        ],
    }
    by_hand = result.get("by_hand")
    if by_hand:
        compared[BY_HAND] = [
            f"{spread(by_hand['time'])} of the study",
            against(by_hand["time"]["ratio"], GOAL_BY_HAND),
            spread(by_hand["cpu_time"]),
        ]
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
    steps = result["eval_every"]
    intro = (
        f"{result['trials']} trials, {AT_ONCE} at a time, a thread each: {result['pairs']} pairs with "
        f"{NAMES[result['lengths']]} lengths, {result['epochs']} epochs in steps of 8, evaluated "
        f"{f'every {steps} steps' if steps else 'at the end'} on {result['held_out']} held-out pairs; "
        f"{result['parameters'] / 1e6:.1f} M parameters, TBPO-A with the k3 baseline. One turn of each: the "
        "brackets hold that one."
    )
    if by_hand:
        intro += (
            f" The runs by hand are processes of their own, also {AT_ONCE} at a time, each with its own "
            "folder and cache."
        )
    return section(intro, head, rows, result["machine"])


def _placed(config: Config, folder: Path, name: str) -> Config:
    return stage_config(
        config,
        {"run.output_dir": str(folder), "run.name": name, "data.cache_dir": str(folder / "cache")},
    )
