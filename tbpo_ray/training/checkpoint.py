"""Checkpoints: one self-describing folder per step, valid if its manifest exists and matches its files.

A folder is written under a hidden name unique to its writer, and renamed once its manifest is written. Each
writer hashes its own files while it writes them (:mod:`tbpo_ray.training.tensor_files`).

checkpoints/step-00000200/
    optimizer-0000.safetensors ...   master weights and optimizer state, a slice per rank
    head.safetensors                 learned baseline and its AdamW
    rng-0000.safetensors ...         torch random state per rank
    state.json                       step, pairs seen, batch order, objective's definition, metrics offset,
                                     fingerprints
    manifest.json                    size and SHA-256 of each of the above, written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_ray.storage.files import write_atomic
from tbpo_ray.training.tensor_files import FileFacts

MANIFEST, STATE = "manifest.json", "state.json"
PENDING = ".to-be-sampled"
"""Marks a folder that validation has yet to read; it is not pruned."""
_FOLDER = re.compile(r"step-(\d{8})")
_HASHING_THREADS = 8
"""Files of one checkpoint that are read at the same time."""


class CorruptCheckpointError(ValueError):
    """A folder that is not a valid checkpoint; the message says why."""


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


def commit_checkpoint(folder: Path, state: Mapping[str, Any], files: Mapping[str, FileFacts]) -> None:
    """Write `state.json` and then the manifest, which makes the folder a valid checkpoint.

    Args:
        files: the facts of all other files, which are on disk.
    """
    text = json.dumps(state, indent=1, sort_keys=True)
    write_atomic(folder / STATE, text)
    facts = {**files, STATE: FileFacts.of_text(text)}
    entries = {name: facts[name].to_json() for name in sorted(facts)}
    # Last: a checkpoint that was interrupted at any point before has no manifest and is never loaded.
    write_atomic(folder / MANIFEST, json.dumps({"version": 1, "files": entries}, indent=1))


def partial_folder(checkpoints: Path, step: int, owner: str) -> Path:
    """Where `owner`, and no other process, writes a checkpoint until it is complete."""
    return checkpoints / f".step-{step:08d}-{owner}"


def publish(partial: Path, folder: Path) -> None:
    """Move a complete folder to its final name, replacing what an earlier attempt has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    _sync_folder(partial)
    os.rename(partial, folder)
    _sync_folder(folder.parent)


def remove_partial(checkpoints: Path) -> None:
    """Delete incomplete folders of earlier attempts."""
    for partial in checkpoints.glob(".step-*"):
        shutil.rmtree(partial, ignore_errors=True)


def await_writers(checkpoints: Path, seconds: float) -> bool:
    """Wait until the folders that are being written now are complete or gone; whether that was in time."""
    deadline = time.monotonic() + seconds
    partial = list(checkpoints.glob(".step-*"))
    while any(folder.exists() for folder in partial):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """The files of a checkpoint.

    Raises:
        CorruptCheckpointError: there is no manifest, or it is damaged.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CorruptCheckpointError("no manifest") from error
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError("the manifest is damaged") from error
    try:
        files = {str(n): FileFacts.from_json(facts) for n, facts in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError("the manifest is damaged") from error
    if STATE not in files:
        raise CorruptCheckpointError("the manifest is empty")
    return files


def find_corruption(folder: Path, hashed: Collection[str] | None = None) -> str | None:
    """The reason why this folder is not a valid checkpoint; None if it is one.

    Args:
        hashed: names of the files whose content is verified; default: all. Of the others, only the size is.
    """
    try:
        files = read_manifest(folder)
    except CorruptCheckpointError as error:
        return str(error)
    return find_corrupt_file(folder, files, files if hashed is None else hashed)


def find_corrupt_file(folder: Path, files: Mapping[str, FileFacts], hashed: Collection[str]) -> str | None:
    """Why one of these files is not as it was written; None if all are. See `find_corruption`."""
    with ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="hash") as pool:
        reasons = pool.map(
            lambda name: _file_corruption(folder, name, files[name], is_hashed=name in hashed), files
        )
        return next((reason for reason in reasons if reason is not None), None)


def find_incompleteness(folder: Path) -> str | None:
    """Like `find_corruption`, without reading the tensors; finds what an interruption leaves behind."""
    return find_corruption(folder, hashed={STATE})


def _file_corruption(folder: Path, name: str, facts: FileFacts, *, is_hashed: bool) -> str | None:
    file = folder / name
    # A damaged manifest must not make us read files of other folders.
    if Path(name).name != name or not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != facts.size:
        return f"{name} has {size} bytes instead of {facts.size}"
    if is_hashed:
        try:
            read = FileFacts.read(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if read != facts:
            return f"{name} has changed since it was written"
    return None


def newest(checkpoints: Path, find_fault: Callable[[Path], str | None] = find_corruption) -> NewestCheckpoint:
    """The newest valid checkpoint under `checkpoints`.

    Args:
        find_fault: returns why a folder is not valid; None if it is.
    """
    rejected: list[str] = []
    for folder in reversed(folders(checkpoints)):
        reason = find_fault(folder)
        if reason is None:
            return NewestCheckpoint(folder, read_state(folder), tuple(rejected))
        rejected.append(rejection(folder, reason))
    return NewestCheckpoint(None, {}, tuple(rejected))


def rejection(folder: Path, reason: str) -> str:
    """The sentence about a folder that is not a valid checkpoint."""
    return f"checkpoint {folder.name} is not used: {reason}"


def last_state(checkpoints: Path) -> dict[str, Any]:
    """The newest readable checkpoint state; empty if there is none. Other files are not verified."""
    for folder in reversed(folders(checkpoints)):
        try:
            return read_state(folder)
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
    for folder in folders(checkpoints):
        if (folder / MANIFEST).is_file():
            metrics = read_state(folder).get("metrics", {})
            if metric in metrics:
                scored.append((metrics[metric] if mode == "min" else -metrics[metric], folder))
    return [folder for _, folder in sorted(scored)[:count]]


def prune(checkpoints: Path, keep: int, protected: set[str] | None = None) -> None:
    """Delete all folders but the newest `keep`, those named in `protected`, and those marked as pending."""
    for folder in folders(checkpoints)[:-keep]:
        if folder.name not in (protected or set()) and not (folder / PENDING).exists():
            shutil.rmtree(folder, ignore_errors=True)


def folders(checkpoints: Path) -> list[Path]:
    """All folders of checkpoints, valid or not, by step."""
    if not checkpoints.is_dir():
        return []
    return sorted(f for f in checkpoints.iterdir() if f.is_dir() and _FOLDER.fullmatch(f.name))


def read_state(folder: Path) -> dict[str, Any]:
    """The content of `state.json`."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
