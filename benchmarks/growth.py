"""Cost of a training step by answer length and vocabulary, and of preparing data by the number of pairs.

The step of TBPO-A (k3, cached reference, shared prompt) is compared with a plain implementation: two rows
per pair, a live reference, and logits at every position.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import pairs as shapes
from benchmarks.bare_loop import run_bare, score_reference
from benchmarks.data import save_tokenizer, timed_prepare, write_file
from benchmarks.measure import Measured, machine, median, run_in_rounds
from benchmarks.pairs import Case, Size, build_case
from benchmarks.tables import machine_line, table
from benchmarks.training import ALL_OFF
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.training.run_plan import make_schedule, resolve_run

OURS, PLAIN = "ours", "all off"
PROMPT = 128
ANSWERS, QUICK_ANSWERS = (256, 512, 1024, 2048, 4096), (16, 32)
VOCABULARIES, QUICK_VOCABULARIES = (32_000, 64_128, 128_256, 262_144), (2048, 4096)
SMALL = Size(width=256, layers=4, heads=4, intermediate=704)
PLAIN_MAX_LOGITS = 2**31
"""The plain variant is skipped where its logits alone would take more bytes than 4 times this number."""
PAIRS = 2
FILES, QUICK_FILES = (1_000, 10_000, 100_000, 1_000_000), (100, 400)
"""Numbers of pairs in the files that are prepared."""
SENTENCES = (1, 4)
"""Sentences per answer in these files, which gives about as many tokens as in HH-RLHF."""


def run(config: Config, *, quick: bool = False, only: str = "step") -> dict[str, Any]:
    """Measure one size after another.

    Args:
        quick: use small sizes, to check that the benchmark runs.
        only: `step` for a training step of both variants in rounds, or `pairs` for preparing data.

    Returns:
        `{"machine", "length": [{"size", "parameters", "variants": {variant: rows}}], "vocabulary": the
        same}`, where `size` is the tokens of each answer or of the vocabulary. For `pairs`, see
        :func:`measure_pairs`.

    Raises:
        InputError: for an unknown case.
    """
    cases = {"step": measure_step, "pairs": measure_pairs}
    if only not in cases:
        raise InputError(f"--only growth:{only}: unknown case; use {' or '.join(cases)}")
    return cases[only](config, quick)


def measure_pairs(config: Config, quick: bool = False) -> dict[str, Any]:
    """Prepare files of growing size, and compute an epoch's order as the driver and each worker do.

    Returns:
        `{"machine", "pairs": [{"pairs", "bytes", "tokens", "seconds", "cpu_seconds", "peak_worker_bytes",
        "order_seconds"}]}`.
    """
    from tbpo_ray.cluster.session import start_ray

    about = machine()
    start_ray()
    rows = []
    with tempfile.TemporaryDirectory(prefix="tbpo-growth-") as name:
        folder = Path(name)
        save_tokenizer(str(folder / "tokenizer"))
        for pairs in QUICK_FILES if quick else FILES:
            file = folder / "pairs.jsonl"
            write_file(file, pairs, sentences_per_answer=SENTENCES)
            row = timed_prepare(file, str(folder / "tokenizer"), folder / f"cache-{pairs}")
            prepared: PreparedPairs = row.pop("prepared")
            began = perf_counter()
            schedule = make_schedule(resolve_run(config), prepared.lengths())
            schedule.epoch_order(0)
            rows.append(row | {"order_seconds": perf_counter() - began})
            print(f"  {pairs:,} pairs: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
            shutil.rmtree(folder / f"cache-{pairs}")
    return {"machine": about, "pairs": rows}


def measure_step(config: Config, quick: bool = False) -> dict[str, Any]:
    """Measure steps with growing answers and vocabularies; see :func:`run`."""
    about = machine()
    base = shapes.TINY if quick else SMALL
    answers = QUICK_ANSWERS if quick else ANSWERS
    longest = 2 * (PROMPT + max(answers))
    out: dict[str, Any] = {"machine": about, "length": [], "vocabulary": []}
    for size in answers:
        out["length"].append({"size": size} | _measure(config, replace(base, positions=longest), size, quick))
    for size in QUICK_VOCABULARIES if quick else VOCABULARIES:
        out["vocabulary"].append(
            {"size": size} | _measure(config, replace(base, vocabulary=size), answers[0], quick)
        )
    return out


def _measure(config: Config, size: Size, answer: int, quick: bool) -> dict[str, Any]:
    """Measure steps of `PAIRS` pairs whose answers all have the same length."""
    prompt = 16 if quick else PROMPT
    lengths = np.tile([prompt, answer, answer], (2 * PAIRS, 1))
    with tempfile.TemporaryDirectory(prefix="tbpo-growth-") as name:
        folder = Path(name)
        case: Case = build_case(
            config,
            folder,
            lengths,
            size,
            data__max_length=prompt + answer + 8,
            data__max_prompt_length=prompt,
            training__pairs_per_step=PAIRS,
            training__micro_batch_pairs=PAIRS,
        )
        score_reference(case, folder / "scores")
        variants = {OURS: lambda: run_bare(case, folder / "scores")}
        if 4 * PAIRS * (prompt + answer) * size.vocabulary <= PLAIN_MAX_LOGITS:
            variants[PLAIN] = lambda: run_bare(case, **ALL_OFF)
        found = run_in_rounds(variants, 1 if quick else 2)
    return {"parameters": case.parameters, "variants": found}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size between the last two sizes: 1 is linear, 2 is quadratic."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def markdown(result: Mapping[str, Any]) -> str:
    """One table for pairs, or two for a step."""
    return _pairs_page(result) if "pairs" in result else _step_page(result)


def _pairs_page(result: Mapping[str, Any]) -> str:
    rows = result["pairs"]
    tokens = sum(row["tokens"] for row in rows) / sum(row["pairs"] for row in rows)
    intro = f"Generated pairs of {tokens:,.0f} tokens on average, prompt and both answers."
    head = ["pairs", "file", "seconds", "CPU ms per pair", "peak memory of a worker", "order of an epoch, s"]
    lines = [
        [
            f"{row['pairs']:,}",
            f"{row['bytes'] / 1e6:,.0f} MB",
            f"{row['seconds']:.1f}",
            f"{1e3 * row['cpu_seconds'] / row['pairs']:.2f}",
            f"{row['peak_worker_bytes'] / 1e6:,.0f} MB",
            f"{row['order_seconds']:.2f}",
        ]
        for row in rows
    ]
    sizes = [row["pairs"] for row in rows]
    time, memory, order = (
        exponent(sizes, [row[key] for row in rows])
        for key in ("seconds", "peak_worker_bytes", "order_seconds")
    )
    growth = (
        f"Between the two largest: time grows with the power {time:.2f} of the pairs, a worker's memory with "
        f"{memory:.2f}, and the time to compute the order with {order:.2f}."
    )
    return f"{intro}\n\n{table(head, lines)}\n{growth}\n\n{machine_line(result['machine'])}\n"


def _step_page(result: Mapping[str, Any]) -> str:
    intro = (
        f"TBPO-A (k3), steps of {PAIRS} pairs, prompts of {PROMPT} tokens, float32; a Llama shape of width "
        f"{SMALL.width} and {SMALL.layers} layers. Peak above model and optimizer."
    )
    if any(PLAIN not in row["variants"] for what in ("length", "vocabulary") for row in result[what]):
        intro += " `-`: not run, because its logits alone would exceed 8 GiB."
    parts = [intro]
    for key, label in (("length", "tokens of each answer"), ("vocabulary", "vocabulary")):
        rows = result[key]
        head = [label, *(f"{variant}, {unit}" for variant in (OURS, PLAIN) for unit in ("s per step", "MiB"))]
        lines = [
            [
                f"{row['size']:,}",
                *(cell for variant in (OURS, PLAIN) for cell in _cells(row["variants"].get(variant))),
            ]
            for row in rows
        ]
        parts.append(table(head, lines).rstrip("\n") + "\n\n" + _growth(rows))
    return "\n\n".join(parts) + "\n\n" + machine_line(result["machine"]) + "\n"


def _cells(rows: Sequence[Measured] | None) -> tuple[str, str]:
    if not rows:
        return "-", "-"
    return f"{_seconds(rows):.2f}", f"{median(rows, 'peak_bytes') / 2**20:,.0f}"


def _seconds(rows: Sequence[Measured]) -> float:
    """Seconds of one step; an epoch has two."""
    return median(rows, "seconds") / 2


def _growth(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = [row["size"] for row in rows]
    ours = [row["variants"][OURS] for row in rows]
    time = exponent(sizes, [_seconds(r) for r in ours])
    memory = exponent(sizes, [median(r, "peak_bytes") for r in ours])
    return (
        f"Ours between the two largest sizes: time grows with the power {time:.2f} of the size, memory with "
        f"{memory:.2f}."
    )
