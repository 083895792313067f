"""Compare runs side by side: an HTML report, Markdown, MLflow, and promotion if the gate passes."""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def work(config: Config) -> None:
    from tbpo_ray.evaluation.report import compare_runs

    print(compare_runs(config))


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__))
