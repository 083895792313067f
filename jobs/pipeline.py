"""The whole pipeline: supervised fine-tuning, preference training, and evaluation before and after it."""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def work(config: Config) -> None:
    from tbpo_ray.workflows.pipeline import run_pipeline

    run_pipeline(config)


def plan(config: Config) -> str:
    from tbpo_ray.workflows.pipeline import pipeline_plan

    return pipeline_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, plan=plan))
