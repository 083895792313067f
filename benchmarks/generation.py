"""Tokens per second of our pool of vLLM engines against `transformers.generate`.

The pool is given all prompts at once and batches them itself. transformers takes them one at a time, and in
batches of similar length, padded on the left, of the size that was fastest in a first round. The ratio that
has a goal excludes starting the engine and loading the model; the times that include them are in the same
table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import pairs as shapes
from benchmarks.measure import Measured, machine, median, ratio, run_in_rounds
from benchmarks.pairs import Size, build_case, sample_lengths
from benchmarks.sampling_loop import Job, run_pool, run_transformers, start_pool
from benchmarks.tables import goal_cell, ratio_cell, section
from tbpo_ray.config.loading import to_tree
from tbpo_ray.config.schema import Config

POOL, ONE, BEST = "vLLM pool", "transformers, batch 1", "transformers, its best batch"
GOALS = {ONE: 10.0, BEST: 3.0}
PROMPTS, ANSWER, BATCHES = 256, 64, (8, 32, 128)
QUICK_PROMPTS, QUICK_ANSWER, QUICK_BATCHES = 64, 32, (8, 32)
MOST_BATCHES = 6
"""How many batches of one size are measured; they are spread evenly over the lengths."""


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Find transformers' best batch size, then measure all variants in rounds.

    Args:
        quick: use a tiny model and few prompts, to check that the benchmark runs.

    Returns:
        `{"machine", "prompts", "prompt_tokens": mean, "answer": tokens of each, "parameters", "batches":
        {size: tokens/s in the first round}, "best", "variants": {variant: rows}, "ratios": {variant:
        {"speed", "cpu_speed", "whole": {ratio, low, high}}}}`; `whole` includes start and load, for all
        prompts.
    """
    about = machine()
    size = shapes.TINY if quick else shapes.MODEL
    lengths = sample_lengths("hh_rlhf", QUICK_PROMPTS if quick else PROMPTS)
    answer = QUICK_ANSWER if quick else ANSWER
    with tempfile.TemporaryDirectory(prefix="tbpo-generation-") as name:
        folder = Path(name)
        case = build_case(config, folder, lengths, size)
        file = folder / "prompts.json"
        file.write_text(json.dumps([row["prompt_ids"] for row in case.prepared.rows(["prompt_ids"])]))
        sampling = config.generation.model_copy(
            update={"max_tokens": answer, "temperature": 1.0, "top_p": 1.0, "samples": 1}
        )
        job = Job(case.model, str(file), to_tree(sampling), str(folder / "samples"))
        tried = fitting(QUICK_BATCHES if quick else BATCHES, size, int(lengths[:, 0].max()) + answer)
        rounds = {str(batch): partial(run_transformers, _with(job, batch)) for batch in tried}
        first = {int(batch): row["tokens_per_second"] for batch, (row,) in run_in_rounds(rounds, 1).items()}
        best = max(first, key=lambda batch: first[batch])
        variants: dict[str, Callable[[], Measured]] = {
            POOL: partial(run_pool, job),
            ONE: partial(run_transformers, _with(job, 1)),
            BEST: partial(run_transformers, _with(job, best)),
        }
        start_pool(job)
        found = run_in_rounds(variants, 1 if quick else 2)
    return {
        "machine": about,
        "prompts": len(lengths),
        "prompt_tokens": float(lengths[:, 0].mean()),
        "answer": answer,
        "parameters": case.parameters,
        "batches": first,
        "best": best,
        "variants": found,
        "ratios": ratios(found, len(lengths)),
    }


def fitting(sizes: Sequence[int], size: Size, tokens: int) -> list[int]:
    """The batch sizes whose key-value cache fits into half of the free memory, and always the smallest."""
    # transformers copies a layer's keys and values to append to them, so one layer counts twice.
    each = 2 * size.layers * size.width * 4 * tokens
    free = psutil.virtual_memory().available / 2
    return [batch for batch in sizes if batch == min(sizes) or batch * each * (1 + 1 / size.layers) <= free]


def ratios(found: Mapping[str, list[Measured]], prompts: int) -> dict[str, dict[str, dict[str, float]]]:
    """The pool over each other variant: tokens per second of sampling, the same per CPU second, and the time
    from the start of the process to its end for all `prompts`."""
    ours = [row | _per_cpu(row) for row in found[POOL]]
    out = {}
    for variant, rows in found.items():
        if variant != POOL:
            theirs = [row | _per_cpu(row) | {"whole": whole_seconds(row, prompts)} for row in rows]
            out[variant] = {
                "speed": ratio(ours, theirs, "tokens_per_second"),
                "cpu_speed": ratio(ours, theirs, "tokens_per_cpu_second"),
                "whole": ratio(theirs, [{"whole": whole_seconds(row, prompts)} for row in ours], "whole"),
            }
    return out


def whole_seconds(row: Measured, prompts: int) -> float:
    """From the start of the process to its end, extrapolated from the measured prompts to all of them."""
    measured = row.get("prompts", prompts)
    return row["process_seconds"] + row["seconds"] * (prompts / measured - 1)


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    variants, prompts = result["variants"], result["prompts"]
    rows = []
    for variant, measured in variants.items():
        ratios_to_it = result["ratios"].get(variant)
        whole = [{"whole": whole_seconds(row, prompts)} for row in measured]
        cells = ["1", "-", "1", "1"]
        if ratios_to_it:
            cells = [
                ratio_cell(ratios_to_it["speed"]),
                goal_cell(ratios_to_it["speed"]["ratio"], GOALS[variant]),
                # In a short run two starts can differ by more CPU time than sampling takes.
                ratio_cell(ratios_to_it["cpu_speed"]) if ratios_to_it["cpu_speed"]["low"] > 0 else "-",
                ratio_cell(ratios_to_it["whole"]),
            ]
        rows.append(
            [
                f"{variant} ({result['best']})" if variant == BEST else variant,
                f"{median(measured, 'tokens_per_second'):,.0f}",
                *cells[:3],
                f"{median(whole, 'whole'):,.1f} s",
                cells[3],
            ]
        )
    head = [
        "variant",
        "tokens/s",
        "pool over it",
        "goal",
        "per CPU second",
        f"process, {prompts} prompts",
        "process time over the pool's",
    ]
    tried = ", ".join(f"{batch}: {speed:,.0f}" for batch, speed in result["batches"].items())
    pool = variants[POOL]
    intro = (
        f"{prompts} prompts with HH-RLHF's lengths (mean {result['prompt_tokens']:.0f} tokens), answers of "
        f"{result['answer']} tokens at temperature 1, {result['parameters'] / 1e6:.0f} M parameters, fp32. "
        "Tokens/s are those of sampling alone: without loading the model, and for the pool without the "
        f"{median(pool, 'start_seconds'):.1f} s that it takes to start and sample one token, measured in a "
        "separate run; its manifest, which includes them, reports "
        f"{median(pool, 'manifest_tokens_per_second'):,.0f}. The time of a process is from its start "
        "to its end; for transformers it is scaled to all prompts if only some of them were sampled. "
        f"transformers' tokens/s by batch, first round: {tried}."
    )
    return section(intro, head, rows, result["machine"])


def _per_cpu(row: Measured) -> Measured:
    return {"tokens_per_cpu_second": row["tokens"] / row["cpu_seconds"]}


def _with(job: Job, batch: int) -> Job:
    return replace(job, batch=batch, most_batches=MOST_BATCHES)
