"""A study of eight trials against the same eight runs launched separately, and against a live reference.

Each separate run prepares the pairs, scores the reference and starts Ray for itself; the study does so once.
Both run two at a time with one thread each. With answers of UltraFeedback's lengths, and evaluated as often
as a scheduler needs it, only the two studies are compared.
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
from benchmarks.measure import Measured, machine, median, ratio, run_in_rounds
from benchmarks.pairs import Size, build_case, sample_lengths, write_pairs
from benchmarks.search_loop import run_study, run_training
from benchmarks.tables import goal_cell, ratio_cell, section
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.space import Space

STUDY, SEPARATE, LIVE = "study, cached scores", "separate runs", "study, live reference"
SPACE: dict[str, Any] = {
    "training.learning_rate": {"grid": [5.0e-7, 1.0e-6, 2.0e-6, 4.0e-6]},
    "objective.beta": {"grid": [0.05, 0.1]},
}
QUICK_SPACE: dict[str, Any] = {"training.learning_rate": {"grid": [1.0e-6, 2.0e-6]}}
AT_ONCE = 2
GOAL_SEPARATE, GOAL_LIVE = 1.3, 0.8
MODEL = Size(vocabulary=8192, width=256, layers=4, heads=4, intermediate=704)


@dataclass(frozen=True)
class Trials:
    """What each trial does.

    Attributes:
        lengths: the lengths of the pairs, as :func:`benchmarks.pairs.sample_lengths` names them.
        eval_every: steps between evaluations on the held-out pairs; None evaluates only at the end.
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
    """Measure each variant once.

    Args:
        quick: use a tiny model, few pairs and two trials, to check that the benchmark runs.
        only: `hh_rlhf` for all three variants, or `ultrafeedback` for the two studies.

    Returns:
        `{"machine", "trials", "lengths", "pairs", "held_out", "epochs", "eval_every", "parameters",
        "variants": {variant: rows}, "separate": {"time", "cpu_time": {ratio, low, high} of the separate runs
        over the study}, "cached": the same of cached scores over a live reference}`; `separate` is absent
        if it was not measured.

    Raises:
        InputError: for an unknown case.
    """
    if only not in CASES:
        raise InputError(f"--only search:{only}: unknown case; use {' or '.join(CASES)}")
    about = machine()
    trials = QUICK if quick else CASES[only]
    space = QUICK_SPACE if quick else SPACE
    points = list(Space.parse(space).grid_points())
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
        variants: dict[str, Callable[[], Measured]] = {
            STUDY: partial(measure_study, settled, space, folder / "study"),
            LIVE: partial(measure_study, live, space, folder / "live"),
        }
        if only == "hh_rlhf":
            variants[SEPARATE] = partial(measure_separate_runs, settled, points, folder / "separate")
        found = run_in_rounds(variants, 1)  # each is eight runs
    return {
        "machine": about,
        "trials": len(points),
        **asdict(trials),
        "parameters": case.parameters,
        "variants": found,
        **ratios(found),
    }


def measure_study(config: Config, space: Mapping[str, Any], folder: Path) -> Measured:
    """Run the study from scratch: its time includes preparing the pairs and computing cached scores."""
    shutil.rmtree(folder, ignore_errors=True)
    return run_study(_placed(config, folder, "study"), space)


def measure_separate_runs(config: Config, points: Sequence[Mapping[str, Any]], folder: Path) -> Measured:
    """Run each point as its own process, AT_ONCE at a time, with separate folders and caches."""
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
    """The separate runs over the study, if they were measured, and cached scores over a live reference."""
    keys = {"time": "seconds", "cpu_time": "cpu_seconds"}
    compared = {"separate": (SEPARATE, STUDY), "cached": (STUDY, LIVE)}
    return {
        what: {name: ratio(found[over], found[under], key) for name, key in keys.items()}
        for what, (over, under) in compared.items()
        if over in found
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    variants, cached = result["variants"], result["cached"]
    compared = {
        STUDY: ["-", "-", "-"],
        LIVE: [
            f"cached over live {ratio_cell(cached['time'])}",
            goal_cell(cached["time"]["ratio"], GOAL_LIVE, at_most=True),
            ratio_cell(cached["cpu_time"]),
        ],
    }
    separate = result.get("separate")
    if separate:
        compared[SEPARATE] = [
            f"{ratio_cell(separate['time'])} of the study",
            goal_cell(separate["time"]["ratio"], GOAL_SEPARATE),
            ratio_cell(separate["cpu_time"]),
        ]
    rows = [
        [
            variant,
            f"{median(measured, 'seconds'):.0f}",
            f"{median(measured, 'cpu_seconds'):.0f}",
            f"{median(measured, 'scorings'):.0f}",
            *compared[variant],
        ]
        for variant, measured in variants.items()
    ]
    head = ["variant", "seconds", "CPU s", "reference scorings", "ratio", "goal", "the same in CPU time"]
    steps = result["eval_every"]
    intro = (
        f"{result['trials']} trials, {AT_ONCE} at a time, one thread each: {result['pairs']} pairs with "
        f"{NAMES[result['lengths']]} lengths, {result['epochs']} epochs in steps of 8, evaluated "
        f"{f'every {steps} steps' if steps else 'at the end'} on {result['held_out']} held-out pairs; "
        f"{result['parameters'] / 1e6:.1f} M parameters, TBPO-A with the k3 baseline. One round: the "
        "brackets contain its single value."
    )
    if separate:
        intro += (
            f" The separate runs are processes of their own, also {AT_ONCE} at a time, each with its own "
            "folder and cache."
        )
    return section(intro, head, rows, result["machine"])


def _placed(config: Config, folder: Path, name: str) -> Config:
    return stage_config(
        config,
        {"run.output_dir": str(folder), "run.name": name, "data.cache_dir": str(folder / "cache")},
    )
