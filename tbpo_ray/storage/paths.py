"""Where a run's files are stored, according to the configuration."""

from __future__ import annotations

from pathlib import Path

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError

STUDY_STATE = "study.json"
"""The state of a study; a folder that contains it belongs to a study, not to a run."""


def output_dir(config: Config) -> Path:
    """`run.output_dir`, absolute.

    Raises:
        InputError: it is an address; checkpoints are written as files, by all nodes.
    """
    if "://" in config.run.output_dir:
        raise InputError(
            f"run.output_dir={config.run.output_dir}: must be a folder on storage that every node mounts "
            "(NFS, EFS, Filestore, Lustre)"
        )
    return Path(config.run.output_dir).expanduser().absolute()


def run_dir(config: Config) -> Path:
    """`<run.output_dir>/<run.name>`, absolute.

    Raises:
        InputError: it is a symbolic link, through which a run would write outside `run.output_dir`.
    """
    folder = output_dir(config) / config.run.name
    if folder.is_symlink():
        raise InputError(
            f"run.name={config.run.name}: {folder} is a symbolic link to {folder.readlink()}; remove it, "
            "or use another run.name"
        )
    return folder


def cache_dir(config: Config) -> Path:
    """`data.cache_dir`, by default `<run.output_dir>/.prepared`, absolute."""
    folder = config.data.cache_dir
    return Path(folder).expanduser().absolute() if folder else output_dir(config) / ".prepared"


def shared_folders(config: Config) -> dict[str, Path]:
    """The folders that all nodes write into, by the configuration key that sets them."""
    folders = {"run.output_dir": output_dir(config)}
    return folders | ({"data.cache_dir": cache_dir(config)} if config.data.cache_dir else {})
