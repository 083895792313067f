"""Child process of the benchmark: the bare training loop over prepared pairs, timed step by step.

`python -m benchmarks.bare_loop JSON`, with the fields of `Job`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.full_logits import FullLogitsScorer
from benchmarks.measure import Measured, run_child, trim_memory
from benchmarks.output_layer import reset_peak, resident_bytes
from benchmarks.pairs import Case
from tbpo_ray.config.loading import stage_config, to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.data.reader import MicroBatch
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.training.scorer import PairScorer


@dataclass(frozen=True)
class Job:
    """One measurement."""

    config: dict[str, Any]
    model: str
    prepared: str
    extra: list[str] = field(default_factory=list)
    """Folders with reference scores; with `score`, the first is where they are written."""
    full_logits: bool = False
    score: bool = False
    """Compute reference scores instead of training."""


def run_bare(case: Case, extra: Path | None = None, *, full_logits: bool = False, **changes: Any) -> Measured:
    """Train one epoch in a separate process.

    Args:
        extra: folder of the reference scores.
        full_logits: use the plain output layer, see `FullLogitsScorer`.
        changes: changes of the configuration, with `__` for the dots.

    Returns:
        `pairs_per_second`, `seconds`, `cpu_seconds`, `peak_bytes` (resident, above model and optimizer), and
        the lists `step_seconds` and `step_cpu_seconds`.
    """
    config = stage_config(case.config, {}, **changes)
    folders = [str(extra)] if extra is not None else []
    job = Job(to_tree(config), case.model, case.prepared.path, folders, full_logits)
    return run_child(["-m", "benchmarks.bare_loop"], asdict(job))


def score_reference(case: Case, extra: Path, **changes: Any) -> Measured:
    """Write reference scores into `extra` in a separate process; returns seconds, without loading."""
    config = stage_config(case.config, {}, **changes)
    job = Job(to_tree(config), case.model, case.prepared.path, [str(extra)], score=True)
    return run_child(["-m", "benchmarks.bare_loop"], asdict(job))


def train(job: Job) -> Measured:
    """Train one epoch over the pairs, after a warm-up step on the shortest one."""
    from tbpo_ray.data.stream import local_micro_batches
    from tbpo_ray.training.components import build_components
    from tbpo_ray.training.run_paths import RunPaths
    from tbpo_ray.training.run_plan import make_schedule, resolve_run
    from tbpo_ray.training.single_process import train_local

    config = Config.model_validate(job.config)
    if config.cluster.threads_per_worker:
        torch.set_num_threads(config.cluster.threads_per_worker)
    prepared = PreparedPairs.load(job.prepared)
    run_paths = RunPaths(run_dir="", checkpoints="", model=job.model, prepared=job.prepared)
    parts = build_components(resolve_run(config), run_paths, torch.device("cpu"))
    if job.full_logits:
        for scorer in (parts.scorer, parts.step.reference):
            if isinstance(scorer, PairScorer):
                scorer.__class__ = FullLogitsScorer
    schedule = make_schedule(resolve_run(config), prepared.lengths())
    marks: list[tuple[float, float]] = []
    baseline, reset = 0, False

    def stream() -> Iterator[MicroBatch]:
        yield _shortest(prepared, job.extra)
        yield from local_micro_batches(prepared, schedule, extra_dirs=job.extra)

    def on_step(step: int, row: dict[str, float]) -> None:
        nonlocal baseline, reset
        if not marks:
            trim_memory()
            baseline, reset = resident_bytes(), reset_peak()
        marks.append((time.perf_counter(), time.process_time()))

    train_local(config, parts, stream(), schedule.steps_total, on_step)
    peak = resident_bytes("VmHWM") if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, cpu_seconds = (marks[-1][i] - marks[0][i] for i in (0, 1))
    return {
        "pairs_per_second": schedule.pairs_before(schedule.steps_total) / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak - baseline,
        "step_seconds": np.diff([wall for wall, _ in marks]).tolist(),
        "step_cpu_seconds": np.diff([cpu for _, cpu in marks]).tolist(),
    }


def score(job: Job) -> Measured:
    """Compute reference scores as the actors of `tbpo_ray.training.reference_scores` do, without Ray."""
    from tbpo_ray.training.reference_scores import ReferenceScorer

    prepared, target = PreparedPairs.load(job.prepared), Path(job.extra[0])
    target.mkdir(parents=True, exist_ok=True)
    scorer = ReferenceScorer(job.config, job.model, None, job.prepared, 1)

    def score_all() -> None:
        for file, pairs in prepared.shards:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            part = {"shard": Path(prepared.path) / file, "start": 0, "stop": pairs, "out": target / file}
            with torch.no_grad():
                scorer({name: np.array([value]) for name, value in part.items()})

    score_all()  # reads the weights, starts the thread pools, and grows to the final size in memory
    began, cpu = time.perf_counter(), time.process_time()
    score_all()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


def _shortest(prepared: PreparedPairs, extra: list[str]) -> MicroBatch:
    """The micro-batch of the warm-up step, which creates the optimizer state and starts the thread pools."""
    from tbpo_ray.data.reader import PairReader
    from tbpo_ray.data.schedule import Schedule

    lengths = prepared.lengths()
    schedule = Schedule(lengths, seed=0, pairs_per_step=1, micro_batch_pairs=1, length_batches=False)
    order = schedule.epoch_order(0)
    step = int(np.flatnonzero(order == lengths.sum(axis=1).argmin())[0])
    return replace(PairReader(prepared, extra).micro_batches(schedule, 0, 1, step, step + 1)[0], step=0)


def main() -> None:
    """Run the job given as JSON in the first argument and print the measurements."""
    from tbpo_ray.models.load import quiet_transformers

    quiet_transformers()
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(score(job) if job.score else train(job)))


if __name__ == "__main__":
    main()
