"""Prepare preference data only: read, validate, tokenize, and write shards and the data card."""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def work(config: Config) -> None:
    from tbpo_ray.workflows.prepare import prepare_all

    prepare_all(config)


def plan(config: Config) -> str:
    from tbpo_ray.training.estimate import plan_text

    return plan_text(config)


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, plan=plan))
