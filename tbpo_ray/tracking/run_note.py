"""The file in a run's folder that holds the id of its MLflow run, so that a restarted process resumes it."""

from __future__ import annotations

import json
from pathlib import Path

from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import read_object

RUN_NOTE = "run.json"
_KEY = "mlflow_run_id"


def read_run_note(note: Path) -> str | None:
    """Return the MLflow run id in the file, or None if the file does not exist.

    Raises:
        InputError: the file is empty or damaged.
    """
    if not note.is_file():
        return None
    remedy = "restore it, or remove it so that the run continues as a new MLflow run"
    return str(read_object(note, remedy, (_KEY,))[_KEY])


def write_run_note(note: Path, run_id: str) -> None:
    """Write the MLflow run id to the file."""
    write_atomic(note, json.dumps({_KEY: run_id}))
