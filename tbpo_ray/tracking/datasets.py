"""Datasets as MLflow's inputs of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tbpo_ray.redaction import redact_text
from tbpo_ray.tracking.limits import MAX_DATASET_NAME, MAX_DIGEST

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput


def dataset_input(
    name: str,
    digest: str,
    source: str,
    context: str,
    *,
    columns: Mapping[str, str],
    profile: Mapping[str, Any],
) -> DatasetInput:
    """A dataset with the role `context`; see :meth:`tbpo_ray.tracking.tracker.Tracker.log_dataset`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    schema = {"mlflow_colspec": [{"type": kind, "name": key} for key, kind in columns.items()]}
    dataset = Dataset(
        name=name[:MAX_DATASET_NAME],
        digest=digest[:MAX_DIGEST],
        source_type="local" if "://" not in source else urlsplit(source).scheme,
        source=json.dumps({"uri": redact_text(source)}),
        schema=json.dumps(schema) if columns else None,
        profile=json.dumps(dict(profile)),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
