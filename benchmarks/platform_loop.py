"""A child of the benchmark: a whole training run, driver and Ray Train workers, timed step by step.

`python -m benchmarks.platform_loop JSON` with a configuration tree and the steps not timed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.pairs import Case
from benchmarks.turns import Measured, child
from tbpo_ray.config.loading import stage_config, to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.storage.paths import run_dir

WORKER = "ray::RayTrainWorker"
POLL_SECONDS = 0.02


def run_platform(case: Case, name: str, *, untimed: int = 1, **changes: Any) -> Measured:
    """Train in a process of its own, as `jobs/train.py` does.

    Args:
        untimed: steps at the start that are not counted.

    Returns:
        step_seconds: of the steps behind these, from one logged step to the next; seconds: their sum;
        worker_cpu_seconds, other_cpu_seconds: in them, of the training workers, and of Ray's own processes
        and the driver;
        data_wait_share: median over the steps.
    """
    config = stage_config(
        case.config,
        {
            "run.name": name,
            "training.checkpoint_every": 1_000_000,
            "cluster.use_gpu": False,
            "cluster.resources_per_worker": {"CPU": 1},
        },
        **changes,
    )
    shutil.rmtree(run_dir(config), ignore_errors=True)
    job = {"config": to_tree(config), "untimed": untimed}
    return child(["-m", "benchmarks.platform_loop"], job)


def others_share(rows: Sequence[Measured]) -> str:
    """What the driver and Ray's own processes take beside the workers, in words; median of the turns."""
    share = statistics.median(row["other_cpu_seconds"] / row["seconds"] for row in rows)
    return f"{share:.0%} of a core"


class WorkerClock(threading.Thread):
    """Reads the CPU seconds of the processes below this one whenever a step was logged: of the training
    workers, and of all others, which are Ray's own and this one, the driver."""

    def __init__(self, timings: Path):
        super().__init__(daemon=True)
        self.timings, self.done = timings, threading.Event()
        self.seen: list[tuple[int, dict[int, float], dict[int, float]]] = []
        """Logged steps, and CPU seconds of each worker and of each other process by then."""

    def run(self) -> None:
        logged = 0
        while not self.done.wait(POLL_SECONDS):
            rows = 0
            with suppress(OSError):
                rows = self.timings.read_bytes().count(b"\n")
            if rows > logged:
                logged = rows
                self.seen.append((rows, *self._look()))

    def _look(self) -> tuple[dict[int, float], dict[int, float]]:
        workers: dict[int, float] = {}
        others: dict[int, float] = {}
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                found = workers if "".join(process.cmdline()[:1]).startswith(WORKER) else others
                found[process.pid] = times.user + times.system
        return workers, others

    def between(self, first: int, last: int) -> tuple[float, float]:
        """CPU seconds of workers and of other processes from when `first` steps were logged to when `last`
        were."""
        at = [[look for rows, *look in self.seen if rows >= n][:1] for n in (first, last)]
        if not all(at) or not at[0][0][0]:
            raise RuntimeError(
                f"no worker was seen between steps {first} and {last}: {len(self.seen)} readings"
            )
        (start,), (end,) = at
        workers, others = (
            sum(b[pid] - a[pid] for pid in a.keys() & b) for a, b in zip(start, end, strict=True)
        )
        return workers, others


def main() -> None:
    """Train with the configuration given as JSON in the first argument; print what was measured."""
    from tbpo_ray.workflows.train import train

    job = json.loads(sys.argv[1])
    config = Config.model_validate(job["config"])
    clock = WorkerClock(run_dir(config) / "timings.jsonl")
    clock.start()
    train(config)
    clock.done.set()
    lines = clock.timings.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    timed = rows[job["untimed"] - 1 :]
    steps = [later["time"] - earlier["time"] for earlier, later in pairwise(timed)]
    workers, others = clock.between(job["untimed"], len(rows))
    out = {
        "step_seconds": steps,
        "seconds": sum(steps),
        "worker_cpu_seconds": workers,
        "other_cpu_seconds": others,
        "data_wait_share": statistics.median(row["data_wait_share"] for row in timed[1:]),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
