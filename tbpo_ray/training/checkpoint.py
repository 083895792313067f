"""Checkpoints: one self-describing folder per step, valid if its manifest exists and matches its files.

A folder is written under a hidden name unique to its writer, and renamed once its manifest is written.

checkpoints/step-00000200/
    optimizer-0000.safetensors ...   master weights and optimizer state, a slice per rank
    head.safetensors                 learned baseline and its AdamW
    rng-0000.safetensors ...         torch random state per rank
    state.json                       step, pairs seen, batch order, objective's definition, metrics offset,
                                     fingerprints
    manifest.json                    size and SHA-256 of each of the above, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_ray.storage.files import write_atomic

MANIFEST = "manifest.json"
PENDING = ".to-be-sampled"
"""Marks a folder that validation has yet to read; it is not pruned."""
_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest valid checkpoint, and the newer folders that are not valid."""

    folder: Path | None
    state: dict[str, Any]
    rejected: tuple[str, ...]
    """One sentence per newer folder that is not valid."""

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def commit_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state.json` and then the manifest, which makes the folder a valid checkpoint."""
    write_atomic(folder / "state.json", json.dumps(state, indent=1, sort_keys=True))
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)}
        for f in sorted(folder.iterdir())
        if f.is_file() and f.name != MANIFEST and not f.name.startswith(".")
    }
    # Last: a checkpoint that was interrupted at any point before has no manifest and is never loaded.
    write_atomic(folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1))


def partial_folder(checkpoints: Path, step: int, owner: str) -> Path:
    """Where `owner`, and no other process, writes a checkpoint until it is complete."""
    return checkpoints / f".step-{step:08d}-{owner}"


def publish(partial: Path, folder: Path) -> None:
    """Move a complete folder to its final name, replacing what an earlier attempt has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def remove_partial(checkpoints: Path) -> None:
    """Delete incomplete folders of earlier attempts."""
    for partial in checkpoints.glob(".step-*"):
        shutil.rmtree(partial, ignore_errors=True)


def find_corruption(folder: Path) -> str | None:
    """The reason why this folder is not a valid checkpoint; None if it is one."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "no manifest"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        entries = [(str(name), int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the manifest is damaged"
    if "state.json" not in files:
        return "the manifest is empty"
    reasons = (_file_corruption(folder, *entry) for entry in entries)
    return next((reason for reason in reasons if reason is not None), None)


def _file_corruption(folder: Path, name: str, size: int, digest: str) -> str | None:
    file = folder / name
    # A damaged manifest must not make us read files of other folders.
    if Path(name).name != name or not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if _sha256(file) != digest:
        return f"{name} has changed since it was written"
    return None


def newest(checkpoints: Path) -> NewestCheckpoint:
    """The newest valid checkpoint under `checkpoints`."""
    rejected: list[str] = []
    for folder in sorted(_folders(checkpoints), reverse=True):
        reason = find_corruption(folder)
        if reason is None:
            return NewestCheckpoint(folder, _read_state(folder), tuple(rejected))
        rejected.append(f"checkpoint {folder.name} is not used: {reason}")
    return NewestCheckpoint(None, {}, tuple(rejected))


def last_state(checkpoints: Path) -> dict[str, Any]:
    """The newest readable checkpoint state; empty if there is none. Other files are not verified."""
    for folder in sorted(_folders(checkpoints), reverse=True):
        try:
            return _read_state(folder)
        except (OSError, ValueError):
            continue
    return {}


def best(checkpoints: Path, metric: str, mode: str, count: int) -> list[Path]:
    """Up to `count` committed folders with the best `metric` in their state, the best one first.

    Folders whose state lacks the metric do not count.

    Args:
        mode: `min` or `max`.
    """
    if not count:
        return []
    scored = []
    for folder in _folders(checkpoints):
        if (folder / MANIFEST).is_file():
            metrics = _read_state(folder).get("metrics", {})
            if metric in metrics:
                scored.append((metrics[metric] if mode == "min" else -metrics[metric], folder))
    return [folder for _, folder in sorted(scored)[:count]]


def prune(checkpoints: Path, keep: int, protected: set[str] | None = None) -> None:
    """Delete all folders but the newest `keep`, those named in `protected`, and those marked as pending."""
    for folder in sorted(_folders(checkpoints))[:-keep]:
        if folder.name not in (protected or set()) and not (folder / PENDING).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [f for f in checkpoints.iterdir() if f.is_dir() and _FOLDER.fullmatch(f.name)]


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
