"""What the objectives cost: the output layer against full logits, and a step of TBPO against one of DPO."""

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
    "logp_entropy_kl": {"want": ALL},
    "logp_frozen": {"frozen": True},
    "logp_entropy_kl_frozen": {"want": ALL, "frozen": True},
}
PARTS = (*CASES, "step")


def run(
    config: Config | None = None, *, only: str | Iterable[str] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Measure; full logits and blockwise in turns (A B A B).

    Args:
        only: some of PARTS, by name; all by default.
        quick: small sizes and one turn, to see that it runs; its figures mean little.

    Returns:
        {"device", "threads", "load", "size", "output_layer": {case: {way: {seconds, cpu_seconds,
        peak_bytes}, "time_ratio", "cpu_time_ratio", "memory_ratio"}}, "step": {variant: {seconds, ratio,
        cpu_ratio}}}; ratios are blockwise over full logits, from medians over turns, and None where the
        full logits do not fit.

    Raises:
        InputError: an unknown part.
    """
    parts = PARTS if only is None else (only,) if isinstance(only, str) else tuple(only)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"only: {' '.join(unknown)} is no part of this benchmark; any of {' '.join(PARTS)}")
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
            result["output_layer"][name] = compare(replace(size, **change), turns=1 if quick else 2)
    if "step" in parts:
        result["step"] = objective_step.run(quick)
    return result


def compare(case: Case, turns: int) -> dict[str, Any]:
    """Both ways of one case, in turns."""
    found: dict[str, list[dict[str, float]]] = {"full_logits": [], "blockwise": []}
    for _ in range(turns):
        for way, measured in found.items():
            measured.append(measure(case, way))
    medians: dict[str, Any] = {
        way: {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
        for way, measured in found.items()
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
        cells = [way_cell(case[way]) for way in ("full_logits", "blockwise")]
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


def way_cell(measured: dict[str, float]) -> str:
    """Seconds and memory of one way."""
    if not measured:
        return "does not fit"
    return f"{measured['seconds']:.2f} s, {measured['peak_bytes'] / 2**20:,.0f} MiB"


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A ratio, or a dash where there is none."""
    return "-" if value is None else form.format(value)
