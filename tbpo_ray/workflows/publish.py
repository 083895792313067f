"""Publish the export of a run on the hub."""

from __future__ import annotations

from pathlib import Path

from tbpo_ray.config.schema import Config
from tbpo_ray.models.export import model_license
from tbpo_ray.models.hub import hub_card, push_to_hub
from tbpo_ray.progress import log_progress
from tbpo_ray.tracking.description import command_line
from tbpo_ray.tracking.tracker import Tracker


def publish(config: Config, export: Path, tracker: Tracker, result: str) -> None:
    """Upload the export to `export.push_to_hub`, and tag the MLflow run with the address.

    Nothing is done without a repository.

    Args:
        result: Markdown for the model card.

    Raises:
        RunFailedError: the hub refuses it.
    """
    if config.export.push_to_hub is None:
        return
    facts = {
        "name": config.run.name,
        "base model": config.model.name_or_path,
        "objective": config.objective.name,
        "beta": config.objective.beta,
        "learning rate": config.training.learning_rate,
        "pairs per step": config.training.pairs_per_step,
    }
    sources = config.data.train
    card = hub_card(
        facts,
        license_name=model_license(export),
        result=result,
        command=command_line(),
        datasets=[sources] if isinstance(sources, str) else [item.source for item in sources],
    )
    address = push_to_hub(config.export, export, card)
    tracker.set_tags({"hub.repository": address})
    log_progress(f"published: {address}")
