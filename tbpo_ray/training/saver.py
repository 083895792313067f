"""Write checkpoints: every rank its slices, rank 0 the manifest, at once or while training continues."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.storage.ownership import WriteLease
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.host_copy import Files, HostCopy
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.readback import Readback
from tbpo_ray.training.tensor_files import FileFacts, write_tensors

CADENCE, SAVE_FAILED = "cadence", "save_failed"
"""Names in a readback: the answer of a `Cadence`, and how many ranks know of a checkpoint that failed."""


class CheckpointError(RuntimeError):
    """A checkpoint was not written; raised on every rank for the same step."""


@dataclass(frozen=True)
class _Target:
    """What is written where."""

    step: int
    partial: Path
    folder: Path
    state: Mapping[str, Any]
    pending: bool


class Saver:
    """Writes one rank's part of each checkpoint into storage that all ranks share.

    Each rank hashes its files while it writes them; rank 0 gathers the digests, commits the folder, and gives
    it its final name if the lease is still held. In the background, the tensors are copied to host memory and
    a thread does the rest; the next `save` waits for it, so that there is one copy at most.

    Args:
        device: where the tensors are.
        background: write while training continues.
    """

    def __init__(
        self,
        checkpoints: Path,
        ranks: RankStore,
        training: TrainingConfig,
        lease: WriteLease,
        device: torch.device | None = None,
        *,
        background: bool,
    ):
        self.checkpoints, self.ranks, self.training, self.lease = checkpoints, ranks, training, lease
        self.background = background
        self._copy = HostCopy(device or torch.device("cpu"))
        self._thread: threading.Thread | None = None
        self._fault: str | None = None

    def save(self, step: int, files: Files, state: Mapping[str, Any], *, pending: bool = False) -> Path:
        """Write `files` of this rank and, on rank 0, the manifest of all ranks' files. Every rank calls it.

        Args:
            files: file name to tensors. Unless in the background they are written when this returns;
                otherwise call `hold_updates` before they change.
            state: the content of `state.json`; its `metrics` decide which checkpoints are the best.
            pending: whether validation is going to read the folder.

        Returns:
            The folder. In the background it exists only after `wait`.

        Raises:
            CheckpointError: this checkpoint, or the one before it, was not written.
        """
        self.wait()
        folder = ckpt.step_folder(self.checkpoints, step)
        partial = ckpt.partial_folder(self.checkpoints, step, self.lease.worker_group)
        target = _Target(step, partial, folder, state, pending)
        # Tensors of the host are written from where they are, if nothing changes them meanwhile.
        in_place = not self.background and self._copy.device.type == "cpu"
        copies = files if in_place else self._copy.take(files)
        if not self.background:
            self._write(target, copies)
            self.wait()
            return folder
        self._thread = threading.Thread(
            target=self._write, args=(target, copies), name="checkpoint", daemon=True
        )
        self._thread.start()
        return folder

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def hold_updates(self) -> None:
        """Let the device finish copying before it changes weights and optimizer state."""
        self._copy.hold_updates()

    def wait(self, seconds: float | None = None) -> None:
        """Return when what `save` began is written, or after so many seconds.

        Raises:
            CheckpointError: it was not written.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._fault is not None:
            raise CheckpointError(self._fault)

    def offer(self, readback: Readback) -> None:
        """Add to what a step reads from the device whether a background write has failed on this rank."""
        readback.add(SAVE_FAILED, self._fault is not None)

    def check(self, readback: Readback) -> None:
        """Raise CheckpointError, on all ranks in the same step, if a background write has failed on any."""
        if readback[SAVE_FAILED] != [0.0]:
            # Here its end may be a moment away.
            self.wait()

    def _write(self, target: _Target, files: Files) -> None:
        """Write and commit; a fault is the same sentence on every rank."""
        try:
            report = self._write_part(target, files)
            self._fault = self.ranks.decide(report, lambda reports: self._finish(target, reports))
        except Exception as error:  # of any kind; `wait` raises it in the training thread
            self._fault = f"the checkpoint of step {target.step} was not written: {error}"

    def _write_part(self, target: _Target, files: Files) -> dict[str, Any]:
        """Write this rank's files; returns their facts, or why that failed."""
        try:
            self.lease.check()
            # The name is this worker group's own, and no step is saved twice.
            target.partial.mkdir(parents=True, exist_ok=True)
            self._copy.wait()
            facts = {name: write_tensors(target.partial / name, files[name]) for name in files}
        except Exception as error:  # of any kind; the other ranks wait for the report
            return {"fault": f"{error}"}
        return {"files": {name: fact.to_json() for name, fact in facts.items()}}

    def _finish(self, target: _Target, reports: Sequence[Mapping[str, Any]]) -> str | None:
        """On rank 0: commit the folder, or return a sentence about what is wrong with it."""
        faults = _grouped([report.get("fault") for report in reports])
        if not faults:
            entries = (entry for report in reports for entry in report["files"].items())
            try:
                self._commit(target, {name: FileFacts.from_json(facts) for name, facts in entries})
                return None
            except Exception as error:  # of any kind; the other ranks wait for the sentence
                faults = [f"{error}"]
        shutil.rmtree(target.partial, ignore_errors=True)
        return f"the checkpoint of step {target.step} was not written: {'; '.join(faults)}"

    def _commit(self, target: _Target, files: Mapping[str, FileFacts]) -> None:
        ckpt.commit_checkpoint(target.partial, target.state, files)
        if target.pending:
            (target.partial / ckpt.PENDING).touch()
        # Again, since writing may have taken long enough for another driver to take over.
        self.lease.check()
        ckpt.publish(target.partial, target.folder)
        training = self.training
        best = ckpt.best(self.checkpoints, training.best_metric, training.best_mode, training.keep_best)
        ckpt.prune(self.checkpoints, training.keep_checkpoints, protected={b.name for b in best})


def _grouped(faults: Sequence[str | None]) -> list[str]:
    """One entry for each different fault, with the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for rank, fault in enumerate(faults):
        if fault is not None:
            ranks.setdefault(fault, []).append(str(rank))
    return [f"rank {', '.join(those)}: {fault}" for fault, those in ranks.items()]


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
