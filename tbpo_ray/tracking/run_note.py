"""The file in a run's folder that holds the id of its MLflow run, so that a restarted process resumes it."""

from __future__ import annotations

import json
from pathlib import Path

from tbpo_ray.storage.files import write_atomic

RUN_NOTE = "run.json"
_KEY = "mlflow_run_id"


def read_run_note(note: Path) -> str | None:
    """Return the MLflow run id in the file, or None if the file does not exist."""
    return str(json.loads(note.read_text(encoding="utf-8"))[_KEY]) if note.is_file() else None


def write_run_note(note: Path, run_id: str) -> None:
    """Write the MLflow run id to the file."""
    write_atomic(note, json.dumps({_KEY: run_id}))
