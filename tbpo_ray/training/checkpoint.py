"""Checkpoints: one self-describing folder per step, whole when its manifest is there and true.

A folder is written aside, under a hidden name of its writer's own, and renamed when it is sealed.

checkpoints/step-00000200/
    optimizer-0000.safetensors ...   master weights and optimizer state, a slice per rank
    head.safetensors                 learned baseline and its AdamW
    rng-0000.safetensors ...         torch random state per rank
    state.json                       step, pairs seen, order of the batches, metrics offset, fingerprints
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
"""Marks a folder that validation still has to read: it is not pruned."""
_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that is whole, and what was passed over on the way to it."""

    folder: Path | None
    state: dict[str, Any]
    rejected: tuple[str, ...]
    """One sentence per newer folder that is not whole."""

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state.json`, then the manifest over everything in the folder, atomically and last."""
    write_atomic(folder / "state.json", json.dumps(state, indent=1, sort_keys=True))
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)}
        for f in sorted(folder.iterdir())
        if f.is_file() and f.name != MANIFEST and not f.name.startswith(".")
    }
    write_atomic(folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1))


def partial_folder(checkpoints: Path, step: int, owner: str) -> Path:
    """Where `owner` writes a checkpoint until it is whole; nobody else writes there."""
    return checkpoints / f".step-{step:08d}-{owner}"


def publish(partial: Path, folder: Path) -> None:
    """Put a sealed folder in its place, for one that is left there of an earlier attempt."""
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def remove_partial(checkpoints: Path) -> None:
    """Delete what earlier attempts left unsealed."""
    for partial in checkpoints.glob(".step-*"):
        shutil.rmtree(partial, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Why this folder is not a whole checkpoint; `None` if it is."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "no manifest"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        items = [(str(name), int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the manifest is damaged"
    if "state.json" not in files:
        return "the manifest is empty"
    for name, size, digest in items:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != digest:
            return f"{name} has changed since it was written"
    return None


def newest(checkpoints: Path) -> Found:
    """The newest whole checkpoint under `checkpoints`; folders that are not whole are never loaded."""
    rejected: list[str] = []
    for folder in sorted(_folders(checkpoints), reverse=True):
        why = fault(folder)
        if why is None:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return Found(folder, state, tuple(rejected))
        rejected.append(f"checkpoint {folder.name} is not used: {why}")
    return Found(None, {}, tuple(rejected))


def last_state(checkpoints: Path) -> dict[str, Any]:
    """State of the newest checkpoint that has a readable one, not verified otherwise; empty without any."""
    for folder in sorted(_folders(checkpoints), reverse=True):
        try:
            return json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return {}


def best(checkpoints: Path, metric: str, mode: str, count: int) -> list[Path]:
    """The up to `count` sealed folders with the best `metric` in their state (`mode`: `min` or `max`), the
    best first; folders that were saved without it do not count."""
    scored = []
    for folder in _folders(checkpoints):
        if count and (folder / MANIFEST).is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if metric in state.get("metrics", {}):
                value = state["metrics"][metric]
                scored.append((value if mode == "min" else -value, folder))
    return [folder for _, folder in sorted(scored)[:count]]


def prune(checkpoints: Path, keep: int, protected: set[str] | None = None) -> None:
    """Delete all but the newest `keep` folders (and those named in `protected`, or pending)."""
    for folder in sorted(_folders(checkpoints))[:-keep]:
        if folder.name not in (protected or set()) and not (folder / PENDING).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [f for f in checkpoints.iterdir() if f.is_dir() and _FOLDER.fullmatch(f.name)]


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
