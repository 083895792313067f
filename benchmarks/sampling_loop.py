"""Child process of the benchmark: answers of one length to many prompts, by the pool or by transformers.

`python -m benchmarks.sampling_loop JSON`, with the fields of :class:`Job`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Measured, TreeClock, run_child
from tbpo_ray.config.schema import GenerationConfig


@dataclass(frozen=True)
class Job:
    """One measurement in a child process."""

    model: str
    prompts: str
    """A JSON file with a list of token ids per prompt."""
    generation: dict[str, Any]
    output: str
    """Where the pool writes its samples; it is emptied first."""
    batch: int | None = None
    """Batch size of transformers; None uses the pool."""
    most_batches: int | None = None
    """transformers: how many batches are measured, spread evenly over the prompts' lengths; None: all."""
    first: int | None = None
    """pool: how many prompts are sampled, from the first on; None: all."""


def run_pool(job: Job) -> Measured:
    """Sample with the pool, and measure its start separately with one token of one prompt.

    Returns:
        `seconds` of sampling `tokens` without the start; `start_seconds` and `manifest_seconds`, which the
        pool's manifest gives for one token and for all; `process_seconds` of the whole process, including
        Ray's start and shutdown; `cpu_seconds` of all its processes without the start.
    """
    start = start_pool(job)
    whole = _run(job)
    # Two starts never take exactly the same time. The time between the first and the last block of answers is
    # always sampling, so it is a lower bound.
    seconds = max(whole["manifest_seconds"] - start["manifest_seconds"], whole["between_blocks"])
    return {
        "seconds": seconds,
        "tokens": whole["tokens"],
        "tokens_per_second": whole["tokens"] / seconds,
        "manifest_tokens_per_second": whole["tokens"] / whole["manifest_seconds"],
        "start_seconds": start["manifest_seconds"],
        "manifest_seconds": whole["manifest_seconds"],
        "process_seconds": whole["process_seconds"],
        "cpu_seconds": whole["cpu_seconds"] - start["cpu_seconds"],
    }


def start_pool(job: Job) -> Measured:
    """Sample one token of one prompt, the cost that :func:`run_pool` subtracts.

    The very first call reads the libraries from disk and takes longer, so call this once before measuring.
    """
    one = job.generation | {"max_tokens": 1}
    return _run(replace(job, generation=one, output=f"{job.output}-start", first=1))


def run_transformers(job: Job) -> Measured:
    """Sample with `transformers.generate`.

    Returns:
        `seconds` in `generate` for `tokens` from `prompts` prompts, without loading the model and a short
        first call; `process_seconds` of the whole process; `cpu_seconds`.
    """
    row = _run(job)
    return row | {"tokens_per_second": row["tokens"] / row["seconds"]}


def batches(lengths: Sequence[int], size: int, limit: int | None) -> list[list[int]]:
    """Indices of prompts in batches of similar length; at most `limit` of them, evenly spread."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    every = [order[at : at + size] for at in range(0, len(order), size)]
    if limit is None or len(every) <= limit:
        return every
    return [every[int((i + 0.5) * len(every) / limit)] for i in range(limit)]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] token ids, padded on the left, and the mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids, mask


def pool(job: Job) -> Measured:
    """Call the pool once, in a Ray session of this process."""
    from tbpo_ray.cluster.session import start_ray
    from tbpo_ray.generation.pool import generate
    from tbpo_ray.generation.samples import PromptTokens

    shutil.rmtree(job.output, ignore_errors=True)
    rows = json.loads(Path(job.prompts).read_text(encoding="utf-8"))[: job.first]
    prompts = [PromptTokens(str(i), ids, "") for i, ids in enumerate(rows)]
    start_ray()
    samples = generate(job.model, prompts, GenerationConfig(**job.generation), output=job.output)
    written = [part.stat().st_mtime for part in Path(job.output).glob("part-*")]
    assert not samples.manifest["failed"]
    return {
        "tokens": samples.manifest["tokens"],
        "manifest_seconds": samples.manifest["seconds"],
        "between_blocks": max(written) - min(written),
    }


def transformers(job: Job) -> Measured:
    """Call `generate` on batches of prompts, with its key-value cache; no answer ends early."""
    from transformers import AutoModelForCausalLM

    from tbpo_ray.models.load import quiet_transformers

    quiet_transformers()
    generation = GenerationConfig(**job.generation)
    prompts = json.loads(Path(job.prompts).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    pad_id = model.config.pad_token_id or 0
    model.generation_config.eos_token_id = None
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": generation.temperature,
        "top_k": 0,
        "top_p": generation.top_p,
        "use_cache": True,
        "pad_token_id": pad_id,
    }
    assert job.batch is not None
    chosen = batches([len(ids) for ids in prompts], job.batch, job.most_batches)
    ids, mask = pad_left([prompts[chosen[0][0]]], pad_id)
    model.generate(ids, attention_mask=mask, max_new_tokens=2, **settings)
    torch.manual_seed(0)
    tokens = 0
    began, cpu = time.perf_counter(), time.process_time()
    for batch in chosen:
        ids, mask = pad_left([prompts[i] for i in batch], pad_id)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=generation.max_tokens, **settings)
        tokens += len(batch) * (out.shape[1] - ids.shape[1])
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": tokens,
        "prompts": sum(map(len, chosen)),
    }


def _run(job: Job) -> Measured:
    began = time.perf_counter()
    row = run_child(["-m", "benchmarks.sampling_loop"], asdict(job))
    return row | {"process_seconds": time.perf_counter() - began}


def main() -> None:
    """Run the job given as JSON in the first argument and print the measurements."""
    job = Job(**json.loads(sys.argv[1]))
    if job.batch is not None:
        print(json.dumps(transformers(job)))
        return
    with TreeClock() as clock:
        row = pool(job)
    print(json.dumps(row | {"cpu_seconds": clock.seconds}))


if __name__ == "__main__":
    main()
