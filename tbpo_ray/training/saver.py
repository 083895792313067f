"""Write checkpoints: every rank its slices, rank 0 the manifest, synchronously or in the background."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.storage.ownership import WriteLease
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.distributed import barrier
from tbpo_ray.training.readback import Readback

WRITTEN = ".written-"
"""Prefix of the files with which ranks announce, during a background save, that their part is written."""
_PEER_TIMEOUT_SECONDS = 1800.0
CADENCE = "cadence"
"""Name of the answer of a `Cadence` in a readback."""


class Saver:
    """Writes one rank's part of each checkpoint into storage that all ranks share.

    A folder gets its final name when it is complete and the lease is still held; if it is not held,
    LeaseLostError is raised. With `training.async_checkpoints` a thread writes while training continues; the
    folder is committed when all ranks have written their part, and the next `save` waits for that.
    """

    def __init__(self, checkpoints: Path, rank: int, world: int, training: TrainingConfig, lease: WriteLease):
        self.checkpoints, self.rank, self.world, self.training = checkpoints, rank, world, training
        self.lease = lease
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        files: Mapping[str, dict[str, Tensor]],
        state: Mapping[str, Any],
        *,
        pending: bool = False,
    ) -> Path:
        """Write `files` of this rank and, on rank 0, the manifest of all ranks' files.

        Args:
            files: file name to tensors, which must not change from now on.
            state: the content of `state.json`; its `metrics` decide which checkpoints are the best.
            pending: whether validation is going to read the folder.

        Returns:
            The folder. With `training.async_checkpoints` it exists only after `wait`.
        """
        self.wait()
        folder = ckpt.step_folder(self.checkpoints, step)
        partial = ckpt.partial_folder(self.checkpoints, step, self.lease.worker_group)
        if self.rank == 0:
            self.lease.check()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if pending:
                (partial / ckpt.PENDING).touch()
        barrier()
        if self.training.async_checkpoints:
            self._thread = threading.Thread(
                target=self._guarded, args=(partial, folder, dict(files), dict(state))
            )
            self._thread.daemon = True
            self._thread.start()
            return folder
        self._write(partial, files)
        barrier()
        if self.rank == 0:
            self._commit(partial, folder, state)
        barrier()
        return folder

    def wait(self) -> None:
        """Return when the background save is done; raise its error, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            barrier()
        if self._error is not None:
            raise self._error

    def _write(self, folder: Path, files: Mapping[str, dict[str, Tensor]]) -> None:
        for name, tensors in files.items():
            save_file(tensors, folder / name)

    def _commit(self, partial: Path, folder: Path, state: Mapping[str, Any]) -> None:
        ckpt.commit_checkpoint(partial, state)
        # Again, since writing may have taken long enough for another driver to take over.
        self.lease.check()
        ckpt.publish(partial, folder)
        training = self.training
        best = ckpt.best(self.checkpoints, training.best_metric, training.best_mode, training.keep_best)
        ckpt.prune(self.checkpoints, training.keep_checkpoints, protected={b.name for b in best})

    def _guarded(
        self, partial: Path, folder: Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any]
    ) -> None:
        try:
            self._write(partial, files)
            (partial / f"{WRITTEN}{self.rank:04d}").touch()
            if self.rank == 0:
                self._await_peers(partial)
                self._commit(partial, folder, state)
        except BaseException as error:  # `wait` raises it in the training thread
            self._error = error

    def _await_peers(self, folder: Path) -> None:
        """Wait for the other ranks' parts. Through files: collectives belong to the training thread."""
        marks = [folder / f"{WRITTEN}{rank:04d}" for rank in range(self.world)]
        deadline = time.monotonic() + _PEER_TIMEOUT_SECONDS
        while not all(mark.exists() for mark in marks):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{folder.name}: a rank has not written its part within {_PEER_TIMEOUT_SECONDS:.0f} s"
                )
            time.sleep(0.02)
        for mark in marks:
            mark.unlink()


class Cadence:
    """Whether `seconds` have passed, by rank 0's clock on all ranks together."""

    def __init__(self, seconds: float, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.rank, self.clock = seconds, rank, clock
        self.last = clock()

    def offer(self, readback: Readback) -> None:
        """Add rank 0's answer to what the step reads from the device."""
        readback.add(CADENCE, self.rank == 0 and self.clock() - self.last >= self.seconds)

    def due(self, readback: Readback) -> bool:
        """Whether the time was up when `offer` was called; the same on every rank."""
        if readback[CADENCE] == [0.0]:
            return False
        self.last = self.clock()
        return True


def finite(row: Mapping[str, float]) -> dict[str, float]:
    """The entries of a row that JSON can represent."""
    return {key: float(value) for key, value in row.items() if math.isfinite(float(value))}
