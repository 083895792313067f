"""SFT, preference training, and evaluation before and after it, as one MLflow run with nested runs."""

from __future__ import annotations

from tbpo_ray.config.loading import expand_dotted, sft_config, stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.evaluation.evaluator import check_settings
from tbpo_ray.evaluation.report import compare_runs
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.models.resolve import policy_folder
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.paths import run_dir
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training.estimate import plan_text
from tbpo_ray.workflows.evaluate import evaluate
from tbpo_ray.workflows.train import train

PIPELINE_NOTE = "pipeline.json"
"""Run note of the pipeline; `run.json` in the same folder is that of preference training."""


def stages(config: Config) -> tuple[Config | None, Config]:
    """Derive the configurations of SFT (None without an `sft` section) and of preference training.

    The folder of SFT is `<run.name>-sft`, or the one that `sft.run.name` names; the folder of preference
    training, which starts from its export, is `<run.name>`.

    Raises:
        InputError: errors in the `sft` section.
    """
    if not config.sft:
        return None, config
    sft = sft_config(config, run__name=_sft_name(config))
    start = str(run_dir(sft) / "export")
    return sft, stage_config(config, {}, model__name_or_path=start, model__gguf_file=None)


def _sft_name(config: Config) -> str:
    """`<run.name>-sft`, unless the `sft` section names a run, which several pipelines can then share."""
    name = expand_dotted(config.sft).get("run", {}).get("name")
    return str(name or f"{config.run.name}-sft")


def pipeline_plan(config: Config) -> str:
    """What the pipeline would do, stage by stage.

    Raises:
        InputError: something that would stop one of the stages.
    """
    prompts = check_settings(config)
    text = ""
    if config.sft:
        text = "\n# stage 1: sft" + plan_text(sft_config(config))
    # Preference training is planned on the base model, because SFT's export does not exist yet.
    text += f"\n# stage 2: {config.objective.name}" + plan_text(config)
    return text + f"\n# stage 3: evaluation on {len(prompts.prompts)} prompts of {prompts.source}\n"


def run_pipeline(config: Config) -> Verdict:
    """Run all stages; finished stages are skipped.

    Raises:
        InputError, RunFailedError: as the stages do.
    """
    sft, preference = stages(config)
    check_settings(preference)  # the evaluation may start only days from now
    folder = run_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    with Tracker.from_note(config, folder / PIPELINE_NOTE, kind="pipeline") as tracker:
        policies = {}
        if sft is not None:
            log_progress("stage 1 of 3: supervised fine-tuning")
            policies["sft"] = str(train(sft, kind="sft", parent_run_id=tracker.run_id, wait=True).export)
        else:
            policies["base"] = policy_folder(preference)
        log_progress("stage 2 of 3: preference training")
        result = train(preference, kind="train", parent_run_id=tracker.run_id)
        policies[preference.objective.name] = str(result.export)
        log_progress("stage 3 of 3: evaluation")
        final = stage_config(preference, {"evaluation": {"policies": policies}})
        verdict = evaluate(final, parent_run_id=tracker.run_id)
        report = compare_runs(final, parent_run_id=tracker.run_id)
        after = verdict[preference.objective.name].metrics
        tracker.log_metrics({name: estimate.value for name, estimate in after.items()})
        tracker.log_artifact(folder / "evaluation" / "verdict.txt")
        tracker.log_artifact(report)
    print(verdict.table())
    print(f"\nreport: {report}\nMLflow: {tracker.url_hint()}")
    return verdict
