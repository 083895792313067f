"""Sampling with our pool of vLLM engines over sampling with `transformers.generate`, in tokens a second.

The pool is handed all prompts at once and batches them itself. transformers takes them one at a time, and in
batches of like length, padded in front, of the size that was fastest in a first round. Starting the engine
and loading the model are left out of the ratio that has a goal; the times with them stand beside it.
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
from benchmarks.pairs import Size, build_case, sample_lengths
from benchmarks.sampling_loop import Job, run_pool, run_transformers, start_pool
from benchmarks.turns import (
    Measured,
    against,
    machine,
    median,
    ratio,
    section,
    spread,
    take_turns,
)
from tbpo_ray.config.loading import to_tree
from tbpo_ray.config.schema import Config

POOL, ONE, BEST = "vLLM pool", "transformers, batch 1", "transformers, its best batch"
GOALS = {ONE: 10.0, BEST: 3.0}
PROMPTS, ANSWER, BATCHES = 256, 64, (8, 32, 128)
QUICK_PROMPTS, QUICK_ANSWER, QUICK_BATCHES = 64, 32, (8, 32)
MOST_BATCHES = 6
"""Of the batches of one size so many are measured, evenly spread over the lengths."""


def run(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Find transformers' best batch, then measure all ways in turns.

    Args:
        quick: a tiny model and few prompts, to see that it runs; its figures mean little.

    Returns:
        `{"machine", "prompts", "prompt_tokens": mean, "answer": tokens of each, "parameters", "batches":
        {size: tokens/s in the first round}, "best", "ways": {way: rows}, "ratios": {way: {"speed",
        "cpu_speed", "whole": {ratio, low, high}}}}`, `whole` with start and load, for all prompts.
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
        first = {int(batch): row["tokens_per_second"] for batch, (row,) in take_turns(rounds, 1).items()}
        best = max(first, key=lambda batch: first[batch])
        ways: dict[str, Callable[[], Measured]] = {
            POOL: partial(run_pool, job),
            ONE: partial(run_transformers, _with(job, 1)),
            BEST: partial(run_transformers, _with(job, best)),
        }
        start_pool(job)
        found = take_turns(ways, 1 if quick else 2)
    return {
        "machine": about,
        "prompts": len(lengths),
        "prompt_tokens": float(lengths[:, 0].mean()),
        "answer": answer,
        "parameters": case.parameters,
        "batches": first,
        "best": best,
        "ways": found,
        "ratios": ratios(found, len(lengths)),
    }


def fitting(sizes: Sequence[int], size: Size, tokens: int) -> list[int]:
    """The batches whose keys and values, as transformers copies them to append, fit into half of the free
    memory; the smallest in any case."""
    each = 2 * size.layers * size.width * 4 * tokens
    free = psutil.virtual_memory().available / 2
    return [batch for batch in sizes if batch == min(sizes) or batch * each * (1 + 1 / size.layers) <= free]


def ratios(found: Mapping[str, list[Measured]], prompts: int) -> dict[str, dict[str, dict[str, float]]]:
    """The pool over each other way: tokens a second of sampling, the same per CPU second, and the time from
    starting the process to its end for all `prompts`."""
    ours = [row | _per_cpu(row) for row in found[POOL]]
    out = {}
    for way, rows in found.items():
        if way != POOL:
            theirs = [row | _per_cpu(row) | {"whole": whole_seconds(row, prompts)} for row in rows]
            out[way] = {
                "speed": ratio(ours, theirs, "tokens_per_second"),
                "cpu_speed": ratio(ours, theirs, "tokens_per_cpu_second"),
                "whole": ratio(theirs, [{"whole": whole_seconds(row, prompts)} for row in ours], "whole"),
            }
    return out


def whole_seconds(row: Measured, prompts: int) -> float:
    """From starting the process to its end, had all prompts been sampled as fast as those that were."""
    measured = row.get("prompts", prompts)
    return row["process_seconds"] + row["seconds"] * (prompts / measured - 1)


def markdown(result: Mapping[str, Any]) -> str:
    """A table."""
    ways, prompts = result["ways"], result["prompts"]
    rows = []
    for way, measured in ways.items():
        against_it = result["ratios"].get(way)
        whole = [{"whole": whole_seconds(row, prompts)} for row in measured]
        cells = ["1", "-", "1", "1"]
        if against_it:
            cells = [
                spread(against_it["speed"]),
                against(against_it["speed"]["ratio"], GOALS[way]),
                # In a short run two starts differ by more than sampling costs.
                spread(against_it["cpu_speed"]) if against_it["cpu_speed"]["low"] > 0 else "-",
                spread(against_it["whole"]),
            ]
        rows.append(
            [
                f"{way} ({result['best']})" if way == BEST else way,
                f"{median(measured, 'tokens_per_second'):,.0f}",
                *cells[:3],
                f"{median(whole, 'whole'):,.1f} s",
                cells[3],
            ]
        )
    head = [
        "way",
        "tokens/s",
        "pool over it",
        "goal",
        "per CPU second",
        f"process, {prompts} prompts",
        "the process's time over the pool's",
    ]
    tried = ", ".join(f"{batch}: {speed:,.0f}" for batch, speed in result["batches"].items())
    pool = ways[POOL]
    intro = (
        f"{prompts} prompts with HH-RLHF's lengths (mean {result['prompt_tokens']:.0f} tokens), answers of "
        f"{result['answer']} tokens at temperature 1, {result['parameters'] / 1e6:.0f} M parameters, fp32. "
        "Tokens/s are of sampling alone: without loading the model, and for the pool without the "
        f"{median(pool, 'start_seconds'):.1f} s that it takes to start and sample one token, "
        f"as a run of its own measures; its manifest, which counts them, says "
        f"{median(pool, 'manifest_tokens_per_second'):,.0f}. A process's time has everything from its start "
        "to its end, for transformers scaled up to all prompts where a part of them was sampled. "
        f"transformers' tokens/s by batch, first round: {tried}."
    )
    return section(intro, head, rows, result["machine"])


def _per_cpu(row: Measured) -> Measured:
    return {"tokens_per_cpu_second": row["tokens"] / row["cpu_seconds"]}


def _with(job: Job, batch: int) -> Job:
    return replace(job, batch=batch, most_batches=MOST_BATCHES)
