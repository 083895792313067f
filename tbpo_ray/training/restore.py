"""Find the checkpoint to resume from: all ranks together, each verifying its own files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.rank_store import RankStore


@dataclass(frozen=True)
class ResumePoint:
    """What a worker group resumes from."""

    newest: ckpt.NewestCheckpoint
    stream_step: int
    """The step at which the data stream starts: that of the newest complete checkpoint. It was set up before
    the ranks verified that checkpoint, so `newest` may be an older one."""


def find_resume_point(checkpoints: Path, ranks: RankStore) -> ResumePoint:
    """The newest checkpoint whose files all have the content that was written. Every rank calls it.

    Each file is read and hashed by one rank, the one that will load it if the number of ranks is the same;
    loading then finds it in the file system's cache.
    """
    first = ranks.decide(None, lambda _: _first_complete(checkpoints))
    rejected: list[str] = list(first["rejected"])
    for name in first["names"]:
        folder = checkpoints / name
        found = ranks.decide(_verify_share(folder, ranks), partial(_verdict, folder))
        if found["reason"] is None:
            return ResumePoint(
                ckpt.NewestCheckpoint(folder, found["state"], tuple(rejected)), first["stream_step"]
            )
        rejected.append(ckpt.rejection(folder, found["reason"]))
    return ResumePoint(ckpt.NewestCheckpoint(None, {}, tuple(rejected)), first["stream_step"])


def share_of(files: Collection[str], rank: int, world: int) -> set[str]:
    """The files that a rank verifies: what the same rank wrote, and an equal part of the others."""
    owners = {f"{rank:04d}": rank for rank in range(world)}
    shared = sorted(name for name in files if _writer(name) not in owners)
    own = {name for name in files if owners.get(_writer(name)) == rank}
    return own | set(shared[rank::world])


def _writer(name: str) -> str:
    """`0003` of `optimizer-0003.safetensors`."""
    return name.partition(".")[0].rpartition("-")[2]


def _first_complete(checkpoints: Path) -> dict[str, Any]:
    """On rank 0: the newest complete checkpoint and all older folders, the newest first."""
    complete = ckpt.newest(checkpoints, ckpt.find_incompleteness)
    names = [folder.name for folder in reversed(ckpt.folders(checkpoints))]
    rejected = complete.rejected
    return {"names": names[len(rejected) :], "rejected": rejected, "stream_step": complete.step}


def _verify_share(folder: Path, ranks: RankStore) -> str | None:
    try:
        files = ckpt.read_manifest(folder)
    except ckpt.CorruptCheckpointError as error:
        return str(error)
    share = share_of(files, ranks.rank, ranks.world)
    return ckpt.find_corrupt_file(folder, {name: files[name] for name in sorted(share)}, share)


def _verdict(folder: Path, reasons: Sequence[str | None]) -> dict[str, Any]:
    """On rank 0: why the folder is not valid, or its state."""
    reason = next((reason for reason in reasons if reason is not None), None)
    # An older folder than the newest complete one has not been looked at as a whole yet.
    reason = reason or ckpt.find_incompleteness(folder)
    return {"reason": reason, "state": ckpt.read_state(folder) if reason is None else {}}
