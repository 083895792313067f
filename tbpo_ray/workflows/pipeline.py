"""SFT, helper models, preference training, and evaluation before and after it, as one MLflow run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tbpo_ray.config.loading import expand_dotted, sft_config, stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.evaluation.evaluator import check_settings
from tbpo_ray.evaluation.report import compare_runs
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.models.hub import check_hub
from tbpo_ray.models.resolve import policy_folder
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.paths import run_dir
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training.cost import read_cost
from tbpo_ray.training.estimate import plan_text
from tbpo_ray.training.resume_checks import refuse_changes
from tbpo_ray.workflows.evaluate import evaluate
from tbpo_ray.workflows.helpers import (
    Helper,
    check_helpers,
    data_description,
    plan_helpers,
    train_helper,
    with_helpers,
)
from tbpo_ray.workflows.publish import publish
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
    _, start = stages(config)
    check_helpers(start, plan_helpers(start), config)
    # All stages are planned on the base model, because SFT's export does not exist yet.
    helpers = plan_helpers(config)
    stage, text = 1, ""
    if config.sft:
        text += f"\n# stage {stage}: sft" + plan_text(sft_config(config))
        stage += 1
    for helper in helpers:
        text += f"\n# stage {stage}: helper {helper.name}, {helper.config.objective.name}, "
        text += data_description(config, helper) + plan_text(helper.config)
        stage += 1
    planned = [helper.traits.side for helper in helpers]
    text += f"\n# stage {stage}: {config.objective.name}" + plan_text(config, planned=planned)
    stage += 1
    return text + f"\n# stage {stage}: evaluation on {len(prompts.prompts)} prompts of {prompts.source}\n"


def run_pipeline(config: Config) -> Verdict:
    """Run all stages; finished stages are skipped.

    Raises:
        InputError, RunFailedError: as the stages do.
    """
    sft, start = stages(config)
    check_settings(start)  # the evaluation may start only days from now
    check_hub(config.export)
    helpers = plan_helpers(start)
    check_helpers(start, helpers, config)
    preference = with_helpers(start, helpers)
    folder = run_dir(config)
    refuse_changes(preference, folder)  # before a helper is trained with settings that the run does not have
    folder.mkdir(parents=True, exist_ok=True)
    stage = _Stages(2 + (sft is not None) + len(helpers))
    costs: list[dict[str, Any]] = []
    with Tracker.from_note(config, folder / PIPELINE_NOTE, kind="pipeline") as tracker:
        policies = {}
        if sft is not None:
            stage.begin("supervised fine-tuning")
            policies["sft"] = str(train(sft, kind="sft", parent_run_id=tracker.run_id, wait=True).export)
            costs.append(_cost("sft", sft))
        else:
            policies["base"] = policy_folder(start)
        for helper in helpers:
            stage.begin(f"helper {helper.name}")
            train_helper(helper, start, parent_run_id=tracker.run_id)
            costs.append(_helper_cost(start, helper))
        stage.begin("preference training")
        result = train(preference, kind="train", parent_run_id=tracker.run_id)
        policies[preference.objective.name] = str(result.export)
        costs.append(_cost(preference.objective.name, preference))
        stage.begin("evaluation")
        final = stage_config(preference, {"evaluation": {"policies": policies}})
        verdict = evaluate(final, parent_run_id=tracker.run_id, costs=costs)
        report = compare_runs(final, parent_run_id=tracker.run_id)
        after = verdict[preference.objective.name].metrics
        tracker.log_metrics({name: estimate.value for name, estimate in after.items()})
        tracker.log_metrics(_cost_metrics(costs))
        tracker.log_artifact(folder / "evaluation" / "verdict.txt")
        tracker.log_artifact(report)
        tracker.describe(verdict.markdown(), tracker.children())
        publish(config, result.export, tracker, verdict.markdown())
    print(verdict.table())
    print(f"\nreport: {report}\nMLflow: {tracker.url_hint()}")
    return verdict


class _Stages:
    """Counts the stages of a pipeline in its progress lines."""

    def __init__(self, total: int):
        self.total, self.number = total, 0

    def begin(self, what: str) -> None:
        self.number += 1
        log_progress(f"stage {self.number} of {self.total}: {what}")


def _cost(name: str, config: Config) -> dict[str, Any]:
    """The verdict's entry for a training run."""
    folder = run_dir(config)
    cost = read_cost(folder)
    entry = {"name": name, "objective": config.objective.name, "run": str(folder)}
    return entry | (asdict(cost) if cost is not None else {})


def _helper_cost(start: Config, helper: Helper) -> dict[str, Any]:
    return _cost(f"helper {helper.name}", helper.config) | {"data": data_description(start, helper)}


def _cost_metrics(costs: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = ("pairs", "tokens", "seconds", "scored_pairs", "scoring_seconds")
    return {
        f"cost/{cost['name'].replace(' ', '_')}/{name}": float(cost[name])
        for cost in costs
        for name in names
        if cost.get(name) is not None
    }
