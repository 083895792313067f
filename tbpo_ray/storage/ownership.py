"""Who may write into a run's folder: one driver at a time, and of its workers those it started last.

.owner.json   the attempt that holds the run: its token, its machine and process
.owner.beat   a count that a driver which lives keeps moving
.gang         the worker group that the attempt started last

A driver that was killed leaves workers behind which do not know of it yet, and a node that was cut off goes
on. So every write asks first whether the run is still its writer's. Checkpoints are besides written aside and
put in their place whole: a write that was under way when the run changed hands meets nobody else's.
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

OWNER, HEARTBEAT, WORKER_GROUP = ".owner.json", ".owner.beat", ".gang"
HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 15.0
"""A driver on another machine that moves nothing for so long is dead."""
PATIENCE_SECONDS = 10.0
"""How long a driver that is just ending is waited for, before the run is refused."""
LEASE_SECONDS = 150.0
"""How long a file server may keep the lock of a machine that is gone."""


class NotOursError(RunFailedError):
    """Raised by a write into a run that somebody else has taken over."""


@dataclass(frozen=True)
class WriteLease:
    """The right to write into a run's folder; travels to the workers."""

    run_dir: str
    token: str
    worker_group: str = ""
    """Of one start of the worker group; empty outside it."""

    def check(self) -> None:
        """Raises NotOursError where the run has passed to another driver, or to a later worker group."""
        folder = Path(self.run_dir)
        owner = _owner(folder)
        if owner.get("token") != self.token:
            raise NotOursError(
                f"{folder}: "
                + (f"taken over by {_who(owner)}" if owner else "the driver that started this has ended")
                + "; nothing more is written from here"
            )
        if self.worker_group and (folder / WORKER_GROUP).read_text(encoding="utf-8") != self.worker_group:
            raise NotOursError(
                f"{folder}: workers that were started later go on with it; nothing more is written from here"
            )

    def for_new_worker_group(self) -> WriteLease:
        """The permit of a worker group that starts now; from here on earlier groups have none.

        Raises:
            NotOursError: the driver has lost the run.
        """
        self.check()
        lease = replace(self, worker_group=uuid.uuid4().hex)
        write_atomic(Path(self.run_dir) / WORKER_GROUP, lease.worker_group)
        return lease


class RunLock:
    """Holds a run for one driver, as a context manager that gives the :class:`Permit`.

    The lock of the file system decides between two drivers that start together. Where it does not reach
    (other machines, on some mounts), the beat tells whether the driver before lives; and should two claim the
    run in the same moment after all, the later one has it and the other one's writes are refused.

    Args:
        folder: the run's; has to exist.
        wait: for another driver of the same run to end, instead of refusing.
    """

    def __init__(self, folder: Path, *, wait: bool = False):
        self.folder, self.wait = folder, wait
        self.lease = WriteLease(str(folder), uuid.uuid4().hex)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="own-run", daemon=True)

    def __enter__(self) -> WriteLease:
        self._lock = (self.folder / ".lock").open("a")
        try:
            self._await_turn()
            write_atomic(self.folder / OWNER, json.dumps({"token": self.lease.token, **_myself()}))
        except BaseException:
            self._lock.close()
            raise
        self._thread.start()
        return self.lease

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            (self.folder / OWNER).unlink(missing_ok=True)
        self._lock.close()

    def _await_turn(self) -> None:
        """Return when the run is free.

        Raises:
            InputError: its driver lives.
        """
        began = moved = time.monotonic()
        seen, beats = self._read_heartbeat(), 0
        told = False
        while True:
            locked, owner = self._try_lock(), _owner(self.folder)
            if locked and (not owner or _has_ended(owner)):
                return
            now = time.monotonic()
            beat = self._read_heartbeat()
            if beat and beat != seen:  # empty: read in the middle of a write
                seen, moved, beats = beat, now, beats + 1
            silent = now - moved >= SILENCE_SECONDS
            if locked and silent:
                return
            waited = now - began
            lives = beats >= 2 and not silent  # the last one of a driver that died may show late
            if not self.wait and ((lives and waited >= PATIENCE_SECONDS) or waited >= LEASE_SECONDS):
                raise InputError(
                    f"run.name={self.folder.name}: {_who(owner)} is at work on this run; wait for it or end "
                    "it, or use another run.name"
                )
            if not told:
                log_progress(f"run {self.folder.name}: waiting to see whether {_who(owner)} still lives")
                told = True
            time.sleep(0.2)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_ours(self) -> bool:
        return _owner(self.folder).get("token") == self.lease.token

    def _read_heartbeat(self) -> str:
        file = self.folder / HEARTBEAT
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def _heartbeat(self) -> None:
        count = 0
        while True:
            with contextlib.suppress(OSError):  # storage that fails for a moment is no reason to end
                if not self._is_ours():
                    return
                # In place: other machines see a file that stays sooner than one that is replaced.
                (self.folder / HEARTBEAT).write_text(f"{self.lease.token} {count}", encoding="utf-8")
            count += 1
            if self._stop.wait(HEARTBEAT_SECONDS):
                return


def _owner(folder: Path) -> dict[str, Any]:
    """Who holds the run; empty where nobody does."""
    try:
        return json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "another driver"
    return f"the driver with process id {owner['pid']} on {owner['host']}"


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "born": psutil.Process(pid).create_time(),
    }


def _machine() -> str:
    """What makes process ids comparable: the machine, its start, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that is there no more. Of others nobody can tell."""
    if owner["machine"] != _machine():
        return False
    try:
        process = psutil.Process(owner["pid"])
        another = abs(process.create_time() - owner["born"]) > 30  # seconds; it moves with the clock
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
