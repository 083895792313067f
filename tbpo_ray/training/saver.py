"""Writing checkpoints: every rank its slices, rank 0 the seal, at once or while training goes on."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.storage.ownership import WriteLease
from tbpo_ray.training import checkpoint as ckpt

WRITTEN = ".written-"
_PEERS_SECONDS = 1800.0


class Saver:
    """Writes one rank's part of each checkpoint into storage that all ranks share.

    A folder gets its name when it is whole and `permit` still holds; if not, NotOursError is raised.
    With `training.async_checkpoints` a thread writes what `save` was given while training goes on; the folder
    is sealed when all ranks have written theirs, and the next `save` waits for that.
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
        """Write `files` of this rank and, on rank 0, the seal over everybody's.

        Args:
            files: file name to tensors, which nothing else changes from now on.
            state: goes into `state.json`; `metrics` in it decides which checkpoints are the best.
            pending: validation is going to read the folder.

        Returns:
            The folder; there only after `wait` with `training.async_checkpoints`.
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
            self._seal(partial, folder, state)
        barrier()
        return folder

    def wait(self) -> None:
        """Return when nothing is being written any more; raise here what went wrong there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            barrier()
        if self._error is not None:
            raise self._error

    def _write(self, folder: Path, files: Mapping[str, dict[str, Tensor]]) -> None:
        for name, tensors in files.items():
            save_file(tensors, folder / name)

    def _seal(self, partial: Path, folder: Path, state: Mapping[str, Any]) -> None:
        ckpt.seal(partial, state)
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
                self._seal(partial, folder, state)
        except BaseException as error:  # raised by the next `wait`
            self._error = error

    def _await_peers(self, folder: Path) -> None:
        """Collectives belong to the training thread, so ranks tell each other through the folder."""
        marks = [folder / f"{WRITTEN}{rank:04d}" for rank in range(self.world)]
        end = time.monotonic() + _PEERS_SECONDS
        while not all(mark.exists() for mark in marks):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{folder.name}: a rank has not written its part in {_PEERS_SECONDS:.0f} s"
                )
            time.sleep(0.02)
        for mark in marks:
            mark.unlink()


class Cadence:
    """Says on all ranks together when `seconds` have gone by on rank 0's clock."""

    def __init__(self, seconds: float, device: Any, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.device, self.clock = seconds, device, clock
        self.last = clock()

    def due(self) -> bool:
        """Whether it is time; every rank must ask equally often."""
        flag = torch.tensor([float(self.clock() - self.last >= self.seconds)], device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(flag, src=0)
        if flag.item() == 0.0:
            return False
        self.last = self.clock()
        return True


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def finite(row: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a row that JSON can hold."""
    return {key: float(value) for key, value in row.items() if math.isfinite(float(value))}
