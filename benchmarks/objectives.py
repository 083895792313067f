"""Cost of the objectives: the output layer against full logits, and a TBPO step against a DPO step."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import objective_step
from benchmarks.output_layer import Case, measure
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError

CPU = Case(("logp",), False, tokens=2048, hidden=640, vocab=262_144)
CUDA = Case(("logp",), False, tokens=16_384, hidden=4096, vocab=128_256, dtype="bfloat16", device="cuda")
QUICK = Case(("logp",), False, tokens=256, hidden=64, vocab=32_768)

ALL = ("logp", "entropy", "kl")
CASES: dict[str, dict[str, Any]] = {
    "logp": {},
    "logp_entropy_kl": {"outputs": ALL},
    "logp_frozen": {"frozen": True},
    "logp_entropy_kl_frozen": {"outputs": ALL, "frozen": True},
}
PARTS = (*CASES, "step")


def run(
    config: Config | None = None, *, only: str | Iterable[str] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Measure the output layer with full logits and blockwise in rounds (A B A B), and the objectives' steps.

    Args:
        only: names from PARTS; all by default.
        quick: use small sizes and one round, to check that the benchmark runs.

    Returns:
        {"device", "threads", "load", "size", "output_layer": {case: {variant: {seconds, cpu_seconds,
        peak_bytes}, "time_ratio", "cpu_time_ratio", "memory_ratio"}}, "step": {variant: {seconds, ratio,
        cpu_ratio}}}; ratios are blockwise over full logits, from medians over the rounds, and None where
        the full logits do not fit into memory.

    Raises:
        InputError: an unknown part.
    """
    parts = PARTS if only is None else (only,) if isinstance(only, str) else tuple(only)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"only: {' '.join(unknown)} is not a part of this benchmark; use {' '.join(PARTS)}")
    on_cuda = torch.cuda.is_available()
    size = QUICK if quick else CUDA if on_cuda else CPU
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_cuda and not quick else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "size": {"tokens": size.tokens, "hidden": size.hidden, "vocab": size.vocab, "dtype": size.dtype},
        "output_layer": {},
    }
    for name, change in CASES.items():
        if name in parts:
            result["output_layer"][name] = compare(replace(size, **change), rounds=1 if quick else 2)
    if "step" in parts:
        result["step"] = objective_step.run(quick)
    return result


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Measure both variants of one case in rounds."""
    found: dict[str, list[dict[str, float]]] = {"full_logits": [], "blockwise": []}
    for _ in range(rounds):
        for variant, measured in found.items():
            measured.append(measure(case, variant))
    medians: dict[str, Any] = {
        variant: {key: statistics.median(row[key] for row in measured) for key in measured[0]}
        for variant, measured in found.items()
    }
    keys = {"time_ratio": "seconds", "cpu_time_ratio": "cpu_seconds", "memory_ratio": "peak_bytes"}
    ratios = {
        name: medians["blockwise"][key] / medians["full_logits"][key]
        if key in medians["full_logits"]
        else None
        for name, key in keys.items()
        if key in medians["blockwise"]
    }
    return medians | ratios


def markdown(result: dict[str, Any]) -> str:
    """The result as two tables."""
    size = result["size"]
    lines = [
        f"{result['device']}, {result['threads']} CPU threads, load {result['load']:.1f} at the start.",
        "",
    ]
    if result["output_layer"]:
        lines += [
            f"Forward plus backward, peak above the inputs: {size['tokens']:,} tokens, "
            f"H = {size['hidden']:,}, V = {size['vocab']:,}, {size['dtype']}.",
            "",
            "| output layer | full logits | blockwise | time ratio | CPU-time ratio | memory ratio |",
            "|---|---|---|---|---|---|",
        ]
    for name, case in result["output_layer"].items():
        cells = [variant_cell(case[variant]) for variant in ("full_logits", "blockwise")]
        memory = case["memory_ratio"]
        lines.append(
            f"| {name} | {cells[0]} | {cells[1]} | {number(case['time_ratio'])} | "
            f"{number(case.get('cpu_time_ratio'))} | {number(memory and 1 / memory, '1/{:.1f}')} |"
        )
    if "step" in result:
        lines += ["", "| step | seconds | over dpo | over dpo, CPU time |", "|---|---|---|---|"]
        for name, v in result["step"].items():
            lines.append(f"| {name} | {v['seconds']:.3f} | {v['ratio']:.3f} | {v['cpu_ratio']:.3f} |")
    return "\n".join(lines).strip() + "\n"


def variant_cell(measured: dict[str, float]) -> str:
    """Seconds and memory of one variant."""
    if not measured:
        return "does not fit"
    return f"{measured['seconds']:.2f} s, {measured['peak_bytes'] / 2**20:,.0f} MiB"


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A ratio, or a dash if there is none."""
    return "-" if value is None else form.format(value)
