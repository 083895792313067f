"""What a training step costs: our path, each of its parts switched off, and TRL's DPOTrainer.

TRL lives in an environment of its own; the variable TBPO_TRL_PYTHON names its Python. Same model (random
weights), pairs, lengths, optimizer (RMSprop), precision (fp32), 8 pairs a step, no activation checkpointing.
Each measurement is one epoch in a process of its own, after a warm-up step; the loop is the bare one, without
Ray and DeepSpeed, whose overhead is measured by `overhead`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pairs as shapes
from benchmarks.bare_loop import run_bare, score_reference
from benchmarks.pairs import Case, build_case, sample_steps, typical_lengths
from benchmarks.turns import (
    Measured,
    against,
    child,
    machine,
    machine_line,
    median,
    ratio,
    spread,
    table,
    take_turns,
)
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.training.plan import make_schedule

TRL_PYTHON = "TBPO_TRL_PYTHON"
CASES = ("hh_rlhf", "ultrafeedback", "memory", "gemma")
BRIEF = ("memory", "gemma")
"""Cases with a large vocabulary: TBPO-A, DPO and TRL's DPO alone."""
GEMMA_PAIRS = 4
"""In a step; twice as many, with full logits, would not fit into memory."""
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
    "tail not cut": {"training__cut_dead_tail": False},
    "prompt not shared": {"training__shared_prompt": False},
    "reference live": {"training__reference_scores": "live"},
    "logits at all positions": {"full_logits": True},
    "random order": {"training__length_batches": False},
}
"""Our path with one part switched off, as arguments of `run_bare`."""
ALL_OFF: dict[str, Any] = {name: value for off in OFF.values() for name, value in off.items()}


def run(config: Config, *, quick: bool = False, only: str | None = None) -> dict[str, Any]:
    """Measure pairs per second and memory, all ways in turns.

    Args:
        quick: a tiny model and few pairs, to see that it runs; its figures mean little.
        only: one of CASES.

    Returns:
        `{"machine", "trl": versions or None, "cases": {case: {"pairs", "parameters", "mean_lengths", "ways":
        {way: [a row for each turn]}, "ratios": {way: {key: {ratio, low, high}}}}}}`.

    Raises:
        InputError: an unknown case.
    """
    if only is not None and only not in CASES:
        raise InputError(f"--only training:{only}: any of {' '.join(CASES)}")
    result: dict[str, Any] = {"machine": machine(), "trl": None, "cases": {}}
    for name in (only,) if only else CASES[:1] if quick else CASES:
        with tempfile.TemporaryDirectory(prefix="tbpo-training-") as folder:
            found = measure(config, Path(folder), name, quick)
        result["cases"][name] = found
        rows = found["ways"].get(TRL)
        if rows:
            result["trl"] = rows[0]["versions"]
    return result


def measure(config: Config, folder: Path, name: str, quick: bool) -> dict[str, Any]:
    """One case."""
    a_step, size = 8, shapes.MODEL
    if name == "memory":
        size, lengths = shapes.LARGE_VOCABULARY, typical_lengths(a_step)
    elif name == "gemma":
        a_step, size = GEMMA_PAIRS, shapes.GEMMA_270M
        lengths = sample_steps("hh_rlhf", STEPS[name], a_step)
    else:
        lengths = sample_steps(name, 2 if quick else STEPS[name])
    size = shapes.TINY if quick else size
    case = build_case(
        config, folder, lengths, size, training__pairs_per_step=a_step, training__micro_batch_pairs=a_step
    )
    score_reference(case, folder / "scores")
    ways: dict[str, Callable[[], Measured]] = {OURS: partial(run_bare, case, folder / "scores")}
    if name not in BRIEF:
        off = {way: partial(run_bare, case, _cached(folder, change), **change) for way, change in OFF.items()}
        ways |= {} if quick else off
        ways["all off"] = partial(run_bare, case, **ALL_OFF)
    if not quick:
        dpo: dict[str, Any] = {"objective__name": "dpo", "objective__state_baseline__kind": None}
        score_reference(case, folder / "whole", **dpo)
        ways[OUR_DPO] = partial(run_bare, case, folder / "whole", **dpo)
    elsewhere = os.environ.get(TRL_PYTHON)
    if elsewhere:
        file = _write_ids(case, folder / "ids.json")
        ways[TRL] = partial(run_trl, elsewhere, case, file, folder, precompute=False)
        if name not in BRIEF:
            ways[TRL_CACHED] = partial(run_trl, elsewhere, case, file, folder, precompute=True)
    found = take_turns(ways, 1 if quick else 2)
    return {
        "pairs": len(lengths),
        "parameters": case.parameters,
        "vocabulary": size.vocabulary,
        "mean_lengths": lengths.mean(axis=0).round(1).tolist(),
        "ways": found,
        "ratios": ratios(found),
    }


def ratios(found: Mapping[str, list[Measured]]) -> dict[str, dict[str, dict[str, float]]]:
    """Ours over each other way: pairs per second, the same per CPU second, peak memory; and the DPOs."""
    ours = found[OURS]
    out = {
        way: {
            "speed": ratio(rows, ours, "seconds"),
            "cpu_speed": ratio(rows, ours, "cpu_seconds"),
            "memory": ratio(ours, rows, "peak_bytes"),
        }
        for way, rows in found.items()
        if way != OURS
    }
    if TRL in found and OUR_DPO in found:
        out[OUR_DPO_OVER_TRL] = {
            "speed": ratio(found[TRL], found[OUR_DPO], "seconds"),
            "cpu_speed": ratio(found[TRL], found[OUR_DPO], "cpu_seconds"),
            "memory": ratio(found[OUR_DPO], found[TRL], "peak_bytes"),
        }
    if TRL_CACHED in found:
        for epochs in (1, 3):
            name = f"{TRL_CACHED}, its cost over {epochs} epoch{'s' if epochs > 1 else ''}"
            whole = [
                {key: epochs * row[key] + row[f"reference_{key}"] for key in ("seconds", "cpu_seconds")}
                for row in found[TRL_CACHED]
            ]
            mine = [{key: epochs * row[key] for key in ("seconds", "cpu_seconds")} for row in ours]
            out[name] = {
                "speed": ratio(whole, mine, "seconds"),
                "cpu_speed": ratio(whole, mine, "cpu_seconds"),
            }
    return out


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
    return child([str(Path(__file__).with_name("trl_loop.py"))], job, python)


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each case."""
    parts = []
    for name, case in result["cases"].items():
        goals = GOALS[name]
        memory = name == "memory"
        head = [
            "way",
            "pairs/s",
            "TBPO-A's memory over it" if memory else "TBPO-A over it",
            "per CPU second",
            "goal",
            "peak above model and optimizer",
        ]
        lines = []
        for way, rows in case["ways"].items():
            against_it = case["ratios"].get(way)
            cells = ["1", "1", "-"]
            if against_it is not None:
                key = "memory" if memory else "speed"
                reached = against_it["memory"]["ratio"] if memory else lesser(against_it)
                verdict = against(reached, goals.get(way), at_most=memory)
                cells = [spread(against_it[key]), spread(against_it["cpu_speed"]), verdict]
            lines.append(
                [
                    way,
                    f"{median(rows, 'pairs_per_second'):.2f}",
                    *cells,
                    f"{median(rows, 'peak_bytes') / 2**20:,.0f} MiB",
                ]
            )
        for way, values in case["ratios"].items():
            if way not in case["ways"]:
                if memory:
                    continue
                verdict = against(lesser(values), goals.get(way))
                lines.append([way, "", spread(values["speed"]), spread(values["cpu_speed"]), verdict, ""])
        prompt, chosen, rejected = case["mean_lengths"]
        parts.append(
            f"{name}: {case['pairs']} pairs (mean tokens {prompt:.0f} + {chosen:.0f} / {rejected:.0f}), "
            f"{case['parameters'] / 1e6:.0f} M parameters, vocabulary {case['vocabulary']:,}.\n\n"
            + table(head, lines)
        )
    trl = result["trl"]
    about = {f"TRL's {name}" if name != "trl" else name: number for name, number in (trl or {}).items()}
    missing = "" if trl else f" TRL was not measured: {TRL_PYTHON} names no Python."
    return "\n".join(parts) + "\n" + machine_line(result["machine"], about) + missing + "\n"


def lesser(values: Mapping[str, Mapping[str, float]]) -> float:
    """What counts towards a goal: the lesser of the ratios by the clock and in CPU seconds."""
    return min(values["speed"]["ratio"], values["cpu_speed"]["ratio"])


def _cached(folder: Path, change: Mapping[str, Any]) -> Path | None:
    """Scores that go with a change: none for the live reference, whole answers where the tail stays."""
    if change.get("training__reference_scores") == "live":
        return None
    return folder / ("scores" if change.get("training__cut_dead_tail", True) else "whole")


def _write_ids(case: Case, file: Path) -> Path:
    """The pairs' token ids in the order of our random-order run."""
    random_order = make_schedule(
        case.config.model_copy(
            update={"training": case.config.training.model_copy(update={"length_batches": False})}
        ),
        case.prepared.lengths(),
    ).epoch_order(0)
    rows = list(case.prepared.rows(["prompt_ids", "chosen_ids", "rejected_ids"]))
    file.write_text(json.dumps([rows[i] for i in random_order]), encoding="utf-8")
    return file
