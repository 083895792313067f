"""Cost of a training step: our path, the same path with each of its parts disabled, and TRL's DPOTrainer.

TRL lives in an environment of its own; the variable TBPO_TRL_PYTHON names its Python. All variants use the
same model (random weights), pairs, lengths, optimizer (RMSprop), precision (fp32) and 8 pairs per step,
without activation checkpointing. Each measurement is one epoch in a process of its own, after a warm-up
step. The loop is the bare one, without Ray and DeepSpeed, whose overhead the part `overhead` measures.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pairs as shapes
from benchmarks.bare_loop import run_bare, score_reference
from benchmarks.measure import Measured, machine, median, ratio, run_child, run_in_rounds
from benchmarks.pairs import Case, build_case, sample_steps, typical_lengths
from benchmarks.tables import goal_cell, machine_line, ratio_cell, table
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.training.run_plan import make_schedule, resolve_run

TRL_PYTHON = "TBPO_TRL_PYTHON"
CASES = ("hh_rlhf", "ultrafeedback", "memory", "gemma")
BRIEF = ("memory", "gemma")
"""Cases with a large vocabulary, which only TBPO-A, DPO and TRL's DPO run."""
GEMMA_PAIRS = 4
"""Pairs per step; twice as many, with full logits, would not fit into memory."""
OURS, OUR_DPO, TRL, TRL_CACHED = "TBPO-A", "our DPO", "TRL DPO", "TRL DPO, precomputed reference"
OUR_DPO_OVER_TRL = "our DPO over TRL DPO"
STEPS = {"hh_rlhf": 4, "ultrafeedback": 2, "gemma": 3}
GOALS: dict[str, dict[str, float]] = {
    "hh_rlhf": {"all off": 5.0, "TRL DPO": 8.0, OUR_DPO_OVER_TRL: 4.0},
    "ultrafeedback": {"all off": 2.0, "TRL DPO": 2.5},
    "memory": {"TRL DPO": 0.25},
    "gemma": {"TRL DPO": 8.0, OUR_DPO_OVER_TRL: 4.0},
}
OFF: dict[str, dict[str, Any]] = {
    "full answers": {"training__truncate_to_shorter": False},
    "separate prompts": {"training__shared_prompt": False},
    "live reference": {"training__reference_scores": "live"},
    "logits at all positions": {"full_logits": True},
    "random order": {"training__length_batches": False},
}
"""Our path with one part disabled, as arguments of `run_bare`."""
ALL_OFF: dict[str, Any] = {name: value for off in OFF.values() for name, value in off.items()}


def run(config: Config, *, quick: bool = False, only: str | None = None) -> dict[str, Any]:
    """Measure pairs per second and memory of all variants in rounds.

    Args:
        quick: use a tiny model and few pairs, to check that the benchmark runs.
        only: one of CASES.

    Returns:
        `{"machine", "trl": versions or None, "cases": {case: {"pairs", "parameters", "mean_lengths",
        "variants": {variant: [a row per round]}, "ratios": {variant: {key: {ratio, low, high}}}}}}`.

    Raises:
        InputError: an unknown case.
    """
    if only is not None and only not in CASES:
        raise InputError(f"--only training:{only}: unknown case; use one of {' '.join(CASES)}")
    result: dict[str, Any] = {"machine": machine(), "trl": None, "cases": {}}
    for name in (only,) if only else CASES[:1] if quick else CASES:
        with tempfile.TemporaryDirectory(prefix="tbpo-training-") as folder:
            found = measure(config, Path(folder), name, quick)
        result["cases"][name] = found
        rows = found["variants"].get(TRL)
        if rows:
            result["trl"] = rows[0]["versions"]
    return result


def measure(config: Config, folder: Path, name: str, quick: bool) -> dict[str, Any]:
    """Measure one case."""
    size, lengths, pairs_per_step = _shape(name, quick)
    case = build_case(
        config,
        folder,
        lengths,
        size,
        training__pairs_per_step=pairs_per_step,
        training__micro_batch_pairs=pairs_per_step,
    )
    rows = run_in_rounds(_variants(case, folder, name, quick), 1 if quick else 2)
    return {
        "pairs": len(lengths),
        "parameters": case.parameters,
        "vocabulary": size.vocabulary,
        "mean_lengths": lengths.mean(axis=0).round(1).tolist(),
        "variants": rows,
        "ratios": ratios(rows),
    }


def _shape(name: str, quick: bool) -> tuple[shapes.Size, np.ndarray, int]:
    """The model, the lengths of the pairs, and the pairs per step of a case."""
    if name == "memory":
        size, lengths, pairs_per_step = shapes.LARGE_VOCABULARY, typical_lengths(8), 8
    elif name == "gemma":
        size, pairs_per_step = shapes.GEMMA_270M, GEMMA_PAIRS
        lengths = sample_steps("hh_rlhf", STEPS[name], pairs_per_step)
    else:
        size, pairs_per_step = shapes.MODEL, 8
        lengths = sample_steps(name, 2 if quick else STEPS[name])
    return shapes.TINY if quick else size, lengths, pairs_per_step


def _variants(case: Case, folder: Path, name: str, quick: bool) -> dict[str, Callable[[], Measured]]:
    """What is measured in a case. Reference scores are computed here, before any measurement."""
    score_reference(case, folder / "scores")
    variants: dict[str, Callable[[], Measured]] = {OURS: partial(run_bare, case, folder / "scores")}
    if name not in BRIEF:
        if not quick:
            for variant, change in OFF.items():
                variants[variant] = partial(run_bare, case, _matching_scores(folder, change), **change)
        variants["all off"] = partial(run_bare, case, **ALL_OFF)
    if not quick:
        dpo: dict[str, Any] = {"objective__name": "dpo", "objective__state_baseline__kind": None}
        score_reference(case, folder / "whole", **dpo)
        variants[OUR_DPO] = partial(run_bare, case, folder / "whole", **dpo)
    trl_python = os.environ.get(TRL_PYTHON)
    if trl_python:
        file = _write_ids(case, folder / "ids.json")
        variants[TRL] = partial(run_trl, trl_python, case, file, folder, precompute=False)
        if name not in BRIEF:
            variants[TRL_CACHED] = partial(run_trl, trl_python, case, file, folder, precompute=True)
    return variants


def ratios(rows: Mapping[str, list[Measured]]) -> dict[str, dict[str, dict[str, float]]]:
    """Ours over each other variant: pairs per second, the same per CPU second, and peak memory."""
    ours = rows[OURS]
    out = {variant: _compare(ours, theirs) for variant, theirs in rows.items() if variant != OURS}
    if TRL in rows and OUR_DPO in rows:
        out[OUR_DPO_OVER_TRL] = _compare(rows[OUR_DPO], rows[TRL])
    if TRL_CACHED in rows:
        for epochs in (1, 3):
            name = f"{TRL_CACHED}, its cost over {epochs} epoch{'s' if epochs > 1 else ''}"
            out[name] = _compare_with_precomputing(ours, rows[TRL_CACHED], epochs)
    return out


def _compare(ours: list[Measured], theirs: list[Measured]) -> dict[str, dict[str, float]]:
    return {
        "speed": ratio(theirs, ours, "seconds"),
        "cpu_speed": ratio(theirs, ours, "cpu_seconds"),
        "memory": ratio(ours, theirs, "peak_bytes"),
    }


def _compare_with_precomputing(
    ours: list[Measured], theirs: list[Measured], epochs: int
) -> dict[str, dict[str, float]]:
    """Over several epochs, where theirs pays once for precomputing the reference."""
    keys = ("seconds", "cpu_seconds")
    total = [{key: epochs * row[key] + row[f"reference_{key}"] for key in keys} for row in theirs]
    our_total = [{key: epochs * row[key] for key in keys} for row in ours]
    return {
        "speed": ratio(total, our_total, "seconds"),
        "cpu_speed": ratio(total, our_total, "cpu_seconds"),
    }


def run_trl(python: str, case: Case, pairs: Path, folder: Path, *, precompute: bool) -> Measured:
    """Train an epoch with TRL in its own environment."""
    job = {
        "model": case.model,
        "pairs": str(pairs),
        "pairs_per_step": case.config.training.pairs_per_step,
        "learning_rate": case.config.training.learning_rate,
        "precompute": precompute,
        "folder": str(folder / "trl"),
    }
    return run_child([str(Path(__file__).with_name("trl_loop.py"))], job, python)


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each case."""
    parts = [_case_section(name, case) for name, case in result["cases"].items()]
    trl = result["trl"] or {}
    versions = {f"TRL's {name}" if name != "trl" else name: number for name, number in trl.items()}
    missing = "" if trl else f" TRL was not measured: {TRL_PYTHON} is not set."
    return "\n".join(parts) + "\n" + machine_line(result["machine"], versions) + missing + "\n"


def _case_section(name: str, case: Mapping[str, Any]) -> str:
    memory = name == "memory"
    head = [
        "variant",
        "pairs/s",
        "TBPO-A's memory over it" if memory else "TBPO-A over it",
        "per CPU second",
        "goal",
        "peak above model and optimizer",
    ]
    lines = []
    for variant, rows in case["variants"].items():
        cells = _ratio_cells(case["ratios"].get(variant), GOALS[name].get(variant), memory=memory)
        peak = f"{median(rows, 'peak_bytes') / 2**20:,.0f} MiB"
        lines.append([variant, f"{median(rows, 'pairs_per_second'):.2f}", *cells, peak])
    for variant, values in case["ratios"].items():
        # Ratios that belong to no measured variant; they have no figures of memory.
        if variant not in case["variants"] and not memory:
            lines.append([variant, "", *_ratio_cells(values, GOALS[name].get(variant), memory=False), ""])
    prompt, chosen, rejected = case["mean_lengths"]
    return (
        f"{name}: {case['pairs']} pairs (mean tokens {prompt:.0f} + {chosen:.0f} / {rejected:.0f}), "
        f"{case['parameters'] / 1e6:.0f} M parameters, vocabulary {case['vocabulary']:,}.\n\n"
        + table(head, lines)
    )


def _ratio_cells(
    values: Mapping[str, Mapping[str, float]] | None, goal: float | None, *, memory: bool
) -> list[str]:
    """Ours over a variant, the same per CPU second, and the goal; None is ours itself."""
    if values is None:
        return ["1", "1", "-"]
    reached = values["memory"]["ratio"] if memory else lesser_speed(values)
    return [
        ratio_cell(values["memory" if memory else "speed"]),
        ratio_cell(values["cpu_speed"]),
        goal_cell(reached, goal, at_most=memory),
    ]


def lesser_speed(values: Mapping[str, Mapping[str, float]]) -> float:
    """The value that a goal is compared with: the lesser of the wall-clock and the CPU-time ratio."""
    return min(values["speed"]["ratio"], values["cpu_speed"]["ratio"])


def _matching_scores(folder: Path, change: Mapping[str, Any]) -> Path | None:
    """The folder of reference scores for a changed path: none for a live reference, or of full answers."""
    if change.get("training__reference_scores") == "live":
        return None
    return folder / ("scores" if change.get("training__truncate_to_shorter", True) else "whole")


def _write_ids(case: Case, file: Path) -> Path:
    """The pairs' token ids in the order of our random-order run."""
    training = case.config.training.model_copy(update={"length_batches": False})
    config = case.config.model_copy(update={"training": training})
    random_order = make_schedule(resolve_run(config), case.prepared.lengths()).epoch_order(0)
    rows = list(case.prepared.rows(["prompt_ids", "chosen_ids", "rejected_ids"]))
    file.write_text(json.dumps([rows[i] for i in random_order]), encoding="utf-8")
    return file
