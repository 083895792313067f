"""Who may write into a run's folder: one driver at a time, and the workers that it started last.

.owner.json   the driver that holds the run: its token, its machine and its process
.owner.beat   the heartbeat, a counter that a live driver keeps incrementing
.gang         the worker group that the driver started last

A driver that is killed leaves workers behind that do not know it yet, and a node that was cut off continues
to work. So every write first checks that its writer still holds the run. Checkpoints are also written under a
temporary name and renamed when complete, so that two writers of the same step never share a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import read_object

OWNER, HEARTBEAT, WORKER_GROUP = ".owner.json", ".owner.beat", ".gang"
HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 15.0
"""A driver on another machine whose heartbeat stops for this long is considered dead."""
PATIENCE_SECONDS = 10.0
"""How long to wait for a driver that may be about to end, before the run is refused."""
LEASE_SECONDS = 150.0
"""How long a file server may keep the lock of a machine that has disappeared."""


class LeaseLostError(RunFailedError):
    """A write into a run that another driver or a later worker group has taken over."""


@dataclass(frozen=True)
class WriteLease:
    """The right to write into a run's folder. Picklable: the driver sends it to its workers."""

    run_dir: str
    token: str
    worker_group: str = ""
    """Identifies one start of the worker group; empty for the driver."""

    def check(self) -> None:
        """Check that this lease still holds.

        Raises:
            LeaseLostError: another driver or a later worker group has taken over the run.
        """
        folder = Path(self.run_dir)
        owner = _read_owner(folder)
        if owner.get("token") != self.token:
            reason = f"taken over by {_describe(owner)}" if owner else "its driver has ended"
            raise LeaseLostError(f"{folder}: {reason}; this process writes nothing more")
        if self.worker_group and (folder / WORKER_GROUP).read_text(encoding="utf-8") != self.worker_group:
            raise LeaseLostError(
                f"{folder}: taken over by workers that were started later; this process writes nothing more"
            )

    def for_new_worker_group(self) -> WriteLease:
        """The lease of a worker group that starts now; it invalidates those of earlier groups.

        Raises:
            LeaseLostError: the driver has lost the run.
        """
        self.check()
        lease = replace(self, worker_group=uuid.uuid4().hex)
        write_atomic(Path(self.run_dir) / WORKER_GROUP, lease.worker_group)
        return lease


class RunLock:
    """Holds a run for one driver; a context manager that returns the driver's :class:`WriteLease`.

    The file system's lock decides between two drivers that start at the same time. Where it has no effect
    (other machines, on some mounts), the heartbeat shows whether the previous driver is alive. If two drivers
    claim the run at the same moment nevertheless, the later one gets it and the other one's writes fail.

    Args:
        folder: the run's folder, which has to exist.
        wait: wait until another driver of the same run ends, instead of refusing.
    """

    def __init__(self, folder: Path, *, wait: bool = False):
        self.folder, self.wait = folder, wait
        self.lease = WriteLease(str(folder), uuid.uuid4().hex)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run-heartbeat", daemon=True)

    def __enter__(self) -> WriteLease:
        self._lock = (self.folder / ".lock").open("a")
        try:
            self._await_turn()
            write_atomic(self.folder / OWNER, json.dumps({"token": self.lease.token, **_this_process()}))
        except BaseException:
            self._lock.close()
            raise
        self._thread.start()
        return self.lease

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(InputError):  # damaged: the next driver says so
            if self._is_held():
                (self.folder / OWNER).unlink(missing_ok=True)
        self._lock.close()

    def _await_turn(self) -> None:
        """Return when the run is free.

        Raises:
            InputError: its driver is alive.
        """
        watch = _HeartbeatWatch(self.folder)
        while not self._try_acquire(watch):
            if not self.wait and watch.should_refuse():
                owner = _describe(_read_owner(self.folder))
                raise InputError(
                    f"run.name={self.folder.name}: {owner} is working on this run; wait for it or stop it, "
                    "or use another run.name"
                )
            if not watch.is_announced:
                owner = _describe(_read_owner(self.folder))
                log_progress(f"run {self.folder.name}: waiting to see whether {owner} is alive")
                watch.is_announced = True
            time.sleep(0.2)
            watch.update()

    def _try_acquire(self, watch: _HeartbeatWatch) -> bool:
        if not self._try_lock():
            return False
        owner = _read_owner(self.folder)
        return not owner or _has_ended(owner) or watch.is_silent()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_held(self) -> bool:
        return _read_owner(self.folder).get("token") == self.lease.token

    def _send_heartbeats(self) -> None:
        count = 0
        while True:
            # A transient storage error must not end the heartbeat.
            with contextlib.suppress(OSError, InputError):
                if not self._is_held():
                    return
                # In place: over NFS, other machines see a changed file sooner than a replaced one.
                (self.folder / HEARTBEAT).write_text(f"{self.lease.token} {count}", encoding="utf-8")
            count += 1
            if self._stop.wait(HEARTBEAT_SECONDS):
                return


class _HeartbeatWatch:
    """What a driver that waits for its turn has seen of the other driver's heartbeat."""

    def __init__(self, folder: Path):
        self.file = folder / HEARTBEAT
        self.began = self.changed = time.monotonic()
        self.last, self.changes = self._read(), 0
        self.is_announced = False
        """Whether the user has been told about the waiting."""

    def update(self) -> None:
        beat = self._read()
        if beat and beat != self.last:  # empty: read in the middle of a write
            self.last, self.changed, self.changes = beat, time.monotonic(), self.changes + 1

    def is_silent(self) -> bool:
        return time.monotonic() - self.changed >= SILENCE_SECONDS

    def should_refuse(self) -> bool:
        """Whether the other driver is alive beyond doubt, or the wait has become too long to tell."""
        waited = time.monotonic() - self.began
        # Two changes, since the last heartbeat of a driver that died may become visible late.
        is_alive = self.changes >= 2 and not self.is_silent()
        return (is_alive and waited >= PATIENCE_SECONDS) or waited >= LEASE_SECONDS

    def _read(self) -> str:
        return self.file.read_text(encoding="utf-8") if self.file.exists() else ""


def _read_owner(folder: Path) -> dict[str, Any]:
    """The content of `.owner.json`; empty if no driver holds the run.

    Raises:
        InputError: the file is damaged, so that nobody can tell who holds the run.
    """
    remedy = "remove it if no driver of this run is alive"
    try:
        return read_object(folder / OWNER, remedy, ("token", "host", "machine", "pid", "born"))
    except FileNotFoundError:
        return {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another driver"
    return f"the driver with process id {owner['pid']} on {owner['host']}"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "born": psutil.Process(pid).create_time(),
    }


def _machine() -> str:
    """Identifies the scope in which process ids are unique: the machine, its boot, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that no longer exists. False for other machines."""
    if owner["machine"] != _machine():
        return False
    try:
        process = psutil.Process(owner["pid"])
        # Another process may have the same id by now. The creation time shifts when the clock is adjusted.
        is_another = abs(process.create_time() - float(owner["born"])) > 30
        return is_another or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
