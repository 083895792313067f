"""The whole way: supervised fine-tuning, preference training, samples before and after, the verdict."""

import sys

from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def work(config: Config) -> None:
    from tbpo_ray.workflows.pipeline import run_pipeline

    run_pipeline(config)


def plan(config: Config) -> str:
    from tbpo_ray.config.loading import stage_config
    from tbpo_ray.evaluation.evaluator import check_settings
    from tbpo_ray.training.estimate import plan_text

    prompts = check_settings(config)

    text = ""
    if config.sft:
        text = "\n# stage 1: sft" + plan_text(stage_config(config, config.sft, objective__name="sft"))
    text += f"\n# stage 2: {config.objective.name}" + plan_text(config)
    return text + f"\n# stage 3: evaluation on {len(prompts.prompts)} prompts of {prompts.source}\n"


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, plan=plan))
