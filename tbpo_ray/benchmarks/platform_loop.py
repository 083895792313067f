"""A child of the benchmark: a whole training run, driver and Ray Train workers, timed step by step.

`python -m tbpo_ray.benchmarks.platform_loop JSON` with a configuration tree.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from tbpo_ray.benchmarks.pairs import Case
from tbpo_ray.benchmarks.turns import Measured, child
from tbpo_ray.config import Config
from tbpo_ray.configuration import stage_config, to_tree
from tbpo_ray.storage import run_dir

WORKER = "ray::RayTrainWorker"
POLL_SECONDS = 0.05


def run_platform(case: Case, name: str, **changes: Any) -> Measured:
    """Train in a process of its own, as `jobs/train.py` does.

    Returns:
        step_seconds: from the second step on, from one logged step to the next;
        worker_cpu_seconds: of the training workers, from the first logged step to the last;
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
    return child(["-m", "tbpo_ray.benchmarks.platform_loop"], {"config": to_tree(config)})


class WorkerClock(threading.Thread):
    """Reads the CPU seconds of the training workers below this process, beside the number of logged steps."""

    def __init__(self, timings: Path):
        super().__init__(daemon=True)
        self.timings, self.done = timings, threading.Event()
        self.seen: list[tuple[int, float]] = []
        self.workers: dict[int, float] = {}

    def run(self) -> None:
        found: dict[int, psutil.Process] = {}
        while not self.done.wait(POLL_SECONDS):
            if not found or not self.seen:
                found = {p.pid: p for p in psutil.Process().children(recursive=True) if _is_worker(p)}
            for pid, process in found.items():
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self.workers[pid] = times.user + times.system
            with suppress(OSError):
                rows = self.timings.read_bytes().count(b"\n")
                if rows and found:
                    self.seen.append((rows, sum(self.workers[pid] for pid in found if pid in self.workers)))

    def between(self, first: int, last: int) -> float:
        """CPU seconds from when `first` steps were logged to when `last` were."""
        at = [[cpu for rows, cpu in self.seen if rows >= n] for n in (first, last)]
        if not all(at):
            raise RuntimeError(
                f"no worker was seen between steps {first} and {last}: {len(self.seen)} readings"
            )
        return at[1][0] - at[0][0]


def main() -> None:
    """Train with the configuration given as JSON in the first argument; print what was measured."""
    from tbpo_ray.training.driver import train

    config = Config.model_validate(json.loads(sys.argv[1])["config"])
    clock = WorkerClock(run_dir(config) / "timings.jsonl")
    clock.start()
    train(config)
    clock.done.set()
    lines = clock.timings.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [later["time"] - earlier["time"] for earlier, later in pairwise(rows)]
    out = {
        "step_seconds": steps,
        "seconds": sum(steps),
        "worker_cpu_seconds": clock.between(1, len(rows)),
        "data_wait_share": statistics.median(row["data_wait_share"] for row in rows),
    }
    print(json.dumps(out))


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "".join(process.cmdline()[:1]).startswith(WORKER)
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
