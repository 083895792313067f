"""What grows with the number of pairs in a process that reads them, and with the number of trials in a study.

The pairs are synthetic: one shard under many names, so that ten million pairs need little disk. A process of
its own reads them as a rank does. The trials have an objective that returns at once; the study's own code
records them.
"""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.measure import fit_exponent, run_child
from benchmarks.tables import table
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import LENGTHS, MANIFEST, TOKEN_COLUMNS, write_shard
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.space import Space

PAIRS, QUICK_PAIRS = (10_240, 102_400, 1_024_000, 10_240_000), (2_048, 4_096, 8_192, 16_384)
TRIALS, QUICK_TRIALS = (125, 250, 500, 1_000), (8, 16, 32, 64)
SHARD_PAIRS, MEAN_TOKENS = 1024, (60, 30, 30)
STEPS = 256
REPORTS, METRICS = 4, 30
TRIAL_SECONDS, AT_ONCE = 10.0, 8
"""A study for which the share of bookkeeping is computed; starting a trial alone takes seconds."""
GOAL_SHARE = 0.01
METRIC = "eval/rewards/accuracy"
SPACE: dict[str, Any] = {
    "objective.beta": {"loguniform": [0.01, 1.0]},
    "training.learning_rate": {"loguniform": [1.0e-7, 1.0e-4]},
    "objective.bregman.generator": {"choice": ["logistic", "sba"]},
}
READING = {
    "open files": "open_files",
    "bytes decoded over bytes used": "read_over_used",
    "private memory of a rank, MB": "rank_bytes",
    "private memory of a reading process, MB": "reader_bytes",
    "start, s": "start_seconds",
    "order of an epoch, s": "order_seconds",
    "reading, ms per pair": "read_ms_per_pair",
}
STUDY = {
    "recording, ms per trial": "record_ms",
    "share of wall time": "share",
    "writing the whole state, ms": "save_ms",
    "proposal by tpe, ms": "propose_ms",
    "reading the state, s": "open_seconds",
    "report page, s": "page_seconds",
    "report page, MB": "page_bytes",
}


def run(config: Config, *, quick: bool = False, only: str = "") -> list[dict[str, Any]]:
    """Measure four sizes of each.

    Args:
        quick: small sizes, to check that the benchmark runs.
        only: `reading` or `ledger`; by default both.

    Returns:
        Rows with `part` (`reading` or `ledger`), `what`, `size` (pairs or trials) and `value`.

    Raises:
        InputError: for an unknown case.
    """
    if only not in ("", "reading", "ledger"):
        raise InputError(f"--only scale:{only}: unknown case; use reading or ledger")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tbpo-scale-") as name:
        if only != "ledger":
            for pairs in QUICK_PAIRS if quick else PAIRS:
                rows += _rows("reading", READING, pairs, measure_reading(Path(name), pairs))
        if only != "reading":
            for trials in QUICK_TRIALS if quick else TRIALS:
                folder = Path(name) / f"study-{trials}"
                folder.mkdir()
                rows += _rows("ledger", STUDY, trials, measure_study(config, folder, trials))
    return rows


def _rows(
    part: str, keys: Mapping[str, str], size: int, measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    return [
        {
            "part": part,
            "what": what,
            "size": size,
            "value": measured[key] / (1e6 if key.endswith("_bytes") else 1),
        }
        for what, key in keys.items()
    ]


def measure_reading(folder: Path, pairs: int) -> dict[str, Any]:
    """Read synthetic pairs in a process of its own."""
    prepared = folder / f"pairs-{pairs}"
    write_synthetic_pairs(prepared, pairs // SHARD_PAIRS)
    return run_child(["-m", "benchmarks.scale_loop"], {"folder": str(prepared), "steps": STEPS})


def write_synthetic_pairs(folder: Path, shards: int) -> None:
    """A prepared folder whose shards are links to one file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.poisson(MEAN_TOKENS, (SHARD_PAIRS, 3)), 1).astype(np.int32)
    columns = {
        name: [rng.integers(0, 30_000, length) for length in lengths[:, i]]
        for i, name in enumerate(TOKEN_COLUMNS)
    }
    first = folder / "part-00000-000000000000.parquet"
    write_shard(first, columns)
    names = [f"part-00000-{shard * SHARD_PAIRS:012d}.parquet" for shard in range(shards)]
    for name in names[1:]:
        os.link(first, folder / name)
    size = first.stat().st_size
    np.save(folder / LENGTHS, np.tile(lengths, (shards, 1)))
    manifest = {
        "shards": [{"file": name, "pairs": SHARD_PAIRS, "bytes": size, "sha256": ""} for name in names],
        "pairs": shards * SHARD_PAIRS,
        "records": shards * SHARD_PAIRS,
        "fingerprint": "synthetic",
        "counts": {},
        "inputs": {},
        "column": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def measure_study(config: Config, folder: Path, trials: int) -> dict[str, Any]:
    """Record a study of trials that end at once, read it back, propose one more and write its report."""
    from tbpo_ray.tuning.ray_tune import Recorder
    from tbpo_ray.tuning.searchers import propose
    from tbpo_ray.tuning.study_report import write_report
    from tbpo_ray.tuning.study_state import StudyState, Trial, pareto_front

    overrides = {"tune.trials": trials, "tune.metric": METRIC, "tune.mode": "max", "tune.algorithm": "tpe"}
    settled = stage_config(config, overrides)
    space = Space.parse(SPACE)
    state = StudyState(folder / "study.json", {})
    state.save()
    recorder = Recorder(state, settled.tune, None, workers=1)
    recorder.setup()
    samples = space.random_samples(trials, 0)
    began = perf_counter()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for number, params in enumerate(samples):
            state.trials.append(Trial(number, params))
            state.record(state.trials[-1], durable=True)
            trial = SimpleNamespace(config={"number": number})
            recorder.on_trial_start(0, [], trial)
            for result in _dummy_results(number):
                recorder.on_trial_result(0, [], trial, result)
    record_seconds = (perf_counter() - began) / trials
    began = perf_counter()
    propose(space, trials, state.trials, settled.tune, 0)
    propose_seconds = perf_counter() - began
    began = perf_counter()
    read = StudyState.open(state.file)
    open_seconds = perf_counter() - began
    began = perf_counter()
    read.save()
    save_seconds = perf_counter() - began
    began = perf_counter()
    tracker: Any = SimpleNamespace(url_hint=lambda: "")
    write_report(settled, space, read, pareto_front(read.trials, settled.tune), "", folder, tracker)
    return {
        "record_ms": 1e3 * record_seconds,
        "share": record_seconds * AT_ONCE / TRIAL_SECONDS,
        "save_ms": 1e3 * save_seconds,
        "propose_ms": 1e3 * propose_seconds,
        "open_seconds": open_seconds,
        "page_seconds": perf_counter() - began,
        "page_bytes": (folder / "report.html").stat().st_size,
    }


def _dummy_results(number: int) -> Iterator[dict[str, Any]]:
    """What a trial reports: a few rows of metrics, then its outcome."""
    rng = random.Random(number)
    row: dict[str, float] = {}
    for step in range(1, REPORTS + 1):
        row = {METRIC: rng.random(), "step": float(step)}
        row |= {f"metric_{index}": rng.random() for index in range(METRICS)}
        yield {"step": step, "objective": row[METRIC], "row": row, "time_total_s": float(step)}
    yield {"state": "finished", "repeats": [row], "time_total_s": REPORTS + 1.0}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each part, with the power of the size with which each value grows."""
    intros = {
        "reading": (
            f"Pairs in shards of {SHARD_PAIRS:,}; a process reads its eighth of {STEPS} steps of 64 "
            "pairs. Its cache holds up to 256 MiB of decoded row groups. Growth: the power of the number of "
            "pairs, fitted over all sizes."
        ),
        "ledger": (
            f"Trials with {REPORTS} reports of {METRICS} metrics each, recorded by the study's own callback. "
            f"The share is that of a study whose trials take {TRIAL_SECONDS:.0f} s, {AT_ONCE} at a time: at "
            f"most {GOAL_SHARE:.0%} is the goal. Before there was a ledger, each of the {REPORTS + 3} events "
            "of a trial wrote the whole state. Growth: the power of the number of trials, fitted over all "
            "sizes."
        ),
    }
    parts = []
    for part, intro in intros.items():
        found = [row for row in rows if row["part"] == part]
        if not found:
            continue
        sizes = sorted({row["size"] for row in found})
        lines = []
        for what in dict.fromkeys(row["what"] for row in found):
            values = [row["value"] for row in found if row["what"] == what]
            lines.append([what, *map(_cell, values), f"{fit_exponent(sizes, values):.2f}"])
        parts.append(f"{intro}\n\n{table(['', *(f'{size:,}' for size in sizes), 'growth'], lines)}")
    return "\n".join(parts)


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
