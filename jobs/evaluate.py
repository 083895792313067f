"""Sample policies with vLLM and judge their answers; set `evaluation.policies` or `runs=[...]`."""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def work(config: Config) -> None:
    from tbpo_ray.workflows.evaluate import evaluate

    print(evaluate(config).table())


def plan(config: Config) -> str:
    from tbpo_ray.workflows.evaluate import evaluation_plan

    return evaluation_plan(config)


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, plan=plan))
