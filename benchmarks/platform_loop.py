"""Child process of the benchmark: a whole training run, driver and Ray Train workers, timed step by step.

`python -m benchmarks.platform_loop JSON`, with a configuration tree and the number of untimed steps.
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

from benchmarks.measure import Measured, run_child
from benchmarks.pairs import Case
from tbpo_ray.config.loading import stage_config, to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.storage.paths import run_dir

WORKER = "ray::RayTrainWorker"
POLL_SECONDS = 0.02


def run_platform(case: Case, name: str, *, untimed: int = 1, **changes: Any) -> Measured:
    """Train in a separate process, as `jobs/train.py` does.

    Args:
        untimed: number of steps at the start that are not counted.

    Returns:
        `step_seconds` of the timed steps, from one logged step to the next; `seconds`, their sum;
        `worker_cpu_seconds` of the training workers, and `other_cpu_seconds` of Ray's own processes and the
        driver, during these steps; `data_wait_share`, the median over the steps.
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
    return run_child(["-m", "benchmarks.platform_loop"], job)


def driver_share(rows: Sequence[Measured]) -> str:
    """CPU time of the driver and of Ray's own processes, as a share of a core; the median over the rounds."""
    share = statistics.median(row["other_cpu_seconds"] / row["seconds"] for row in rows)
    return f"{share:.0%} of a core"


class WorkerClock(threading.Thread):
    """Reads the CPU seconds of this process tree whenever a step has been logged.

    The training workers are counted separately from the rest: Ray's own processes and this one, the driver.
    """

    def __init__(self, timings: Path):
        super().__init__(daemon=True)
        self.timings, self.done = timings, threading.Event()
        self.seen: list[tuple[int, dict[int, float], dict[int, float]]] = []
        """Readings: logged steps, and the CPU seconds of each worker and of each other process until then."""

    def run(self) -> None:
        logged = 0
        while not self.done.wait(POLL_SECONDS):
            rows = 0
            with suppress(OSError):
                rows = self.timings.read_bytes().count(b"\n")
            if rows > logged:
                logged = rows
                self.seen.append((rows, *self._read()))

    def _read(self) -> tuple[dict[int, float], dict[int, float]]:
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
        """CPU seconds of workers and of other processes between the logging of `first` and of `last` steps.

        Raises:
            RuntimeError: no worker was running at both times.
        """
        at = [[reading for rows, *reading in self.seen if rows >= n][:1] for n in (first, last)]
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
    """Train with the configuration given as JSON in the first argument and print the measurements."""
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
