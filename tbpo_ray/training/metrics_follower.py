"""Follow a run from the driver: turn its metrics files into progress lines and MLflow metrics.

Workers write to the run's folder only; the driver alone talks to MLflow and to the terminal.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from tbpo_ray.progress import close_bar, is_live, log_progress, show_bar
from tbpo_ray.storage.json_lines import loads_numbers
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training.metrics_file import VALIDATION

FALLING_TAG = "alarm.chosen_logps"
PROGRESS_METRICS = {
    "margin": "rewards/margin",
    "acc": "rewards/accuracy",
    "kl": "kl/k3",
    "eval loss": "eval/loss",
    "eval acc": "eval/rewards/accuracy",
}
"""Names in progress lines and the metrics that they show."""
TIMINGS = ("step_seconds", "data_wait_share", "tokens_per_second", "padding_share")


class Follower:
    """Reads what is appended to the run's metrics, timings, validations and events until it is closed.

    Use it as a context manager around the training run.

    Args:
        label: the name of the run, for the progress lines.
        every_seconds: the time between progress lines.
        on_row: called with every new row of `metrics.jsonl`, in the follower's thread.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker | None,
        *,
        label: str,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        on_row: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.tracker, self.label, self.stream = tracker, label, stream or sys.stderr
        self.every_seconds, self.on_row = every_seconds, on_row
        self.metrics = _Tail(run_dir / "metrics.jsonl")
        self.timings = _Tail(run_dir / "timings.jsonl")
        self.events = _Tail(run_dir / "events.log")
        self.validations = _Tail(run_dir / VALIDATION)
        self.timing_rows: dict[int, dict[str, Any]] = {}
        self.done = 0
        self.last_print = 0.0
        self.started = time.monotonic()
        self.first_step: int | None = None
        self.last_row: dict[str, Any] = {}
        self.alarm = FallingAlarm()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="follow-run", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._poll(final=True)

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            self._poll()

    def _poll(self, *, final: bool = False) -> None:
        for line in self.events.lines():
            self._print(line)
        for row in self.timings.rows():
            self.timing_rows[int(row["step"])] = row
        for row in self.metrics.rows():
            self._handle_row(row)
        for row in self.validations.rows(json.loads):
            self._handle_validation(row)
        if self.last_row and is_live(self.stream):
            self._show_bar()
        elif self.last_row and (final or time.monotonic() - self.last_print > self.every_seconds):
            self._print_progress(final)
        if final:
            close_bar()

    def _handle_row(self, row: dict[str, Any]) -> None:
        step = int(row["step"])
        if step <= self.done:
            return  # a resumed run writes some steps again, with the same values
        timing = self.timing_rows.pop(step, {})
        if self.tracker is not None:
            timings = {f"speed/{k}": timing[k] for k in TIMINGS if k in timing}
            self.tracker.log_metrics(_numbers(row) | timings, step)
        drift = row.get("logps/chosen_drift", row.get("logps/chosen"))
        if drift is not None and self.alarm.falls(drift):
            self._raise_alarm(step)
        self.done = step
        self.first_step = step if self.first_step is None else self.first_step
        self.last_row = row | timing
        if self.on_row is not None:
            self.on_row(row | {k: timing[k] for k in ("total",) if k in timing})

    def _handle_validation(self, row: dict[str, Any]) -> None:
        numbers = _numbers(row)
        if self.tracker is not None:
            self.tracker.log_metrics(numbers, int(row["step"]))
        shown = "  ".join(
            f"{k.removeprefix('validation/')} {v:.3f}" for k, v in numbers.items() if v is not None
        )
        self._print(f"{self.label} sampled at step {row['step']}: {shown}")

    def _raise_alarm(self, step: int) -> None:
        message = (
            f"step {step}: the chosen answers' log-prob has been falling for {3 * self.alarm.window} logged "
            "steps; lower training.learning_rate, raise objective.beta, or check the data for corruption"
        )
        self._print(f"{self.label} ALARM: {message}")
        if self.tracker is not None:
            self.tracker.set_tags({FALLING_TAG: message})

    def _show_bar(self) -> None:
        """Update the live bar; the time left is its own."""
        row, self.last_row = self.last_row, {}
        show_bar(self.label, int(row["step"]), int(row.get("total", 0)), _note(row), self.stream)

    def _print_progress(self, final: bool) -> None:
        row = self.last_row
        self.last_print = time.monotonic()
        self.last_row = {} if not final else row
        fields = [f"{self.label} step {int(row['step'])}/{int(row.get('total', 0))}", _note(row)]
        left = int(row.get("total", 0)) - int(row["step"])
        if left > 0 and self.first_step is not None and row["step"] > self.first_step:
            pace = (time.monotonic() - self.started) / max(1, row["step"] - self.first_step + 1)
            # The mean includes starting the workers; a recent step bounds what that adds to the estimate.
            fields.append(f"{_duration(left * min(pace, 1.5 * row.get('step_seconds', pace)))} left")
        self._print("  ".join(fields))

    def _print(self, text: str) -> None:
        log_progress(text, self.stream)


class FallingAlarm:
    """Detects a value that keeps falling.

    It goes off when each of three consecutive windows has a mean below the previous one's by more than twice
    the standard error of the difference, and not again before the value has recovered.
    """

    def __init__(self, window: int = 20):
        self.window = window
        self.values: deque[float] = deque(maxlen=3 * window)
        self.raised = False

    def falls(self, value: float) -> bool:
        """Add the next value. Returns whether it sets off the alarm."""
        self.values.append(value)
        if len(self.values) < 3 * self.window:
            return False
        values, n = list(self.values), self.window
        windows = [values[i * n : (i + 1) * n] for i in range(3)]
        falling = all(
            statistics.fmean(a) - statistics.fmean(b)
            > 2 * math.sqrt((statistics.variance(a) + statistics.variance(b)) / n)
            for a, b in pairwise(windows)
        )
        goes_off, self.raised = falling and not self.raised, falling
        return goes_off


class _Tail:
    """The new complete lines of a growing file, which shrinks when a run returns to a checkpoint."""

    def __init__(self, file: Path):
        self.file = file
        self.at = file.stat().st_size if file.exists() else 0

    def lines(self) -> list[str]:
        if not self.file.exists():
            return []
        size = self.file.stat().st_size
        if size < self.at:
            self.at = size
        if size == self.at:
            return []
        with self.file.open("rb") as handle:
            handle.seek(self.at)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self.at += end
        return [line for line in data[:end].decode("utf-8", errors="replace").split("\n") if line]

    def rows(self, parse: Callable[[str], dict[str, Any]] = loads_numbers) -> list[dict[str, Any]]:
        """The new lines, parsed as JSON; by default null is read as NaN."""
        try:
            return [parse(line) for line in self.lines()]
        except ValueError:
            # The file shrank and grew past the old position in between, so that reading began within a line.
            self.at = 0
            return []


def _note(row: dict[str, Any]) -> str:
    """Loss, metrics and speed of a step for a line of progress."""
    fields = [f"loss {row.get('loss', 0):.4f}"]
    fields += [f"{name} {row[key]:.3f}" for name, key in PROGRESS_METRICS.items() if key in row]
    if "tokens_per_second" in row:
        fields.append(f"{row['tokens_per_second']:,.0f} tok/s")
    return "  ".join(fields)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "step"}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
