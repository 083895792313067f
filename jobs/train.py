"""Train a policy on preference pairs with TBPO or one of its baselines."""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def work(config: Config) -> None:
    from tbpo_ray.progress import log_progress
    from tbpo_ray.workflows.train import train

    result = train(config)
    log_progress(f"policy: {result.export}")


def plan(config: Config) -> str:
    from tbpo_ray.training.estimate import plan_text

    return plan_text(config)


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, plan=plan))
