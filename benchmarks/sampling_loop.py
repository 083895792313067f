"""A child of the benchmark: answers of one length to many prompts, by the pool or by transformers.

`python -m benchmarks.sampling_loop JSON` with a :class:`Job`.
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

from benchmarks.turns import Measured, TreeClock, child
from tbpo_ray.config.schema import GenerationConfig


@dataclass(frozen=True)
class Job:
    """What a child does."""

    model: str
    prompts: str
    """A JSON file with a list of token ids for each prompt."""
    generation: dict[str, Any]
    output: str
    """Where the pool writes its samples; emptied first."""
    batch: int | None = None
    """Prompts that transformers takes at once; none: the pool."""
    most_batches: int | None = None
    """transformers: measure so many batches, evenly spread over the prompts' lengths."""
    first: int | None = None
    """pool: the first so many prompts only."""


def run_pool(job: Job) -> Measured:
    """Sample with the pool, and once more one token of one prompt: what starting it costs.

    Returns:
        seconds: of sampling, the start taken off, in which `tokens` were sampled;
        start_seconds, manifest_seconds: of the pool for the one token and for all, as its manifest says;
        process_seconds: of the whole process, Ray's start and end included;
        cpu_seconds: of all its processes, the start taken off.
    """
    start = start_pool(job)
    whole = _run(job)
    # Two starts are never quite alike. What passed between the first block of answers and the last is in any
    # case sampling.
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
    """One token of one prompt, what :func:`run_pool` takes off. The first of all reads the libraries from
    disk and takes longer than any other: call this once before measuring."""
    one = job.generation | {"max_tokens": 1}
    return _run(replace(job, generation=one, output=f"{job.output}-start", first=1))


def run_transformers(job: Job) -> Measured:
    """Sample with `transformers.generate`.

    Returns:
        seconds: in `generate`, model load and a first short call left out, in which `tokens` were sampled
        from `prompts` prompts; process_seconds: of the whole process; cpu_seconds.
    """
    row = _run(job)
    return row | {"tokens_per_second": row["tokens"] / row["seconds"]}


def batches(lengths: Sequence[int], size: int, most: int | None) -> list[list[int]]:
    """Indices of prompts in batches of like length; of more than `most` batches so many, evenly spread."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    every = [order[at : at + size] for at in range(0, len(order), size)]
    if most is None or len(every) <= most:
        return every
    return [every[int((i + 0.5) * len(every) / most)] for i in range(most)]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] token ids with padding in front, and the mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids, mask


def pool(job: Job) -> Measured:
    """One call of the pool, in a cluster of this process."""
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
    """Batches of prompts through `generate`, with its key-value cache; no answer ends early."""
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
    row = child(["-m", "benchmarks.sampling_loop"], asdict(job))
    return row | {"process_seconds": time.perf_counter() - began}


def main() -> None:
    """Run the job given as JSON in the first argument; print what was measured."""
    job = Job(**json.loads(sys.argv[1]))
    if job.batch is not None:
        print(json.dumps(transformers(job)))
        return
    with TreeClock() as clock:
        row = pool(job)
    print(json.dumps(row | {"cpu_seconds": clock.seconds}))


if __name__ == "__main__":
    main()
