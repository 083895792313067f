"""Where a run's files are stored, as the configuration says."""

from __future__ import annotations

from pathlib import Path

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError

STUDY_STATE = "study.json"
"""What a study knows of its trials; the folder that holds it is a study's, not a run's."""


def output_dir(config: Config) -> Path:
    """`run.output_dir`, absolute.

    Raises:
        InputError: an address instead of a folder; checkpoints are written as files, by all nodes.
    """
    if "://" in config.run.output_dir:
        raise InputError(
            f"run.output_dir={config.run.output_dir}: give a folder on storage that every node mounts "
            "(NFS, EFS, Filestore, Lustre)"
        )
    return Path(config.run.output_dir).expanduser().absolute()


def run_dir(config: Config) -> Path:
    """`<run.output_dir>/<run.name>`, absolute.

    Raises:
        InputError: a link lies there: what a run writes stays in `run.output_dir`.
    """
    folder = output_dir(config) / config.run.name
    if folder.is_symlink():
        raise InputError(
            f"run.name={config.run.name}: {folder} is a link to {folder.readlink()}; remove it, or use "
            "another run.name"
        )
    return folder


def cache_dir(config: Config) -> Path:
    """`data.cache_dir`, by default `<run.output_dir>/.prepared`, absolute."""
    given = config.data.cache_dir
    return Path(given).expanduser().absolute() if given else output_dir(config) / ".prepared"


def shared_folders(config: Config) -> dict[str, Path]:
    """The folders that nodes write into, by the configuration key that places them."""
    folders = {"run.output_dir": output_dir(config)}
    return folders | ({"data.cache_dir": cache_dir(config)} if config.data.cache_dir else {})
