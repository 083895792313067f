"""Search over the divergence, the baseline or any key: `--space tune_spaces/joint.yaml tune.trials=12`."""

import argparse
import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", required=True, metavar="SPACE.yaml", help="the search space")


def prepare(config: Config, arguments: argparse.Namespace) -> Config:
    from tbpo_ray.tuning.space import Space
    from tbpo_ray.workflows.tune import check_study

    check_study(config, Space.load(arguments.space))
    return config


def work(config: Config, arguments: argparse.Namespace) -> None:
    from tbpo_ray.tuning.space import Space
    from tbpo_ray.workflows.tune import tune

    tune(config, Space.load(arguments.space))


def plan(config: Config) -> str:
    from tbpo_ray.workflows.tune import study_plan

    return study_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, options=options, prepare=prepare, plan=plan))
