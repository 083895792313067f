"""Label noise and the divergence: points of the plane of proper losses, with 0 to 40 % of the pairs flipped.

Every divergence gets the same budget: a grid of learning rates that grows until the best rate is inside it,
chosen on the split `eval` with the first seed, and reported on `test` with all seeds. Finished runs are kept
in a file, so an interrupted benchmark continues, and a repeated one returns the same table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.local_run import LocalTask, build_task, load_policy, measure, train_policy
from benchmarks.tables import table
from tbpo_ray.config.loading import digest, stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.win_rates import t_interval
from tbpo_ray.training.reference_scores import model_digest

NOISE = (0.0, 0.1, 0.2, 0.4)
SEEDS = (0, 1, 2)
BETA = 1.0
STEPS, PAIRS_PER_STEP = 120, 64
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""All rates that may be tried; the grid starts with `RATES[3:6]` and grows by one at a time."""
BASELINE = "logistic"


def _point(a: float, b: float) -> dict[str, Any]:
    return {"generator": "beta_family", "a": a, "b": b}


DIVERGENCES: dict[str, dict[str, Any]] = {
    "logistic": {"generator": "logistic"},
    "sba": {"generator": "sba", "lam": 0.0, "scale": 4.0},
    "(1, 1)": _point(1.0, 1.0),
    "(2, 2)": _point(2.0, 2.0),
}
"""Sections `objective.bregman` by name. `sba` at lam 0 and scale 4 is the point (0, -1)."""


class Results:
    """Measurements of finished runs by their settings, in a JSON-lines file."""

    def __init__(self, file: Path):
        self.file = file
        self.known: dict[str, dict[str, Any]] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.known[row["key"]] = row["found"]

    def get(self, settings: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The measurement with these settings; `run` makes it if it does not exist yet."""
        key = digest(settings)
        if key not in self.known:
            found = run()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "settings": settings, "found": found}) + "\n")
            self.known[key] = found
        return self.known[key]


def best_rate(
    measure_rate: Callable[[float], float], rates: Sequence[float] = RATES, start: int = 3
) -> float:
    """The learning rate with the largest measurement, with a smaller and a larger one tried beside it.

    Args:
        measure_rate: what a rate achieves; called once for each rate that is tried.
        rates: in ascending order; the grid starts with three of them from index `start`.

    Raises:
        InputError: the best rate is the first or the last of `rates`.
    """
    low, high = start, start + 3
    found = {rate: measure_rate(rate) for rate in rates[low:high]}
    while True:
        best = max(found, key=lambda rate: found[rate])
        if best not in (rates[low], rates[high - 1]):
            return best
        at_low_end = best == rates[low]
        if low == 0 if at_low_end else high == len(rates):
            raise InputError(
                f"rate={best:g}: the best of {', '.join(f'{rate:g}' for rate in found)} is at the edge of "
                "the grid, so a better one may be outside; add rates to RATES"
            )
        low, high = (low - 1, high) if at_low_end else (low, high + 1)
        rate = rates[low] if at_low_end else rates[high - 1]
        found[rate] = measure_rate(rate)


def run(config: Config, *, quick: bool = False) -> list[dict[str, Any]]:
    """Train and measure; finished runs are reused.

    Args:
        quick: one seed, no and 40 % noise, two divergences, few steps.

    Returns:
        A row for each divergence, noise and seed with `policy`, `noise`, `seed`, `beta`, `rate`,
        `expected_exact_match`, `kl`, `entropy`; the starting policy has the policy `sft` and no rate.
    """
    from tbpo_ray.cluster.session import start_ray
    from tbpo_ray.storage.paths import run_dir
    from tbpo_ray.workflows.train import train

    seeds, noises = (SEEDS[:1], NOISE[::3]) if quick else (SEEDS, NOISE)
    divergences = dict(list(DIVERGENCES.items())[::2]) if quick else DIVERGENCES
    results = Results(run_dir(config) / ("noise-quick.jsonl" if quick else "noise.jsonl"))
    starts = {}
    for seed in seeds:
        name = f"{config.run.name}-sft-{seed}"
        sft = stage_config(config, config.sft, objective__name="sft", run__name=name, run__seed=seed)
        starts[seed] = str(train(sft, kind="sft").export)
    start_ray()
    rows = [_start_row(config, starts[seed], seed, quick) for seed in seeds]
    for noise in noises:
        tasks = {seed: _task(config, starts[seed], noise, seed, quick) for seed in seeds}
        for name, bregman in divergences.items():
            arm = _Arm(tasks, bregman, noise, quick, results)
            rate = best_rate(partial(arm.quality, seed=seeds[0]))
            about = {"policy": name, "noise": noise, "beta": BETA, "rate": rate}
            rows += [about | {"seed": seed} | arm.measure(rate, seed)["test"] for seed in seeds]
    return rows


@dataclass(frozen=True)
class _Arm:
    """One divergence at one noise."""

    tasks: Mapping[int, LocalTask]
    bregman: Mapping[str, Any]
    noise: float
    quick: bool
    results: Results

    def measure(self, rate: float, seed: int) -> dict[str, Any]:
        """The measurements of a run by split, from the file if it is there."""
        task = self.tasks[seed]
        settings = {
            "bregman": self.bregman,
            "noise": self.noise,
            "seed": seed,
            "rate": rate,
            "beta": BETA,
            "pairs": task.train.fingerprint,
            "start": model_digest(task.start),
        }
        return self.results.get(settings, lambda: _run(task, self.bregman, rate, self.quick))

    def quality(self, rate: float, seed: int) -> float:
        """What rates are chosen by: the expected exact match on the split `eval`."""
        return float(self.measure(rate, seed)["eval"]["expected_exact_match"])


def _task(config: Config, start: str, noise: float, seed: int, quick: bool) -> LocalTask:
    train, held_out = _sources(quick)
    settled = stage_config(config, {"run.seed": seed})
    return build_task(settled, start, f"{train}&flipped={noise}" if noise else train, held_out)


def _sources(quick: bool) -> tuple[str, dict[str, str]]:
    tasks = "tasks=copy,reverse,sort,swap,drop"
    sizes = {"train": 320, "eval": 40, "test": 40} if quick else {"train": 8000, "eval": 500, "test": 1600}
    texts = {split: f"builtin:copyedit?split={split}&pairs={pairs}&{tasks}" for split, pairs in sizes.items()}
    return texts.pop("train"), texts


def _start_row(config: Config, start: str, seed: int, quick: bool) -> dict[str, Any]:
    policy = load_policy(start)
    found = measure(policy, policy, _task(config, start, 0.0, seed, quick).held_out["test"])
    return {"policy": "sft", "noise": 0.0, "seed": seed, "beta": None, "rate": None} | found


def _run(task: LocalTask, bregman: Mapping[str, Any], rate: float, quick: bool) -> dict[str, Any]:
    began = time.perf_counter()
    policy = train_policy(
        task,
        {
            "objective.name": "tbpo_q",
            "objective.state_baseline.kind": "none",
            "objective.beta": BETA,
            "objective.bregman": dict(bregman),
            "training.learning_rate": rate,
            "training.max_steps": 4 if quick else STEPS,
            "training.pairs_per_step": PAIRS_PER_STEP,
        },
    )
    reference = load_policy(task.start)
    found: dict[str, Any] = {name: measure(policy, reference, pairs) for name, pairs in task.held_out.items()}
    seconds = time.perf_counter() - began
    print(f"  {dict(bregman)} rate {rate:g}: {found['eval']}, {seconds:.0f} s", flush=True)
    return found | {"seconds": seconds}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Expected exact match by noise, and the difference from `logistic` at the same noise and seed."""
    noises = sorted({row["noise"] for row in rows})
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "sft"))
    values = {(row["policy"], row["noise"], row["seed"]): row["expected_exact_match"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    sft = [values["sft", 0.0, seed] for seed in seeds]
    lines = [["SFT", *([_mean_cell(sft)] + ["the same"] * (len(noises) - 1))]]
    for policy in policies:
        cells = []
        for noise in noises:
            found = [values[policy, noise, seed] for seed in seeds]
            rates = {f"{row['rate']:g}" for row in rows if (row["policy"], row["noise"]) == (policy, noise)}
            cell = f"{_mean_cell(found)} at {', '.join(sorted(rates))}"
            if policy != BASELINE:
                gains = [values[policy, noise, seed] - values[BASELINE, noise, seed] for seed in seeds]
                cell += f"; {_gain_cell(gains)}"
            cells.append(cell)
        lines.append([policy, *cells])
    return table(["divergence", *(f"{100 * noise:.0f} % flipped" for noise in noises)], lines)


def _mean_cell(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}"


def _gain_cell(gains: Sequence[float]) -> str:
    """Mean difference in points, with its 95 % interval over the seeds."""
    if len(gains) < 2:
        return f"{100 * gains[0]:+.1f}"
    mean, low, high = t_interval(gains)
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
