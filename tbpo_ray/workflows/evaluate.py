"""`jobs/evaluate.py`: evaluate the policies of a configuration as one MLflow run that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.fit import fit_to_cluster
from tbpo_ray.cluster.session import start_ray
from tbpo_ray.config.loading import to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.evaluator import check_evaluation, evaluate_policies
from tbpo_ray.evaluation.plan import plan_text
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import file_lock, write_atomic
from tbpo_ray.storage.paths import run_dir
from tbpo_ray.tracking.run_note import RUN_NOTE
from tbpo_ray.tracking.store import check_store
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.workflows.system_metrics import system_metrics


def configured_policies(config: Config) -> dict[str, str]:
    """The policies to evaluate: `evaluation.policies`, else `runs`, else the run's own export.

    Returns:
        Name to model folder or run.

    Raises:
        InputError: two runs with the same name, or nothing to evaluate.
    """
    if config.evaluation.policies:
        return dict(config.evaluation.policies)
    names = [Path(run).name for run in config.runs]
    if len(set(names)) != len(names):
        raise InputError(
            f"runs={config.runs}: names must be unique; name the policies in evaluation.policies"
        )
    if config.runs:
        return dict(zip(names, config.runs, strict=True))
    if (run_dir(config) / "export").is_dir():
        return {config.run.name: config.run.name}
    raise InputError(
        f"evaluation.policies: missing, and run.name={config.run.name} has no export; give "
        "evaluation.policies or runs=[...]"
    )


def evaluation_plan(config: Config) -> str:
    """The text that `--dry-run` prints after the configuration.

    Raises:
        InputError: something that would stop the evaluation before an engine starts.
    """
    return plan_text(config, check_evaluation(config, configured_policies(config)))


def evaluate(
    config: Config, *, parent_run_id: str | None = None, costs: Sequence[Mapping[str, Any]] = ()
) -> Verdict:
    """Evaluate into `<run.output_dir>/<run.name>/evaluation/`; samples that exist are reused.

    Args:
        costs: as for :func:`evaluate_policies`.

    Raises:
        InputError: invalid configuration or input; raised before any engine starts.
        RunFailedError: the engines or the judge returned nothing.
    """
    check_store(config)
    policies = configured_policies(config)
    check_evaluation(config, policies)
    folder = run_dir(config) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    # Two processes that evaluate the same run would write the same samples.
    with file_lock(folder / ".lock"):
        write_atomic(folder / "config.yaml", to_yaml(config))
        with Tracker.from_note(
            config,
            folder / RUN_NOTE,
            kind="evaluate",
            name=f"{config.run.name}-evaluate",
            parent_run_id=parent_run_id,
        ) as tracker:
            start_ray()
            with system_metrics(config, tracker.run_id):
                verdict = evaluate_policies(
                    fit_to_cluster(config), policies, output=folder, tracker=tracker, costs=costs
                )
            tracker.describe(verdict.markdown(), {"parent": parent_run_id} if parent_run_id else {})
        log_progress(f"MLflow: {tracker.url_hint()}")
    return verdict
