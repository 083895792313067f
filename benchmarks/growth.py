"""How the cost of a training step grows with the length of the answers and with the vocabulary, and the cost
of preparing with the number of pairs.

The step of TBPO-A (k3, cached reference, shared prompt) next to the same done the usual way: two rows a pair,
a live reference, logits at every position.
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
from benchmarks.pairs import Case, Size, build_case
from benchmarks.training import ALL_OFF
from benchmarks.turns import Measured, machine, machine_line, median, table, take_turns
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import Prepared
from tbpo_ray.errors import InputError
from tbpo_ray.training.plan import make_schedule

OURS, PLAIN = "ours", "all off"
PROMPT = 128
ANSWERS, QUICK_ANSWERS = (256, 512, 1024, 2048, 4096), (16, 32)
VOCABULARIES, QUICK_VOCABULARIES = (32_000, 64_128, 128_256, 262_144), (2048, 4096)
SMALL = Size(width=256, layers=4, heads=4, intermediate=704)
PLAIN_MOST_LOGITS = 2**31
"""The usual way is not run where its logits alone would take more bytes than 4 times this."""
PAIRS = 2
FILES, QUICK_FILES = (1_000, 10_000, 100_000, 1_000_000), (100, 400)
"""Pairs of the files that are prepared."""
SENTENCES = (1, 4)
"""Of each answer in them: about the tokens of HH-RLHF's."""


def run(config: Config, *, quick: bool = False, only: str = "step") -> dict[str, Any]:
    """Measure one size after the other.

    Args:
        quick: small sizes, to see that it runs; its figures mean little.
        only: `step`, a training step in both ways, in turns; or `pairs`, preparing.

    Returns:
        `{"machine", "length": [{"size", "parameters", "ways": {way: rows}}], "vocabulary": the same}`; `size`
        is tokens of each answer, or tokens of the vocabulary. Of `pairs`: see :func:`measure_pairs`.

    Raises:
        InputError: for an unknown case.
    """
    cases = {"step": measure_step, "pairs": measure_pairs}
    if only not in cases:
        raise InputError(f"--only growth:{only}: no such case; use {' or '.join(cases)}")
    return cases[only](config, quick)


def measure_pairs(config: Config, quick: bool = False) -> dict[str, Any]:
    """Prepare files of growing size, and deal out an epoch's order, which the driver and each worker do.

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
            write_file(file, pairs, sentences_an_answer=SENTENCES)
            row = timed_prepare(file, str(folder / "tokenizer"), folder / f"cache-{pairs}")
            prepared: Prepared = row.pop("prepared")
            began = perf_counter()
            schedule = make_schedule(config, prepared.lengths())
            schedule.epoch_order(0)
            rows.append(row | {"order_seconds": perf_counter() - began})
            print(f"  {pairs:,} pairs: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
            shutil.rmtree(folder / f"cache-{pairs}")
    return {"machine": about, "pairs": rows}


def measure_step(config: Config, quick: bool = False) -> dict[str, Any]:
    """Steps of growing answers and vocabularies, as :func:`run` says."""
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
    """Steps of `PAIRS` pairs whose answers are all of one length."""
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
        ways = {OURS: lambda: run_bare(case, folder / "scores")}
        if 4 * PAIRS * (prompt + answer) * size.vocabulary <= PLAIN_MOST_LOGITS:
            ways[PLAIN] = lambda: run_bare(case, **ALL_OFF)
        found = take_turns(ways, 1 if quick else 2)
    return {"parameters": case.parameters, "ways": found}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size between the last two sizes: 1 is linear, 2 quadratic."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def markdown(result: Mapping[str, Any]) -> str:
    """A table of pairs, or two of a step."""
    return _pairs_page(result) if "pairs" in result else _step_page(result)


def _pairs_page(result: Mapping[str, Any]) -> str:
    rows = result["pairs"]
    tokens = sum(row["tokens"] for row in rows) / sum(row["pairs"] for row in rows)
    intro = f"Generated pairs of {tokens:,.0f} tokens in the mean, prompt and both answers."
    head = ["pairs", "file", "seconds", "CPU ms a pair", "peak memory of a worker", "order of an epoch, s"]
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
        f"{memory:.2f}, the order with {order:.2f}."
    )
    return f"{intro}\n\n{table(head, lines)}\n{growth}\n\n{machine_line(result['machine'])}\n"


def _step_page(result: Mapping[str, Any]) -> str:
    intro = (
        f"TBPO-A (k3), steps of {PAIRS} pairs, prompts of {PROMPT} tokens, float32; a Llama shape of width "
        f"{SMALL.width} and {SMALL.layers} layers. Peak above model and optimizer."
    )
    if any(PLAIN not in row["ways"] for what in ("length", "vocabulary") for row in result[what]):
        intro += " `-`: not run, its logits alone pass 8 GiB."
    parts = [intro]
    for what, words in (("length", "tokens of each answer"), ("vocabulary", "vocabulary")):
        rows = result[what]
        head = [words, *(f"{way}, {unit}" for way in (OURS, PLAIN) for unit in ("s a step", "MiB"))]
        lines = [
            [f"{row['size']:,}", *(cell for way in (OURS, PLAIN) for cell in _cells(row["ways"].get(way)))]
            for row in rows
        ]
        parts.append(table(head, lines).rstrip("\n") + "\n\n" + _growth(rows))
    return "\n\n".join(parts) + "\n\n" + machine_line(result["machine"]) + "\n"


def _cells(rows: Sequence[Measured] | None) -> tuple[str, str]:
    if not rows:
        return "-", "-"
    return f"{_seconds(rows):.2f}", f"{median(rows, 'peak_bytes') / 2**20:,.0f}"


def _seconds(rows: Sequence[Measured]) -> float:
    """Of one step: an epoch is two."""
    return median(rows, "seconds") / 2


def _growth(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = [row["size"] for row in rows]
    ours = [row["ways"][OURS] for row in rows]
    time = exponent(sizes, [_seconds(r) for r in ours])
    memory = exponent(sizes, [median(r, "peak_bytes") for r in ours])
    return (
        f"Ours between the two largest sizes: time grows with the power {time:.2f} of the size, memory with "
        f"{memory:.2f}."
    )
