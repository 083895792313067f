"""Supervised fine-tuning on the chosen answers, which gives the policy that preference training starts from.

The `sft` section overrides the rest of the configuration, and the objective is `sft`.
"""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.loading import sft_config
from tbpo_ray.config.schema import Config


def prepare(config: Config, arguments: object) -> Config:
    return sft_config(config)


def work(config: Config) -> None:
    from tbpo_ray.progress import log_progress
    from tbpo_ray.workflows.train import train

    result = train(config, kind="sft")
    log_progress(f"policy: {result.export}")


def plan(config: Config) -> str:
    from tbpo_ray.training.estimate import plan_text

    return plan_text(config)


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, plan=plan, prepare=prepare))
