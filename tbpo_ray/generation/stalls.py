"""Engines that make no progress: each engine reports its progress in a file, and the driver reads the files.

The driver decides, because an engine process that hangs or is stopped cannot. Progress is counted by steps of
the engine, so that a long answer is not a stall.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tbpo_ray.cluster.processes import NodeProcess, await_end, kill, own_processes, running
from tbpo_ray.cluster.worker_logs import read_worker_log
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import write_atomic

START_SECONDS = 1800.0
"""How long an engine may take to load its model and to compile, in which it reports no step."""
_PREFIX = ".engines-"
_GIVEN_UP = "given-up"
_REPORT_SECONDS = 5.0
_LOG_LINES, _LOG_CHARACTERS = 3, 500


class StalledError(RuntimeError):
    """An engine is not started again, because its prompts have stalled twice."""


class ProgressReporter:
    """Reports the progress of the engine in this process, in a file that the driver reads.

    Args:
        folder: folder of the reports, on storage that the driver shares.
        stall_timeout_s: `generation.stall_timeout_s`.

    Raises:
        StalledError: the driver has given up.
    """

    def __init__(self, folder: str, stall_timeout_s: float):
        at = Path(folder)
        if (at / _GIVEN_UP).exists():
            raise StalledError("the engine stalled twice with the same prompts")
        self._lock = threading.Lock()
        self._steps, self._ready, self._reports = 0, False, 0
        self._unfinished: set[int] = set()
        process = own_processes()[0]
        self._file = at / f"{process.node[:12]}-{process.pid}.json"
        self._interval = _interval(stall_timeout_s)
        self.report()
        threading.Thread(target=self._keep_reporting, name="engine progress", daemon=True).start()

    def engine_started(self) -> None:
        """Note that the engine accepts prompts."""
        with self._lock:
            self._ready = True
        self.report()

    def begin(self, rows: Iterable[int]) -> None:
        """Note that the engine received these rows."""
        with self._lock:
            self._unfinished.update(rows)

    def step(self) -> None:
        """Note that the engine has computed another token of an answer."""
        with self._lock:
            self._steps += 1

    def finish(self, rows: Iterable[int]) -> None:
        """Note that these rows are answered, or have failed."""
        with self._lock:
            self._unfinished.difference_update(rows)
            self._steps += 1

    def report(self) -> None:
        """Write the file."""
        with self._lock:
            self._reports += 1
            report = EngineReport(
                own_processes(), self._ready, self._steps, self._reports, sorted(self._unfinished)
            )
        with suppress(OSError):  # the folder is removed when sampling ends, and before the engines do
            write_atomic(self._file, json.dumps(asdict(report)))

    def _keep_reporting(self) -> None:
        while self._file.parent.is_dir():
            time.sleep(self._interval)
            self.report()


@dataclass(frozen=True)
class EngineReport:
    """The content of a report."""

    processes: list[NodeProcess]
    """The actor's process, and those below it."""
    ready: bool
    """Whether the engine has loaded its model."""
    steps: int
    reports: int
    """The number of this report; it does not change while the process is stopped."""
    unfinished: list[int]
    """Indices of the rows that the engine has received and not answered."""

    @classmethod
    def read(cls, file: Path) -> EngineReport | None:
        """Read a report; None if its file is gone."""
        try:
            tree = json.loads(file.read_text())
        except (OSError, ValueError):  # over NFS, a file that is being replaced
            return None
        return cls(**(tree | {"processes": [NodeProcess(**item) for item in tree["processes"]]}))

    @property
    def progress(self) -> tuple[bool, int, int]:
        """What changes while the engine makes progress, or has nothing to do."""
        return self.ready, self.steps, 0 if self.unfinished else self.reports


@dataclass
class _Seen:
    """The last progress of an engine, by the driver's clock."""

    progress: tuple[bool, int, int]
    at: float


class StallWatch:
    """Watches the reports of a pool's engines in a thread, and kills those that stall.

    Attributes:
        failure: why the pool cannot go on: an engine stalled with rows that had stalled before.
        stalls: how many engines were killed.
    """

    def __init__(self, samples: Path, stall_timeout_s: float):
        for left in samples.glob(f"{_PREFIX}*"):  # of a driver that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.folder = samples / f"{_PREFIX}{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        self.timeout_s = stall_timeout_s
        self.failure: str | None = None
        self.stalls = 0
        self._processes: set[NodeProcess] = set()
        self._seen: dict[Path, _Seen] = {}
        self._stalled_rows: set[int] = set()
        self._start_stalled = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine stalls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=_REPORT_SECONDS)
        with suppress(OSError):
            self.reports()  # processes that began after the last look
        shutil.rmtree(self.folder, ignore_errors=True)

    def await_engines_end(self) -> None:
        """Return when no process of any engine is left, and with it no memory of a device is in use.

        Raises:
            RunFailedError: a process cannot be killed.
        """
        await_end(self._processes)

    def reports(self) -> dict[Path, EngineReport]:
        """The reports of all engines, by file."""
        found = {file: EngineReport.read(file) for file in self.folder.glob("*.json")}
        present = {file: report for file, report in found.items() if report is not None}
        for report in present.values():
            self._processes.update(report.processes)
        return present

    def check(self) -> None:
        """Look at the reports once, and kill the engines that have stalled."""
        for file, report in self.reports().items():
            seen = self._seen.get(file)
            if seen is None or seen.progress != report.progress:
                self._seen[file] = _Seen(report.progress, time.monotonic())
                continue
            limit = self.timeout_s if report.ready else max(self.timeout_s, START_SECONDS)
            if time.monotonic() - seen.at > limit:
                file.unlink(missing_ok=True)
                del self._seen[file]
                self._end_engine(report, limit)

    def _end_engine(self, report: EngineReport, limit: float) -> None:
        if not running(report.processes[:1]):  # it died, and Ray restarts it
            return
        process, rows = report.processes[0], set(report.unfinished)
        repeated = bool(rows & self._stalled_rows) if report.ready else self._start_stalled
        self._stalled_rows |= rows
        self._start_stalled |= not report.ready
        fault = f"an engine (process {process.pid}) {_describe(report, limit)}; {_quote_log(process)}"
        if repeated:
            self.failure = (
                f"{fault}; another one stalled before with the same prompts. If engines are only slow, raise "
                f"generation.stall_timeout_s={self.timeout_s:g}"
            )
            (self.folder / _GIVEN_UP).touch()
        else:
            log_progress(f"{fault}; it is killed, and its {len(rows)} prompts are sampled again")
        self.stalls += 1
        kill(report.processes)

    def _watch(self) -> None:
        while not self._end.wait(_interval(self.timeout_s)) and self.failure is None:
            try:
                self.check()
            except Exception as error:  # of a node that is being lost; the others are still to be watched
                log_progress(f"looking for stalled engines failed ({type(error).__name__}: {error})")


def _interval(stall_timeout_s: float) -> float:
    return min(_REPORT_SECONDS, stall_timeout_s / 10)


def _quote_log(process: NodeProcess) -> str:
    """The last lines that the process and those below it printed, as the end of a sentence."""
    lines = map(str.strip, read_worker_log(process.node, process.pid).splitlines())
    printed = [line for line in lines if line and not line.startswith(":")]  # Ray's own marks begin with one
    if not printed:
        return "it printed nothing"
    return f"its last lines: {' / '.join(printed[-_LOG_LINES:])[-_LOG_CHARACTERS:]}"


def _describe(report: EngineReport, limit: float) -> str:
    if not report.ready:
        return f"was not ready after {limit:g} s"
    return f"computed no token for {limit:g} s with {len(report.unfinished)} unfinished prompts"
