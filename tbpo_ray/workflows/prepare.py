"""Prepare the data of a run: for `jobs/prepare.py` alone, and as the first stage of training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config, Sources
from tbpo_ray.data.card import card_metrics, write_card
from tbpo_ray.data.preparation import PairsSpec, find_sources, prepare
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.paths import cache_dir, run_dir, shared_folders


def prepare_all(config: Config) -> dict[str, dict[str, Any]]:
    """Prepare `data.train` and `data.eval` as training does, with a data card each, and log them to MLflow.

    The cards and the quarantine files are written to the folder of the run: `data_card_train.json`,
    `data_card_train.png`, `quarantine.jsonl`.

    Returns:
        For each role the folder, fingerprint, pairs, records and number of quarantined records.

    Raises:
        InputError: when a source is invalid, before any worker starts.
    """
    from tbpo_ray.cluster.session import start_ray
    from tbpo_ray.models.load import load_tokenizer
    from tbpo_ray.models.resolve import policy_folder
    from tbpo_ray.tracking.store import check_store
    from tbpo_ray.tracking.tracker import Tracker

    check_store(config)
    folder, cache = run_dir(config), cache_dir(config)
    roles: dict[str, Sources] = {"train": config.data.train}
    if config.data.eval is not None:
        roles["eval"] = config.data.eval
    faults: list[str] = []
    for role, source in roles.items():
        try:
            find_sources(source, f"data.{role}")
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*faults)
    tokenizer = policy_folder(config)
    load_tokenizer(tokenizer, chat_template=config.model.chat_template)
    start_ray()
    done = {role: prepare_role(config, role, tokenizer, cache) for role in roles}
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    with Tracker.from_note(
        config, folder / "prepare.json", kind="prepare", name=f"{config.run.name}-prepare"
    ) as tracker:
        for role, prepared in done.items():
            log_prepared(tracker, role, roles[role], prepared, config, folder)
            out[role] = {
                "path": prepared.path,
                "fingerprint": prepared.fingerprint,
                "pairs": prepared.pairs,
                "records": prepared.records,
                "quarantined": prepared.quarantined,
            }
            log_progress(
                f"data.{role}: {prepared.records:,} records, {prepared.pairs:,} pairs, "
                f"{prepared.quarantined:,} quarantined: {prepared.path}"
            )
    return out


def prepare_role(config: Config, role: str, tokenizer: str, cache: Path) -> PreparedPairs:
    """The prepared pairs of `data.train` or `data.eval`, the same for every job with this configuration."""
    source = config.data.train if role == "train" else config.data.eval
    assert source is not None
    spec = PairsSpec(
        source,
        config.data,
        tokenizer,
        chat_template=config.model.chat_template,
        role=role,
        seed=config.run.seed,
        keep_ties=config.objective.ties != "drop",
    )
    return prepare(
        spec,
        cache,
        labels=config.cluster.labels.prepare,
        before_build=lambda: _wait_for_node(config, role, source, tokenizer),
    )


def _wait_for_node(config: Config, role: str, source: Sources, tokenizer: str) -> None:
    """Wait for a node that can tokenize, and check that it can access the sources and the output folders."""
    from tbpo_ray.cluster.placement import wait_for_resources

    files = {"model.name_or_path": tokenizer} if Path(tokenizer).is_absolute() else {}
    local = [file.address for file in find_sources(source, role)[0] if Path(file.address).is_file()]
    if local:
        files[f"data.{role}"] = str(Path(local[0]).absolute())
    wait_for_resources(
        config,
        f"preparing data.{role}",
        {"CPU": 1.0},
        1,
        labels=config.cluster.labels.prepare,
        folders=shared_folders(config),
        files=files,
    )


def log_prepared(
    tracker: Any, role: str, source: Sources, prepared: PreparedPairs, config: Config, folder: Path
) -> dict[str, Any]:
    """Log the dataset, statistics, card and quarantine of prepared pairs, and copy the files to `folder`.

    Returns:
        The data card.
    """
    name = source if isinstance(source, str) else ", ".join(item.source for item in source)
    card, card_file, figure_file = write_card(prepared, training=config.training)
    tracker.log_dataset(
        role,
        digest=prepared.fingerprint,
        source=name,
        rows=prepared.pairs,
        context=role,
        profile={**prepared.counts, **card_metrics(card)},
    )
    counts = {name: prepared.counts[name] for name in ("records", "pairs", "quarantined")}
    tracker.set_tags({f"data.{role}.{name}": int(count) for name, count in counts.items()})
    for file in (card_file, figure_file):
        shutil.copyfile(file, folder / f"{file.stem}_{role}{file.suffix}")
        tracker.log_artifact(file, f"data/{role}")
    if prepared.quarantine_file is not None:
        name = "quarantine.jsonl" if role == "train" else f"quarantine_{role}.jsonl"
        shutil.copyfile(prepared.quarantine_file, folder / name)
        tracker.log_artifact(prepared.quarantine_file, f"data/{role}")
    return card
